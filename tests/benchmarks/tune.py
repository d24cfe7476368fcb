"""Single-tenant training: whole steps of full fine-tuning, with layers compiled and not, and of PEFT's methods beside
transformers' and PEFT's own loops; how near the gradients are to autograd's; what a snapshot costs.

    PYTHONPATH=client:api:worker:. python3 tests/benchmarks/tune.py --seconds 4 --limit 280 --to run.json
    PYTHONPATH=client:api:worker:. python3 tests/benchmarks/tune.py --parts "gradients,full 0.6B"

On a CUDA machine bases of Qwen3 shapes in bfloat16, 32 sequences of 512 tokens a step. Without a GPU a rehearsal of
the same parts: the tiny shape in float32, 4 sequences of 128 tokens, and an attention in plain torch that layers can
be compiled around. Random weights, AdamW. The loops beside it keep all weights, gradients and moments of full
fine-tuning in the base's dtype; ours keeps float32 beside it. The report is written after every number.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests.benchmarks import train
from tests.benchmarks.train import ON_GPU, Row, say
from tests.worker.one_call import attention_in_one_call
from tinsmith_worker import checkpoints
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, LoraSpec, SampleInput, Work
from tinsmith_worker.engine import EngineSettings
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.engine import FULL, TunedEngine, TunedSampler

train.SHAPES["1.7B"] = train.SHAPES["0.6B"] | {"hidden_size": 2048, "intermediate_size": 6144}
train.SHAPES["4B"] = train.SHAPES["8B"] | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}
FEW_LAYERS = "0.6B, 4 of 28 layers, 8k of 152k words" if ON_GPU else "tiny"
LENGTHS = [512] * 32 if ON_GPU else [128] * 4
METHODS: dict[str, tuple[LoraSpec, Callable[[], peft.PeftConfig]]] = {
    "dora": (
        LoraSpec(0, 1, train_unembed=False, method="dora", settings={"rank": 32, "alpha": 32}),
        lambda: peft.LoraConfig(r=32, lora_alpha=32, use_dora=True, target_modules=train.LINEARS),
    ),
    "oft": (
        LoraSpec(0, 1, train_unembed=False, method="oft", settings={"block_size": 32}),
        lambda: peft.OFTConfig(r=0, oft_block_size=32, target_modules=train.LINEARS),
    ),
}
Rows = Iterator[Row]


def gradients(seconds: float) -> Rows:
    """‖difference‖ / ‖gradient‖ of full fine-tuning against autograd's through transformers' model in float32, of
    the same weights; in bfloat16 transformers' own is as far off as that dtype takes it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = train.batch([200, 313, 64, 7], train.SHAPES[FEW_LAYERS]["vocab_size"], 3)
    exact = by_autograd(torch.float32, given)
    for dtype in (torch.float32, torch.bfloat16):
        row: Row = {"shape": FEW_LAYERS, "dtype": str(dtype).removeprefix("torch.")}
        if dtype != torch.float32:
            row["transformers"] = apart(by_autograd(dtype, given), exact)
            yield row
        # In float32 there is no kernel that layers could be compiled around, so it is plain torch there.
        with around(dtype):
            engine = TunedEngine(TunedBase(few_layers(dtype)))
            plain = by_engine(engine, given)
            row["not compiled"] = apart(plain, exact)
            yield row
            row["ready after s"] = compiled(engine)
            layers = len(engine.base._layers)
            for name, keeping in {
                "compiled": Keeping(),
                "compiled, lean": Keeping(lean_layers=layers),
                "compiled, computed anew": Keeping(recomputed_layers=layers),
            }.items():
                engine.base.keeping = keeping
                found = by_engine(engine, given)
                row[name], row[f"{name}, against not"] = apart(found, exact), apart(found, plain)
                yield row
        del engine
        train.free()


def few_layers(dtype: torch.dtype) -> Any:
    """Weights that bfloat16 holds, in any dtype."""
    model = train.model_of(FEW_LAYERS).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model


Gradients = dict[str, torch.Tensor]


def by_autograd(dtype: torch.dtype, given: Any) -> Gradients:
    model = few_layers(dtype)
    start = 0
    for length in given.lengths_S.tolist():
        rows = slice(start, start + length)
        tokens = torch.from_numpy(given.tokens_T[rows].astype(np.int64)).to(train.DEVICE)[None]
        targets = torch.from_numpy(given.targets_TK[rows, 0]).to(train.DEVICE)
        logits = model(input_ids=tokens, use_cache=False).logits[0].float()
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        start = rows.stop
    return {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters()}


