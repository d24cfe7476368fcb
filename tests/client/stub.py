"""A service that answers from a script, in the open: what it was sent is kept for the test to read."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROTOBUF = "application/x-protobuf"


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes
    method: str = "POST"
    query: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: Any = field(default_factory=dict)  # bytes are protobuf, None drops the connection
    headers: dict[str, str] = field(default_factory=dict)


class Stub:
    """`answers[path]` is called with each request to that path; the defaults accept everything."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.results: dict[str, Answer] = {}
        self.answers: dict[str, Callable[[Request], Answer]] = {
            "client/config": lambda request: Answer(body={"session_seconds": 86400}),
            "create_session": lambda request: Answer(body={"session_id": "s1"}),
            "get_info": lambda request: Answer(
                body={"model_id": request.json["model_id"], "model_data": {"model_name": "m"}}
            ),
            "retrieve_future": lambda request: self.results.get(request.json["request_id"], Answer()),
            "create_sampling_session": lambda request: Answer(body={"sampling_session_id": "s1:sample:0"}),
        }
        self._count = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.removeprefix("/api/v1/").partition("?")
                headers = {k.lower(): v for k, v in self.headers.items()}
                request = Request(path, headers, body, self.command, query)
                stub.requests.append(request)
                answer = stub.answers.get(path, stub.promise)(request)
                if answer.body is None:
                    self.close_connection = True
                    return
                raw = isinstance(answer.body, bytes)
                content = answer.body if raw else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", PROTOBUF if raw else "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that hangs up is none."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def promise(self, request: Request) -> Answer:
        self._count += 1
        return Answer(body={"request_id": f"r{self._count}"})

    def of(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
