"""Single-tenant training: whole steps of full fine-tuning and of PEFT's methods beside transformers' and PEFT's own
loops, what a snapshot costs, how fast such weights are sampled, and how near the gradients are to autograd's.

    PYTHONPATH=client:api:worker:. python3 tests/benchmarks/tune.py --to run.json

On a CUDA machine bases of the Qwen3-0.6B, 1.7B, 4B and 8B shapes in bfloat16; without a GPU the tiny one's, in float32.
Random weights, 32 sequences of 512 tokens a step (4 of 128 without a GPU), AdamW. The loops beside it keep all
weights, gradients and moments of full fine-tuning in the base's dtype; ours keeps float32 beside it.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests.benchmarks import train
from tests.benchmarks.train import ON_GPU, Row, say
from tinsmith_worker import checkpoints
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


def full(shape: str, seconds: float, *, saves: bool = True) -> Iterator[Row]:
    row: Row = {"shape": shape, "method": "full"}
    engine = TunedEngine(TunedBase(train.model_of(shape)))
    engine.create("run", FULL)
    row["parameters"] = engine.base.blank_adapter(FULL, device=torch.device("meta")).weights.numel()
    row["ours"] = train.timed(step_of(engine), sum(LENGTHS), seconds=seconds)
    moment = engine._adapters["run"].moment1
    assert moment is not None
    row["moments on"] = moment.device.type
    yield row
    if saves:
        row |= snapshot(engine)
        yield row
        row["sampled tokens/s"] = sampled(engine)
    engine.drop("run")
    del engine
    train.free()
    model = train.model_of(shape).train()
    row["transformers"] = train.timed(train.peft_step(model, [LENGTHS], 8192), sum(LENGTHS), seconds=seconds)
    yield row


def by_method(shape: str, seconds: float) -> Iterator[Row]:
    for method, (spec, config) in METHODS.items():
        row: Row = {"shape": shape, "method": method}
        engine = TunedEngine(TunedBase(train.model_of(shape)))
        engine.create("run", spec)
        row["ours"] = train.timed(step_of(engine), sum(LENGTHS), seconds=seconds)
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
        del wrapped
        train.free()
        yield row


def step_of(engine: TunedEngine) -> Callable[[], None]:
    work = [Work("run", train.batch(LENGTHS, engine.facts.vocab_size, 0))]

    def step() -> None:
        engine.forward_backward(work)
        (answer,) = engine.optim_steps([("run", AdamParams(1e-5))])
        assert isinstance(answer, dict), answer

    return step


def snapshot(engine: TunedEngine) -> Row:
    """How long the engine's thread copies, and how long another one then makes files of it."""
    started = time.perf_counter()
    state = engine.state("run")
    copied = time.perf_counter()
    files = checkpoints.write(state, "base")
    size = sum(map(len, files.values()))
    return {
        "snapshot GB": size / 1e9,
        "copy seconds": copied - started,
        "files seconds": time.perf_counter() - copied,
    }


def sampled(engine: TunedEngine) -> float:
    """Tokens a second of 32 sequences."""
    sampler = TunedSampler(engine.base)
    sampler.hold("s", engine.frozen("run"))
    prompt = np.arange(64, dtype=np.int32)

    def draw(tokens: int) -> float:
        sampler.add(SampleInput(f"r{tokens}", "s", prompt, 32, tokens, 1, stop_tokens=()))
        started = time.perf_counter()
        while sampler.busy:
            sampler.step()
        return 32 * tokens / (time.perf_counter() - started)

    draw(4)
    return draw(64 if ON_GPU else 16)


def gradients(seconds: float) -> Iterator[Row]:
    """‖difference‖ / ‖gradient‖ of full fine-tuning against autograd's through transformers' model, float32."""
    shape = "0.6B, 4 of 28 layers, 8k of 152k words"
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = TunedEngine(TunedBase(train.model_of(shape).float()))
    engine.create("run", FULL)
    lengths = [200, 313, 64, 7]
    given = train.batch(lengths, engine.facts.vocab_size, 3)
    engine.forward_backward([Work("run", given)])
    state = engine.state("run")
    assert state.gradient is not None
    found = torch.from_numpy(state.gradient).double()
    model = train.model_of(shape).float().eval()
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        tokens = torch.from_numpy(given.tokens_T[rows].astype(np.int64)).to(train.DEVICE)[None]
        targets = torch.from_numpy(given.targets_TK[rows, 0]).to(train.DEVICE)
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        start = rows.stop
    expected = torch.zeros_like(found)
    named: dict[str, Any] = dict(model.named_parameters())
    for name, offset, _ in state.tensors:
        gradient = named[name].grad.double().cpu().flatten()
        expected[offset : offset + len(gradient)] = gradient
    yield {"shape": shape, "gradient": float((found - expected).norm() / expected.norm())}


def moments(seconds: float) -> Iterator[Row]:
    """Whether steps with moments in host memory have the bits of those with moments on the device."""
    states = []
    for reserve_bytes in (0, 1 << 50):
        base = TunedBase(train.model_of("0.6B, 4 of 28 layers, 8k of 152k words"))
        base.reserve_bytes = reserve_bytes
        engine = TunedEngine(base, EngineSettings(deterministic=True))
        engine.create("run", FULL)
        step = step_of(engine)
        for _ in range(3):
            step()
        moment = engine._adapters["run"].moment1
        assert moment is not None
        states.append((moment.device.type, engine.state("run")))
        del engine, step
        train.free()
    (one, on_device), (other, in_host) = states
    names = ("weights", "moment1", "moment2")
    equal = all(np.array_equal(getattr(on_device, n), getattr(in_host, n)) for n in names)
    yield {"moments on": f"{one} and {other}", "equal bits": equal}


def parts() -> dict[str, Callable[[float], Iterator[Row]]]:
    if not ON_GPU:
        return {
            "gradients": gradients,
            "full tiny": lambda s: full("tiny", s),
            "tiny": lambda s: by_method("tiny", s),
        }
    return {
        "gradients": gradients,
        "full 0.6B": lambda s: full("0.6B", s),
        "full 1.7B": lambda s: full("1.7B", s),
        "full 4B": lambda s: full("4B", s, saves=False),
        "8B": lambda s: by_method("8B", s),
        "moments": moments,  # the last: it makes all of torch deterministic
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for the repeats of each number (default 10)"
    )
    parser.add_argument("--to", type=Path, default=Path("bench-tune.json"), help="where the report goes")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as a worker does
    command = f"tests/benchmarks/tune.py --seconds {given.seconds:g}"
    report: Row = {"command": command, "machine": train.machine(), "parts": {}}
    for name, part in parts().items():
        rows = report["parts"][name] = []
        try:
            for row in part(given.seconds):
                if row not in rows:
                    rows.append(row)
                say(json.dumps(row)[:300])
                given.to.write_text(json.dumps(report, indent=1))
        except Exception as error:  # the other parts may do
            rows.append({"error": repr(error)[:300]})
        given.to.write_text(json.dumps(report, indent=1))
        train.free()
    print(train.table(report))


if __name__ == "__main__":
    main()
