"""A group of ranks that trains all weights of a tiny base, for test_tuned_group.py: the same scenarios for one
process and for many."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.worker import tiny
from tests.worker.group_script import Asked, Found, custom_batch, flats
from tests.worker.one_call import as_on_a_gpu
from tinsmith.errors import InvalidInput
from tinsmith.wire.losses import LOSSES
from tinsmith_api.journal.objects import DirectoryStore
from tinsmith_worker import checkpoints, in_pieces
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, AdapterState, Failure, LoraSpec, SampleInput, Work
from tinsmith_worker.engine import EngineSettings
from tinsmith_worker.in_pieces import Held
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.launch import Place
from tinsmith_worker.parallel.load import read_sharded
from tinsmith_worker.slots import Slots
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.engine import FULL, TunedEngine, TunedSampler
from tinsmith_worker.tuning.group import ShardedTunedEngine, ShardedTunedSampler, TunedGroupEngine
from tinsmith_worker.tuning.shards import ShardedTunedBase

ADAM = AdamParams(3e-3, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.5)
METHODS = [
    LoraSpec(0, 3, method="dora", settings={"rank": 8, "alpha": 16}),
    LoraSpec(0, 4, method="oft", settings={"block_size": 16}),
]


def state_of(engine: TunedEngine, run_id: str = "run") -> AdapterState:
    """All of it, as one process has it: read from the files that it is written to."""
    state = engine.state(run_id)
    if not isinstance(state, Held):
        return state
    files = {name: b"".join(map(bytes, pieces())) for name, pieces in in_pieces.write(state).items()}
    return checkpoints.read(files)


def losses(engine: TunedEngine) -> Found:
    found: Found = {}
    for number, loss in enumerate(sorted(LOSSES)):
        engine.create("run", FULL)
        (output,) = engine.forward_backward([Work("run", tiny.batch(loss, (7, 30, 12, 51, 3), seed=number))])
        found |= {f"{loss} logprobs": output.logprobs_TK, f"{loss} losses": output.losses_T}
        found[f"{loss} gradient"] = state_of(engine).gradient
    engine.create("run", FULL)
    (own,) = engine.forward_backward([Work("run", custom_batch((7, 30, 12, 51, 3), seed=1))])
    found |= {"custom losses": own.losses_T, "custom gradient": state_of(engine).gradient}
    found |= {name: np.array([value]) for name, value in own.metric_sums.items()}
    engine.drop("run")
    return found


def uneven(engine: TunedEngine) -> Found:
    """One token, one sequence, one long among short ones, more than a pass, nothing but forward; gradients that
    several calls add up."""
    found: Found = {}
    engine.create("run", FULL)
    for lengths in ((1,), (70,), (5, 300, 4, 4), (100, 200, 150, 90, 60, 30), (2, 3)):
        for forward_only in (True, False):
            given = tiny.batch("ppo", lengths, seed=7, forward_only=forward_only)
            (output,) = engine.forward_backward([Work("run", given)])
            found[f"{lengths} {forward_only}"] = output.losses_T
        found[f"{lengths} gradient"] = state_of(engine).gradient
    engine.drop("run")
    return found


def steps(engine: TunedEngine) -> Found:
    """Clipped and not, several calls a step, layers computed anew, and steps that are refused."""
    found: Found = {}
    engine.create("run", FULL)
    for number, params in enumerate([ADAM, replace(ADAM, grad_clip_norm=0.0), ADAM]):
        engine._keep(Keeping(recomputed_layers=number))
        work = [Work("run", tiny.batch(seed=10 * number + part)) for part in range(2)]
        engine.forward_backward(work)
        assert isinstance(tiny.step(engine, "run", replace(params, eps=0.0)), Failure)
        answer = tiny.step(engine, "run", params)
        assert isinstance(answer, dict), answer
        assert answer["optimizer_step"] == number + 1
        found[f"norm {number}"] = np.array([answer["grad_norm"]])
    engine._keep(None)
    given = tiny.batch(seed=1)
    engine.forward_backward(
        [Work("run", replace(given, columns={"weights": np.full_like(given.columns["weights"], np.inf)}))]
    )
    assert isinstance(tiny.step(engine, "run", ADAM), Failure)
    engine.forward_backward([Work("run", given)])
    found |= flats(state_of(engine))
    engine.drop("run")
    return found


def two_runs(engine: TunedEngine) -> Found:
    """By turns in one slot: each leaves for host memory, with an accumulated gradient, when the other computes."""
    size = engine.size_bytes(FULL)
    slots = Slots(engine, slot_bytes=size, host_bytes=100 * size)
    for run in ("one", "two"):
        slots.create(run, FULL, "tenant")
    for seed in range(2):
        for number, run in enumerate(("one", "two")):
            slots.bring([run])
            engine.forward_backward([Work(run, tiny.batch("ppo", (30, 20), seed=10 * number + seed))])
            if seed == 0:
                tiny.step(engine, run, ADAM)
                engine.forward_backward([Work(run, tiny.batch("ppo", (30, 20), seed=5 + number))])
    found: Found = {}
    for run in ("one", "two"):
        slots.bring([run])
        found |= {f"{run} {name}": flat for name, flat in flats(state_of(engine, run)).items()}
        slots.drop(run)
    return found


def methods(engine: TunedEngine) -> Found:
    """Where every rank has the whole base."""
    found: Found = {}
    for spec in METHODS:
        engine.create("run", spec)
        for seed in range(2):
            (output,) = engine.forward_backward([Work("run", tiny.batch(seed=seed))])
            found[f"{spec.method} {seed}"] = output.losses_T
            tiny.step(engine, "run", ADAM)
        found |= {f"{spec.method} {name}": flat for name, flat in flats(state_of(engine)).items()}
        engine.drop("run")
    return found


def sampling(engine: TunedEngine) -> Found:
    """The base, a run's weights as they were, and those of files; while the run trains on."""
    of_group = isinstance(engine, ShardedTunedEngine)
    sampler = (ShardedTunedSampler if of_group else TunedSampler)(engine.base)
    engine.create("run", FULL)
    tuned(engine, 1)
    sampler.hold("then", engine.frozen("run"))
    sampler.hold("read", replace(state_of(engine), moment1=None, moment2=None, step=0))
    tuned(engine, 1, first=1)
    found: Found = {}
    for number, (held, temperature) in enumerate([("", 0.0), ("then", 0.0), ("read", 1.0), ("", 1.0)]):
        prompt = np.arange(40, 52, dtype=np.int32)[number:]
        sampler.add(
            SampleInput(
                str(number), held, prompt, 2, 6, seed=3, temperature=temperature, prompt_logprobs=True
            )
        )
    while sampler.busy:
        for done in sampler.step():
            assert not isinstance(done, tuple), done
            for place, sequence in enumerate(done.sequences):
                found[f"{done.request_id}.{place} tokens"] = sequence.tokens
                found[f"{done.request_id}.{place} logprobs"] = sequence.logprobs
            found[f"{done.request_id} prompt"] = done.prompt_logprobs[1:]
    tuned(engine, 1, first=2)
    sampler.release("then")
    found |= flats(state_of(engine))
    engine.drop("run")
    return found