def by_engine(engine: TunedEngine, given: Any) -> Gradients:
    engine.create("compared", FULL)
    engine.forward_backward([Work("compared", given)])
    state = engine.state("compared")
    engine.drop("compared")
    assert state.gradient is not None
    flat = torch.from_numpy(state.gradient).double()
    return {name: flat[at : at + int(np.prod(shape))].view(shape) for name, at, shape in state.tensors}


def apart(found: Gradients, expected: Gradients) -> float:
    assert set(found) == set(expected)
    off = sum(float((found[name] - one).square().sum()) for name, one in expected.items())
    return float((off / sum(float(one.square().sum()) for one in expected.values())) ** 0.5)


def full(shape: str, seconds: float) -> Rows:
    """Of a run whose layers are compiled, as a worker's on a GPU are, of the same run without, and of transformers."""
    row: Row = {"shape": shape, "method": "full"}
    with around(train.DTYPE):
        engine = TunedEngine(TunedBase(train.model_of(shape)))
        row["ready after s"] = compiled(engine)
        engine.create("run", FULL)
        row["parameters"] = engine.base.blank_adapter(FULL, device=torch.device("meta")).weights.numel()
        for name in ("compiled", "not compiled"):
            if name == "not compiled":
                engine.base.run_eagerly()
            row[name] = timed(engine, seconds)
            yield row
            row[f"prompt tokens/s, {name}"] = read(engine)
            yield row
        row["over not compiled"] = row["compiled"]["tokens/s"] / row["not compiled"]["tokens/s"]
        moment = engine._adapters["run"].moment1
        assert moment is not None
        row["moments on"] = moment.device.type
    del engine, moment
    train.free()
    model = train.model_of(shape).train()
    step = train.peft_step(model, [LENGTHS], 8192)
    row["transformers"] = train.timed(step, sum(LENGTHS), seconds=seconds)
    row["over transformers"] = row["compiled"]["tokens/s"] / row["transformers"]["tokens/s"]
    yield row


