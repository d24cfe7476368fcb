"""Sampling, tokens per second: the sampler beside transformers' generate and its continuous batching.

    make bench-sample                                        # this machine's tables
    PYTHONPATH=client:api:worker python3 tests/benchmarks/sample.py --parts decode,adapters --to run.json

On a CUDA machine the base is of the Qwen3-8B shape in bfloat16, without a GPU it is the built-in one in
float32. Prompts are random and nothing stops a sequence but its length. Needs torch, transformers, peft and
numpy, and nothing of the service. The report is written after every number; what cannot be measured says
why, and the rest goes on.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import DEVICE, DTYPE, ON_GPU, Row, batch, free, machine, model_of, say, synchronize
from transformers import AutoModelForCausalLM, GenerationConfig

from tinsmith_worker import tiny_base
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    LoraSpec,
    SampleInput,
    SampleOutput,
    Work,
)
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import SamplerSettings, TorchSampler

Rows = Iterator[Row]
PROMPT = 512 if ON_GPU else 32
# Without a GPU what counts is the processor's time: other programs do not take part in it.
CLOCK = time.perf_counter if ON_GPU else time.process_time
# A worker's slice_seconds, whose module needs more than is installed beside a bare GPU.
SLICE_SECONDS = 0.5
# As a worker that does nothing else has it: most of the memory holds keys and values.
SAMPLING_ONLY = SamplerSettings(max_sequences=512, cache_bytes=45 << 30) if ON_GPU else SamplerSettings()


@functools.cache
def untouched() -> Any:
    """transformers' own model: measured before the base takes it over, so `beside` comes first."""
    if ON_GPU:
        return model_of("8B")
    return AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=DTYPE)


@functools.cache
def engine() -> TorchEngine:
    model = untouched() if ON_GPU else AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=DTYPE)
    made = TorchEngine(Base(model), EngineSettings(max_tokens_per_pass=8192))
    if made.base.can_compile:
        made.base.compile()
    return made


_samplers: list[TorchSampler] = []  # one at a time: most of the memory is its keys and values


def sampler(settings: SamplerSettings | None = None) -> TorchSampler:
    """The one that is there, or one with other settings."""
    if not _samplers or settings not in (None, _samplers[0].settings):
        _samplers.clear()
        free()
        started = time.perf_counter()
        _samplers.append(TorchSampler(engine().base, settings=settings))
        _samplers[0].warm_up()
        synchronize()
        say(f"the sampler is ready after {time.perf_counter() - started:.0f} s")
    return _samplers[0]


def prompts(count: int, lengths: Sequence[int] = (PROMPT,), seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 4000, lengths[n % len(lengths)]).astype(np.int32) for n in range(count)]


