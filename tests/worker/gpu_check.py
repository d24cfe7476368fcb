"""Does the engine compute on this machine's GPU what transformers + PEFT compute, and how fast?

    PYTHONPATH=client:api:worker python tests/worker/gpu_check.py           # a CUDA GPU of 80 GB, five minutes
    PYTHONPATH=client:api:worker python tests/worker/gpu_check.py --tiny    # any machine, small shapes

Needs torch, transformers, peft, numpy and safetensors; downloads nothing, all weights are random. Each part
runs in a process of its own, so that one may fail, or change torch's settings, without the others.
Prints a table last; with OUT set in the environment writes gpu_check.json there. Exit status 1: a check failed.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from tinsmith.wire.batch import TrainInput
from tinsmith_worker.contract import AdamParams, Failure, LoraSpec, SampleInput, SampleOutput, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import TorchSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Finding = dict[str, Any]
Shape = dict[str, Any]

SMALL: Shape = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
QWEN3_8B: Shape = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}

# Ranks, targets, losses and shapes of six tenants; together more than one pass of 1024 tokens.
TENANTS: dict[str, tuple[LoraSpec, TrainInput]] = {
    "all": (LoraSpec(32, 1), tiny.batch("cross_entropy", (200, 313, 64), seed=1)),
    "attention": (LoraSpec(8, 2, train_mlp=False), tiny.batch("ppo", (100, 29), seed=2)),
    "mlp": (LoraSpec(16, 3, train_attn=False), tiny.batch("gspo", (70, 141, 88), seed=3)),
    "no unembed": (LoraSpec(12, 4, train_unembed=False), tiny.batch("dro", (120,), seed=4)),
    "unembed": (LoraSpec(8, 5, train_attn=False, train_mlp=False), tiny.batch("cispo", (90,), seed=5)),
    "one token": (LoraSpec(32, 6), tiny.batch("importance_sampling", (1,), seed=6)),
}


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s]", *words, flush=True)


STARTED = time.perf_counter()


def error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    a, b = (torch.as_tensor(x).double().cpu().flatten() for x in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def engine_with(
    shape: Shape, dtype: torch.dtype, *, grouped: bool | None = None, **settings: Any
) -> TorchEngine:
    base = Base(tiny.model(dtype=dtype, **shape).to(DEVICE))
    engine = TorchEngine(base, EngineSettings(**{"max_tokens_per_pass": 1024, **settings}))
    if grouped is not None:
        base.grouped_deltas = grouped
    for run, (spec, _) in TENANTS.items():
        engine.restore(run, tiny.trained(base, spec, seed=spec.seed, spread=0.02))
    return engine


def trained(engine: TorchEngine, runs: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(logprobs, gradient) of each run after two operations each, all in one call."""
    work = [Work(run, TENANTS[run][1]) for run in runs]
    outputs = engine.forward_backward(work + work)
    found = {}
    for run, output in zip(runs, outputs, strict=False):
        gradient = engine.state(run).gradient
        assert gradient is not None
        found[run] = (output.logprobs_TK, gradient)
    return found


def check_numbers(shape: Shape) -> list[Finding]:
    """The engine against transformers + PEFT in float32; in bfloat16 it may err as much as PEFT does there."""
    findings = []
    exact: dict[str, tiny.Reference] = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = engine_with(shape, dtype)
        worst = {"logprobs": 0.0, "gradient": 0.0, "PEFT's logprobs": 0.0, "PEFT's gradient": 0.0}
        for run, (_, given) in TENANTS.items():
            output = engine.forward_backward([Work(run, given)])[0]
            state = engine.state(run)
            model = tiny.peft(tiny.model(dtype=dtype, **shape).to(DEVICE), state)
            theirs = tiny.reference(model, given)
            truth = exact.setdefault(run, theirs)
            order = [tiny.peft_name(name) for name, _, _ in state.tensors]
            expected, by_peft = (
                torch.cat([r.gradients[n].float().flatten() for n in order]) for r in (truth, theirs)
            )
            gradients = tiny.tensors(state, state.gradient).values()
            found = torch.cat([torch.from_numpy(g).flatten() for g in gradients])
            for name, value in {
                "logprobs": error(output.logprobs_TK, truth.logprobs),
                "gradient": error(found, expected),
                "PEFT's logprobs": error(theirs.logprobs, truth.logprobs),
                "PEFT's gradient": error(by_peft, expected),
            }.items():
                worst[name] = max(worst[name], value)
        for name in ("logprobs", "gradient"):
            limit = 5e-5 if dtype == torch.float32 else 2 * worst[f"PEFT's {name}"]
            findings.append(
                {
                    "check": f"{name} against PEFT in float32, engine in {dtype}".replace("torch.", ""),
                    "error": worst[name],
                    "limit": limit,
                    "passed": worst[name] <= limit,
                    "PEFT's own error": worst[f"PEFT's {name}"],
                }
            )
        say(dtype, worst)
    return findings


