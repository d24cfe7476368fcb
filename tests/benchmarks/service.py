"""Training through the service, official SDK to engine and back, beside the same engine alone.

    make bench-service                           # this machine
    python3 -m tests.benchmarks.service --shape 8B --cases one,many --to run.json

Every tenant trains as a recipe does: a forward_backward and an optim_step at a time, the next pair submitted before
the last one's results are waited for. The engine alone gets the same work, one call after the other. Weights are
random, and written to a folder first, which the service loads as it loads any base model.
"""

import argparse
import json
import os
import secrets
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import control, train
from tinsmith_worker import tiny_base
from tinsmith_worker.contract import AdamParams, LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base

# tenants, sequences of each, tokens of a sequence, rank
CASES = {"one": (1, 32, 512, 32), "many": (16, 8, 128, 8), "short": (1, 8, 512, 32)}
CASES_OF_A_CPU = {"one": (1, 8, 64, 16), "many": (8, 2, 32, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = CASES if train.ON_GPU else CASES_OF_A_CPU
    parser.add_argument("--shape", choices=train.SHAPES, default="8B" if train.ON_GPU else "tiny")
    parser.add_argument("--cases", default=",".join(cases), help="some of: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of every tenant that are timed (default 20)")
    parser.add_argument("--to", type=Path, default=Path("bench-service.json"), help="where the report goes")
    given = parser.parse_args()
    os.environ["TINSMITH_API_KEY"] = f"tml-{secrets.token_hex(8)}"
    os.environ["TINKER_TELEMETRY"] = "0"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    wanted = {name: cases[name] for name in given.cases.split(",")}
    command = f"python3 -m tests.benchmarks.service --shape {given.shape} --cases {given.cases} --steps {given.steps}"
    report: dict[str, Any] = {"command": command, "machine": train.machine(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_model(given.shape, folder)
        with control.service(max(c[0] for c in wanted.values()), "--model", f"random={folder}") as place:
            for name, case in wanted.items():
                found = through_the_service(
                    control.Place(place.port, "random", place.keys), case, given.steps
                )
                report["cases"][name] = {"tenants x sequences x tokens, rank": case, "service": found}
                train.say(name, "service", found)
        engine = open_engine(folder)
        for name, case in wanted.items():
            row = report["cases"][name]
            row["engine"] = alone(engine, case, given.steps)
            row["share"] = row["service"]["tokens/s"] / row["engine"]["tokens/s"]
            train.say(name, "engine", row["engine"], f"share {row['share']:.3f}")
            given.to.write_text(json.dumps(report, indent=1))


def write_model(shape: str, folder: str) -> None:
    train.model_of(shape).save_pretrained(folder)
    for file in tiny_base.FOLDER.iterdir():  # any tokenizer will do
        if "token" in file.name or file.suffix == ".jinja":
            Path(folder, file.name).write_bytes(file.read_bytes())
    train.free()


def through_the_service(place: control.Place, case: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Tokens a second of all tenants together, over the time in which all of them train."""
    import tinker

    tenants, sequences, tokens, rank = case
    address = f"http://127.0.0.1:{place.port}"
    clients = [tinker.ServiceClient(base_url=address, api_key=key) for key in place.keys[:tenants]]
    runs = [c.create_lora_training_client("random", rank=rank, train_unembed=False) for c in clients]
    opened = [run.result() if hasattr(run, "result") else run for run in runs]
    ends: list[list[float]] = [[] for _ in opened]
    at_once = threading.Barrier(tenants)

    def train_one(number: int) -> None:
        training, data = opened[number], datums(sequences, tokens, number)
        before: list[Any] = []
        at_once.wait()
        for _ in range(steps + 3):
            pair = [
                training.forward_backward(data, "cross_entropy"),
                training.optim_step(tinker.AdamParams(learning_rate=1e-5)),
            ]
            for promise in before:
                promise.result()
            ends[number].append(time.perf_counter())
            before = pair
        for promise in before:
            promise.result()
        ends[number].append(time.perf_counter())

    with ThreadPoolExecutor(tenants) as threads:
        list(threads.map(train_one, range(tenants)))
    begun, ended = max(e[2] for e in ends), min(e[-2] for e in ends)
    inside = sum(sum(begun < end <= ended for end in e) for e in ends)
    return {
        "tokens/s": inside * sequences * tokens / (ended - begun),
        "steps": inside,
        "seconds": ended - begun,
    }


def datums(sequences: int, tokens: int, seed: int) -> list[Any]:
    from tinker import Datum, ModelInput

    random = np.random.default_rng(seed)
    rows = [random.integers(0, 1000, tokens) for _ in range(sequences)]
    ones = np.ones(tokens, np.float32)
    return [
        Datum(
            model_input=ModelInput.from_ints(r.tolist()), loss_fn_inputs={"target_tokens": r, "weights": ones}
        )
        for r in rows
    ]


def open_engine(folder: str) -> TorchEngine:
    base = Base.load(folder, device=train.DEVICE, dtype=train.DTYPE)
    engine = TorchEngine(base, EngineSettings())
    engine.warm_up()
    return engine


def alone(engine: TorchEngine, case: tuple[int, ...], steps: int) -> dict[str, Any]:
    tenants, sequences, tokens, rank = case
    names = [str(n) for n in range(tenants)]
    work: list[Work] = []
    for number, name in enumerate(names):
        engine.create(name, LoraSpec(rank, number, train_unembed=False))
        work.append(Work(name, train.batch([tokens] * sequences, 1000, number)))
    taken = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        engine.forward_backward(work)
        engine.optim_steps([(name, AdamParams(1e-5)) for name in names])
        taken.append(time.perf_counter() - start)
    for name in names:
        engine.drop(name)
    middle = statistics.median(taken[3:])
    return {"tokens/s": tenants * sequences * tokens / middle, "seconds of a step": middle, "steps": steps}


if __name__ == "__main__":
    main()