def requests(
    given: Sequence[np.ndarray], max_tokens: Sequence[int], samplers: Sequence[str] = ("",), **more: Any
) -> list[SampleInput]:
    return [
        SampleInput(
            request_id=str(n),
            sampler_id=samplers[n * len(samplers) // len(given)],
            prompt=prompt,
            num_samples=1,
            max_tokens=max_tokens[n % len(max_tokens)],
            seed=n,
            stop_tokens=(),
            **more,
        )
        for n, prompt in enumerate(given)
    ]


def run(asked: Sequence[SampleInput], made: TorchSampler | None = None) -> dict[str, SampleOutput]:
    made = made or sampler()
    for one in asked:
        made.add(one)
    found = {}
    while made.busy:
        for answer in made.step():
            assert isinstance(answer, SampleOutput), answer
            found[answer.request_id] = answer
    synchronize()
    return found


def seconds_of(work: Callable[[], object], repeats: int = 1) -> float:
    """The best of several, after one that warms up where there are several."""
    taken = []
    for number in range(repeats + (repeats > 1)):
        synchronize()
        started = CLOCK()
        work()
        synchronize()
        if number or repeats == 1:
            taken.append(CLOCK() - started)
    return min(taken)


def time_decode(rows: int, steps: int, samplers: Sequence[str] = ("",), **more: Any) -> Row:
    """Steps in which so many sequences grow by a token each, after all prompts were read."""
    made = sampler()
    assert not made.busy
    # Those that come first grow while the others' prompts are read.
    for one in requests(prompts(rows), [steps + 20 + rows * PROMPT // 8192], samplers, **more):
        made.add(one)
    made.step()
    while made._places.reading or made._places.waiting:
        made.step()
    for _ in range(8):
        made.step()
    synchronize()
    started = CLOCK()
    for _ in range(steps):
        made.step()
    synchronize()
    taken = CLOCK() - started
    assert len(made._places.growing) == rows, "some ended before they were timed"
    while made.busy:
        made.step()
    return {"tokens/s": rows * steps / taken, "ms a step": taken / steps * 1e3}


def least_ms(rows: int, context: int, adapters: int = 0) -> float | None:
    """What reading the weights, the keys and values and the adapters takes at the card's own rate for a
    copy."""
    if not ON_GPU:
        return None
    base = engine().base
    # Of the maps of layers, which hold almost all; and the output embedding.
    weights = sum(m.weight.numel() for g in base._groups for m in g.members) + base.head._weight_VD.numel()
    cells = sampler()._runner.cache.page_bytes(base.dtype) / sampler().settings.page_tokens
    of_adapter = state_of(32, 0).weights.size
    total = (weights + adapters * of_adapter) * base.dtype.itemsize + rows * context * cells
    return total / copy_rate() * 1e3


@functools.cache
def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds_of(lambda: y.copy_(x), 10)


# transformers


def generate(
    model: Any, given: Sequence[np.ndarray], tokens: int, repeats: int = 1 if ON_GPU else 3
) -> float:
    """generate with all prompts in one batch, of one length."""
    ids = torch.from_numpy(np.stack(given).astype(np.int64)).to(DEVICE)

    def work() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    return seconds_of(work, repeats)


def generate_continuously(model: Any, given: Sequence[np.ndarray], tokens: int) -> float:
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    before = model.config._attn_implementation
    try:
        found: Any = None

        def work() -> None:
            nonlocal found
            found = model.generate_batch(
                inputs=[p.tolist() for p in given], generation_config=config, progress_bar=False
            )

        taken = seconds_of(work)
        assert len(found) == len(given)
        return taken
    finally:
        model.set_attn_implementation(before)


# Parts. Each yields its rows, and may fill in a row that it yielded; every yield is saved.


def beside(_: Row) -> Rows:
    """64 requests of 64 tokens, the whole run, beside generate: prompts of one length, as it takes them."""
    assert not engine.cache_info().currsize, "the base has been taken over: let `beside` be the first part"
    given, tokens = prompts(64), 64
    row: Row = {"work": f"64 x {PROMPT} + {tokens}, the whole run"}
    yield row
    row["generate"] = {"tokens/s": 64 * tokens / generate(untouched(), given, tokens)}
    # Of two runs that differ in their length alone the difference is steps.
    longer = generate(untouched(), given, 2 + tokens // 2) - generate(untouched(), given, 2)
    row["generate, its steps alone"] = {"tokens/s": 64 * (tokens // 2) / longer}
    yield {}
    free()
    sampler(SAMPLING_ONLY)
    taken = []
    for number in range(4):  # other prompts each time: none was read before
        asked = requests(prompts(64, seed=number), [tokens])
        taken.append(seconds_of(functools.partial(run, asked)))
    row["sampler"] = {"tokens/s": 64 * tokens / min(taken[1:])}
    row["times generate"] = row["sampler"]["tokens/s"] / row["generate"]["tokens/s"]
    yield {}


def turns(_: Row) -> Rows:
    """`beside` where both models fit side by side, in turns: other programs disturb them alike then."""
    assert not ON_GPU, "beside does this on a GPU"
    tokens, ours, theirs = 64, [], []
    row: Row = {"work": f"64 x {PROMPT} + {tokens}, the whole run, {torch.get_num_threads()} threads"}
    yield row
    for number in range(7):
        given = prompts(64, seed=number)
        theirs.append(64 * tokens / generate(untouched(), given, tokens, repeats=1))
        ours.append(64 * tokens / seconds_of(functools.partial(run, requests(given, [tokens]))))
        if number:  # the first warms up
            times = sorted(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))
            row |= {
                "turns": number,
                "generate": {"tokens/s": float(np.median(theirs[1:]))},
                "sampler": {"tokens/s": float(np.median(ours[1:]))},
                "times generate": {"median": float(np.median(times)), "from": times[0], "to": times[-1]},
            }
            yield {}
    # What nothing but a faster product could take less than.
    least = products(64 * PROMPT, 64) + (tokens - 1) * products(64, 64)
    row["products with the weights alone"] = {
        "ms": least * 1e3,
        "generate, ms": 64 * tokens / row["generate"]["tokens/s"] * 1e3,
        "sampler, ms": 64 * tokens / row["sampler"]["tokens/s"] * 1e3,
    }
    yield {}


def products(rows: int, heads: int) -> float:
    """Seconds of a pass's products: of so many rows with every weight, of `heads` with the output
    embedding."""
    base = engine().base
    weights = [group.weight for group in base._groups]
    given = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in [*weights, base.head._weight_VD]}
    states = given[base.head._weight_VD.shape[1]][:heads]

    def work() -> None:
        for weight in weights:
            torch.nn.functional.linear(given[weight.shape[1]], weight)
        base.head.logits(states, None)

    with torch.inference_mode():
        return seconds_of(work, 20)


def continuous(_: Row) -> Rows:
    """transformers' continuous batching by itself: it keeps the memory it takes."""
    given, tokens = prompts(64), 16
    found = {"tokens/s": 64 * tokens / generate_continuously(untouched(), given, tokens)}
    yield {"work": f"64 x {PROMPT} + {tokens}, the whole run", "transformers' continuous batching": found}


def decode(_: Row) -> Rows:
    sampler(SAMPLING_ONLY)
    for rows in (64, 256, 1) if ON_GPU else (64, 1):
        steps = 64
        found = time_decode(rows, steps)
        least = least_ms(rows, PROMPT + 8 + steps // 2)
        share = {} if least is None else {"of the byte limit": least / found["ms a step"]}
        yield {"work": f"{rows} rows, context about {PROMPT + 8 + steps // 2}", "sampler": found, **share}
    for name, more in (
        ("top_p 0.9", {"top_p": 0.9}),
        ("top_k 50", {"top_k": 50}),
        ("top_k 50, then top_p 0.9", {"top_k": 50, "top_p": 0.9}),
        ("top-20 logprobs", {"topk_sample_logprobs": 20}),
    ):
        yield {"work": f"64 rows, {name}", "sampler": time_decode(64, 32, **more)}


@functools.cache
def state_of(rank: int, seed: int) -> AdapterState:
    made = engine().base.new_adapter(LoraSpec(rank, seed, train_unembed=False)).state()
    random = np.random.default_rng(seed)
    noise = random.normal(0, 0.01, 1 << 20).astype(np.float32)
    return replace(made, weights=np.resize(noise, made.weights.shape))


def adapters(_: Row) -> Rows:
    without = time_decode(64, 48)
    yield {"work": "64 rows, no adapter", "sampler": without}
    for count in (1, 8, 16):
        names = [f"adapter {n}" for n in range(count)]
        for n, name in enumerate(names):
            sampler().hold(name, state_of(32, n % 2))
        found = time_decode(64, 48, names)
        yield {
            "work": f"64 rows, {count} adapters of rank 32",
            "sampler": found,
            "times the time without": found["ms a step"] / without["ms a step"],
        }
    for n in range(16):
        sampler().release(f"adapter {n}")


def prefill(_: Row) -> Rows:
    tokens = 8192 if ON_GPU else 2048
    made = engine()
    made.create("run", LoraSpec(32, 0, train_unembed=False))
    work = [Work("run", replace(batch([PROMPT] * (tokens // PROMPT), 4000, 0), forward_only=True))]
    forward = seconds_of(lambda: made.forward_backward(work), 4)
    made.drop("run")
    sampler().hold("adapter", state_of(32, 0))
    taken = []
    for number in range(4):
        asked = requests(prompts(tokens // PROMPT, seed=number), [1], ["adapter"])
        taken.append(seconds_of(functools.partial(run, asked)))
    sampler().release("adapter")
    yield {
        "work": f"{tokens} tokens in prompts of {PROMPT}, one adapter, to the first tokens",
        "sampler": {"tokens/s": tokens / min(taken[1:])},
        "forward, with the head": {"tokens/s": tokens / forward},
        "of forward": forward / min(taken[1:]),
    }


def mixed(_: Row) -> Rows:
    """Many requests of mixed lengths, against batches of 64 of which each waits for its longest."""
    count, longest = (512, 512) if ON_GPU else (64, 128)
    lengths = np.random.default_rng(0).integers(longest // 32, longest, count).tolist()
    total, of_prompts = sum(lengths), [PROMPT // 2, PROMPT // 4, PROMPT]
    made = sampler(SAMPLING_ONLY)
    taken = seconds_of(lambda: run(requests(prompts(count, of_prompts), lengths), made))
    row: Row = {
        "work": f"{count} requests of {total // count} tokens on average, prompts of {sum(of_prompts) // 3}",
        "sampler": {"tokens/s": total / taken},
    }
    yield row

    def in_batches() -> None:
        asked = requests(prompts(count, of_prompts, seed=1), lengths)
        for start in range(0, count, 64):
            run(asked[start : start + 64], made)

    batches = seconds_of(in_batches)
    row["batches of 64"] = {"tokens/s": total / batches}
    row["times batches"] = batches / taken
    yield {}


def fresh(_: Row) -> Rows:
    """From weights that were just trained to the first token that they sample."""
    made = engine()
    made.create("run", LoraSpec(32, 0, train_unembed=False))
    taken = []
    for number in range(5):
        name = f"fresh {number}"
        asked = requests(prompts(1, [64], seed=number), [1], [name])

        def work(name: str = name, asked: list[SampleInput] = asked) -> None:
            sampler().hold(name, made.frozen("run"))
            run(asked)

        taken.append(seconds_of(work))
        sampler().release(name)
    state = made.state("run")
    through = seconds_of(
        lambda: (sampler().hold("host", state), run(requests(prompts(1, [64]), [1], ["host"])))
    )
    sampler().release("host")
    made.drop("run")
    yield {"work": "a copy of rank 32, then one token of a prompt of 64", "ms": min(taken[1:]) * 1e3,
           "from host memory, ms": through * 1e3}  # fmt: skip


def tenants(_: Row) -> Rows:
    """Eight RL loops: each samples 4 prompts 4 times, then trains on what it got."""
    made, steps, tokens = engine(), 1, 256 if ON_GPU else 16
    sampler(SamplerSettings())
    names = [f"tenant {n}" for n in range(8)]
    for n, name in enumerate(names):
        made.create(name, LoraSpec(32 if ON_GPU else 8, n, train_unembed=False))

    def round_of(some: Sequence[str], number: int) -> None:
        for name in some:
            sampler().hold(name, made.frozen(name))
        asked = [
            replace(r, request_id=f"{name} {r.request_id}", num_samples=4)
            for n, name in enumerate(some)
            for r in requests(prompts(4, [PROMPT // 4], seed=number * 8 + n), [tokens], [name])
        ]
        run(asked)
        work = [Work(name, batch([PROMPT // 4 + tokens] * 16, 4000, number)) for name in some]
        made.forward_backward(work)
        made.optim_steps([(name, AdamParams(1e-5)) for name in some])
        for name in some:
            sampler().release(name)

    round_of(names, 99)
    together = seconds_of(lambda: [round_of(names, n) for n in range(steps)])
    apart = seconds_of(lambda: [round_of([name], n) for name in names for n in range(steps)])
    for name in names:
        made.drop(name)
    yield {"work": f"8 tenants, a round of 16 x {tokens} tokens and a step on {PROMPT // 4 + tokens} each",
           "together, s": together, "one after the other, s": apart, "times": apart / together}  # fmt: skip


def slices(_: Row) -> Rows:
    """A worker's turns: a training pass, then sampling for as long as that took, half a second at most. What
    each of them gets, against having the device to itself."""
    made, given = engine(), batch([PROMPT] * 16 if ON_GPU else [PROMPT] * 4, 4000, 0)
    made.create("run", LoraSpec(32 if ON_GPU else 8, 0, train_unembed=False))
    sampler(SamplerSettings())
    tokens, passes = 16 * PROMPT if ON_GPU else 4 * PROMPT, 8

    def train() -> None:
        made.forward_backward([Work("run", given)])
        made.optim_steps([("run", AdamParams(1e-5))])
        synchronize()

    def fill() -> None:
        number = itertools.count()
        while len(sampler()._places.growing) + len(sampler()._places.waiting) < 64:
            asked = requests(prompts(1, seed=next(number)), [2000 if ON_GPU else 400])[0]
            sampler().add(replace(asked, request_id=f"{time.perf_counter()}"))
            sampler().step()

    train()
    started = time.perf_counter()
    for _ in range(passes):
        train()
    trained_alone = (time.perf_counter() - started) / passes
    fill()
    synchronize()
    started = time.perf_counter()
    for _ in range(32):
        sampler().step()
    synchronize()
    sampled_alone = (time.perf_counter() - started) / 32
    waited: list[float] = []
    sampled, started = 0, time.perf_counter()
    for _ in range(passes):
        began = time.perf_counter()
        train()
        ended = now = time.perf_counter()
        until = ended + min(ended - began, SLICE_SECONDS)
        while now < until:
            sampler().step()
            sampled += len(sampler()._places.growing)
            now = time.perf_counter()
        waited.append(now - ended)
    taken = time.perf_counter() - started
    yield {
        "work": f"steps on {tokens} tokens and 64 sequences under way, in turns",
        "a step alone, ms": trained_alone * 1e3,
        "steps, of those alone": passes * trained_alone / taken,
        "tokens sampled, of those alone": sampled / taken / (64 / sampled_alone),
        "a pass waits for sampling, ms": {"mean": float(np.mean(waited)) * 1e3, "longest": max(waited) * 1e3},
    }
    for one in [c.request.given.request_id for c in sampler()._places.growing]:
        sampler().cancel(one)
    made.drop("run")


def profile(_: Row) -> Rows:
    """Where the time of a step goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    made = sampler()
    for rows, names in ((64, [""]), (64, [f"adapter {n}" for n in range(8)]), (1, [""])):
        for n, name in enumerate(filter(None, names)):
            made.hold(name, state_of(32, n % 2))
        for one in requests(prompts(rows), [60], names):
            made.add(one)
        for _ in range(20):
            made.step()
        synchronize()
        with watch(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as seen:
            for _ in range(10):
                made.step()
            synchronize()
        while made.busy:
            made.step()
        times = {
            event.key[:60]: (event.device_time_total if ON_GPU else event.self_cpu_time_total) / 1e4
            for event in seen.key_averages()
        }
        counts = {event.key[:60]: event.count // 10 for event in seen.key_averages()}
        top = sorted(times, key=lambda key: -times[key])[:18]
        yield {"work": f"{rows} rows, {len(list(filter(None, names)))} adapters",
               "ms": {f"{key} x {counts[key]}": round(times[key], 3) for key in top}, "in all": sum(times.values())}  # fmt: skip
        for name in filter(None, names):
            made.release(name)


PARTS: dict[str, Callable[[Row], Rows]] = {
    "beside": beside, "turns": turns, "decode": decode, "adapters": adapters, "prefill": prefill, "mixed": mixed, "fresh": fresh,
    "tenants": tenants, "slices": slices, "profile": profile,
    "continuous": continuous,
}  # fmt: skip


def main(parts: dict[str, Callable[[Row], Rows]], default: Sequence[str], about: str | None) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(default), help="some of: " + ", ".join(parts))
    parser.add_argument("--to", type=Path, default=Path("bench-sample.json"), help="where the report goes")
    given = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as a worker does
    command = f"tests/benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:])
    report: Row = {"command": command, "machine": machine(), "parts": {}}
    for part in given.parts.split(","):
        say("part", part)
        rows = report["parts"][part] = []
        try:
            for row in parts[part](report):
                if row:
                    rows.append(row)
                say(json.dumps(rows[-1])[:3000])
                given.to.write_text(json.dumps(report, indent=1))
        except Exception as error:  # the other parts may do
            traceback.print_exc()
            rows.append({"error": repr(error)[:300]})
        given.to.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    alone = {"continuous", "turns" if ON_GPU else "beside"}
    main(PARTS, [part for part in PARTS if part not in alone], __doc__)
