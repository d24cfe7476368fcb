"""tinsmith.connect(): finds a service or starts one, and many programs share it."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinsmith
from tests.conftest import RunningService
from tests.servers import wait_until

NULL = ("--engine", "null", "--model", "base/null")
PROGRAM = f"""
import sys, tinsmith
client = tinsmith.connect(data_dir=sys.argv[1], arguments={NULL!r}, keep="keep" in sys.argv)
training = client.create_lora_training_client("base/null", rank=2).result(60)
print(client._connection.base_url, training.model_id, *sorted({{"tinsmith_api", "torch"}} & set(sys.modules)), flush=True)
sys.stdin.read()
client.close().result(10)
"""


def program(folder: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("_BASE_URL", "_API_KEY"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def said(running: "subprocess.Popen[str]") -> list[str]:
    assert running.stdout is not None
    return running.stdout.readline().split()


def is_served(folder: Path) -> bool:
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def leave(running: "subprocess.Popen[str]") -> None:
    running.communicate(timeout=30)
    assert running.returncode == 0


def test_programs_that_connect_at_once_share_one_service_and_the_last_one_stops_it(tmp_path: Path) -> None:
    programs = [program(tmp_path) for _ in range(3)]
    answers = [said(one) for one in programs]
    assert len({answer[0] for answer in answers}) == 1
    assert len({answer[1] for answer in answers}) == 3
    assert all(len(answer) == 2 for answer in answers), "the service's own package was imported"
    leave(programs[0])
    programs[1].kill()  # without a word
    programs[1].communicate()
    time.sleep(0.5)
    assert is_served(tmp_path)
    late = program(tmp_path)
    assert said(late)[0] == answers[0][0]
    leave(programs[2])
    leave(late)
    wait_until(lambda: not is_served(tmp_path), what="the end of the service")


def test_one_that_is_to_be_kept_is_kept(tmp_path: Path) -> None:
    first = program(tmp_path, "keep")
    address = said(first)[0]
    leave(first)
    second = program(tmp_path)
    assert said(second)[0] == address
    leave(second)
    assert is_served(tmp_path)
    found = subprocess.run(
        ["pgrep", "-f", f"serve --data-dir {tmp_path} "], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(found[0]), signal.SIGTERM)
    wait_until(lambda: not is_served(tmp_path), what="the end of the service")


def test_one_that_runs_already_is_used_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TINSMITH_BASE_URL", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    running = RunningService(tmp_path, *NULL)
    (tmp_path / "key").write_text(running.key)
    try:
        with tinsmith.connect(data_dir=tmp_path) as client:
            assert client.get_server_capabilities().supported_models[0].model_name == "base/null"
            assert client._connection.base_url == running.url
        assert running.process.poll() is None
        # An address in the environment goes before all.
        monkeypatch.setenv("TINSMITH_BASE_URL", running.url)
        monkeypatch.setenv("TINSMITH_API_KEY", running.key)
        with tinsmith.connect() as client:
            assert client.get_server_capabilities().supported_models
    finally:
        running.stop()


def test_a_number_left_by_one_that_died_stops_nobody(tmp_path: Path) -> None:
    """A service that was killed leaves its process's number, which another program may have by now."""
    stranger = subprocess.Popen(["sleep", "60"])
    running = RunningService(tmp_path, *NULL)
    (tmp_path / "key").write_text(running.key)
    (tmp_path / "connect.pid").write_text(str(stranger.pid))
    try:
        user = program(tmp_path)
        assert said(user)[0] == running.url
        leave(user)
        time.sleep(0.2)
        assert (stranger.poll(), running.process.poll()) == (None, None)
    finally:
        stranger.kill()
        stranger.wait()
        running.stop()


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(tinsmith.TinsmithError, match="no-such-folder"):
        tinsmith.connect(data_dir=tmp_path, arguments=("--model", "x=/no-such-folder"), timeout_seconds=60)
    assert not is_served(tmp_path)
