"""What the control plane costs: a service whose engine computes nothing, driven as hard as it goes.

`make bench-control` (ARGS="--json FILE --seconds 8"). Every tenant has its own key, session and run. A round
trip is one forward_backward from submission to result; a pipelined step is a forward_backward and an
optim_step submitted before either is waited for. Each carries 16 datums of 512 tokens. Far away means behind
a proxy that holds every byte for 20 ms in each direction.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.far import far

DATUMS, TOKENS = 16, 512
ROUND_TRIPS = 300
FAR_SECONDS, FAR_STEPS = 0.02, 30
TENANTS = (8, 32)
TARGETS = {
    "p50_ms": 10.0,
    "p95_ms": 25.0,
    "tinker_steps": 40.0,
    "tinsmith_steps": 80.0,
    "raw_steps": 120.0,
}


@dataclass(frozen=True)
class Place:
    port: int
    model: str
    keys: tuple[str, ...]


# --- the service ---------------------------------------------------------------------------------


@contextmanager
def service(tenants: int, *options: str, patience_seconds: float = 30.0) -> Iterator[Place]:
    """With as many tenants' keys. `options` of `tinsmith serve`; without any, its engine computes nothing."""
    from tinsmith_api.journal import identities
    from tinsmith_api.journal.store import Store

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        serve = [sys.executable, "-m", "tinsmith_api.cli", "serve", "--port", str(port)]
        serve += options or ("--engine", "null")
        log = Path(folder, "log")
        with log.open("w") as out:
            child = subprocess.Popen([*serve, "--data-dir", folder], stdout=out, stderr=out)
        try:
            _wait_until_ready(child, f"http://127.0.0.1:{port}/api/v1/healthz", log, patience_seconds)
            journal = Store(f"sqlite:///{folder}/journal.db")
            names = [f"tenant-{i}" for i in range(tenants)]
            keys = [journal.write(lambda c, n=name: identities.create_key(c, n)).result() for name in names]
            journal.close()
            yield Place(port, "tinsmith/tiny", tuple(keys))
        finally:
            child.terminate()
            child.wait()


def _wait_until_ready(child: "subprocess.Popen[bytes]", address: str, log: Path, seconds: float) -> None:
    for _ in range(int(10 * seconds)):
        if child.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the service did not start:\n{log.read_text()}")


# --- a raw HTTP client: a socket per tenant, nothing between it and the bytes ---------------------


class RawTenant:
    def __init__(self, place: Place, number: int) -> None:
        self.place = place
        self.key = place.keys[number]
        self.seq_id = 0

    async def open(self) -> "RawTenant":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.place.port)
        session = json.loads(await self.post("create_session", {"type": "create_session"}))["session_id"]
        fields = {"session_id": session, "model_seq_id": 0, "base_model": self.place.model}
        promise = json.loads(await self.post("create_model", {**fields, "lora_config": {"rank": 32}}))
        await self.result(promise["request_id"])
        self.model_id = f"{session}:train:0"
        return self

    async def post(self, path: str, body: Any) -> bytes:
        raw = isinstance(body, bytes)
        content = body if raw else json.dumps(body).encode()
        kind = "application/x-protobuf" if raw else "application/json"
        head = (
            f"POST /api/v1/{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {self.key}\r\nContent-Type: {kind}\r\n"
            f"Accept: application/x-protobuf\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.writer.write(head.encode() + content)
        top = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(top.partition("content-length: ")[2].partition("\r")[0])
        answer = await self.reader.readexactly(length)
        if top.split(" ", 2)[1] not in ("200", "408"):
            raise RuntimeError(f"{path}: {top.splitlines()[0]} {answer[:300]!r}")
        return answer

    async def submit(self, path: str, body: Any) -> str:
        return str(json.loads(await self.post(path, body))["request_id"])

    async def result(self, request_id: str) -> bytes:
        while b"try_again" in (answer := await self.post("retrieve_future", {"request_id": request_id})):
            pass
        return answer

    async def forward_backward(self) -> str:
        from tinsmith.wire import tinsmith_pb2 as pb

        self.seq_id += 1
        # Serialised messages concatenate: only the head differs from call to call.
        head = pb.ForwardBackwardRequest(model_id=self.model_id, seq_id=self.seq_id).SerializeToString()
        return await self.submit("forward_backward", head + BODY)

    async def optim_step(self) -> str:
        self.seq_id += 1
        fields = {"model_id": self.model_id, "seq_id": self.seq_id, "adam_params": {"learning_rate": 1e-4}}
        return await self.submit("optim_step", fields)

    async def round_trip(self) -> None:
        await self.result(await self.forward_backward())

    async def step(self) -> None:
        promises = [await self.forward_backward(), await self.optim_step()]
        for promise in promises:
            await self.result(promise)


def _body() -> bytes:
    from tinsmith.messages import pack
    from tinsmith.types import Datum, ModelInput

    rows = _rows()
    data = [Datum(ModelInput.from_ints(t), {"target_tokens": t, "weights": w}) for t, w in rows]
    return pack(data, "cross_entropy")[0].SerializeToString()


def _rows() -> list[tuple[Any, Any]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 1000, TOKENS), np.ones(TOKENS, np.float32)) for _ in range(DATUMS)]