def tuned(engine: TunedEngine, count: int, *, first: int = 0) -> None:
    for seed in range(first, first + count):
        engine.forward_backward([Work("run", tiny.batch(seed=seed))])
        tiny.step(engine, "run", ADAM)


def begin(engine: TunedEngine, store: DirectoryStore) -> None:
    """Leave a run in the middle in a store: stepped twice, half a gradient accumulated."""
    engine.create("run", FULL)
    tuned(engine, 2)
    engine.forward_backward([Work("run", tiny.batch(seed=8))])
    state = engine.state("run")
    if isinstance(state, Held):
        assert state.nbytes * engine._ranks < 1.3 * 4 * 4 * state.size, "it is no part of the whole"
        store.put_stream("begun", in_pieces.write(state))
        store.put_stream("exported", in_pieces.export(state))
    else:
        store.put("begun", checkpoints.write(state, "tiny"))
        store.put("exported", checkpoints.export(state, "tiny"))
    engine.drop("run")


def go_on(engine: TunedEngine, store: DirectoryStore) -> Found:
    """What was left there, restored; and loaded into another run, with and without its optimizer."""
    in_pieces_too = engine.has_states_in_pieces
    state = in_pieces.open_stored(store, "begun") if in_pieces_too else checkpoints.read(store.get("begun"))
    engine.restore("run", state)
    tuned(engine, 1, first=9)
    found = flats(state_of(engine))
    for optimizer in (True, False):
        engine.create("run", FULL)
        tuned(engine, 1)
        engine.forward_backward([Work("run", tiny.batch(seed=3))])
        engine.load("run", state, optimizer=optimizer)
        tuned(engine, 1, first=9)
        found |= {f"{optimizer} {name}": flat for name, flat in flats(state_of(engine)).items()}
        assert state_of(engine).step == (3 if optimizer else 1)
    engine.drop("run")
    return found


