"""The proxy of docker-compose.yml, as Caddy runs it, in front of processes that are gone or die in a call."""

import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.servers import Server, free_port, missing

CADDYFILE = Path(__file__).parents[2] / "deploy" / "Caddyfile"
BODY = b"x" * 3_000_000

Calls = Callable[[int], list[int]]


class _Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the length of what it got."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        answer = str(len(self.rfile.read(int(self.headers["content-length"])))).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def living(port: int = 0) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Echo)
    threading.Thread(target=server.serve_forever).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def dying() -> Iterator[tuple[int, list[bytes]]]:
    """Takes every call and breaks off; gives its port and how each of them began."""
    begun: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            begun.append(connection.recv(100_000))
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1], begun
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def proxy(folder: Path, ports: list[int]) -> Iterator[Calls]:
    """Caddy with our file, the names of processes replaced by `ports`; gives calls by their number."""
    caddy = shutil.which("caddy", path=str(Path(sys.executable).parent))
    if caddy is None:
        missing("Caddy comes as a wheel for Linux and macOS only")
    read = subprocess.run([str(caddy), "adapt", "--config", str(CADDYFILE)], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    config = json.loads(read.stdout)
    (server,) = config["apps"]["http"]["servers"].values()
    port = free_port()
    server["listen"] = [f"127.0.0.1:{port}"]
    (handler,) = server["routes"][0]["handle"]
    assert handler.pop("dynamic_upstreams")["name"] == "api", "the service's name in docker-compose.yml"
    handler["upstreams"] = [{"dial": f"127.0.0.1:{p}"} for p in ports]
    (folder / "caddy.json").write_text(json.dumps(config))
    running = Server(folder, [str(caddy), "run", "--config", str(folder / "caddy.json")], port)

    def call(times: int) -> list[int]:
        answers = [httpx.post(f"http://127.0.0.1:{port}/", content=BODY, timeout=30) for _ in range(times)]
        assert {a.text for a in answers if a.status_code == 200} <= {str(len(BODY))}, "whole or not at all"
        return [a.status_code for a in answers]

    try:
        yield call
    finally:
        running.stop()


def test_no_call_is_lost_while_one_of_two_processes_is_gone(tmp_path: Path) -> None:
    with living() as there, proxy(tmp_path, [free_port(), there]) as call:
        assert call(6) == [200] * 6


def test_a_call_that_breaks_off_is_told_at_once_and_not_sent_on_without_its_body(tmp_path: Path) -> None:
    with living() as there, dying() as (dead, begun), proxy(tmp_path, [dead, there]) as call:
        answers = call(20)
    assert set(answers) == {200, 502}
    assert len(begun) == answers.count(502), "each broken call was tried once; the client repeats it"


def test_a_call_waits_a_while_for_a_process_to_come_back(tmp_path: Path) -> None:
    port = free_port()
    with proxy(tmp_path, [port]) as call, ThreadPoolExecutor(1) as client:
        answer = client.submit(call, 1)
        time.sleep(1)
        with living(port):
            assert answer.result() == [200]
