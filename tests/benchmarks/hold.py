"""What a base costs one GPU that does, or does not, have the memory for it: whole, in four bits, and in parts
that lie in host memory or on a disk.

    make bench-hold
    PYTHONPATH=client:api:worker python3 tests/benchmarks/hold.py --to run.json
    PYTHONPATH=client:api:worker python3 tests/benchmarks/hold.py --shape tiny                 # any machine
    PYTHONPATH=client:api:worker python3 tests/benchmarks/hold.py --shape wide --limit-gib 2   # no GPU, 2.3 GB

Random weights of the 8B shape in files, read as a worker reads them; whole steps (forward, backward, AdamW) of
one adapter, in passes of 8,192 tokens. Each holding has a process of its own. Those marked "limited" may have
--limit-gib of the card and no more: the rest of it is taken before anything else is. Without a GPU they may have
as much of the host's memory (RLIMIT_DATA).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train
from scale import SEQUENCE, SPEC, allocated, error, machine

from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.open_engine import Holding, read_base
from tinsmith_worker.parallel.engine import GroupEngine
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.launch import start_followers

PASS_TOKENS = {"8B": 8192, "tiny": 512, "wide": 64}
# Few operations for its bytes.
train.SHAPES["wide"] = train.SHAPES["tiny"] | {"num_hidden_layers": 24, "intermediate_size": 32768}
WRITE = "the base is written"
# Name -> how it is held, whether the process is limited, passes of a step.
HOLDINGS = {
    "whole": (Holding(), False, 2),
    "nf4": (Holding(quantize="nf4"), False, 2),
    "whole, limited": (Holding(), True, 2),
    "nf4, limited": (Holding(quantize="nf4"), True, 2),
    "fsdp2, host, limited": (Holding("fsdp2", offload=True), True, 2),
    "deepspeed, host, limited": (Holding("deepspeed", offload=True), True, 2),
    "deepspeed, disk, limited": (Holding("deepspeed", offload_folder="disk"), True, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--holdings", nargs="*", choices=HOLDINGS, default=[*HOLDINGS])
    parser.add_argument("--limit-gib", type=float, default=15)
    parser.add_argument(
        "--files", type=Path, default=Path(tempfile.gettempdir()), help="where 16 GB find room"
    )
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="a folder on a disk")
    parser.add_argument("--to", type=Path, default=Path("hold.json"))
    parser.add_argument("--shape", choices=PASS_TOKENS, default="8B", help="tiny: for a rehearsal")
    parser.add_argument("--seconds", type=int, default=180, help="the most that a holding may take")
    for inner in ("one", "base", "rows"):  # of the processes that this one starts
        parser.add_argument(f"--{inner}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one == WRITE:
        train.model_of(given.shape).save_pretrained(given.base, max_shard_size="150MB")
    elif given.one:
        run = Run(given)
        try:
            run.all()
        except torch.OutOfMemoryError as failure:
            run.row(fits=False, said=str(failure)[:160])
    else:
        every_holding(given)


class Run:
    """One holding, in this process."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.holding, self.is_limited, self.passes = HOLDINGS[given.one]
        self.pass_tokens = PASS_TOKENS[given.shape]
        self.spec = SPEC if given.shape == "8B" else LoraSpec(8, 0, train_unembed=False)
        if self.holding.offload_folder:
            self.holding = Holding("deepspeed", offload_folder=str(given.disk))

    def all(self) -> None:
        device, ballast = torch.device("cuda", 0) if train.ON_GPU else train.DEVICE, None
        if self.is_limited and train.ON_GPU:
            room = torch.cuda.mem_get_info()[0] - int(self.given.limit_gib * 2**30)
            ballast = torch.empty(room, dtype=torch.uint8, device=device)
        elif self.is_limited:
            resource.setrlimit(resource.RLIMIT_DATA, (int(self.given.limit_gib * 2**30),) * 2)
        beside = allocated() if ballast is not None else 0.0
        assert beside is not None
        started = time.perf_counter()
        place, _followers = start_followers(1, [])  # its folder is there as long as this name
        group = Group(place, device) if self.holding.is_cut else None
        base = read_base(self.given.base, self.holding, group, device)
        train.free()
        limit = self.given.limit_gib if self.is_limited else None
        held = None if allocated() is None else float(allocated() or 0) - beside
        self.row(limit_gib=limit, base_gib=held, ready_after_s=time.perf_counter() - started)
        engine = TorchEngine(base, EngineSettings(self.pass_tokens))
        if group is not None:
            engine = GroupEngine(base, group, EngineSettings(self.pass_tokens))
        if base.can_compile:
            base.compile()
        if self.given.shape == "wide":
            base.keeping = Keeping(recomputed_layers=base.activations.layers)
        self.time(engine, beside)
        self.compare(engine)

    def time(self, engine: TorchEngine, beside: float) -> None:
        engine.create("timed", self.spec)
        work = [Work("timed", self.batch(self.passes * self.pass_tokens))]

        def step() -> None:
            began = time.perf_counter()
            engine.forward_backward(work)
            engine.optim_steps([("timed", AdamParams(1e-5))])
            train.synchronize()
            print(f"{self.given.one}: a step of {time.perf_counter() - began:.1f} s", flush=True)

        found = train.timed(step, work[0].given.tokens, seconds=5)
        engine.drop("timed")
        if found["peak GiB"] is not None:
            found["peak GiB"] -= beside
        self.row(**found, **vars(engine.base.kept))

    def compare(self, engine: TorchEngine) -> None:
        """Its gradient with that of the base that is held whole."""
        state = engine.base.new_adapter(self.spec).state()
        state.weights[:] = np.random.default_rng(5).normal(0, 0.01, state.weights.shape)
        engine.restore("compared", state)
        engine.forward_backward([Work("compared", self.batch(self.pass_tokens))])
        gradient = engine.state("compared").gradient
        assert gradient is not None
        whole = Path(self.given.base) / "gradient.npy"
        if self.given.one == "whole":
            np.save(whole, gradient)
        elif whole.exists():
            self.row(gradient_against_whole=error(gradient, np.load(whole)))

    def batch(self, tokens: int) -> Any:
        length = SEQUENCE if self.given.shape == "8B" else SEQUENCE // 8
        return train.batch([length] * (tokens // length), train.SHAPES[self.given.shape]["vocab_size"], 1)

    def row(self, **row: Any) -> None:
        row = {"holding": self.given.one, **row}
        print(json.dumps(row), flush=True)
        with open(self.given.rows, "a") as file:
            file.write(json.dumps(row) + "\n")


def every_holding(given: argparse.Namespace) -> None:
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "rows": []}
    on_disk = tempfile.TemporaryDirectory(dir=given.disk)
    with tempfile.TemporaryDirectory(dir=given.files) as folder, on_disk as disk:
        rows = Path(folder) / "rows"
        rows.touch()
        for name in (WRITE, *given.holdings):
            command = [sys.executable, *sys.argv, "--one", name]
            command += ["--base", folder, "--rows", str(rows), "--disk", disk]
            try:
                status: int | None = subprocess.run(command, timeout=given.seconds).returncode
            except subprocess.TimeoutExpired:
                status = None
            with rows.open("a") as file:
                file.write(json.dumps({"holding": name, "status": status}) + "\n")
            report["rows"] = [json.loads(line) for line in rows.read_text().splitlines()]
            given.to.write_text(json.dumps(report, indent=1))
    print(given.to)


if __name__ == "__main__":
    main()