def check_packing(shape: Shape) -> list[Finding]:
    """Tenants packed together against each alone, and grouped products against the loop over adapters."""
    findings = []
    for dtype, limit in ((torch.float32, 5e-5), (torch.bfloat16, 0.05)):
        packed = trained(engine_with(shape, dtype), list(TENANTS))
        alone = {run: trained(engine_with(shape, dtype), [run])[run] for run in TENANTS}
        loop = trained(engine_with(shape, dtype, grouped=False), list(TENANTS))
        for what, others in (("each alone", alone), ("the loop over adapters", loop)):
            worst = max(error(a, b) for run in TENANTS for a, b in zip(packed[run], others[run], strict=True))
            findings.append(
                {
                    "check": f"packed against {what}, {dtype}".replace("torch.", ""),
                    "error": worst,
                    "limit": limit,
                    "passed": worst <= limit,
                }
            )
            say(findings[-1])
    return findings


def check_deterministic(shape: Shape) -> list[Finding]:
    """In deterministic mode a tenant's bits are its own: packed with anyone in any order, and run again."""
    findings = []
    orders = [list(TENANTS), list(TENANTS)[::-1], ["one token", "all", "mlp"], ["all", "no unembed"]]
    for dtype in (torch.float32, torch.bfloat16):
        alone = {run: trained(engine_with(shape, dtype, deterministic=True), [run])[run] for run in TENANTS}
        differing = [
            f"{run} of {len(order)}"
            for order in [*orders, orders[0]]
            for run, found in trained(engine_with(shape, dtype, deterministic=True), order).items()
            if not all(np.array_equal(a, b) for a, b in zip(found, alone[run], strict=True))
        ]
        findings.append(
            {
                "check": f"deterministic mode: packed bits equal alone, {dtype}".replace("torch.", ""),
                "error": float(len(differing)),
                "limit": 0.0,
                "passed": not differing,
                "differing": differing,
            }
        )
        say(findings[-1])
    return findings


def check_sampler(shape: Shape) -> list[Finding]:
    """What the sampler says of the tokens it drew against what a forward of the same weights says."""
    findings = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        engine = engine_with(shape, dtype)
        sampler = TorchSampler(engine.base)
        worst = 0.0
        for run in ("all", "attention"):
            sampler.hold(run, engine.state(run))
        for run in ("all", "attention"):
            prompt = np.arange(5, 45, dtype=np.int32)
            sampler.add(SampleInput(run, run, prompt, 8, 64, seed=1, stop_tokens=()))
        while sampler.busy:
            for output in sampler.step():
                assert isinstance(output, SampleOutput), output
                for sequence in output.sequences:
                    whole = np.concatenate([prompt, sequence.tokens])
                    given = _next_tokens(whole)
                    forward = engine.forward_backward([Work(output.request_id, given)])[0]
                    theirs = forward.logprobs_TK[len(prompt) - 1 :, 0]
                    worst = max(worst, float(np.abs(theirs - sequence.logprobs).mean()))
        findings.append(
            {
                "check": f"sampler's logprobs against forward's, mean, {dtype}".replace("torch.", ""),
                "error": worst,
                "limit": limit,
                "passed": worst <= limit,
            }
        )
        say(findings[-1])
    return findings


def _next_tokens(tokens: np.ndarray) -> TrainInput:
    rows = len(tokens) - 1
    return TrainInput(
        loss="cross_entropy",
        forward_only=True,
        lengths_S=np.array([rows]),
        tokens_T=tokens[:-1],
        targets_TK=tokens[1:, None].astype(np.int64),
        target_widths_S=np.zeros(1, np.int64),
        columns={"weights": np.ones((rows, 1), np.float32)},
    )