def around(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Attention that layers can be compiled around, if there is no kernel for it."""
    has_kernel = ON_GPU and dtype != torch.float32
    return contextlib.nullcontext() if has_kernel else attention_in_one_call()


def compiled(engine: TunedEngine) -> float:
    """Have its layers compiled; the seconds it took."""
    started = time.perf_counter()
    base = engine.base
    base.can_compile |= not ON_GPU or base.dtype == torch.float32
    engine.warm_up()
    train.synchronize()
    assert base.is_compiled, "the layers cannot be compiled here: see what the log says"
    return time.perf_counter() - started


def timed(engine: TunedEngine, seconds: float) -> Row:
    found = train.timed(step_of(engine), sum(LENGTHS), seconds=seconds)
    kept = engine.base.kept
    return found | {"lean layers": kept.lean_layers, "layers computed anew": kept.recomputed_layers}


def step_of(engine: TunedEngine) -> Callable[[], None]:
    work = [Work("run", train.batch(LENGTHS, engine.facts.vocab_size, 0))]

    def step() -> None:
        engine.forward_backward(work)
        (answer,) = engine.optim_steps([("run", AdamParams(1e-5))])
        assert isinstance(answer, dict), answer

    return step


def read(engine: TunedEngine) -> float:
    """Tokens a second of prompts, none of which begins as another, after as many that warm up."""
    sampler = TunedSampler(engine.base)
    sampler.hold("s", engine.frozen("run"))
    taken = 0.0
    for seed in range(2):
        random, began = np.random.default_rng(seed), time.perf_counter()
        for number, length in enumerate(LENGTHS):
            prompt = random.integers(0, engine.facts.vocab_size, length).astype(np.int32)
            sampler.add(SampleInput(f"{seed}.{number}", "s", prompt, 1, 1, 1, stop_tokens=()))
        run(sampler)
        taken = time.perf_counter() - began
    return sum(LENGTHS) / taken


def run(sampler: TunedSampler) -> None:
    while sampler.busy:
        for done in sampler.step():
            assert not isinstance(done, tuple), done


def by_method(shape: str, method: str, seconds: float) -> Rows:
    spec, config = METHODS[method]
    row: Row = {"shape": shape, "method": method}
    engine = TunedEngine(TunedBase(train.model_of(shape)))
    engine.create("run", spec)
    row["ours"] = timed(engine, seconds)
    yield row
    del engine
    train.free()
    wrapped = peft.get_peft_model(train.model_of(shape), config()).train()
    for at_once in (8192, 4096, 2048):
        try:
            step = train.peft_step(wrapped, [LENGTHS], at_once)
            row["peft"] = train.timed(step, sum(LENGTHS), seconds=seconds) | {"at once": at_once}
            break
        except torch.OutOfMemoryError:
            wrapped.zero_grad()
            train.free()
    yield row


def snapshot(shape: str, seconds: float) -> Rows:
    """How long the engine's thread copies, and how long another one then makes files of it; and how fast 32
    sequences are sampled."""
    engine = TunedEngine(TunedBase(train.model_of(shape)))
    engine.create("run", FULL)
    step_of(engine)()
    train.synchronize()
    started = time.perf_counter()
    state = engine.state("run")
    row: Row = {"shape": shape, "copy seconds": time.perf_counter() - started}
    started = time.perf_counter()
    files = checkpoints.write(state, "base")
    row |= {
        "snapshot GB": sum(map(len, files.values())) / 1e9,
        "files seconds": time.perf_counter() - started,
    }
    yield row
    del files, state
    sampler = TunedSampler(engine.base)
    sampler.hold("s", engine.frozen("run"))
    prompt = np.arange(64, dtype=np.int32)
    for tokens in (4, 64 if ON_GPU else 16):
        sampler.add(SampleInput(f"r{tokens}", "s", prompt, 32, tokens, 1, stop_tokens=()))
        started = time.perf_counter()
        run(sampler)
        row["sampled tokens/s"] = 32 * tokens / (time.perf_counter() - started)
    yield row


def deterministic(seconds: float) -> Rows:
    """With compiled layers: whether steps with moments in host memory have the bits of those with moments on the
    device, and a forward those of the pass that trains."""
    row: Row = {"shape": FEW_LAYERS}
    states = []
    with around(train.DTYPE):
        for reserve_bytes in (0, 1 << 50):
            base = TunedBase(train.model_of(FEW_LAYERS))
            base.reserve_bytes = reserve_bytes
            engine = TunedEngine(base, EngineSettings(deterministic=True))
            compiled(engine)
            engine.create("run", FULL)
            step = step_of(engine)
            for _ in range(3):
                step()
            given = train.batch(LENGTHS, engine.facts.vocab_size, 1)
            both = [replace(given, forward_only=True), given]
            forward, trains = (engine.forward_backward([Work("run", one)])[0].logprobs_TK for one in both)
            row["a forward has the bits"] = np.array_equal(forward, trains)
            moment = engine._adapters["run"].moment1
            assert moment is not None
            states.append((moment.device.type, engine.state("run")))
            del engine, step
            train.free()
    (one, on_device), (other, in_host) = states
    names = ("weights", "moment1", "moment2", "gradient")
    equal = all(np.array_equal(getattr(on_device, n), getattr(in_host, n)) for n in names)
    yield row | {"moments on": f"{one} and {other}", "equal bits": equal}


def of(shape: str) -> str:
    return shape if ON_GPU else "tiny"


PARTS: dict[str, Callable[[float], Rows]] = {
    "gradients": gradients,
    "full 0.6B": lambda s: full(of("0.6B"), s),
    "full 1.7B": lambda s: full(of("1.7B"), s),
    "dora 8B": lambda s: by_method(of("8B"), "dora", s),
    "snapshot 0.6B": lambda s: snapshot(of("0.6B"), s),
    "snapshot 1.7B": lambda s: snapshot(of("1.7B"), s),
    "oft 8B": lambda s: by_method(of("8B"), "oft", s),
    "full 4B": lambda s: full(of("4B"), s),
    "deterministic": deterministic,  # the last: it makes all of torch so
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for the repeats of each number (default 10)"
    )
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no more is measured")
    parser.add_argument("--to", type=Path, default=Path("bench-tune.json"), help="where the report goes")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as a worker does
    # A worker has layers of one shape and dtype; here are many, and past so many torch compiles no more.
    torch._dynamo.config.recompile_limit = 64
    command = "tests/benchmarks/tune.py " + " ".join(sys.argv[1:])
    report: Row = {"command": command, "machine": train.machine(), "parts": {}}
    for name in given.parts.split(","):
        rows = report["parts"][name] = []
        say("part", name)
        try:
            measure(PARTS[name](given.seconds), rows, report, given)
        except Exception as error:  # the other parts may do
            rows.append({"error": repr(error)[:300]})
            say(rows[-1])
        given.to.write_text(json.dumps(report, indent=1))
        train.free()
    print(train.table(report))


def measure(part: Rows, rows: list[Row], report: Row, given: argparse.Namespace) -> None:
    while (left := given.limit - (time.perf_counter() - train.STARTED)) > 0:
        if (row := next(part, None)) is None:
            return
        if row not in rows:
            rows.append(row)
        say(json.dumps(row)[-300:])
        given.to.write_text(json.dumps(report, indent=1))
    rows.append({"not measured": f"the limit was over {-left:.0f} s ago"})


if __name__ == "__main__":
    main()
