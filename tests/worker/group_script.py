"""A group of ranks that trains and samples on a tiny base, for test_parallel.py: the same scenarios for one process
and for many. A rank that torchrun starts is `-m tests.worker.group_script FOLDER OUT PARALLEL`, in deterministic mode.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith.wire import loss_graph
from tinsmith.wire.batch import CustomInput, TrainInput
from tinsmith.wire.losses import LOSSES
from tinsmith_worker import checkpoints
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    Failure,
    LoraSpec,
    MuonParams,
    SampleInput,
    SampleOutput,
    Work,
)
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.parallel.engine import GroupEngine
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.parallel.launch import Place, place_in_environment
from tinsmith_worker.parallel.load import read_sharded, read_zero
from tinsmith_worker.parallel.shard import ShardedBase
from tinsmith_worker.sampler import TorchSampler
from tinsmith_worker.slots import Slots

Found = dict[str, Any]
SPEC = LoraSpec(8, 5)
TENANTS = {
    "ada": (LoraSpec(8, 1), tiny.batch("cross_entropy", (33, 90, 5), seed=1)),
    "bob": (LoraSpec(3, 2, train_mlp=False), tiny.batch("ppo", (64,), seed=2, clip_low_threshold=0.9)),
    "cyd": (LoraSpec(16, 3, train_attn=False), tiny.batch("gspo", (70, 41, 88, 2, 60), seed=3)),
    "dee": (LoraSpec(8, 4, train_unembed=False), tiny.batch("cross_entropy", (12, 50), seed=4, width=3)),
    "eve": (LoraSpec(8, 5, train_attn=False, train_mlp=False), tiny.batch("dro", (40,), seed=5, beta=0.3)),
    "fay": (LoraSpec(8, 6), tiny.batch("cispo", (1,), seed=6)),
}


def every_loss(engine: TorchEngine) -> Found:
    found: Found = {}
    for number, loss in enumerate(sorted(LOSSES)):
        engine.restore("run", tiny.trained(engine.base, SPEC, seed=number))
        given = tiny.batch(loss, (7, 30, 12, 51, 3), seed=number)
        (output,) = engine.forward_backward([Work("run", given)])
        found |= {f"{loss} logprobs": output.logprobs_TK, f"{loss} losses": output.losses_T}
        found[f"{loss} gradient"] = engine.state("run").gradient
    engine.drop("run")
    return found


def uneven_batches(engine: TorchEngine) -> Found:
    """One token, one sequence, one long among short ones, more than a pass, nothing but forward."""
    found: Found = {}
    for lengths in ((1,), (70,), (5, 300, 4, 4), (100, 200, 150, 90, 60, 30), (2, 3)):
        engine.restore("run", tiny.trained(engine.base, SPEC))
        for forward_only in (True, False):
            given = tiny.batch("ppo", lengths, seed=7, forward_only=forward_only)
            (output,) = engine.forward_backward([Work("run", given)])
            found[f"{lengths} {forward_only}"] = output.losses_T
        found[f"{lengths} gradient"] = engine.state("run").gradient
    engine.drop("run")
    return found


def tenants_together(engine: TorchEngine) -> Found:
    for run, (spec, _) in TENANTS.items():
        engine.restore(run, tiny.trained(engine.base, spec, seed=spec.seed))
    look = tiny.batch("cross_entropy", (21,), seed=9, forward_only=True)
    work = [Work(run, given) for run, (_, given) in TENANTS.items()]
    outputs = engine.forward_backward([*work, Work("ada", look), *work])
    found: Found = {str(number): output.losses_T for number, output in enumerate(outputs)}
    found |= {run: engine.state(run).gradient for run in TENANTS}
    for run in TENANTS:
        engine.drop(run)
    return found


STEPS = [
    AdamParams(1e-2),
    AdamParams(1e-2, grad_clip_norm=0.1),
    AdamParams(3e-3, beta1=0.8, beta2=0.99, eps=1e-8, weight_decay=0.1),
]


def optimizer(engine: TorchEngine) -> Found:
    """Two calls a step, with somebody looking at the state in between; two runs step together."""
    found: Found = {}
    runs = {"one": SPEC, "two": LoraSpec(4, 2, train_mlp=False)}
    for run, spec in runs.items():
        engine.create(run, spec)
    for number, params in enumerate(STEPS):
        for part in range(2):
            given = tiny.batch("cross_entropy", (20, 9, 31), seed=10 * number + part)
            engine.forward_backward([Work(run, given) for run in runs])
            found[f"{number}.{part} gradient"] = engine.state("one").gradient
        for run, answer in zip(runs, engine.optim_steps([(run, params) for run in runs]), strict=True):
            assert isinstance(answer, dict), answer
            found[f"{number} norm of {run}"] = np.array([answer["grad_norm"]])
    found |= {f"{run} {name}": flat for run in runs for name, flat in flats(engine.state(run)).items()}
    for run in runs:
        engine.drop(run)
    return found


def node(op: str, name: str, target: str, *args: object) -> dict[str, object]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


def custom_batch(lengths: tuple[int, ...], *, seed: int) -> TrainInput:
    """-sum(exp(logprobs - q) * advantages), with the mean of the ratio as its metric: a graph as clients send it."""
    names = ("logprobs", "q", "advantages")
    nodes = [
        *(node("placeholder", name, name) for name in names),
        node("call_function", "sub", "operator.sub", {"ref": "logprobs"}, {"ref": "q"}),
        node("call_function", "exp", "torch.exp", {"ref": "sub"}),
        node("call_function", "mul", "operator.mul", {"ref": "exp"}, {"ref": "advantages"}),
        node("call_method", "sum_1", "sum", {"ref": "mul"}),
        node("call_function", "neg", "operator.neg", {"ref": "sum_1"}),
        node("call_method", "mean", "mean", {"ref": "exp"}),
    ]
    answer = [{"ref": "neg"}, {"dict": {"custom/ratio:mean": {"ref": "mean"}}}]
    nodes.append(node("output", "output", "output", {"tuple": answer}))
    inputs = [{"name": name, "rank": 1} for name in names]
    graph = loss_graph.read(loss_graph.write("gain", inputs, {"format": 1, "nodes": nodes}))
    given = tiny.batch("ppo", lengths, seed=seed)
    columns = [np.split(given.columns[name], given.offsets_S[1:-1]) for name in ("logprobs", "advantages")]
    custom = CustomInput(graph, tuple(zip(*columns, strict=True)))
    return replace(given, loss=loss_graph.LOSS, columns={}, custom=custom)


def computed_anew(engine: TorchEngine) -> Found:
    """The first layer runs again in the backward."""
    engine._keep(Keeping(recomputed_layers=1))
    engine.restore("run", tiny.trained(engine.base, SPEC))
    (output,) = engine.forward_backward([Work("run", tiny.batch("ppo", (30, 12, 51)))])
    found: Found = {"losses": output.losses_T, "gradient": engine.state("run").gradient}
    engine.drop("run")
    engine._keep(None)
    return found


def custom_losses(engine: TorchEngine) -> Found:
    """Beside a loss that we know; the metrics are summed over what the ranks computed."""
    for run in ("own", "known"):
        engine.restore(run, tiny.trained(engine.base, SPEC))
    work = [Work("own", custom_batch((7, 30, 12, 51, 3), seed=1)), Work("known", tiny.batch("ppo", (20, 41)))]
    own, known = engine.forward_backward(work)
    found = {"losses": own.losses_T, "logprobs": own.logprobs_TK, "known losses": known.losses_T}
    found |= {name: np.array([value]) for name, value in own.metric_sums.items()}
    found |= {f"{run} gradient": engine.state(run).gradient for run in ("own", "known")}
    for run in ("own", "known"):
        engine.drop(run)
    return found


def muon(engine: TorchEngine) -> Found:
    """Beside a run that steps otherwise; all of it is begun before the first answer is asked for."""
    steps = [("one", MuonParams(1e-2, weight_decay=0.1)), ("two", AdamParams(1e-2))]
    for run, _ in steps:
        engine.restore(run, tiny.trained(engine.base, SPEC))
    begun = []
    for seed in range(2):
        given = tiny.batch("cross_entropy", (20, 9, 31), seed=seed)
        engine.begin_forward_backward([Work(run, given) for run, _ in steps])
        begun.append(engine.begin_optim_steps(steps))
    found: Found = {}
    for number, step in enumerate(begun):
        for (run, _), answer in zip(steps, step.get(), strict=True):
            assert isinstance(answer, dict), answer
            assert answer["optimizer_step"] == number + 1
            found[f"{number} norm of {run}"] = np.array([answer["grad_norm"]])
    for run, _ in steps:
        found |= {f"{run} {name}": flat for name, flat in flats(engine.state(run)).items()}
        engine.drop(run)
    assert "one moment2" not in found
    return found


def refused_steps(engine: TorchEngine) -> Found:
    """A step that cannot be taken leaves the gradient, one that is not finite clears it; both once."""
    engine.restore("run", tiny.trained(engine.base, SPEC))
    given = tiny.batch("cross_entropy", (20, 9, 31), seed=1)
    engine.forward_backward([Work("run", given)])
    assert isinstance(tiny.step(engine, "run", AdamParams(eps=0.0)), Failure)
    found = {"left": engine.state("run").gradient}
    assert isinstance(tiny.step(engine, "run", AdamParams(eps=0.0)), Failure)
    assert isinstance(tiny.step(engine, "run", AdamParams(1e-3)), dict)
    weights = np.full_like(given.columns["weights"], np.inf)
    engine.forward_backward([Work("run", replace(given, columns={"weights": weights}))])
    assert isinstance(tiny.step(engine, "run", AdamParams(1e-3)), Failure)
    engine.forward_backward([Work("run", given)])
    found |= flats(engine.state("run"))
    engine.drop("run")
    return found


def paging(engine: TorchEngine) -> Found:
    """Adapters that come and go, with an accumulated gradient."""
    size = engine.size_bytes(SPEC)
    slots = Slots(engine, slot_bytes=2 * size, host_bytes=100 * size)
    runs = [f"run{n}" for n in range(4)]
    for run in runs:
        slots.restore(run, tiny.trained(engine.base, SPEC, seed=3), "tenant")
    for seed in range(2):
        for run in runs:
            slots.bring([run])
            engine.forward_backward([Work(run, tiny.batch("ppo", (30, 20), seed=seed))])
    found = {run: slots.begin_state(run).arrival.result().gradient for run in runs}
    for run in runs:
        slots.drop(run)
    return found


def begun(engine: TorchEngine) -> AdapterState:
    """A run in the middle: stepped twice, half a gradient accumulated."""
    engine.restore("run", tiny.trained(engine.base, SPEC))
    for step in range(2):
        engine.forward_backward([Work("run", tiny.batch("cross_entropy", (20, 9, 31), seed=step))])
        tiny.step(engine, "run", AdamParams(1e-3, eps=1e-6))
    engine.forward_backward([Work("run", tiny.batch("cross_entropy", (20, 9, 31), seed=8))])
    state = engine.state("run")
    engine.drop("run")
    return state


def continued(engine: TorchEngine, state: AdapterState) -> Found:
    engine.restore("run", state)
    engine.forward_backward([Work("run", tiny.batch("cross_entropy", (14, 22, 8), seed=9))])
    tiny.step(engine, "run", AdamParams(1e-3, eps=1e-6))
    found = flats(engine.state("run"))
    engine.drop("run")
    return found


def sampling(engine: TorchEngine) -> Found:
    """Greedy and drawn, the base alone and an adapter, prompts scored."""
    sampler = TorchSampler(engine.base)
    sampler.hold("adapter", tiny.trained(engine.base, SPEC))
    prompt = np.arange(40, 52, dtype=np.int32)
    for number, (held, temperature) in enumerate([("", 0.0), ("", 1.0), ("adapter", 0.0), ("adapter", 0.7)]):
        sampler.add(
            SampleInput(
                str(number),
                held,
                prompt[number:],
                3,
                12,
                seed=number,
                temperature=temperature,
                prompt_logprobs=True,
            )
        )
    found: Found = {}
    while sampler.busy:
        for done in sampler.step():
            assert isinstance(done, SampleOutput), done
            for place, sequence in enumerate(done.sequences):
                found[f"{done.request_id}.{place} tokens"] = sequence.tokens
                found[f"{done.request_id}.{place} logprobs"] = sequence.logprobs
            found[f"{done.request_id} prompt"] = done.prompt_logprobs[1:]
    return found


def together_and_alone(engine: TorchEngine) -> Found:
    """In deterministic mode: every tenant alone, then all at once with somebody looking at their states in between."""
    found: Found = {}
    for runs in (*([run] for run in TENANTS), list(TENANTS)):
        for run in runs:
            engine.restore(run, tiny.trained(engine.base, TENANTS[run][0], seed=TENANTS[run][0].seed))
        work = [Work(run, TENANTS[run][1]) for run in runs]
        outputs = engine.forward_backward(work)
        if len(runs) > 1:
            for run in runs:
                engine.state(run)
        engine.forward_backward(work)
        for run, output in zip(runs, outputs, strict=True):
            name = "together" if len(runs) > 1 else "alone"
            found[f"{run} {name} losses"] = output.losses_T
            found[f"{run} {name} gradient"] = engine.state(run).gradient
            engine.drop(run)
    return found


def _no_room(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory, say")


def failing_pass(engine: TorchEngine) -> Found:
    """One rank alone cannot compute its part; the pass fails, and the next one does not."""
    found: Found = {}
    engine.create("run", SPEC)
    given = tiny.batch("cross_entropy", (60, 60, 60, 60))
    for place in (0, -1):
        broken = tiny.batch("cross_entropy", (60, 60, 60, 60))
        broken.tokens_T[place] = 10**6
        try:
            engine.forward_backward([Work("run", broken)])
        except (IndexError, RuntimeError) as error:
            found[f"error at {place}"] = np.array([str(error)])
        engine.restore("run", tiny.trained(engine.base, SPEC))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine.base, "backward", _no_room)
        with pytest.raises(MemoryError, match="rank 0: no room"):
            engine.forward_backward([Work("run", given)])
        engine.restore("run", tiny.trained(engine.base, SPEC))
    (output,) = engine.forward_backward([Work("run", given)])
    engine.drop("run")
    return found | {"losses": output.losses_T}


def scores(engine: TorchEngine) -> Found:
    """What a text is scored with, and what a run that is trained on it is told."""
    state = tiny.trained(engine.base, SPEC)
    engine.restore("run", state)
    found: Found = {}
    for seed, length in ((1, 30), (2, 2)):
        given = tiny.batch("cross_entropy", (length,), seed=seed, forward_only=True)
        text = np.append(given.tokens_T, given.targets_TK[-1]).astype(np.int32)
        given.targets_TK[:, 0] = text[1:]
        (found[f"scored {length}"],) = engine.score([(engine.frozen("run"), text)])
        (output,) = engine.forward_backward([Work("run", given)])
        found[f"trained {length}"] = output.logprobs_TK[:, 0]
    engine.drop("run")
    return found


def flats(state: AdapterState) -> Found:
    given = {name: getattr(state, name) for name in ("weights", "moment1", "moment2", "gradient")}
    return {name: flat for name, flat in given.items() if flat is not None}


SCENARIOS: dict[str, Callable[[TorchEngine], Found]] = {
    scenario.__name__: scenario
    for scenario in (
        every_loss,
        computed_anew,
        custom_losses,
        uneven_batches,
        tenants_together,
        optimizer,
        muon,
        refused_steps,
        paging,
        sampling,
    )
}


@dataclass(frozen=True)
class Asked:
    """parallel: with what is offloaded, and where to: "fsdp2 host", "deepspeed disk". resume: also continue the run that
    another group left there. compiled: layers are, as they would be on GPUs."""

    folder: Path
    out: Path
    parallel: str
    deterministic: bool = False
    resume: Path | None = None
    compiled: bool = False


def work(asked: Asked, place: Place) -> None:
    """What each of the ranks does."""
    group = Group(place, torch.device("cpu"))
    engine = GroupEngine(read_base(asked, group), group, EngineSettings(256, asked.deterministic))
    if group.leads:
        lead(engine, asked)
        engine.close()
    else:
        engine.follow()
        group.close()
    np.save(asked.out / f"kept{group.rank}.npy", engine._adapters["kept"].weights.numpy())


def read_base(asked: Asked, group: Group) -> Base:
    parallel, _, where = asked.parallel.partition(" ")
    if parallel == "none":
        return Base.load(asked.folder, device=group.device, dtype=torch.float32)
    options: dict[str, Any] = {"dtype": torch.float32, "offload": where == "host"}
    if parallel == "fsdp2":
        return ShardedBase(read_sharded(asked.folder, group, **options), group)
    folder = str(asked.out.with_name(f"{asked.out.name} disk")) if where == "disk" else ""
    return ShardedBase(read_zero(asked.folder, group, **options, folder=folder), group)


def lead(engine: TorchEngine, asked: Asked) -> None:
    if asked.deterministic:
        np.savez(asked.out / "together_and_alone.npz", **together_and_alone(engine))
    else:
        run_all(engine, asked.out, asked.resume)
    if asked.parallel == "none":
        np.savez(asked.out / "scores.npz", **scores(engine))
        np.savez(asked.out / "failing_pass.npz", **failing_pass(engine))
    engine.create("kept", SPEC)
    for step in range(3):
        engine.forward_backward([Work("kept", tiny.batch("cross_entropy", (20, 9, 31), seed=step))])
        tiny.step(engine, "kept", AdamParams(1e-2))


def run_all(engine: TorchEngine, out: Path, resume: Path | None) -> None:
    for name, scenario in SCENARIOS.items():
        np.savez(out / f"{name}.npz", **scenario(engine))
    for name, data in checkpoints.write(begun(engine), "tiny").items():
        (out / name).write_bytes(data)
    if resume is not None:
        np.savez(out / "continued.npz", **continued(engine, read_state(resume)))


def read_state(folder: Path) -> AdapterState:
    names = (checkpoints.CONFIG, checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.SPEC)
    return checkpoints.read({name: (folder / name).read_bytes() for name in names})


if __name__ == "__main__":
    told = place_in_environment()
    assert told is not None, "for torchrun"
    work(Asked(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], deterministic=True), told)
