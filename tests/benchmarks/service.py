"""Training through the service, official SDK to engine and back, beside the same engine alone.

    make bench-service                           # this machine
    python3 -m tests.benchmarks.service --shape 8B --cases one,many --to run.json

Every tenant trains as a recipe does: a forward_backward and an optim_step at a time, the next pair submitted
before the last one's results are waited for. The engine alone gets the same work, one call after the other, in a
process of its own before the service and in another one after it (with the cases in the other order), unless
`--limit` seconds are over by then. What a snapshot of every tenant costs the engine alone is measured beside.
Weights are random, and written to a folder first, which the service loads as it loads any base model.
"""

import argparse
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import control, train
from tinsmith_worker import tiny_base
from tinsmith_worker.contract import AdamParams, LoraSpec, Work
from tinsmith_worker.engine import TorchEngine

# tenants, sequences of each, tokens of a sequence, rank
Case = tuple[int, int, int, int]
CASES: dict[str, Case] = {"one": (1, 32, 512, 32), "many": (16, 8, 128, 8), "short": (1, 8, 512, 32)}
CASES_OF_A_CPU: dict[str, Case] = {"one": (1, 8, 64, 16), "many": (8, 2, 32, 8)}
WARM_UP_STEPS = 3
# Of the steps in which snapshots are taken, every so many-th.
SNAPSHOT_STEPS, SNAPSHOT_EVERY = 10, 5


def main() -> None:
    cases = CASES if train.ON_GPU else CASES_OF_A_CPU
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=train.SHAPES, default="8B" if train.ON_GPU else "tiny")
    parser.add_argument("--cases", default=",".join(cases), help="some of: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of every tenant that are timed (default 20)")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all (default 540)")
    parser.add_argument("--to", type=Path, default=Path("bench-service.json"), help="where the report goes")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    # As a worker does; and torch reads it once.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if given.alone:
        engine, _ = train.engine_on(train.model_of(given.shape))
        chosen = {name: cases[name] for name in given.cases.split(",")}
        found = {name: alone(engine, case, given.steps) for name, case in chosen.items()}
        given.to.write_text(json.dumps(found))
        return
    command = f"--shape {given.shape} --cases {given.cases} --steps {given.steps}"
    report: dict[str, Any] = {
        "command": f"python3 -m tests.benchmarks.service {command}",
        "machine": train.machine(),
        "cases": {name: {"tenants, sequences, tokens, rank": cases[name]} for name in given.cases.split(",")},
    }
    for _ in measure(report, given.shape, given.steps, given.limit):
        given.to.write_text(json.dumps(report, indent=1))


def measure(report: dict[str, Any], shape: str, steps: int, limit: float) -> Iterator[None]:
    """The engine alone, every case through the service, the engine again; after each, what there is may be
    saved."""
    os.environ["TINSMITH_API_KEY"] = f"tml-{secrets.token_hex(8)}"
    os.environ["TINKER_TELEMETRY"] = "0"
    cases = {name: row["tenants, sequences, tokens, rank"] for name, row in report["cases"].items()}
    tenants = max(case[0] for case in cases.values())
    started = time.monotonic()
    for name, row in in_a_process(shape, list(cases), steps).items():
        report["cases"][name]["engine before"] = row
    took = time.monotonic() - started
    yield
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, folder)
        options = ("--model", f"random={folder}")
        with control.service(tenants, *options, patience_seconds=200.0) as place:
            train.say("the service is up")
            for name, case in cases.items():
                report["cases"][name]["service"] = through_the_service(place.port, place.keys, case, steps)
                train.say(name, report["cases"][name]["service"])
                yield
    again = {}
    if time.monotonic() - started + took < limit:
        again = in_a_process(shape, list(cases)[::-1], steps)
    for name, row in report["cases"].items():
        if name in again:
            row["engine after"] = again[name]
        rates = [row[f"engine {when}"]["tokens/s"] for when in ("before", "after") if f"engine {when}" in row]
        row["share"] = row["service"]["tokens/s"] / statistics.mean(rates)
        train.say(name, f"share {row['share']:.3f} of {[round(rate) for rate in rates]} tokens/s")
    yield


def in_a_process(shape: str, cases: list[str], steps: int) -> dict[str, train.Row]:
    """`alone`, and all that it took of the GPU given back."""
    with tempfile.NamedTemporaryFile() as written:
        options = ["--shape", shape, "--cases", ",".join(cases), "--steps", str(steps)]
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.service",
            "--alone",
            *options,
            "--to",
            written.name,
        ]
        subprocess.run(command, check=True)
        found: dict[str, train.Row] = json.loads(Path(written.name).read_text())
    return found


