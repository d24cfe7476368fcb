"""Training on several cards of one machine against one of them, and what happens when one of them ends.

    make bench-scale                                                       # every GPU of this machine
    PYTHONPATH=client:api:worker python3 tests/benchmarks/scale.py --to run.json
    PYTHONPATH=client:api:worker python3 tests/benchmarks/scale.py --tiny  # any machine: two processes, small shapes

Random weights and tokens, bfloat16 on GPUs, 16k tokens a card and step (forward, backward, AdamW). Parts:
scaling   the 8B shape on one card, replicated, and cut by fsdp2 and by deepspeed; their gradients against
          one card's
exact     the same gradients in float32, on the 0.6B shape
large     the 32B shape with fsdp2, which no single card trains; large_deepspeed: the same cut by deepspeed
kill      a rank killed in mid-step; a new group restores the last snapshot and repeats what came after it
beside    sampling on one card while training on another
full      all weights trained by all cards with fsdp2 (scale_full.py)
Each part runs in processes of its own and may fail alone; the report is written after every number.
"""

import argparse
import functools
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Its set-up fails on machines that lend only some of their cards.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import train
from scale_full import full
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config

from tinsmith_worker import checkpoints
from tinsmith_worker.contract import AdamParams, AdapterState, LoraSpec, SampleInput, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.parallel.engine import GroupEngine
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.launch import Followers, end_with_leader, place_in_environment, start_followers
from tinsmith_worker.parallel.load import empty_model, give_memory, give_memory_beside
from tinsmith_worker.parallel.shard import ShardedBase, shard
from tinsmith_worker.parallel.zero import Parts
from tinsmith_worker.sampler import TorchSampler

