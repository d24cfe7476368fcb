"""A service to train on: the one in the environment, else one of our own for as long as it is needed."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tinsmith
from tinsmith_cookbook.sdk import tinker

ADDRESS = ("TINSMITH_BASE_URL", "TINKER_BASE_URL")
KEY = ("TINSMITH_API_KEY", "TINKER_API_KEY")


@contextmanager
def connect(folder: Path) -> Iterator[tinker.ServiceClient]:
    """A client of the service in the environment (TINSMITH_BASE_URL or TINKER_BASE_URL, and the key beside
    it); without one, of a service whose data lies in `folder`: the one that runs there, if a run was killed,
    or one that is started now and ends with this program. Leaving finishes its session."""
    if address := in_environment():
        with tinker.ServiceClient(base_url=address[0], api_key=address[1]) as client:
            yield client
        return
    data = folder / "data"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a small model more threads mostly wait for each other
    tinsmith.connect(data_dir=data, arguments=("--deterministic",))
    url, key = ((data / name).read_text().strip() for name in ("address", "key"))
    with tinker.ServiceClient(base_url=url, api_key=key) as client:
        yield client


@contextmanager
def embedded(folder: Path, *arguments: str) -> Iterator[tuple[str, str]]:
    """A service of our own for others to use, on a free port, stopped however this ends. Its address and
    key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, key = f"http://127.0.0.1:{port}", f"tml-{secrets.token_hex(16)}"
    command = [*_command(), "serve", "--port", str(port), "--data-dir", str(folder / "data"), *arguments]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "service.log").open("w") as log:
        # A session of its own: Ctrl-C is ours to handle, and then to pass on.
        # One thread: on a model this small more of them mostly wait for each other.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TINSMITH_API_KEY": key}
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        while not _is_ready(url):
            if child.poll() is not None:
                sys.exit(f"The service did not start:\n{(folder / 'service.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield url, key
    finally:
        child.terminate()
        child.wait()


def in_environment() -> tuple[str, str | None] | None:
    """The address and key of the service named there."""
    url = _first(ADDRESS)
    return (url, _first(KEY)) if url else None


def new_key(folder: Path, tenant: str) -> str:
    """A key for one more tenant of the service that `embedded` started in `folder`."""
    command = [*_command(), "admin", "keys", "create", tenant, "--data-dir", str(folder / "data")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _command() -> list[str]:
    return [shutil.which("tinsmith", path=Path(sys.executable).parent) or "tinsmith"]


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5):  # noqa: S310 - our own address
            return True
    except OSError:
        return False


def _first(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