async def raw_round_trips(place: Place) -> list[tuple[float, float]]:
    """Of each its seconds, and those that this process computed."""
    tenant = await RawTenant(place, 0).open()
    taken = []
    for _ in range(ROUND_TRIPS):
        start, computed = time.perf_counter(), time.process_time()
        await tenant.round_trip()
        taken.append((time.perf_counter() - start, time.process_time() - computed))
    return taken


async def raw_steps(place: Place, seconds: float) -> float:
    opened = [await RawTenant(place, i).open() for i in range(len(place.keys))]

    async def train(tenant: RawTenant, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            await tenant.step()
            count += 1
        return count

    start = time.perf_counter()
    counts = await asyncio.gather(*(train(tenant, start + seconds) for tenant in opened))
    assert min(counts) > 0, counts
    return sum(counts) / (time.perf_counter() - start)


# --- the official SDK, and our client: the same lines ----------------------------------------------


def tenant_of(package: str, place: Place, number: int) -> tuple[Any, Any]:
    url = f"http://127.0.0.1:{place.port}"
    client = import_module(package).ServiceClient(base_url=url, api_key=place.keys[number])
    return client, client.create_lora_training_client(place.model).result()


def data_of(package: str) -> list[Any]:
    types = import_module(package).types
    return [
        types.Datum(types.ModelInput.from_ints(t.tolist()), {"target_tokens": t, "weights": w})
        for t, w in _rows()
    ]


def round_trips_of(package: str, place: Place) -> list[tuple[float, float]]:
    _, training = tenant_of(package, place, 0)
    data, taken = data_of(package), []
    for _ in range(ROUND_TRIPS):
        start, computed = time.perf_counter(), time.process_time()
        training.forward_backward(data, "cross_entropy").result()
        taken.append((time.perf_counter() - start, time.process_time() - computed))
    return taken


def far_steps_of(package: str, place: Place) -> float:
    """Milliseconds of a step of one tenant, the median, where the service is far away."""
    data = data_of(package)
    params = import_module(package).types.AdamParams(learning_rate=1e-4)
    taken = []
    with far(place.port, FAR_SECONDS) as port:
        _, training = tenant_of(package, replace(place, port=port), 0)
        for _ in range(FAR_STEPS):
            start = time.perf_counter()
            promises = [training.forward_backward(data, "cross_entropy"), training.optim_step(params)]
            for promise in promises:
                promise.result()
            taken.append(time.perf_counter() - start)
    return float(np.median(taken[10:])) * 1e3


def steps_of(package: str, place: Place, seconds: float) -> float:
    """All tenants in this process, a thread each; the SDK itself runs on one event loop per process."""
    data = data_of(package)
    params = import_module(package).types.AdamParams(learning_rate=1e-4)
    opened = [tenant_of(package, place, i)[1] for i in range(len(place.keys))]

    def train(training: Any, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            promises = [training.forward_backward(data, "cross_entropy"), training.optim_step(params)]
            for promise in promises:
                promise.result()
            count += 1
        return count

    start = time.perf_counter()
    with ThreadPoolExecutor(len(opened)) as threads:
        counts = list(threads.map(lambda training: train(training, start + seconds), opened))
    assert min(counts) > 0, counts
    return sum(counts) / (time.perf_counter() - start)


# --- the table --------------------------------------------------------------------------------------


def measured(measure: Callable[..., Any], tenants: int, *given: Any) -> Any:
    """Measure a fresh service from a process of its own, as a client would be."""
    with service(tenants) as place, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (measure, (place, *given)))


def _measure(measure: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    global BODY
    BODY = _body()
    found = measure(*given)
    return asyncio.run(found) if asyncio.iscoroutine(found) else found


BODY = b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each throughput is measured")
    given = parser.parse_args()
    os.environ["TINSMITH_API_KEY"] = f"tml-{secrets.token_hex(8)}"
    os.environ["TINKER_TELEMETRY"] = "0"
    found: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "body_bytes": len(_body()),
    }
    rows: list[tuple[str, float, str]] = []
    for client, round_trips, steps in (
        ("raw", raw_round_trips, raw_steps),
        *((name, partial(round_trips_of, name), partial(steps_of, name)) for name in ("tinsmith", "tinker")),
    ):
        taken, computed = np.array(measured(round_trips, 1)[20:]).T * 1e3
        for percentile in (50, 95):
            name = f"p{percentile}_ms"
            found[f"{client}_{name}"] = value = float(np.percentile(taken, percentile))
            rows.append((f"round trip, {client}, p{percentile} ms", value, f"≤ {TARGETS[name]:.0f}"))
        found[f"{client}_cpu_ms"] = value = float(np.median(computed))
        rows.append((f"round trip, {client}, CPU ms", value, "in the client's process"))
        for tenants in TENANTS:
            found[f"{client}_steps_{tenants}"] = value = measured(steps, tenants, given.seconds)
            rows.append(
                (f"steps/s, {client}, {tenants} tenants", value, f"≥ {TARGETS[f'{client}_steps']:.0f}")
            )
    for client in ("tinsmith", "tinker"):
        found[f"{client}_far_ms"] = value = measured(partial(far_steps_of, client), 1)
        rows.append((f"a step from far away, {client}, ms", value, "4 round trips are 160"))
    print(
        f"{found['machine']}, {found['cores']} cores; {DATUMS}×{TOKENS} tokens, {found['body_bytes']:,} bytes"
    )
    for label, value, target in rows:
        print(f"{label:<36}{value:>8.1f}   {target}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
