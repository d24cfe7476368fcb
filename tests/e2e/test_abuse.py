"""What no client sends by mistake: broken, huge, bottomless and contradictory requests. Each is answered with a 4xx
or fails its own future, the process stays small, and whoever else is there goes on."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import RunningService
from tests.e2e.wire import Json, Wire, datum
from tinsmith.wire import tinsmith_pb2 as pb

MODEL = "base/null"
PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}
MIB = 1 << 20

NEEDS_NOTHING = ("/create_session", "/sessions/search")
EVERY_POST = (
    "/create_session", "/session_heartbeat", "/telemetry", "/create_model", "/load_weights", "/get_info",
    "/forward_backward", "/forward", "/optim_step", "/save_weights", "/save_weights_for_sampler",
    "/save_weights_external", "/weights_info", "/copy_weights", "/create_sampling_session", "/asample",
    "/retrieve_future", "/sessions/search", "/sessions/x/finish",
)  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    given = ("--engine", "null", "--model", MODEL)
    running = RunningService(tmp_path_factory.mktemp("abuse"), *given, config="gap_seconds = 1.0\n")
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="module")
def wire(service: RunningService) -> Wire:
    return Wire(service.url, service.key)


@pytest.fixture(autouse=True)
def it_still_works(wire: Wire) -> Iterator[None]:
    yield
    run = wire.run(MODEL)
    assert "loss:sum" in wire.output(wire.submit(run, 1, datum([1, 2, 3]))).metrics


def peak_mib(service: RunningService) -> float:
    """The most memory its process ever had."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def refused(answer: httpx.Response) -> str:
    """The sentence of a 4xx."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    return str(answer.json()["detail"])


# -- broken ----------------------------------------------------------------------------------------------


def _whole(run: str) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=run, seq_id=1, loss_fn="cross_entropy")
    message.data.extend([datum([1, 2, 3, 4]), datum([5, 6, 7])])
    message.loss_fn_config_v2["x"].number = 1.5
    return message.SerializeToString()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_protobuf_that_was_cut_or_flipped_gets_no_5xx(wire: Wire, data: st.DataObject) -> None:
    body = bytearray(_whole(RUN.setdefault("id", wire.run(MODEL))))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body))) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    answer = wire.http.post("/forward_backward", content=bytes(body), headers=PROTOBUF)
    assert answer.status_code < 500, (bytes(body), answer.text)


RUN: dict[str, str] = {}


@pytest.mark.parametrize("path", EVERY_POST)
def test_bodies_of_another_kind_are_refused(wire: Wire, path: str) -> None:
    protobuf = _whole("a:train:0")
    bodies: list[tuple[bytes, dict[str, str]]] = [
        (protobuf, JSON),
        (protobuf, {"content-type": "text/plain"}),
        (protobuf, {}),
        (b'{"model_id": "x"', PROTOBUF),
        (
            b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--",
            {"content-type": "multipart/form-data; boundary=x"},
        ),
        (b"a=1&b=2", {"content-type": "application/x-www-form-urlencoded"}),
        ("ü".encode("utf-16"), {"content-type": "application/json; charset=utf-16"}),
        (b"\xef\xbb\xbf{}", JSON),
        (b"", JSON),
        (b"null", JSON),
        (b'"text"', JSON),
    ]
    for body, headers in bodies:
        answer = wire.http.post(path, content=body, headers=headers)
        if path == "/telemetry" or (path in NEEDS_NOTHING and not body):
            assert answer.status_code == 200
        else:
            assert refused(answer), (path, body, headers)


@pytest.mark.parametrize(
    "coding", ["zstd", "gzip", "br", "deflate", "zstd, zstd", "unknown", "identity, zstd"]
)
def test_encoded_bodies_are_refused_before_they_grow(
    wire: Wire, service: RunningService, coding: str
) -> None:
    zeros = bytes(64 * MIB)
    declared = zstandard.ZstdCompressor().compress(zeros)
    undeclared = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    assert zstandard.frame_content_size(declared) == len(zeros)
    assert zstandard.frame_content_size(undeclared) == -1
    before = peak_mib(service)
    for bomb in (declared, undeclared, undeclared * 50):
        for path in ("/forward_backward", "/asample", "/create_session"):
            headers = {**PROTOBUF, "content-encoding": coding}
            assert refused(wire.http.post(path, content=bomb, headers=headers))
    assert peak_mib(service) < before + 16


# -- huge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_POST)
def test_a_body_of_100_megabytes_is_refused(wire: Wire, path: str) -> None:
    body = b" " * 100_000_000
    for headers in (JSON, PROTOBUF) if path == "/forward_backward" else (JSON,):
        try:
            refused(wire.http.post(path, content=body, headers=headers))
        except httpx.WriteError:  # it was told before it had sent everything, and the door was shut
            assert path not in ("/forward_backward", "/forward")


def _repeated(prefix: bytes, part: bytes, size: int) -> bytes:
    """A message whose one field, length-delimited under `prefix`, is `part` again and again."""
    inner, length = part * (size // len(part)), b""
    left = len(inner)
    while left > 127:
        length += bytes([left & 127 | 128])
        left >>= 7
    return prefix + length + bytes([left]) + inner


BOTTOMLESS: dict[str, Callable[[], tuple[str, bytes, dict[str, str]]]] = {
    "empty datums": lambda: ("/forward_backward", b"\x1a\x00" * (12 * MIB), PROTOBUF),
    "empty chunks": lambda: ("/forward_backward", _repeated(b"\x1a", b"\x0a\x00", 24 * MIB), PROTOBUF),
    "empty inputs": lambda: ("/forward_backward", _repeated(b"\x1a", b"\x12\x00", 24 * MIB), PROTOBUF),
    "empty spans": lambda: ("/forward_backward", _repeated(b"\x1a", b"\x1a\x00", 24 * MIB), PROTOBUF),
    "settings": lambda: ("/forward_backward", b"\x2a\x00" * (12 * MIB), PROTOBUF),
    "lists": lambda: ("/forward_backward", b"[" + b"[]," * (8 * MIB) + b"[]]", JSON),
    "objects": lambda: ("/forward", b"[" + b"{}," * (8 * MIB) + b"{}]", JSON),
    "texts": lambda: ("/asample", b"[" + b'"ab",' * (6 * MIB) + b'""]', JSON),
    "numbers": lambda: ("/asample", b'{"prompt":{"chunks":[' + b"9999," * (12 * MIB) + b"1]}}", JSON),
}


@pytest.mark.parametrize("case", BOTTOMLESS)
def test_a_body_of_nothing_but_small_parts_does_not_fill_the_memory(
    wire: Wire, service: RunningService, case: str
) -> None:
    """Read as they are, 24 MiB of these take up to 800."""
    path, body, headers = BOTTOMLESS[case]()
    before = peak_mib(service)
    assert "send less at a time" in refused(wire.http.post(path, content=body, headers=headers))
    # Once as it arrives in pieces, and once in one.
    assert peak_mib(service) < max(before, 350) + 2.5 * len(body) / MIB


@pytest.mark.parametrize("path", EVERY_POST)
def test_deep_json_is_refused(wire: Wire, path: str) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * 100_000
        for inner in (deep, deep + b"1" + closing * 100_000):
            for body in (
                inner,
                b'{"user_metadata":' + inner + b"}",
                b'{"prompt":{"chunks":[' + inner + b"]}}",
            ):
                answer = wire.http.post(path, content=body, headers=JSON)
                assert answer.status_code == 200 if path == "/telemetry" else refused(answer)


def test_a_datum_or_prompt_of_a_million_tokens_fails_with_its_length(wire: Wire) -> None:
    run = wire.run(MODEL)
    message = datum([1] * 1_000_001)
    told = wire.result(wire.submit(run, 1, message))
    assert (told["category"], "1000000 tokens are more" in told["error"]) == ("user", True), told
    tensor = {"data": [1] * 1_000_000}
    given = {
        "model_input": {"chunks": [{"tokens": [1] * 1_000_000}]},
        "loss_fn_inputs": {"target_tokens": tensor},
    }
    body = {"data": [given], "loss_fn": "cross_entropy"}
    told = wire.result(wire.post("/forward_backward", model_id=run, seq_id=2, forward_backward_input=body))
    assert "more than" in told["error"]
    answer = wire.sample(_sampler(wire), 0, [1] * 1_000_000)
    assert wire.status == 400
    assert "1000000 tokens" in answer["detail"]


def test_a_tenant_s_bodies_under_way_are_bounded_together(tmp_path: Path) -> None:
    small = "max_forward_backward_bytes = 4_000_000\n"
    running = RunningService(tmp_path, "--engine", "null", "--model", MODEL, config=small)
    try:
        run = Wire(running.url, running.key).run(MODEL)
        other = Wire(running.url, running.new_key("other"))
        held = [_begin(running, 3_900_000, bytes(3_800_000)) for _ in range(2)]
        _until(lambda: _told(running, run) == 429)
        # Another tenant has room of its own, and so has the first when a client of its goes away.
        assert "loss:sum" in other.output(other.submit(other.run(MODEL), 1, datum([1, 2, 3]))).metrics
        for connection in held:
            connection.close()
        _until(lambda: _told(running, run) == 400)
    finally:
        assert running.stop() == 0


def _told(running: RunningService, run: str) -> int:
    """The answer to a body, of half of what a tenant may have under way, that is no message."""
    headers = {"x-api-key": running.key, **PROTOBUF}
    url = f"{running.url}/api/v1/forward_backward"
    return httpx.post(url, content=b"\xff" * 900_000, headers=headers).status_code


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- strange ---------------------------------------------------------------------------------------------

LONG = "x" * 10_000
NAMES = [
    LONG, "..", "../../etc/passwd", "%2e%2e", "..%2f..%2f", "a/../b", ".", "-", "naïve", "東京", "🙂", "\u202eevil",
    "a\u0000b", "a\nb", "a\tb", " ", "C:\\x", "a;drop table runs", "'", '"', "tinker://a/weights/b", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_no_id_or_name_is_strange_enough_for_a_5xx(wire: Wire, service: RunningService, name: str) -> None:
    run = RUN.setdefault("names", wire.run(MODEL))
    body = json.dumps({"model_id": run, "seq_id": 1 + NAMES.index(name), "path": name}).encode()
    answer = wire.http.post("/save_weights", content=body, headers=JSON)
    told = wire.result(answer.json()) if answer.status_code == 200 else answer.json()
    assert "error" in told or "detail" in told, told
    for field, path in (
        ("model_id", "/get_info"),
        ("request_id", "/retrieve_future"),
        ("session_id", "/session_heartbeat"),
        ("tinker_path", "/weights_info"),
        ("source_path", "/copy_weights"),
        ("session_id", "/sessions/search"),
        ("project_id", "/create_session"),
    ):
        answer = wire.http.post(path, content=json.dumps({field: name}).encode(), headers=JSON)
        assert (
            answer.status_code == 200 if path == "/sessions/search" and answer.is_success else refused(answer)
        )
    raw = httpx.URL(f"{service.url}/api/v1/training_runs/x").copy_with  # sent as it is, no dots resolved
    for before, after in (
        ("/training_runs/", ""),
        ("/training_runs/", "/checkpoints"),
        (f"/training_runs/{run}/checkpoints/weights/", "/archive"),
        (f"/training_runs/{run}/checkpoints/", "/x/external_weights_urls"),
        ("/sessions/", "/trace_export"),
        ("/samplers/", ""),
        ("/downloads/", "?token=x"),
    ):
        part = name.encode("utf-8", "surrogatepass")
        quoted = b"".join(b"%%%02X" % byte for byte in part)
        for sent in (
            quoted,
            part if part.isascii() and part.decode().isprintable() and b" " not in part else quoted,
        ):
            url = raw(raw_path=f"/api/v1{before}".encode() + sent + after.encode())
            answer = httpx.get(url, headers={"x-api-key": service.key})
            assert 400 <= answer.status_code < 500 or sent in (b".", b".."), (url, answer.status_code)


@pytest.mark.parametrize("path", ["/training_runs", "/checkpoints", "/sessions"])
def test_limits_and_offsets_out_of_range_are_refused(wire: Wire, path: str) -> None:
    for query in ({"limit": -1}, {"offset": -5}, {"limit": 10**30}, {"offset": 10**30}, {"limit": "1e3"}, {"limit": ""},
                  {"limit": "NaN"}, {"limit": "٣٣"}, {"limit": LONG}):  # fmt: skip
        answer = wire.http.get(path, params=query)
        assert refused(answer) or query == {"limit": "٣٣"}, query
    wire.post("/sessions/search", limit=-1)
    assert wire.status == 400


def test_tokens_where_keys_are_asked_for_are_refused(service: RunningService) -> None:
    for credential in (
        "eyJ",
        "eyJ.eyJ.eyJ",
        "eyJhbGciOiJub25lIn0.eyJrZXkiOjF9.",
        "eyJ" + LONG,
        "tml-" + LONG,
    ):
        answer = httpx.get(f"{service.url}/api/v1/sessions", headers={"x-api-key": credential})
        assert answer.status_code == 401
        assert "key" in answer.json()["detail"]


# -- contradictory ---------------------------------------------------------------------------------------


def test_a_number_that_is_sent_again_with_another_call_is_refused_and_the_first_stands(wire: Wire) -> None:
    run = wire.run(MODEL)
    first = wire.submit(run, 1, datum([1, 2, 3]))
    again: dict[str, Callable[[], Json]] = {
        "another kind": lambda: wire.optim(run, 1),
        "a save": lambda: wire.post("/save_weights", model_id=run, seq_id=1, path="s"),
        "forward only": lambda: wire.submit(run, 1, datum([1, 2, 3]), forward_only=True),
        "more datums": lambda: wire.submit(run, 1, datum([1, 2, 3, 4])),
        "other datums": lambda: wire.submit(run, 1, datum([1, 2, 4])),
        "other weights": lambda: wire.submit(run, 1, datum([1, 2, 3], [1.0, 0.5])),
    }
    for what, send in again.items():
        told = send()
        assert (wire.status, "a number of its own" in told["detail"]) == (400, True), what
        assert wire.submit(run, 1, datum([1, 2, 3])) == first
    assert wire.output(first).metrics["tokens:sum"] == 2
    stepped = wire.optim(run, 3, learning_rate=1e-3)  # waits for the second
    wire.optim(run, 3, learning_rate=2e-3)
    assert wire.status == 400
    assert wire.optim(run, 3, learning_rate=1e-3) == stepped
    assert wire.result(wire.optim(run, 2))["metrics"]["optimizer_step"] == 1
    sampler = _sampler(wire)
    sample = wire.sample(sampler, 7, [1, 2, 3])
    wire.sample(sampler, 7, [1, 2, 3, 4, 5])
    assert wire.status == 400
    assert wire.sample(sampler, 7, [1, 2, 3]) == sample


def test_clients_that_leave_in_the_middle_of_a_body_leave_nothing_behind(
    wire: Wire, service: RunningService
) -> None:
    before = peak_mib(service)
    for number in range(40):
        connection = _begin(service, 50_000_000, bytes(200_000))
        if number % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no end
        connection.close()
    assert wire.session()
    assert peak_mib(service) < before + 64


def _begin(service: RunningService, size: int, sent: bytes) -> socket.socket:
    """A connection on which a forward_backward of `size` bytes was begun."""
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    lines = ["POST /api/v1/forward_backward HTTP/1.1", f"Host: {host}", f"X-API-Key: {service.key}",
             "Content-Type: application/x-protobuf", f"Content-Length: {size}", "", ""]  # fmt: skip
    connection.sendall("\r\n".join(lines).encode() + sent)
    return connection


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 5000, "1e9", "²"])
def test_a_length_that_is_none_is_refused(service: RunningService, length: str) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.key}\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n{{}}".encode("latin-1"))
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def _sampler(wire: Wire) -> str:
    body: Any = {"session_id": wire.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    return str(wire.post("/create_sampling_session", **body)["sampling_session_id"])
