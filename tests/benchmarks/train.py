"""Whole training steps, tokens per second: the engine beside transformers + PEFT, which trains one adapter at a time.

    make bench-train                                        # this machine's tables
    PYTHONPATH=client:api:worker python3 tests/benchmarks/train.py --parts tenants,profile --to run.json

On a CUDA machine the base is of the Qwen3-8B shape in bfloat16; without a GPU it is the built-in tiny one and some
layers of the Qwen3-0.6B shape, in float32. Weights and tokens are random, nothing is downloaded. A step is forward,
backward and AdamW of every tenant. Needs torch, transformers, peft and numpy, and nothing of the service.
The report is written after every number; what cannot be measured says why, and the rest goes on.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from tinsmith.wire.batch import TrainInput
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
Row = dict[str, Any]

SHAPES: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "0.6B": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "tie_word_embeddings": True,
    },
}  # fmt: skip
# Of Qwen3-30B-A3B: 128 experts in every layer, of which a token meets 8.
SHAPES["30B-A3B"] = SHAPES["8B"] | {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
# A whole step of the 0.6B shape takes a CPU minutes: a few layers and a short vocabulary tell the same.
SHAPES["0.6B, 4 of 28 layers, 8k of 152k words"] = SHAPES["0.6B"] | {
    "num_hidden_layers": 4,
    "vocab_size": 8192,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(shape: str) -> Any:
    config_class = Qwen3MoeConfig if "num_experts" in SHAPES[shape] else Qwen3Config
    config = config_class(**SHAPES[shape], max_position_embeddings=40960)
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def ragged(count: int, longest: int, seed: int) -> tuple[int, ...]:
    """Lengths spread evenly between a 64th of the longest and the longest."""
    return tuple(np.random.default_rng(seed).integers(longest // 64, longest + 1, count).tolist())


def batch(lengths: Sequence[int], vocabulary: int, seed: int) -> TrainInput:
    random, tokens = np.random.default_rng(seed), sum(lengths)
    return TrainInput(
        loss="cross_entropy",
        forward_only=False,
        lengths_S=np.array(lengths, np.int64),
        tokens_T=random.integers(0, vocabulary, tokens).astype(np.int32),
        targets_TK=random.integers(0, vocabulary, (tokens, 1)),
        target_widths_S=np.zeros(len(lengths), np.int64),
        columns={"weights": np.ones((tokens, 1), np.float32)},
    )


def timed(step: Callable[[], None], tokens: int, *, seconds: float, repeats: int = 5) -> Row:
    """Some steps after one to warm up, at least two, as many as the time allows: the median and the spread."""
    step()
    synchronize()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 2 or (len(taken) < repeats and time.perf_counter() - began < seconds):
        start = time.perf_counter()
        step()
        synchronize()
        taken.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    return summary(tokens, taken) | {"peak GiB": peak}


def summary(tokens: int, taken: list[float]) -> Row:
    middle = statistics.median(taken)
    return {"tokens/s": tokens / middle, "slowest": tokens / max(taken), "fastest": tokens / min(taken),
            "seconds": middle, "steps": len(taken)}  # fmt: skip


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


# transformers + PEFT


def time_peft(model: Any, rank: int, tenants: Sequence[Sequence[int]], *, seconds: float, half: bool) -> Row:
    """`half`: adapters of the base's dtype instead of float32."""
    # They come one after the other: a part of them tells as well how many tokens a second it is.
    tenants = [tenant[:32] for tenant in tenants[:4]]
    wrapped = with_adapter(model, rank, half=half)
    try:
        for at_once in (8192, 4096, 2048):
            try:
                found = timed(peft_step(wrapped, tenants, at_once), sum(map(sum, tenants)), seconds=seconds)
                dtype = "base's" if half else "float32"
                return found | {"at once": at_once, "adapters": dtype, "tenants": len(tenants)}
            except torch.OutOfMemoryError:
                wrapped.zero_grad()
                free()
        raise RuntimeError("no memory for PEFT, however small its batches")
    finally:
        wrapped.unload()


def with_adapter(model: Any, rank: int, *, half: bool = False) -> Any:
    config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules=LINEARS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=not half).train()