def write_model(shape: str, folder: str) -> None:
    train.model_of(shape).save_pretrained(folder)
    for file in tiny_base.FOLDER.iterdir():  # any tokenizer will do
        if "token" in file.name or file.suffix == ".jinja":
            Path(folder, file.name).write_bytes(file.read_bytes())
    train.free()


def through_the_service(port: int, keys: Sequence[str], case: Case, steps: int) -> train.Row:
    """Tokens a second of all tenants together, over the time in which all of them train."""
    import tinker

    tenants, sequences, tokens, rank = case
    address = f"http://127.0.0.1:{port}"
    clients = [tinker.ServiceClient(base_url=address, api_key=key) for key in keys[:tenants]]
    asked = [c.create_lora_training_client("random", rank=rank, train_unembed=False) for c in clients]
    runs = [one.result() for one in asked]
    ends: list[list[float]] = [[] for _ in runs]
    at_once = threading.Barrier(tenants)

    def train_one(number: int) -> None:
        training, data = runs[number], datums(sequences, tokens, number)
        before: list[Any] = []
        at_once.wait()
        for _ in range(WARM_UP_STEPS + steps):
            pair = [
                training.forward_backward(data, "cross_entropy"),
                training.optim_step(tinker.AdamParams(learning_rate=1e-5)),
            ]
            for promise in before:
                promise.result()
            if before:
                ends[number].append(time.perf_counter())
            before = pair
        for promise in before:
            promise.result()

    with ThreadPoolExecutor(tenants) as threads:
        list(threads.map(train_one, range(tenants)))
    begun, ended = max(e[WARM_UP_STEPS - 1] for e in ends), min(e[-1] for e in ends)
    inside = sorted(end for e in ends for end in e if begun <= end <= ended)
    gaps = [after - before for before, after in itertools.pairwise(inside)]
    rate = (len(inside) - 1) * sequences * tokens / (ended - begun)
    return {"tokens/s": rate, "steps": len(inside) - 1, "longest without a step s": max(gaps)}


def datums(sequences: int, tokens: int, seed: int) -> list[Any]:
    from tinker import Datum, ModelInput

    random, ones = np.random.default_rng(seed), np.ones(tokens, np.float32)
    rows = [random.integers(0, 1000, tokens) for _ in range(sequences)]
    return [
        Datum(
            model_input=ModelInput.from_ints(row.tolist()),
            loss_fn_inputs={"target_tokens": row, "weights": ones},
        )
        for row in rows
    ]


def alone(engine: TorchEngine, case: Case, steps: int) -> train.Row:
    tenants, sequences, tokens, rank = case
    names, work = [str(number) for number in range(tenants)], []
    for number, name in enumerate(names):
        engine.create(name, LoraSpec(rank, number, train_unembed=False))
        work.append(Work(name, train.batch([tokens] * sequences, 1000, number)))

    def step(then: Callable[[], object] = lambda: None) -> float:
        start = time.perf_counter()
        engine.forward_backward(work)
        engine.optim_steps([(name, AdamParams(1e-5)) for name in names])
        then()
        return time.perf_counter() - start

    taken = [step() for _ in range(WARM_UP_STEPS + steps)][WARM_UP_STEPS:]
    found = train.summary(tenants * sequences * tokens, taken)
    found |= {"snapshots": snapshots(engine, names, step)}
    for name in names:
        engine.drop(name)
    return found


def snapshots(engine: TorchEngine, names: list[str], step: Callable[..., float]) -> train.Row:
    """How much longer than the others a step takes, in seconds, in which every tenant's state is asked for; how
    much longer the slowest of the next ones, beside which it is fetched. And when it is waited for instead."""
    row: train.Row = {"GB": sum(engine.begin_state(name).arrival.result().nbytes for name in names) / 1e9}
    asked: list[Any] = []

    def ask() -> None:
        asked[:] = [engine.begin_state(name) for name in names]

    def wait() -> None:
        asked[:] = [engine._adapters[name].state() for name in names]

    for how, take in (("beside", ask), ("waited for", wait)):
        usual = statistics.median(step() for _ in range(SNAPSHOT_EVERY))
        taken = [step(take) if n % SNAPSHOT_EVERY == 0 else step() for n in range(SNAPSHOT_STEPS)]
        first, others = taken[::SNAPSHOT_EVERY], [t for n, t in enumerate(taken) if n % SNAPSHOT_EVERY]
        row[how] = {"step s": usual, "longer s": max(first) - usual, "the next longer s": max(others) - usual}
        asked.clear()
    return row


if __name__ == "__main__":
    main()
