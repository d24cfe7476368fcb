"""Training through the service, official SDK to engine and back, beside the same engine alone.

    make bench-service                           # this machine
    python3 -m tests.benchmarks.service --shape 8B --cases one,many --to run.json

Every tenant trains as a recipe does: a forward_backward and an optim_step at a time, the next pair submitted
before the last one's results are waited for. The engine alone gets the same work, one call after the other.
Weights are random, and written to a folder first, which the service loads as it loads any base model.
"""

import argparse
import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
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


def main() -> None:
    cases = CASES if train.ON_GPU else CASES_OF_A_CPU
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=train.SHAPES, default="8B" if train.ON_GPU else "tiny")
    parser.add_argument("--cases", default=",".join(cases), help="some of: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of every tenant that are timed (default 20)")
    parser.add_argument("--to", type=Path, default=Path("bench-service.json"), help="where the report goes")
    given = parser.parse_args()
    # As a worker does; and torch reads it once.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = f"--shape {given.shape} --cases {given.cases} --steps {given.steps}"
    report: dict[str, Any] = {
        "command": f"python3 -m tests.benchmarks.service {command}",
        "machine": train.machine(),
        "cases": {name: {"tenants, sequences, tokens, rank": cases[name]} for name in given.cases.split(",")},
    }
    for _ in measure(report, given.shape, given.steps):
        given.to.write_text(json.dumps(report, indent=1))


def measure(report: dict[str, Any], shape: str, steps: int) -> Iterator[None]:
    """Both sides of every case; after each, what there is may be saved."""
    os.environ["TINSMITH_API_KEY"] = f"tml-{secrets.token_hex(8)}"
    os.environ["TINKER_TELEMETRY"] = "0"
    cases = {name: row["tenants, sequences, tokens, rank"] for name, row in report["cases"].items()}
    tenants = max(case[0] for case in cases.values())
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, folder)
        options = ("--model", f"random={folder}")
        with control.service(tenants, *options, patience_seconds=200.0) as place:
            train.say("the service is up")
            for name, case in cases.items():
                report["cases"][name]["service"] = through_the_service(place.port, place.keys, case, steps)
                train.say(name, report["cases"][name]["service"])
                yield
    engine, _ = train.engine_on(train.model_of(shape))
    for name, row in report["cases"].items():
        row["engine"] = alone(engine, cases[name], steps)
        row["share"] = row["service"]["tokens/s"] / row["engine"]["tokens/s"]
        train.say(name, row["engine"], f"share {row['share']:.3f}")
        yield


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
    inside = sum(begun < end <= ended for e in ends for end in e)
    return {"tokens/s": inside * sequences * tokens / (ended - begun), "steps": inside}


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
    taken = []
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        engine.forward_backward(work)
        engine.optim_steps([(name, AdamParams(1e-5)) for name in names])
        taken.append(time.perf_counter() - start)
    for name in names:
        engine.drop(name)
    return train.summary(tenants * sequences * tokens, taken[WARM_UP_STEPS:])


if __name__ == "__main__":
    main()