Row = dict[str, Any]
SHAPES = train.SHAPES
SHAPES |= {
    "32B": {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "8B, 4 of 36 layers": train.SHAPES["8B"] | {"num_hidden_layers": 4},
}  # fmt: skip
SPEC = LoraSpec(32, 0, train_unembed=False)
SEQUENCE = 512
PASS_TOKENS = 8192


class Run:
    """One part in this process: its group (None: it is alone), what it was asked for, where its rows go."""

    def __init__(self, given: argparse.Namespace, group: Group | None, followers: Followers | None) -> None:
        self.given, self.group, self.followers = given, group, followers
        self.tokens = 1024 if given.tiny else 16384  # a card and step
        self.settings = EngineSettings(self.tokens // 2 if given.tiny else PASS_TOKENS)
        self.seconds = 1.0 if given.tiny else 6.0

    def shape(self, name: str) -> str:
        return "tiny" if self.given.tiny else name

    def row(self, **row: Any) -> None:
        if self.group is None or self.group.leads:
            row = {"part": self.given.part, **row}
            print(json.dumps(row), flush=True)
            with open(self.given.rows, "a") as file:
                file.write(json.dumps(row) + "\n")

    def batch(self, cards: int, seed: int = 1) -> Any:
        length = SEQUENCE // 8 if self.given.tiny else SEQUENCE
        vocabulary = SHAPES[self.shape("8B")]["vocab_size"]
        return train.batch([length] * (cards * self.tokens // length), vocabulary, seed)

    def time(self, engine: TorchEngine, cards: int, **about: Any) -> float:
        """Tokens per second of whole steps."""
        engine.create("timed", SPEC)
        work = [Work("timed", self.batch(cards))]

        def step() -> None:
            engine.forward_backward(work)
            (answer,) = engine.optim_steps([("timed", AdamParams(1e-5))])
            assert isinstance(answer, dict), answer

        step()  # compiles
        found = train.timed(step, work[0].given.tokens, seconds=self.seconds)
        engine.drop("timed")
        self.row(cards=cards, **about, **found, **vars(engine.base.kept))
        return float(found["tokens/s"])

    def gradient(self, engine: TorchEngine) -> np.ndarray:
        """Of one adapter with weights that all matter, over one card's batch."""
        state = engine.base.new_adapter(SPEC).state()
        weights = np.random.default_rng(5).normal(0, 0.01, state.weights.shape).astype(np.float32)
        engine.restore("compared", replace(state, weights=weights))
        engine.forward_backward([Work("compared", self.batch(1, seed=2))])
        gradient = engine.state("compared").gradient
        engine.drop("compared")
        assert gradient is not None
        return gradient

    def follow(self, engine: GroupEngine, leads: Callable[[], None]) -> None:
        """The leader does `leads`, the others what it tells."""
        assert self.group is not None
        if not self.group.leads:
            engine.follow()
            return
        leads()
        self.group.tell("close")


def error(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@dataclass
class Single:
    """What one card found."""

    gradient: np.ndarray
    speed: float


def scaling(run: Run) -> None:
    shape = run.shape("8B")
    single = replicated(run, shape)
    assert run.group is not None
    for parallel, cut in CUTS.items():
        gc.collect()
        train.free()
        engine = GroupEngine(
            ShardedBase(cut(train.model_of(shape), run.group), run.group), run.group, run.settings
        )
        train.free()
        run.row(shape=shape, parallel=parallel, base_gib=allocated())
        run.follow(engine, functools.partial(cut_against, run, engine, single, parallel, shape))
        del engine


def cut_against(run: Run, engine: GroupEngine, single: Single | None, parallel: str, shape: str) -> None:
    assert single is not None
    compiled(engine)
    compare(run, engine, single, shape=shape, parallel=parallel)


def cut_by_deepspeed(model: Any, group: Group) -> Any:
    parts = Parts(model, group)
    for name in parts:
        parts.take(name, model.get_parameter(name).data)
    return model


CUTS: dict[str, Callable[[Any, Group], Any]] = {"fsdp2": shard, "deepspeed": cut_by_deepspeed}


def replicated(run: Run, shape: str) -> Single | None:
    """One card, then all, on one and the same base. None if this rank does not lead."""
    assert run.group is not None
    base = Base(train.model_of(shape))
    engine = GroupEngine(base, run.group, run.settings)
    found: list[Single] = []

    def leads() -> None:
        compiled(engine)
        alone = TorchEngine(base, run.settings)
        gradient = run.gradient(alone)
        again = error(run.gradient(alone), gradient)
        run.row(shape=shape, parallel="one card", gradient_against_one_card=again)
        found.append(Single(gradient, run.time(alone, 1, shape=shape, parallel="one card")))
        compare(run, engine, found[0], shape=shape, parallel="none")

    run.follow(engine, leads)
    return found[0] if found else None


def compare(run: Run, engine: GroupEngine, single: Single, **about: Any) -> None:
    run.row(**about, gradient_against_one_card=error(run.gradient(engine), single.gradient))
    cards = engine._group.ranks
    speed = run.time(engine, cards, **about)
    run.row(**about, cards=cards, efficiency=speed / cards / single.speed)


def compiled(engine: GroupEngine) -> None:
    """Its layers, on all ranks."""
    if engine.base.can_compile:
        engine._group.tell("compile")
        engine.base.compile()


def exact(run: Run) -> None:
    group, shape = run.group, run.shape("0.6B")
    assert group is not None
    train.DTYPE = torch.float32
    run.settings = EngineSettings(2048)
    run.tokens = min(run.tokens, 4096)
    found: dict[str, np.ndarray] = {}

    def replicated() -> None:
        found["one card"] = run.gradient(TorchEngine(base, run.settings))
        found["none"] = run.gradient(engine)

    base = Base(train.model_of(shape))
    engine = GroupEngine(base, group, run.settings)
    run.follow(engine, replicated)
    for parallel, cut in CUTS.items():
        cut_engine = GroupEngine(ShardedBase(cut(train.model_of(shape), group), group), group, run.settings)
        run.follow(cut_engine, functools.partial(keep_gradient, run, cut_engine, found, parallel))
    for name in ("none", *CUTS):
        if group.leads:
            difference = error(found[name], found["one card"])
            run.row(shape=shape, dtype="float32", parallel=name, gradient_against_one_card=difference)


def keep_gradient(run: Run, engine: GroupEngine, found: dict[str, np.ndarray], name: str) -> None:
    found[name] = run.gradient(engine)


def large(run: Run, parallel: str = "fsdp2") -> None:
    group, shape = run.group, run.shape("32B")
    assert group is not None
    about, started = {"shape": shape, "parallel": parallel}, time.perf_counter()
    random = {"fsdp2": random_shards, "deepspeed": random_parts}[parallel]
    base = ShardedBase(random(shape, group), group)
    train.free()
    run.row(**about, base_gib=allocated(), ready_after_s=time.perf_counter() - started)
    engine = GroupEngine(base, group, run.settings)

    def leads() -> None:
        compiled(engine)
        run.time(engine, group.ranks, **about)
        sampler, began = TorchSampler(base), time.perf_counter()
        sampled = sum(
            len(s.tokens) for done in drain(sampler, sequences=16, tokens=8) for s in done.sequences
        )
        seconds = time.perf_counter() - began
        run.row(**about, sampled_tokens=sampled, sampled_per_s=sampled / seconds)

    run.follow(engine, leads)


def large_deepspeed(run: Run) -> None:
    large(run, "deepspeed")


def random_shards(shape: str, group: Group) -> Any:
    """A model of which every rank draws its own rows: the whole of it never exists."""
    config = Qwen3Config(**SHAPES[shape], max_position_embeddings=40960)
    model = shard(empty_model(config, dtype=train.DTYPE), group)
    give_memory(model, group.device)
    draw(model, group)
    return model


def random_parts(shape: str, group: Group) -> Any:
    """The same in DeepSpeed's keeping, a whole tensor at a time."""
    config = Qwen3Config(**SHAPES[shape], max_position_embeddings=40960)
    model = empty_model(config, dtype=train.DTYPE)
    parts = Parts(model, group)
    for number, name in enumerate(parts):
        torch.manual_seed(number)
        size = model.get_parameter(name).shape
        parts.take(name, torch.empty(size, device=group.device, dtype=train.DTYPE).normal_(0, 0.02))
    give_memory_beside(model, parts, group.device)
    for name, parameter in model.named_parameters():
        if name not in parts:
            parameter.data.fill_(1) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02)
    return model


def draw(model: Any, group: Group) -> None:
    """Random weights for what this rank holds."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            ours: Any = parameter
            torch.manual_seed(number)  # what is whole is the same on all
            if isinstance(parameter, DTensor):
                ours = parameter.to_local()
                torch.manual_seed(number + 10_000 * (1 + group.rank))
            ours.fill_(1) if parameter.dim() == 1 else ours.normal_(0, 0.02)


def drain(sampler: TorchSampler, *, sequences: int, tokens: int, held: str = "") -> list[Any]:
    prompt = np.arange(1, 65, dtype=np.int32)
    sampler.add(SampleInput("r", held, prompt, sequences, tokens, seed=1, stop_tokens=()))
    done: list[Any] = []
    while sampler.busy:
        done += sampler.step()
    return done


STEPS, SNAPSHOT_AT, KILL_AT = 6, 2, 4
FILES = (checkpoints.CONFIG, checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.SPEC)


def kill(run: Run) -> None:
    """The first group trains undisturbed, twice, and then until one of its ranks is killed; the second one
    restores the snapshot that the first left and repeats. In fast mode, where runs differ by themselves, and
    in deterministic mode; the killing is in the latter."""
    group, folder = run.group, Path(run.given.folder)
    assert group is not None
    base = Base(train.model_of(run.shape("8B, 4 of 36 layers")))
    is_second = (folder / "killed").exists()
    for deterministic in (False, True):
        engine = GroupEngine(base, group, replace(run.settings, deterministic=deterministic))
        place = folder / f"deterministic {deterministic}"
        leads = recover if is_second else undisturbed
        run.follow(engine, functools.partial(leads, run, engine, place, deterministic=deterministic))
    if not is_second:
        run.follow(engine, lambda: until_killed(run, engine))


def undisturbed(run: Run, engine: GroupEngine, place: Path, *, deterministic: bool) -> None:
    place.mkdir()
    engine.create("run", SPEC)
    first = train_steps(run, engine, 0, place).weights
    np.save(place / "weights.npy", first)
    engine.create("run", SPEC)
    again = train_steps(run, engine, 0).weights
    compare_weights(run, again, first, deterministic=deterministic, what="undisturbed again")


def recover(run: Run, engine: GroupEngine, place: Path, *, deterministic: bool) -> None:
    engine.restore("run", checkpoints.read({name: (place / name).read_bytes() for name in FILES}))
    found = train_steps(run, engine, SNAPSHOT_AT).weights
    undisturbed = np.load(place / "weights.npy")
    compare_weights(run, found, undisturbed, deterministic=deterministic, what="restored by a new group")


def until_killed(run: Run, engine: GroupEngine) -> None:
    engine.create("run", SPEC)
    for number in range(STEPS):
        if number == KILL_AT:
            assert run.followers is not None
            threading.Timer(0.03, shoot, args=(run.followers.pids[0], Path(run.given.folder))).start()
        for _ in range(20 if number == KILL_AT else 1):
            engine.forward_backward([Work("run", run.batch(engine._group.ranks, seed=number))])
        engine.optim_steps([("run", AdamParams(1e-3))])
    raise AssertionError("the group outlived its rank")


def train_steps(run: Run, engine: GroupEngine, first: int, place: Path | None = None) -> AdapterState:
    """With a place, a snapshot is left there on the way."""
    for number in range(first, STEPS):
        engine.forward_backward([Work("run", run.batch(engine._group.ranks, seed=number))])
        engine.optim_steps([("run", AdamParams(1e-3))])
        if place is not None and number + 1 == SNAPSHOT_AT:
            for name, data in checkpoints.write(engine.state("run"), "random").items():
                (place / name).write_bytes(data)
    return engine.state("run")


def compare_weights(run: Run, found: np.ndarray, expected: np.ndarray, **about: Any) -> None:
    run.row(**about, same_bits=bool(np.array_equal(found, expected)), difference=error(found, expected))


def shoot(pid: int, folder: Path) -> None:
    (folder / "killed").write_text(str(time.time()))
    os.kill(pid, signal.SIGKILL)


def beside(run: Run) -> None:
    """`--role train` on the first card, `--role sample` on the second; the files of `folder` are their signals."""
    folder, role = Path(run.given.folder), run.given.role
    base = Base(train.model_of(run.shape("8B")))
    if role == "train":
        engine = TorchEngine(base, run.settings)
        if base.can_compile:
            base.compile()
        wait_for(folder / "sampler is ready")
        run.time(engine, 1, role=role, beside="nothing")
        engine.create("run", SPEC)
        engine.forward_backward([Work("run", run.batch(1))])
        engine.optim_steps([("run", AdamParams(1e-4))])
        for name, data in checkpoints.write(engine.state("run"), "random").items():
            (folder / name).write_bytes(data)
        (folder / "trained").touch()
        wait_for(folder / "sampling")
        run.time(engine, 1, role=role, beside="a sampler on another card")
        (folder / "done").touch()
        return
    sampler = TorchSampler(base)
    amount = {"sequences": 64, "tokens": 16 if run.given.tiny else 64}
    drain(sampler, **amount)
    (folder / "sampler is ready").touch()
    wait_for(folder / "trained")
    sampler.hold("trained", checkpoints.read({name: (folder / name).read_bytes() for name in FILES}))
    sampled(sampler, amount)  # its first time
    run.row(role=role, beside="nothing", **sampled(sampler, amount))
    (folder / "sampling").touch()
    while not (folder / "done").exists():
        run.row(role=role, beside="a trainer on another card", **sampled(sampler, amount))


def sampled(sampler: TorchSampler, amount: dict[str, int]) -> Row:
    started = time.perf_counter()
    count = sum(len(s.tokens) for done in drain(sampler, held="trained", **amount) for s in done.sequences)
    return {"sampled": count, "sampled_per_s": count / (time.perf_counter() - started)}


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def allocated() -> float | None:
    return torch.cuda.memory_allocated() / 2**30 if train.ON_GPU else None


PARTS: dict[str, Callable[[Run], None]] = {
    f.__name__: f for f in (scaling, exact, large, large_deepspeed, kill, beside, full)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cards", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--to", type=Path, default=Path("scale.json"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--seconds", type=int, default=180, help="the most that a part may take")
    for inner in ("part", "rows", "folder", "role"):  # of the processes that this one starts
        parser.add_argument(f"--{inner}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        one_process(given)
    else:
        every_part(given)


def one_process(given: argparse.Namespace) -> None:
    if given.role:
        torch.set_num_threads(4)
        PARTS[given.part](Run(given, None, None))
        return
    place, followers = place_in_environment(), None
    if place is None:
        place, followers = start_followers(given.cards, [sys.executable, *sys.argv])
    end_with_leader()
    group = Group(place, torch.device("cuda", place.local_rank) if train.ON_GPU else torch.device("cpu"))
    PARTS[given.part](Run(given, group, followers))
    group.close()
    if followers is not None:
        followers.let_go()


def every_part(given: argparse.Namespace) -> None:
    report: Row = {"command": " ".join(sys.argv), "ranks": given.cards, "machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()

        def keep() -> None:
            report["rows"] = [json.loads(line) for line in rows.read_text().splitlines()]
            given.to.write_text(json.dumps(report, indent=1))

        for part in given.parts.split(","):
            place = Path(folder) / part
            place.mkdir()
            command = [sys.executable, *sys.argv, "--part", part, "--rows", str(rows), "--folder", str(place)]
            started = time.perf_counter()
            for number, status in enumerate(run_part(part, command, given.seconds, place, rows)):
                with rows.open("a") as file:
                    about = {
                        "part": part,
                        "process": number,
                        "status": status,
                        "seconds": time.perf_counter() - started,
                    }
                    file.write(json.dumps(about) + "\n")
                keep()
    print(given.to)


def run_part(part: str, command: list[str], seconds: int, folder: Path, rows: Path) -> Any:
    """Yields the exit status of every process it took (None: it took too long)."""
    if part == "beside":
        roles = [
            subprocess.Popen([*command, "--role", role], env=card(n))
            for n, role in enumerate(("train", "sample"))
        ]
        for process in roles:
            yield wait(process, seconds)
        return
    yield wait(subprocess.Popen(command), seconds)
    if part == "kill" and (folder / "killed").exists():
        row = {"part": part, "group_down_after_s": time.time() - float((folder / "killed").read_text())}
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        yield wait(subprocess.Popen(command), seconds)


def card(number: int) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": str(number)} if train.ON_GPU else {**os.environ}


def wait(process: "subprocess.Popen[bytes]", seconds: int) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # the others of its group end with it
        return None


def machine() -> Row:
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {"cards": names or platform.machine(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