def peft_step(
    wrapped: Any, tenants: Sequence[Sequence[int]], at_once: int, *, exchange: bool = False
) -> Callable[[], None]:
    """Every tenant's sequences in padded batches of like lengths, a step each. One adapter stands for all, which
    flatters PEFT; or each has its own, with its own moments, and they are exchanged (`exchange`)."""
    names = [f"tenant_{number}" for number in range(len(tenants))] if exchange else ["default"]
    optimizers = []
    for name in names:
        if exchange:
            if name not in wrapped.peft_config:
                wrapped.add_adapter(name, wrapped.peft_config["default"])
            wrapped.set_adapter(name)
        adapters = [p for p in wrapped.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(adapters, lr=1e-5, betas=(0.9, 0.95), fused=True))
    vocabulary = wrapped.config.vocab_size
    batches = [[padded(group, vocabulary) for group in alike(tenant, at_once)] for tenant in tenants]

    def step() -> None:
        for number, of_tenant in enumerate(batches):
            optimizer = optimizers[number % len(optimizers)]
            if exchange:
                wrapped.set_adapter(names[number])
            for tokens, targets, mask in of_tenant:
                logits = wrapped(input_ids=tokens, attention_mask=mask, use_cache=False).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
                loss.backward()
                del logits, loss
            optimizer.step()
            optimizer.zero_grad()

    return step


def alike(lengths: Sequence[int], at_once: int) -> list[list[int]]:
    """Sequences sorted by length, in groups of at most so many tokens once padded."""
    groups: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if not groups or groups[-1][0] * (len(groups[-1]) + 1) > at_once:
            groups.append([])
        groups[-1].append(length)
    return groups