def check_speed(*, tiny_shapes: bool) -> list[Finding]:
    """Whole training steps, tokens per second: transformers + PEFT one adapter at a time, and the engine."""
    shape = TINY if tiny_shapes else QWEN3_8B
    scale = 16 if tiny_shapes else 1
    rank = 8 if tiny_shapes else 32
    cases = [("1 tenant x 32 x 512", 1, 32, 512 // scale), ("16 tenants x 8 x 128", 16, 8, 128 // scale)]
    config = Qwen3Config(**shape)
    say("transformers + PEFT")
    model = _random_model(config)
    baseline = {name: _time_peft(model, rank, *case) for name, *case in cases}
    del model
    _free()
    say("the engine")
    base = Base(_random_model(config))
    findings = []
    for name, tenants, sequences, length in cases:
        engine = TorchEngine(base)
        found = _time_engine(engine, rank, tenants, sequences, length)
        findings.append(
            {"speed": name, "tokens/s": found["tokens/s"], "PEFT tokens/s": baseline[name]["tokens/s"]}
            | {
                "ratio": found["tokens/s"] / baseline[name]["tokens/s"],
                "engine": found,
                "PEFT": baseline[name],
            }
        )
        say(findings[-1])
        if tenants > 1 and base.grouped_deltas:
            base.grouped_deltas = False
            by_loop = _time_engine(engine, rank, tenants, sequences, length)
            base.grouped_deltas = True
            findings[-1]["engine, loop over adapters"] = by_loop
            say("loop over adapters", by_loop)
        del engine
        _free()
    return findings


def _random_model(config: Any) -> Any:
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _time_peft(model: Any, rank: int, tenants: int, sequences: int, length: int) -> Finding:
    """One adapter trained `tenants` times stands for so many: switching them would only add to the time."""
    modules = tiny.ATTENTION + tiny.MLP
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules=modules)).train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")
    tokens = torch.randint(0, 1000, (sequences, length + 1), device=DEVICE)
    at_once = max(1, 8192 // length)

    def step() -> None:
        for _ in range(tenants):
            for some in tokens.split(at_once):
                logits = wrapped(input_ids=some[:, :-1], use_cache=False).logits
                F.cross_entropy(
                    logits.float().flatten(0, 1), some[:, 1:].flatten(), reduction="sum"
                ).backward()
                del logits
            optimizer.step()
            optimizer.zero_grad()

    found = _timed(step, tenants * sequences * length)
    wrapped.unload()
    return found


def _time_engine(engine: TorchEngine, rank: int, tenants: int, sequences: int, length: int) -> Finding:
    work = []
    for number in range(tenants):
        engine.create(str(number), LoraSpec(rank, number, train_unembed=False))
        work.append(Work(str(number), tiny.batch("cross_entropy", (length,) * sequences, seed=number)))

    def step() -> None:
        engine.forward_backward(work)
        for one in work:
            answer = engine.optim_step(one.run_id, AdamParams(1e-5))
            assert not isinstance(answer, Failure), answer

    found = _timed(step, tenants * sequences * length)
    for one in work:
        engine.drop(one.run_id)
    return found


def _timed(step: Callable[[], None], tokens: int, repeats: int = 3) -> Finding:
    """The fastest of some steps after one to warm up, and the most memory one took."""
    step()
    _synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    return {"tokens/s": tokens / min(seconds), "seconds": seconds, "peak GiB": memory}


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


PARTS = ["numbers", "packing", "deterministic", "sampler", "speed"]


def run_part(part: str, *, tiny_shapes: bool) -> list[Finding]:
    if part == "speed":
        return check_speed(tiny_shapes=tiny_shapes)
    checks = {
        "numbers": check_numbers,
        "packing": check_packing,
        "deterministic": check_deterministic,
        "sampler": check_sampler,
    }
    return checks[part](TINY if tiny_shapes else SMALL)


def run_all(*, tiny_shapes: bool, parts: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
    }
    for part in parts:
        say("part", part)
        with tempfile.NamedTemporaryFile() as written:
            command = [sys.executable, __file__, "--part", part, "--to", written.name]
            done = subprocess.run(command + ["--tiny"] * tiny_shapes, check=False)
            text = Path(written.name).read_text()
        report[part] = json.loads(text) if done.returncode == 0 else f"failed with status {done.returncode}"
    return report


def table(report: dict[str, Any]) -> str:
    lines = [f"\ntorch {report['torch']} on {report['device']}"]
    for part in PARTS:
        findings = report.get(part, [])
        if isinstance(findings, str):
            lines.append(f"{'FAILED':7} {part}: {findings}, see above")
            continue
        for found in findings:
            if "check" in found:
                verdict = "ok" if found["passed"] else "FAILED"
                lines.append(
                    f"{verdict:7} {found['check']:62} {found['error']:.2e} (limit {found['limit']:.0e})"
                )
            else:
                lines.append(
                    f"{'speed':7} {found['speed']:24} engine {found['tokens/s']:8.0f} tokens/s, "
                    f"PEFT {found['PEFT tokens/s']:8.0f}, ratio {found['ratio']:.2f}, "
                    f"peak {found['engine']['peak GiB']:.0f} against {found['PEFT']['peak GiB']:.0f} GiB"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    parser.add_argument("--part", choices=PARTS, help="this part only")
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.to:
        given.to.write_text(json.dumps(run_part(given.part, tiny_shapes=given.tiny)))
        return
    report = run_all(tiny_shapes=given.tiny, parts=[given.part] if given.part else PARTS)
    if folder := os.environ.get("OUT"):
        Path(folder, "gpu_check.json").write_text(json.dumps(report, indent=1))
    text = table(report)
    print(text)
    sys.exit("FAILED" in text)


if __name__ == "__main__":
    main()
