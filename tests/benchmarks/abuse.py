"""What one tenant's bad input costs the others: their round trips beside it and without it, and the memory it takes.

`make bench-abuse` (ARGS="--seconds 20 --rounds 3 --connections 4"). A service whose engine computes nothing; two
tenants send a forward_backward of 16 datums of 512 tokens each every 50 ms. In every other window a third sends
bodies of 64 MiB of nothing but empty parts, 100 MB of no message at all, deep JSON, compressed bombs and half bodies,
on several connections, each as soon as the last was refused. It runs at the lowest priority: it stands for another
machine, and takes this one's processors all the same.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Any

import httpx
import numpy as np

from tests.benchmarks import control
from tests.conftest import RunningService
from tests.e2e.test_abuse import BOTTOMLESS, JSON, PROTOBUF

MODEL = "base/null"
PERIOD_SECONDS = 0.05
TARGETS = {"p95_ratio": 2.0, "peak_mib": 2048.0}


# -- who misbehaves --------------------------------------------------------------------------------------


def bodies() -> list[tuple[str, bytes, dict[str, str]]]:
    deep = b"[" * 900_000
    bomb = {**PROTOBUF, "content-encoding": "zstd"}
    return [
        *(make() for make in BOTTOMLESS.values()),
        ("/forward_backward", bytes(100_000_000), PROTOBUF),
        ("/forward_backward", b" " * 100_000_000, JSON),
        ("/asample", b" " * 100_000_000, JSON),
        ("/create_session", deep, JSON),
        ("/asample", deep, JSON),
        ("/forward_backward", b"\x28\xb5\x2f\xfd" + bytes(1000), bomb),
    ]


def misbehave(url: str, key: str, connections: int, on: Event, told: Any) -> None:
    """Until it is killed; what it was answered goes to `told`."""
    os.nice(19)  # it stands for another machine
    given = itertools.cycle(bodies())
    lock = threading.Lock()

    def send() -> None:
        with httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60) as client:
            while on.wait():
                with lock:
                    path, body, headers = next(given)
                try:
                    told.put(str(client.post(path, content=body, headers=headers).status_code))
                except httpx.TransportError as error:
                    told.put(type(error).__name__)

    for _ in range(connections):
        threading.Thread(target=send, daemon=True).start()
    while True:
        time.sleep(1)


# -- the others ------------------------------------------------------------------------------------------


async def round_trips(tenants: list[control.RawTenant], seconds: float) -> list[float]:
    async def train(tenant: control.RawTenant) -> list[float]:
        taken, end = [], time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            await tenant.round_trip()
            taken.append(time.perf_counter() - start)
            await asyncio.sleep(max(0.0, PERIOD_SECONDS - taken[-1]))
        return taken

    return [seconds for its in await asyncio.gather(*map(train, tenants)) for seconds in its]


async def windows(
    place: control.Place, on: Event, rounds: int, seconds: float
) -> dict[str, list[list[float]]]:
    tenants = [await control.RawTenant(place, number).open() for number in range(2)]
    await round_trips(tenants, 3)
    found: dict[str, list[list[float]]] = {"calm": [], "beside it": []}
    for _ in range(rounds):
        for name, its in found.items():
            (on.set if name == "beside it" else on.clear)()
            await asyncio.sleep(1 if name == "beside it" else 5)  # what is under way ends
            its.append(await round_trips(tenants, seconds))
    on.clear()
    return found


def peak_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    control.BODY = control._body()
    with tempfile.TemporaryDirectory() as folder:
        service = RunningService(Path(folder), "--engine", "null", "--model", MODEL)
        keys = tuple(service.new_key(f"tenant-{number}") for number in range(3))
        context = multiprocessing.get_context("spawn")
        on, told = context.Event(), context.Queue()
        arguments = (service.url, keys[2], given.connections, on, told)
        other = context.Process(target=misbehave, args=arguments, daemon=True)
        other.start()
        before = peak_mib(service.process.pid)
        place = control.Place(int(service.url.rsplit(":", 1)[1]), MODEL, keys)
        try:
            found = asyncio.run(windows(place, on, given.rounds, given.seconds))
            peak = peak_mib(service.process.pid)
        finally:
            other.kill()
            service.stop()
    answers: Counter[str] = Counter()
    try:
        while True:
            answers[told.get_nowait()] += 1
    except Empty:
        pass
    return report(found, answers, before, peak, given.json)


def report(
    found: dict[str, list[list[float]]],
    answers: "Counter[str]",
    before: float,
    peak: float,
    file: Path | None,
) -> int:
    p95 = {name: [float(np.percentile(its, 95)) * 1e3 for its in windows] for name, windows in found.items()}
    best = {name: min(values) for name, values in p95.items()}
    numbers: dict[str, Any] = {
        "p95_ms": p95,
        "p95_ratio": best["beside it"] / best["calm"],
        "idle_mib": before,
        "peak_mib": peak,
        "answers": dict(answers),
    }
    print(f"answers: {dict(sorted(answers.items()))}; peak memory {peak:.0f} MiB (idle {before:.0f})")
    for name, values in p95.items():
        print(f"{name:<10} p95 ms of the windows: {', '.join(f'{value:.1f}' for value in values)}")
    print(f"ratio of the best: {numbers['p95_ratio']:.2f} (at most {TARGETS['p95_ratio']})")
    if file:
        file.write_text(json.dumps(numbers, indent=2) + "\n")
    failed = [status for status in answers if status.startswith("5")]
    return int(bool(failed) or any(numbers[name] > most for name, most in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
