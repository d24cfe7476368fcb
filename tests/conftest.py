"""A real service for tests: `tinsmith serve` in a process of its own, on a free port and a fresh directory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


class RunningService:
    """Starts on construction. `url` and `key` are what a client needs; `other_key` is another tenant's."""

    def __init__(self, folder: Path, *arguments: str, config: str = "") -> None:
        self.folder = folder
        self.arguments = list(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        if config:
            (folder / "config.toml").write_text(config)
            self.arguments += ["--config", str(folder / "config.toml")]
        self.key = "tml-test-key-of-the-first-tenant"
        self.start()

    def start(self, port: int = 0) -> None:
        self.log = open(self.folder / "service.log", "a")  # noqa: SIM115
        command = [sys.executable, "-m", "tinsmith_api.cli", "serve", "--data-dir", str(self.folder)]
        before = (self.folder / "service.log").stat().st_size
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *self.arguments],
            env={**os.environ, "TINSMITH_API_KEY": self.key, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.url = self._wait_for("http://127.0.0.1:", before)
        self.wait_ready()

    def restart(self) -> None:
        """Start again on the same directory and the same port."""
        port = int(self.url.rsplit(":", 1)[1])
        self.process.wait(timeout=60)
        self.start(port)

    def wait_ready(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_text()
            try:
                if httpx.get(f"{self.url}/api/v1/healthz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log_text()}")

    def worker_pid(self) -> int:
        """The newest worker process of this service; waits for one that is being started."""
        pattern = f"tinsmith_worker.*--data-dir {self.folder}( |$)"
        for _ in range(200):
            if found := subprocess.run(
                ["pgrep", "-f", pattern], capture_output=True, text=True
            ).stdout.split():
                return int(found[-1])
            time.sleep(0.05)
        raise AssertionError(f"no worker:\n{self.log_text()}")

    def kill_worker(self) -> None:
        os.kill(self.worker_pid(), signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to everything at once."""
        worker = self.worker_pid()
        self.process.kill()
        os.kill(worker, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)

    def new_key(self, tenant: str) -> str:
        command = [sys.executable, "-m", "tinsmith_api.cli", "admin", "keys", "create", tenant]
        made = subprocess.run(
            [*command, "--data-dir", str(self.folder)], capture_output=True, text=True, check=True
        )
        return made.stdout.strip()

    def log_text(self) -> str:
        return (self.folder / "service.log").read_text()

    def _wait_for(self, text: str, start: int) -> str:
        for _ in range(600):
            for word in (self.folder / "service.log").read_bytes()[start:].decode().split():
                if word.startswith(text):
                    return word
            assert self.process.poll() is None, self.log_text()
            time.sleep(0.05)
        raise AssertionError(self.log_text())


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The tiny base on the torch engine, shared by the session's tests: each makes sessions of its own."""
    running = RunningService(tmp_path_factory.mktemp("service"), "--deterministic")
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text()


@pytest.fixture(scope="session")
def null_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """The null engine: everything but computing."""
    running = RunningService(
        tmp_path_factory.mktemp("null"),
        "--engine",
        "null",
        "--model",
        "base/null",
        config="gap_seconds = 2.0\npoll_seconds = 2.0\n",
    )
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text()
