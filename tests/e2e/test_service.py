"""`tinsmith serve` as its operator sees it: what it says, what it leaves on disk, how it ends."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import RunningService
from tests.e2e.wire import Wire
from tests.servers import free_port, wait_until
from tinsmith_api.serve import local_key


def _serve(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tinsmith_api.cli", "serve", "--port", "0", "--data-dir", str(folder)]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_path_that_holds_no_model_ends_the_service_with_a_sentence(tmp_path: Path) -> None:
    served = _serve(tmp_path, "--model", "foo=/nonexistent")
    said, _ = served.communicate(timeout=90)
    assert served.returncode == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("tinsmith: the worker of foo could not start from '/nonexistent'"), said
    assert "log above" in last


def test_what_an_operator_gets_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said, _ = _serve(tmp_path / "file" / "data").communicate(timeout=90)
    assert (
        said
        == f"tinsmith: {tmp_path}/file/data cannot be made (Not a directory): choose another --data-dir\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", [["api", "--port", "0"], ["admin", "keys", "list"]])
def test_a_database_that_is_not_there_is_said_in_a_sentence(command: list[str]) -> None:
    nobody = f"postgresql+psycopg://u:p@127.0.0.1:{free_port()}/x"
    settings = {"DATABASE": nobody, "REDIS": "redis://127.0.0.1:1/0", "OBJECTS": "/tmp/none"}
    environment = {**os.environ, **{f"TINSMITH_{name}": value for name, value in settings.items()}}
    ended = subprocess.run(
        [sys.executable, "-m", "tinsmith_api.cli", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ended.returncode == 1
    assert "tinsmith: the database does not answer: connection failed" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_interrupted_while_a_model_is_loading_it_leaves_at_once(tmp_path: Path) -> None:
    served = _serve(tmp_path)
    assert served.stdout is not None
    while "Stop with Ctrl-C" not in served.stdout.readline():
        assert served.poll() is None
    time.sleep(1.0)
    started = time.monotonic()
    served.send_signal(signal.SIGINT)
    said, _ = served.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert served.returncode == 0, said
    assert "Traceback" not in said


def test_more_clients_wait_at_once_than_a_shell_gives_a_process_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinsmith_api.cli", "serve", "--port", "0", "--data-dir", str(tmp_path)]
    shell = ["sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh", *command, "--engine", "null"]
    served = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = tmp_path / "address"
    wait_until(address.exists, 60, "saying where it listens")
    host, port = address.read_text().removeprefix("http://").split(":")

    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)), timeout=20)
        return None

    wait_until(lambda: connect() is not None, 60, "listening")
    waiting = list(filter(None, [connect() for _ in range(200)]))
    try:
        waiting[-1].sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert waiting[-1].recv(100).startswith(b"HTTP/1.1 ")
    finally:
        for connection in waiting:
            connection.close()
        served.send_signal(signal.SIGINT)
        served.communicate(timeout=30)


def test_what_it_keeps_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "tinsmith_api.cli", "admin", "keys", "list", "--data-dir", str(folder)]
    subprocess.run(command, check=True)
    key = local_key(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert local_key(folder) == key


def test_an_empty_key_file_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    key = local_key(tmp_path)
    assert key.startswith("tml-")
    assert (tmp_path / "key").read_text() == key + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_run_whose_model_is_served_no_more_is_told_so(tmp_path: Path) -> None:
    running = RunningService(tmp_path, "--engine", "null", "--model", "one", "--model", "two")
    run = Wire(running.url, running.key).run("one")
    assert running.stop() == 0
    running.arguments = ["--engine", "null", "--model", "two"]
    running.restart()
    wire = Wire(running.url, running.key)
    refused = wire.optim(run, 1)
    assert (wire.status, "this service has two" in refused["detail"]) == (400, True), refused
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text()
