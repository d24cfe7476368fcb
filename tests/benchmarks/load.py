"""A fleet under many clients: PostgreSQL, Redis, Celery, two API processes and a worker that computes nothing.

`make bench-load` (ARGS="--seconds 600 --json FILE"). 200 clients of the official SDK, each a tenant of its own,
make no-op calls (an optim_step of the null engine, from submission to result) at an even pace; meanwhile 2,000
futures that cannot be finished yet are waited for. At the end those are let go, and each must have its answer.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from tests.benchmarks.control import Place, RawTenant
from tests.conftest import RunningFleet

MODEL = "base/null"
CLIENTS, PROCESSES = 200, 4
OPEN_PER_CLIENT = 10
TARGETS = {"errors": 0.0, "p95_ms": 60.0, "idle_p50_ms": 15.0, "growth_percent": 10.0}


# -- the clients -----------------------------------------------------------------------------------------


def open_run(url: str, key: str) -> Any:
    import tinker

    client = tinker.ServiceClient(base_url=url, api_key=key)
    run = client.create_lora_training_client(MODEL, rank=8).result()
    run.client = client  # lives as long as the run
    return run


def call(run: Any) -> float:
    """A no-op call; its seconds."""
    from tinker import types

    started = time.perf_counter()
    run.optim_step(types.AdamParams()).result()
    return time.perf_counter() - started


def clients(
    places: Sequence[tuple[str, str]], period: float, ready: Any, go: Any, ended: Any, out: Any
) -> None:
    """One process: a thread for each of these (url, key), each calling once in `period` seconds."""
    found: Queue[float | str] = Queue()
    opened: Queue[Any] = Queue()

    def live(url: str, key: str) -> None:
        try:
            run = open_run(url, key)
            call(run)
        except Exception as error:
            opened.put(None)
            found.put(f"opening: {error!r}")
            return
        opened.put(run)
        go.wait()
        due = time.perf_counter() + random.random() * period
        while not ended.wait(max(0.0, due - time.perf_counter())):
            try:
                found.put(call(run))
            except Exception as error:
                found.put(repr(error))
            due += period

    threads = [threading.Thread(target=live, args=place) for place in places]
    for thread in threads:
        thread.start()
    for _ in threads:
        opened.get()
    ready.release()
    for thread in threads:
        thread.join()
    out.put(list(found.queue))


# -- futures that stay open --------------------------------------------------------------------------------


async def hold_open(places: Sequence[Place], ready: Any, ended: Any) -> int:
    """Submit calls 2..11 of a run for each tenant and wait for their results, which need call 1. Submit that
    when it has ended; how many had the right answer."""
    tenants, waiting = [], []
    for place in places:
        tenant = await RawTenant(place, 0).open()
        tenants.append(tenant)
        tenant.seq_id = 1
        for number in range(OPEN_PER_CLIENT):
            request_id = await tenant.optim_step()
            waiting.append((asyncio.create_task(_step(place, request_id)), number + 2))
    ready.release()
    await asyncio.to_thread(ended.wait)
    assert not any(task.done() for task, _ in waiting), "answered before the call in front of it"
    for tenant in tenants:
        await _connect(tenant)  # the server has hung up on what was idle
        tenant.seq_id = 0
        await tenant.optim_step()
    return sum([await task == step for task, step in waiting])


async def _step(place: Place, request_id: str) -> int:
    waiter = await _connect(RawTenant(place, 0))
    answer = json.loads(await waiter.result(request_id))
    waiter.writer.close()
    return int(answer["metrics"]["optimizer_step"])


async def _connect(tenant: RawTenant) -> RawTenant:
    tenant.reader, tenant.writer = await asyncio.open_connection("127.0.0.1", tenant.place.port)
    return tenant


def hold(places: Sequence[Place], ready: Any, ended: Any, out: Any) -> None:
    out.put(asyncio.run(hold_open(places, ready, ended)))


# -- the measurement ---------------------------------------------------------------------------------------


def memory_mib(fleet: RunningFleet) -> dict[str, float]:
    """Resident memory of every process."""
    found = {}
    for name, process in fleet.processes.items():
        status = Path(f"/proc/{process.pid}/status").read_text()
        found[name] = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return found


def cpu_seconds(fleet: RunningFleet) -> dict[str, float]:
    """Of the fleet's processes, and of the clients together."""
    ours = {name: process.pid for name, process in fleet.processes.items()}
    ours |= {"redis": fleet.redis.process.pid}
    found = {name: _ticks(pid) for name, pid in ours.items()}
    found["postgresql"] = sum(
        map(_ticks, [fleet.postgres.process.pid, *_children(fleet.postgres.process.pid)])
    )
    found["clients"] = sum(_ticks(p.pid) for p in multiprocessing.active_children() if p.pid)
    return {name: ticks / os.sysconf("SC_CLK_TCK") for name, ticks in found.items()}


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def make_keys(fleet: RunningFleet, count: int) -> list[str]:
    from tinsmith_api.journal import identities
    from tinsmith_api.journal.store import Store

    journal = Store(fleet.postgres.url)
    written = [journal.write(lambda c, n=n: identities.create_key(c, f"tenant-{n}")) for n in range(count)]
    keys = [key.result() for key in written]
    journal.close()
    return keys


