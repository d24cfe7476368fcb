"""Where this process stands in its group, and the processes beside it. No torch."""

import contextlib
import logging
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("tinsmith.worker")

_FOLLOWS = "TINSMITH_FOLLOWS"


@dataclass(frozen=True)
class Place:
    """rank: of `ranks`; local_rank: among those of this machine, which is the number of its GPU. meeting:
    where they find each other, as `torch.distributed.init_process_group` wants to know it."""

    rank: int
    ranks: int
    local_rank: int
    meeting: str


def place_in_environment() -> Place | None:
    """As torchrun, or the leader that started this process, says; None if this process stands alone."""
    if "RANK" not in os.environ:
        return None
    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(rank, ranks, local, os.environ.get(_FOLLOWS, "env://"))


def start_followers(count: int, command: Sequence[str]) -> tuple[Place, "Followers"]:
    """Start the other `count - 1` processes of a group of `count` on this machine, each with `command`."""
    followers = Followers(count, command)
    return Place(0, count, 0, followers.meeting), followers


def end_with_leader() -> None:
    """In a follower that a leader started: end when it does, wherever this process is stuck then."""
    if _FOLLOWS in os.environ:
        threading.Thread(target=_end_with_leader, name="leader", daemon=True).start()


def _end_with_leader() -> None:
    while os.read(0, 1):  # its end of the pipe at our standard input
        pass
    os._exit(1)


class Followers:
    """The group goes down as one: when one of them ends before `let_go`, this process does too, at once and
    with status 1. They end with it, because their standard input does."""

    def __init__(self, count: int, command: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tinsmith-group-")
        # A file and not a port: nobody else can take it, and nobody outside reaches it.
        self.meeting = f"file://{Path(self._folder.name) / 'meeting'}"
        keep_on_this_machine()
        self._is_over = threading.Event()
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    _FOLLOWS: self.meeting,
                },
            )
            for rank in range(1, count)
        ]
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def let_go(self) -> None:
        """They were told to end: wait until they have."""
        self._is_over.set()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()
            process.wait()
        self._folder.cleanup()

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        if not self._is_over.is_set():
            log.error("rank %d of this worker ended with status %d: the group goes down", rank, status)
            for other in self._processes:
                other.kill()
            self._folder.cleanup()
            os._exit(1)


def keep_on_this_machine() -> None:
    """One machine's ranks talk over the loopback interface, unless somebody says otherwise."""
    names = {name for _, name in socket.if_nameindex()}
    for loopback in names & {"lo", "lo0"}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
