"""`python -m tinsmith_worker.vllm.guardian FOLDER COMMAND…`: runs the command, and ends it, with all that it
started, when standard input ends: whoever holds the other end of the pipe may be killed at any time. Takes
FOLDER away at last, and ends as the command did."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path


def main() -> None:
    folder, *command = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to whole groups; whoever is at the pipe decides
    # Ours is not where its packages are.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
    (Path(folder) / "process").write_text(
        str(process.pid)
    )  # of its group, too; should this process be killed
    threading.Thread(target=_end_with_the_pipe, args=(process,), daemon=True).start()
    status = process.wait()
    _end(process)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(status if status >= 0 else 128 - status)


def _end_with_the_pipe(process: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1):
        pass
    _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # none of them is left


if __name__ == "__main__":
    main()