def idle_p50_ms(url: str, key: str) -> float:
    run = open_run(url, key)
    taken = []
    for _ in range(200):
        taken.append(call(run))
        time.sleep(0.02)
    run.client.close("success")
    return float(np.median(taken[20:])) * 1e3


def measure(fleet: RunningFleet, seconds: float, rate: float) -> dict[str, Any]:
    keys = make_keys(fleet, CLIENTS + 1)
    idle = idle_p50_ms(fleet.url, keys.pop())
    spawn = multiprocessing.get_context("spawn")
    ready, go, ended = spawn.Semaphore(0), spawn.Event(), spawn.Event()
    calls, held = spawn.Queue(), spawn.Queue()
    urls = [fleet.urls[n % len(fleet.urls)] for n in range(CLIENTS)]
    places = [Place(int(url.rsplit(":", 1)[1]), MODEL, (key,)) for url, key in zip(urls, keys, strict=True)]
    processes = [spawn.Process(target=hold, args=(places, ready, ended, held), daemon=True)]
    for number in range(PROCESSES):
        mine = list(zip(urls, keys, strict=True))[number::PROCESSES]
        given = (mine, CLIENTS / rate, ready, go, ended, calls)
        processes.append(spawn.Process(target=clients, args=given, daemon=True))
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=300), "the clients did not all come up"
    started = time.monotonic()
    go.set()
    time.sleep(seconds / 5)
    before, cpu_before, measured_from = memory_mib(fleet), cpu_seconds(fleet), time.monotonic()
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    after, cpu_after = memory_mib(fleet), cpu_seconds(fleet)
    span = time.monotonic() - measured_from
    ended.set()
    answered = held.get(timeout=120)
    found = [value for _ in range(PROCESSES) for value in calls.get(timeout=120)]
    for process in processes:
        process.join()
    errors = [value for value in found if isinstance(value, str)]
    taken = np.array([value for value in found if isinstance(value, float)]) * 1e3
    missing = CLIENTS * OPEN_PER_CLIENT - answered
    return {
        "idle_p50_ms": idle,
        "calls": len(taken),
        "calls_per_second": len(taken) / seconds,
        "p50_ms": float(np.percentile(taken, 50)),
        "p95_ms": float(np.percentile(taken, 95)),
        "p99_ms": float(np.percentile(taken, 99)),
        "max_ms": float(taken.max()),
        "errors": float(len(errors) + missing),
        "first_errors": errors[:5],
        "open_futures_answered": answered,
        "memory_mib": {name: [round(before[name], 1), round(after[name], 1)] for name in before},
        "cores_used": {name: round((cpu_after[name] - cpu_before[name]) / span, 3) for name in cpu_before},
        "growth_percent": max((after[n] / before[n] - 1) * 100 for n in before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rate", type=float, default=25.0, help="calls a second, of all clients together")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    os.environ["TINKER_TELEMETRY"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        # Snapshots go to a directory: a test server of S3 written in Python would be what is measured.
        settings = {"engine": "null", "gap_seconds": 86400, "objects": f"{folder}/objects"}
        fleet = RunningFleet(Path(folder), model=MODEL, workers=1, **settings)
        try:
            found = measure(fleet, given.seconds, given.rate)
        finally:
            status = fleet.stop()
            complaints = [line for line in fleet.log_text().splitlines() if "Traceback" in line]
    print(
        f"{CLIENTS} clients, {found['open_futures_answered']:,} open futures, {given.seconds:g} s, "
        f"{found['calls']:,} calls ({found['calls_per_second']:.1f}/s), {len(os.sched_getaffinity(0))} cores"
    )
    for name, target in TARGETS.items():
        print(f"{name:<16}{found[name]:>8.1f}   ≤ {target:g}")
    print(f"p50, p99, max   {found['p50_ms']:.1f}, {found['p99_ms']:.1f}, {found['max_ms']:.1f} ms")
    for name, (before, after) in found["memory_mib"].items():
        print(f"memory of {name:<10}{before:>8.1f} MiB after a fifth of the time, {after:.1f} at the end")
    print("cores used: " + ", ".join(f"{name} {cores:.2f}" for name, cores in found["cores_used"].items()))
    for error in found["first_errors"]:
        print(f"error: {error}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    if status or complaints or found["errors"]:
        sys.exit(
            f"exit status {status}, {len(complaints)} tracebacks in the logs, {found['errors']:g} errors"
        )


if __name__ == "__main__":
    main()