def deterministic(engine: TunedEngine) -> Found:
    """Calls given together and one by one, looked at in between or not."""
    found: Found = {}
    given = [tiny.batch("ppo", (30, 12, 51), seed=1), tiny.batch(seed=2)]
    for name in ("together", "alone"):
        engine.create("run", FULL)
        for _ in range(2):
            if name == "together":
                engine.forward_backward([Work("run", one) for one in given])
            else:
                for one in given:
                    engine.forward_backward([Work("run", one)])
                    engine.state("run")
            tiny.step(engine, "run", ADAM)
        found |= {f"{name} {flat}": values for flat, values in flats(state_of(engine)).items()}
        engine.drop("run")
    return found


SCENARIOS = {one.__name__: one for one in (losses, uneven, steps, two_runs, sampling)}


def run_all(engine: TunedEngine, out: Path) -> None:
    for name, scenario in SCENARIOS.items():
        np.savez(out / f"{name}.npz", **scenario(engine))
    begin(engine, DirectoryStore(out))
    if isinstance(engine, ShardedTunedEngine):
        for refused in METHODS:
            try:
                engine.create("run", refused)
            except InvalidInput as error:
                (out / f"{refused.method}.txt").write_text(str(error))
    else:
        np.savez(out / "methods.npz", **methods(engine))


def work(asked: Asked, runs_left: list[Path], place: Place) -> None:
    """What each of the ranks does; `runs_left`: they also go on with what was left there."""
    engine = open_engine(asked, Group(place, torch.device("cpu")))
    with as_on_a_gpu() if asked.compiled else contextlib.nullcontext():
        run(engine, asked, runs_left)
    held = [len(engine.base.counterparts._things)] if isinstance(engine, ShardedTunedEngine) else []
    np.save(asked.out / f"held{place.rank}.npy", np.array(held))


def run(engine: Any, asked: Asked, runs_left: list[Path]) -> None:
    engine.base.can_compile, engine.base.pass_tokens = asked.compiled, 256
    if engine._group.leads:
        engine.warm_up()
        if asked.deterministic:
            np.savez(asked.out / "deterministic.npz", **deterministic(engine))
        run_all(engine, asked.out)
        for folder in runs_left:
            np.savez(asked.out / f"resumed {folder.name}.npz", **go_on(engine, DirectoryStore(folder)))
        engine.close()
    else:
        engine.follow()
        engine._group.close()
    assert engine.base.is_compiled == asked.compiled


def open_engine(asked: Asked, group: Group) -> Any:
    settings = EngineSettings(256, asked.deterministic)
    if asked.parallel == "none":
        base = TunedBase.load(asked.folder, device=group.device, dtype=torch.float32)
        return TunedGroupEngine(base, group, settings)
    model = read_sharded(asked.folder, group, dtype=torch.float32)
    return ShardedTunedEngine(ShardedTunedBase(model, group), group, settings)
