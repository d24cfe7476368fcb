"""A service without an address: the one that the environment names, the one that runs on this machine, or one
that is started now."""

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx

from tinsmith.errors import ServiceUnavailable, TinsmithError
from tinsmith.service_client import ServiceClient

# Files beside the service's own in its data directory.
_STARTING = "connect.lock"  # held while one is looked for or started
_USERS = "connect.users"  # held, shared, by every process that uses one that `connect` started
_STARTED = "connect.pid"  # whose it is: that of a service which the last user is to stop

_in_use: dict[Path, IO[str]] = {}


def connect(
    *,
    data_dir: str | Path | None = None,
    arguments: tuple[str, ...] = (),
    keep: bool = False,
    timeout_seconds: float = 600.0,
    **options: Any,
) -> ServiceClient:
    """A client of the service at hand: TINSMITH_BASE_URL or TINKER_BASE_URL if one of them is set, else the
    one that runs on `data_dir` (~/.tinsmith), else a `tinsmith serve` started there with `arguments`, for
    example ("--model", "Qwen/Qwen3-0.6B").

    Processes that connect at once share one service. What was started here ends with the last of them, unless
    somebody said `keep`; runs and checkpoints stay in `data_dir`. `options` are ServiceClient's.
    """
    if data_dir is None and any(os.environ.get(f"{who}_BASE_URL") for who in ("TINSMITH", "TINKER")):
        return ServiceClient(**options)
    folder = Path(data_dir or os.environ.get("TINSMITH_DATA_DIR") or "~/.tinsmith").expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    until = time.monotonic() + timeout_seconds
    with _locked(folder / _STARTING):
        url = _find(folder, until) or _start(folder, arguments, until)
        if keep:
            (folder / _STARTED).unlink(missing_ok=True)
        elif folder not in _in_use:
            _in_use[folder] = _share(folder)
            atexit.register(_leave, folder)
    return ServiceClient(base_url=url, api_key=(folder / "key").read_text().strip(), **options)


def _find(folder: Path, until: float) -> str | None:
    """The address of the service that runs on `folder`, once it is ready; None if there is none."""
    while _is_locked(folder / "lock"):
        with contextlib.suppress(OSError, httpx.TransportError):
            url = (folder / "address").read_text().strip()
            if httpx.get(f"{url}/api/v1/healthz", timeout=5).status_code == 200:
                return url
        if time.monotonic() > until:
            raise ServiceUnavailable(f"the service on {folder} does not get ready: {folder / 'service.log'}")
        time.sleep(0.1)
    return None


def _start(folder: Path, arguments: tuple[str, ...], until: float) -> str:
    log = folder / "service.log"
    # The key is the one in the folder: whoever connects later finds it there.
    environment = {name: value for name, value in os.environ.items() if name != "TINSMITH_API_KEY"}
    with log.open("wb") as out:
        child = subprocess.Popen(
            [*_command(), "serve", "--data-dir", str(folder), "--port", "0", *arguments],
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # Ctrl-C is the program's; other programs may use the service
        )
    while not _is_locked(folder / "lock") and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    (folder / _STARTED).write_text(str(child.pid))
    url = _find(folder, until)
    if url is None:
        (folder / _STARTED).unlink(missing_ok=True)
        said = log.read_text(errors="replace")[-2000:]
        raise TinsmithError(f"the service did not start; its log {log} ends:\n{said}")
    return url


def _command() -> list[str]:
    if importlib.util.find_spec("tinsmith_api") and importlib.util.find_spec("uvicorn"):
        return [sys.executable, "-m", "tinsmith_api.cli"]
    if found := shutil.which("tinsmith"):
        return [found]
    raise TinsmithError(
        "no service runs here and none can be started: set TINSMITH_BASE_URL and TINSMITH_API_KEY, "
        "or pip install 'tinsmith[api,worker]'"
    )


def _leave(folder: Path) -> None:
    """The last one out stops what `connect` started."""
    _in_use.pop(folder).close()
    with contextlib.suppress(OSError), _locked(folder / _STARTING):
        if not _is_locked(folder / _USERS):
            pid = (folder / _STARTED).read_text()
            (folder / _STARTED).unlink()
            # One that ended without us may have left its number to another process, and its folder to a
            # service that somebody else started.
            if _is_locked(folder / "lock") and (folder / "lock").read_text() == pid:
                os.kill(int(pid), signal.SIGTERM)


def _share(folder: Path) -> IO[str]:
    import fcntl

    held = open(folder / _USERS, "a")  # noqa: SIM115 - held as long as the process lives
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def _is_locked(file: Path) -> bool:
    import fcntl

    try:
        with open(file, "a") as tried:
            fcntl.flock(tried, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    import fcntl

    with open(file, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