def padded(lengths: list[int], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    lengths_S, longest = torch.tensor(lengths, device=DEVICE), max(lengths)
    tokens = torch.randint(0, vocabulary, (len(lengths), longest), device=DEVICE)
    inside = torch.arange(longest, device=DEVICE) < lengths_S[:, None]
    targets = torch.where(inside, tokens, -100)
    return tokens, targets, None if min(lengths) == longest else inside.long()


# The engine


def time_engine(
    engine: TorchEngine, ranks: Sequence[int], tenants: Sequence[Sequence[int]], *, seconds: float
) -> Row:
    step, names = ready(engine, ranks, tenants)
    try:
        found = timed(step, sum(map(sum, tenants)), seconds=seconds)
        kept = engine.base.kept
        return found | {"lean layers": kept.lean_layers, "layers computed anew": kept.recomputed_layers}
    finally:
        for name in names:
            engine.drop(name)
        free()


def ready(
    engine: TorchEngine, ranks: Sequence[int], tenants: Sequence[Sequence[int]]
) -> tuple[Callable[[], None], list[str]]:
    """A whole step of all tenants, whose adapters are made; and their names."""
    vocabulary = engine.facts.vocab_size
    names = [str(number) for number in range(len(tenants))]
    work = []
    for number, (name, rank, lengths) in enumerate(zip(names, ranks, tenants, strict=True)):
        engine.create(name, LoraSpec(rank, number, train_unembed=False))
        work.append(Work(name, batch(lengths, vocabulary, number)))

    def step() -> None:
        engine.forward_backward(work)
        answers = engine.optim_steps([(name, AdamParams(1e-5)) for name in names])
        assert all(isinstance(answer, dict) for answer in answers), answers

    return step, names


def engine_on(
    model: Any, *, deterministic: bool = False, max_tokens: int = 8192
) -> tuple[TorchEngine, float]:
    """The engine, and how long it took to get ready."""
    started = time.perf_counter()
    engine = TorchEngine(Base(model), EngineSettings(max_tokens, deterministic))
    engine.warm_up()
    synchronize()
    return engine, time.perf_counter() - started


# Parts. Each yields its rows, and may fill in a row that it yielded; every yield is saved.

Rows = Iterator[Row]


_engines: dict[str, TorchEngine] = {}  # the one that was compared with PEFT serves the other parts, too


def the_8b() -> TorchEngine:
    if "8B" not in _engines:
        _engines["8B"] = engine_on(model_of("8B"))[0]
    return _engines["8B"]


def tenants_8b(seconds: float) -> Rows:
    """The engine against PEFT, rank 32 (8 where 64 adapters of 32 find no room)."""
    room = torch.cuda.get_device_properties(DEVICE).total_memory / 2**30
    cases: list[Case] = [
        ("1 x 32 x 512", 32, [[512] * 32]),
        ("16 x 8 x 128", 32, [[128] * 8] * 16),
        ("64 x 1 x 256", 32 if room > 120 else 8, [[256]] * 64),
        ("1 x 64 ragged 32..2048", 32, [ragged(64, 2048, 0)]),
        ("8 x 8 ragged 32..2048", 32, [ragged(8, 2048, n) for n in range(8)]),
    ]
    return side_by_side("8B", cases, seconds)


def small_gpu(seconds: float) -> Rows:
    cases: list[Case] = [("1 x 32 x 512", 32, [[512] * 32]), ("16 x 8 x 128", 32, [[128] * 8] * 16)]
    return side_by_side("0.6B", cases, seconds, max_tokens=16384)


Case = tuple[str, int, list[Sequence[int]]]


def side_by_side(shape: str, cases: list[Case], seconds: float, max_tokens: int = 8192) -> Rows:
    model = model_of(shape)
    rows: list[Row] = []
    half = False
    for name, rank, tenants in cases:
        rows.append({"work": name, "shape": shape, "rank": rank, "tokens": sum(map(sum, tenants))})
        yield rows[-1]
        try:
            theirs = time_peft(model, rank, tenants, seconds=seconds, half=half)
            if len(rows) == 1 and ON_GPU:  # the better of the two for all that follows
                rows[-1]["PEFT, the other dtype"] = theirs
                other = time_peft(model, rank, tenants, seconds=seconds, half=True)
                half = other["tokens/s"] > theirs["tokens/s"]
                if half:
                    theirs = other
                else:
                    rows[-1]["PEFT, the other dtype"] = other
        except Exception as error:
            theirs = {"tokens/s": float("nan"), "error": repr(error)[:300]}
        rows[-1]["PEFT"] = theirs
        say("PEFT", name, f"{theirs['tokens/s']:.0f}")
        free()
        yield {}
    engine, getting_ready = engine_on(model, max_tokens=max_tokens)
    say("ready after", round(getting_ready, 1), "s")
    _engines[shape] = engine
    for row, (name, rank, tenants) in zip(rows, cases, strict=True):
        row["engine"] = time_engine(engine, [rank] * len(tenants), tenants, seconds=seconds)
        row["ratio"] = row["engine"]["tokens/s"] / row["PEFT"]["tokens/s"]
        row["ready after s"] = getting_ready
        say("engine", name, f"{row['engine']['tokens/s']:.0f}", f"{row['ratio']:.2f}x")
        yield {}


def adapters_8b(seconds: float) -> Rows:
    """16k tokens as 1 to 64 adapters of a rank, as one of several ranks, and as one wide among narrow ones."""
    engine = the_8b()
    cases = [[8], [8] * 8, [8] * 32, [8] * 64, [32], [32] * 8, [32] * 32, [32] * 64, [128], [128] + [8] * 31]
    for ranks in cases:
        wanted = sum(engine.size_bytes(LoraSpec(rank, 0, train_unembed=False)) for rank in ranks)
        row: Row = {
            "adapters": len(ranks),
            "ranks": " and ".join(f"{len(list(g))} of {r}" for r, g in groupby(ranks)),
        }
        if wanted > torch.cuda.mem_get_info()[0] - (24 << 30):
            row["error"] = "no room on this card"
        else:
            tenants = [[256] * (64 // len(ranks))] * len(ranks)
            row["engine"] = time_engine(engine, ranks, tenants, seconds=seconds)
        yield row


def lengths_8b(seconds: float) -> Rows:
    """16k tokens in sequences of 512 to 8k, and one of 32k, against the law: 4 N + 7 s d L + 6 P operations per token."""
    engine, shape = the_8b(), SHAPES["8B"]
    layers = sum(
        m.weight.numel()
        for layer in engine.base._decoder.layers
        for m in layer.modules()
        if hasattr(m, "in_features")
    )
    parameters = layers + shape["hidden_size"] * shape["vocab_size"]
    width = shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    first = 0.0
    for length in (512, 2048, 8192, 32768):
        engine._settings = EngineSettings(max(8192, length))
        found = time_engine(engine, [32], [[length] * max(1, 16384 // length)], seconds=seconds)
        flops = 4 * parameters + 7 * length * width + 6 * 87_293_952
        rate = found["tokens/s"] * flops / 1e12
        first = first or rate
        yield {
            "length": length,
            "engine": found,
            "TFLOP/s": rate,
            "time over the law of the first": first / rate,
        }
    engine._settings = EngineSettings()


def deterministic_8b(seconds: float) -> Rows:
    """What deterministic mode costs, and how far packed and alone are apart without it. Comes last: it changes
    torch's settings."""
    cases: dict[str, list[Sequence[int]]] = {
        "4 x 8 ragged 32..2048": [ragged(8, 2048, n) for n in range(4)],
        "1 x 32 x 512": [[512] * 32],
        "16 x 8 x 128": [[128] * 8] * 16,
    }
    fast = the_8b()
    yield {"work": "packed against alone, fast", **apart(fast)}
    rows: list[Row] = []
    for name, lengths in cases.items():
        rows.append({"work": name, "fast": time_engine(fast, [32] * len(lengths), lengths, seconds=seconds)})
        yield rows[-1]
    engine = TorchEngine(fast.base, EngineSettings(deterministic=True))
    yield {"work": "packed against alone, deterministic", **apart(engine)}
    for row, lengths in zip(rows, cases.values(), strict=True):
        row["deterministic"] = time_engine(engine, [32] * len(lengths), lengths, seconds=seconds)
        row["price"] = row["fast"]["tokens/s"] / row["deterministic"]["tokens/s"] - 1
        yield {}


def apart(engine: TorchEngine) -> Row:
    """Relative norms of the differences of one tenant's logprobs and gradient, alone and among seven others."""
    found = []
    for tenants in ([0], range(8)):
        for n in tenants:
            engine.create(str(n), LoraSpec(32, n, train_unembed=False))
            adapter = engine._adapters[str(n)]
            generator = torch.Generator(DEVICE).manual_seed(n)
            adapter.weights.normal_(0, 0.01, generator=generator)
            adapter.refresh()
        given = {n: batch(ragged(6, 512, n), engine.facts.vocab_size, n) for n in tenants}
        output = engine.forward_backward([Work(str(n), given[n]) for n in reversed(list(tenants))])[-1]
        gradient = engine._adapters["0"].gradient
        assert gradient is not None
        found.append((torch.from_numpy(output.logprobs_TK), gradient.clone()))
        for n in tenants:
            engine.drop(str(n))
    (alone, alone_g), (packed, packed_g) = found
    return {"logprobs": float((alone - packed).norm() / alone.norm()), "gradient": float((alone_g - packed_g).norm() / alone_g.norm()),
            "bits equal": torch.equal(alone, packed) and torch.equal(alone_g, packed_g)}  # fmt: skip


def memory_8b(seconds: float) -> Rows:
    """What a pass keeps, with and without its activations, and what an adapter takes."""
    engine = the_8b()
    for rank in (8, 32, 128):
        gib = engine.size_bytes(LoraSpec(rank, 0, train_unembed=False)) / 2**30
        yield {"adapter of rank": rank, "GiB": gib}
    activations = engine.base.activations
    yield {
        "KiB of a token and layer": activations.whole_bytes / 2**10,
        "lean": activations.lean_bytes / 2**10,
    }
    for keeping in (Keeping(), Keeping(lean_layers=36), Keeping(recomputed_layers=36)):
        for tokens in (4096, 8192, 16384):
            engine._settings = EngineSettings(tokens)
            engine.base.keeping = keeping
            row: Row = {"tokens per pass": tokens}
            try:
                row["engine"] = time_engine(engine, [32], [[512] * (tokens // 512)], seconds=seconds)
            except torch.OutOfMemoryError:
                row |= {"error": "no room on this card", "keeping": repr(keeping)}
                free()
            yield row
    engine.base.keeping = None
    engine._settings = EngineSettings()


def mixture(seconds: float) -> Rows:
    """A mixture of experts of the Qwen3-30B-A3B shape, in 16 bits on one card."""
    _engines.clear()
    free()
    engine, getting_ready = engine_on(model_of("30B-A3B"))
    yield {
        "shape": "30B-A3B",
        "ready after s": getting_ready,
        "GiB": torch.cuda.memory_allocated() / 2**30,
        "compiled": engine.base.is_compiled,
    }
    cases: list[Case] = [("1 x 32 x 512", 32, [[512] * 32]), ("8 x 8 x 256", 32, [[256] * 8] * 8)]
    for is_compiled in (True, False) if engine.base.is_compiled else (False,):
        if not is_compiled:
            engine.base.run_eagerly()
            engine._warm_up()  # what its layers keep of a token is something else now
        for name, rank, tenants in cases:
            row: Row = {"work": name, "rank": rank, "compiled": is_compiled}
            try:
                row["engine"] = time_engine(engine, [rank] * len(tenants), tenants, seconds=seconds)
            except torch.OutOfMemoryError as error:
                row["error"] = repr(error)[:300]
                free()
            yield row


def profile_8b(seconds: float) -> Rows:
    """Where the milliseconds of one step go, by kernels; and how long the GPU had nothing to do."""
    engine = the_8b()
    cases: list[Case] = [("1 x 32 x 512", 32, [[512] * 32]), ("16 x 8 x 128", 8, [[128] * 8] * 16)]
    for name, rank, tenants in cases:
        step, names = ready(engine, [rank] * len(tenants), tenants)
        for _ in range(2):
            step()
        synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            step()
            synchronize()
            wall = 1e3 * (time.perf_counter() - start)
        yield {"work": name, "rank": rank, "wall ms": wall, **by_kind(profile)}
        for n in names:
            engine.drop(n)
        free()


# By the beginning of a kernel's name; the first that fits.
KINDS = {
    "adapters": ("shrink", "expand", "correlate", "fold"), "head": ("log_sums", "logit_slopes"), "AdamW": ("adamw",),
    "layers, compiled": ("triton_",), "attention": ("flash", "fmha", "cudnn", "void cudnn", "void pytorch_flash"),
    "products of the base": ("nvjet", "sm90_", "cutlass", "void cutlass", "gemm", "ampere", "void splitk", "void cublas"),
    "copies": ("memcpy", "memset"),
}  # fmt: skip


def by_kind(profile: Any) -> Row:
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kinds: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in events:
        name = event.name.lower()
        kind = next((k for k, words in KINDS.items() if name.startswith(words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + event.device_time / 1e3
        kernels[event.name[:60]] = kernels.get(event.name[:60], 0.0) + event.device_time / 1e3
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    gaps, end = [], spans[0][1]
    for start, stop in spans:
        gaps.append(max(0.0, start - end) / 1e3)
        end = max(end, stop)
    top = sorted(kernels.items(), key=lambda kv: -kv[1])[:24]
    return {"ms": {k: round(v, 1) for k, v in sorted(kinds.items(), key=lambda kv: -kv[1])},
            "launches": len(events), "idle ms": round(sum(gaps), 1), "longest gap ms": round(max(gaps), 2), "kernels": {k: round(v, 1) for k, v in top}}  # fmt: skip


def cpu(seconds: float) -> Rows:
    cases: list[Case] = [
        ("16 x 1 x 32", 16, [[32]] * 16),
        ("1 x 16 x 32", 16, [[32] * 16]),
        ("1 x 8 x 64", 16, [[64] * 8]),
        ("4 x 4 x 64", 16, [[64] * 4] * 4),
        ("16 x 2 ragged 1..64", 16, [ragged(2, 64, n) for n in range(16)]),
        ("1 x 16 ragged 4..256", 16, [ragged(16, 256, 0)]),
    ]
    yield from by_turns("tiny", cases, seconds)
    yield from by_turns("0.6B, 4 of 28 layers, 8k of 152k words", cases[:3:2], seconds)


def by_turns(shape: str, cases: list[Case], seconds: float) -> Rows:
    """A step of the engine, then one of PEFT either way, and again: what else the machine does slows all down.
    A ratio is of two that are neighbours. Each with as many threads as suit it best, one or as many as there are
    cores: small products gain nothing from a second one."""
    engine, _ = engine_on(model_of(shape))
    for name, rank, tenants in cases:
        ours, names = ready(engine, [rank] * len(tenants), tenants)
        steps = {"engine": ours, "PEFT": peft_step(with_adapter(model_of(shape), rank), tenants, 2048)}
        if len(tenants) > 1:
            own = with_adapter(model_of(shape), rank)
            steps["PEFT, adapters exchanged"] = peft_step(own, tenants, 2048, exchange=True)
            steps["products of the base, tenant by tenant"] = products(shape, list(map(sum, tenants)))
        steps["products of the base"] = products(shape, [sum(map(sum, tenants))])
        threads = {who: best_threads(step) for who, step in steps.items()}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        began = time.perf_counter()
        while len(taken["engine"]) < 4 or time.perf_counter() - began < seconds:
            for who, step in steps.items():
                torch.set_num_threads(threads[who])
                start = time.perf_counter()
                step()
                taken[who].append(time.perf_counter() - start)
        tokens = sum(map(sum, tenants))
        row: Row = {"work": name, "shape": shape, "rank": rank, "tokens": tokens}
        for who, times in taken.items():  # without the first, which warms up
            row[who] = summary(tokens, times[1:]) | {"threads": threads[who]}
            if who != "engine":
                ratios = [theirs / mine for theirs, mine in zip(times[1:], taken["engine"][1:], strict=True)]
                row[f"over {who}"] = {
                    "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
                    "fastest": row["engine"]["fastest"] / row[who]["fastest"],
                }  # fmt: skip
        yield row
        for run in names:
            engine.drop(run)


def products(shape: str, rows: Sequence[int]) -> Callable[[], None]:
    """The products of the base that a step cannot do without, and nothing else: of every map's output and of its
    input's gradient, for so many rows and then for as many as come next."""
    of = SHAPES[shape]
    hidden, inside, channels = of["hidden_size"], of["intermediate_size"], of["head_dim"]
    queries, keys = of["num_attention_heads"] * channels, of["num_key_value_heads"] * channels
    layer = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layer += [(hidden, inside), (hidden, inside), (inside, hidden)]
    maps = [*layer * of["num_hidden_layers"], (hidden, of["vocab_size"])]
    weights = [torch.randn(outputs, inputs) for inputs, outputs in maps]
    given = [{width: torch.randn(n, width) for width in {w for one in maps for w in one}} for n in rows]

    def step() -> None:
        for by_width in given:
            for weight_OI in weights:
                torch.mm(by_width[weight_OI.shape[1]], weight_OI.T)
                torch.mm(by_width[weight_OI.shape[0]], weight_OI)

    return step


def best_threads(step: Callable[[], None]) -> int:
    """With how many threads the fastest of three steps is faster."""
    fastest = {}
    step()
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        fastest[threads] = min(taken)
    return min(fastest, key=lambda threads: fastest[threads])


PARTS: dict[str, Callable[[float], Rows]] = (
    {
        "tenants": tenants_8b, "small": small_gpu, "profile": profile_8b, "adapters": adapters_8b,
        "lengths": lengths_8b, "memory": memory_8b, "mixture": mixture, "deterministic": deterministic_8b,
    }
    if ON_GPU
    else {"cpu": cpu}
)  # fmt: skip
STARTED = time.perf_counter()


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:4.0f} s]", *words, file=sys.stderr, flush=True)


def machine() -> Row:
    name = (
        torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()} cores of {platform.machine()}, no GPU"
    )
    if ON_GPU:
        torch.ones(1, device=DEVICE)
        say("allocator", torch.cuda.memory._snapshot()["allocator_settings"])
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    return {"card": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def table(report: Row) -> str:
    """Every number of the report that is short enough for a line."""
    lines = [", ".join(f"{k} {v}" for k, v in report["machine"].items())]
    for part, rows in report["parts"].items():
        lines += [f"\n{part}", *("  " + "; ".join(cells(row)) for row in rows)]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict) and "tokens/s" in value:
            about = f"{name} {value['tokens/s']:,.0f} tokens/s"
            if "threads" in value:
                about += f" with {value['threads']} threads"
            if "steps" in value:
                about += f" ({value['slowest']:,.0f} to {value['fastest']:,.0f}, {value['steps']} steps)"
            for what in ("lean layers", "layers computed anew"):
                if value.get(what):
                    about += f", {value[what]} {what}"
            if value.get("peak GiB"):
                about += f", {value['peak GiB']:.0f} GiB"
            found.append(about)
        elif isinstance(value, float):
            found.append(f"{name} {value:.3g}")
        elif not isinstance(value, dict) or name == "ms":
            found.append(f"{name} {value}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for the repeats of each number (default 10)"
    )
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which no more is measured")
    parser.add_argument("--to", type=Path, default=Path("bench-train.json"), help="where the report goes")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as a worker does
    command = "tests/benchmarks/train.py " + " ".join(sys.argv[1:])
    report: Row = {"command": command, "machine": machine(), "parts": {}}
    for part in given.parts.split(","):
        say("part", part)
        rows = report["parts"][part] = []
        try:
            for row in PARTS[part](given.seconds):
                if row:
                    rows.append(row)
                    say(json.dumps(row)[:200])
                given.to.write_text(json.dumps(report, indent=1))
                if time.perf_counter() - STARTED > given.limit:
                    raise TimeoutError(f"the limit of {given.limit:.0f} s is over")
        except Exception as error:  # the other parts may do
            rows.append({"error": repr(error)[:300]})
        given.to.write_text(json.dumps(report, indent=1))
        free()
    print(table(report))


if __name__ == "__main__":
    main()
