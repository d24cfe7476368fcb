"""Groups of ranks, each rank forked from one process that has already imported what all of them need: one that starts
from nothing spends six seconds of a processor on that."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinsmith_worker.parallel.launch import Place, keep_on_this_machine

Work = Callable[[Place], None]


class Ranks:
    """Here, the process they are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, ranks: int, folder: Path, work: Work, *, patience_seconds: int = 280) -> None:
        """Have `ranks` of them each do `work`, which can be pickled. `folder`, which is there, takes what they say. When
        one fails the others are killed, and it is an AssertionError."""
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        pickle.dump((ranks, folder, work, patience_seconds), asked)
        asked.flush()
        failures = pickle.load(answers)
        said = "\n".join(
            _log(folder, rank).read_text() for rank in range(ranks) if _log(folder, rank).exists()
        )
        assert not failures, f"{failures}\n{said}"

    def close(self) -> None:
        self._process.communicate()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _serve() -> None:
    """Run one group after another, for whoever started this process."""
    from tests.worker import group_script, tuned_group_script  # noqa: F401  what they all need

    keep_on_this_machine()
    signal.signal(signal.SIGALRM, _too_late)
    with contextlib.suppress(EOFError):
        while True:
            pickle.dump(_run(*pickle.load(sys.stdin.buffer)), sys.stdout.buffer)
            sys.stdout.flush()


def _run(ranks: int, folder: Path, work: Work, patience_seconds: int) -> str:
    """What went wrong, if anything."""
    meeting = f"file://{folder / 'meeting'}"
    running: dict[int, int] = {}
    try:
        for rank in range(ranks):
            running[_fork(work, Place(rank, ranks, rank, meeting), _log(folder, rank))] = rank
        signal.alarm(patience_seconds)
        while running:
            pid, status = os.wait()
            rank = running.pop(pid)
            if status:
                return f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"
        return ""
    except TimeoutError:
        return f"ranks {[*running.values()]} were still at it after {patience_seconds} s"
    finally:
        signal.alarm(0)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(work: Work, place: Place, log: Path) -> int:
    if pid := os.fork():
        return pid
    with contextlib.suppress(BaseException), open(log, "ab") as said, open(os.devnull) as nothing:
        for stream, number in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(stream.fileno(), number)
        try:
            work(place)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
    os._exit(1)


def _too_late(*_: Any) -> None:
    raise TimeoutError


if __name__ == "__main__":
    _serve()
