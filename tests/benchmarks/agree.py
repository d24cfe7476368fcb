"""What the sampler says of its tokens against what the trainer's forward says, and what it costs that both say the same.

    make bench-agree                                         # this machine's tables
    PYTHONPATH=client:api:worker python3 tests/benchmarks/agree.py --parts trained,exact --to run.json

`trained` needs the built-in base, whose weights were trained; the others take the base of bench-sample. Otherwise as
bench-sample.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import sample
import torch
from sample import DTYPE, ON_GPU, PROMPT, Row, Rows, engine, prompts, requests, run, sampler, seconds_of
from train import DEVICE, batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinsmith_worker import tiny_base
from tinsmith_worker.contract import LoraSpec, SampleInput, SampleOutput, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import SamplerSettings, TorchSampler
from tinsmith_worker.tiny_base import tasks, text


def forward(made: TorchEngine, prompt: np.ndarray, tokens: np.ndarray, *, train: bool = False) -> np.ndarray:
    """Logprobs of the tokens after the prompt, by a call of its own."""
    whole = np.concatenate([prompt, tokens])
    given = replace(
        batch([len(whole) - 1], 4000, 0),
        forward_only=not train,
        tokens_T=whole[:-1],
        targets_TK=whole[1:, None].astype(np.int64),
    )
    return made.forward_backward([Work("run", given)])[0].logprobs_TK[len(prompt) - 1 :, 0]


def compared(
    made: TorchEngine, asked: Sequence[SampleInput], found: dict[str, SampleOutput]
) -> tuple[np.ndarray, np.ndarray]:
    sequences = [(one.prompt, s) for one in asked for s in found[one.request_id].sequences]
    sampled = np.concatenate([s.logprobs for _, s in sequences])
    return sampled, np.concatenate([forward(made, prompt, s.tokens) for prompt, s in sequences])


def difference(found: np.ndarray, expected: np.ndarray) -> Row:
    """KL is Schulman's k3 of what was drawn from `found`'s distribution: unbiased and never negative."""
    delta = (found - expected).astype(np.float64)
    return {
        "mean |delta|": float(np.abs(delta).mean()),
        "largest |delta|": float(np.abs(delta).max()),
        "KL": float((np.exp(-delta) - 1 + delta).mean()),
    }


def trained(_: Row) -> Rows:
    """The built-in base, which was trained, on prompts of tasks it knows; alone, and with an adapter."""
    words = AutoTokenizer.from_pretrained(tiny_base.FOLDER)
    random = Random("agreement")
    examples = [tasks.held_out(name, random) for name in tasks.TASKS for _ in range(8)]
    asked_of = [
        words(text.chat(made.turns[:-1], made.tools)).input_ids for made in examples if made.turns[0][0]
    ]
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=dtype).to(DEVICE)
        made = TorchEngine(Base(model), EngineSettings(max_tokens_per_pass=8192))
        if made.base.can_compile:
            made.base.compile()
        made.create("run", LoraSpec(32, 0))
        for name, spread in (("no adapter", 0.0), ("an adapter of rank 32", 0.01)):
            fresh = made.state("run")
            noise = np.random.default_rng(0).normal(0, spread, fresh.weights.shape).astype(np.float32)
            state = replace(fresh, weights=noise)
            made.restore("run", state)
            one = TorchSampler(made.base, settings=SamplerSettings(cache_bytes=1 << 29))
            one.hold("same", state)
            asked = [
                SampleInput(str(n), "same" if spread else "", np.array(ids, np.int32), 4, 128, seed=n)
                for n, ids in enumerate(asked_of)
            ]
            found, expected = compared(made, asked, run(asked, one))
            yield {
                "work": f"the built-in base, {name}, {str(dtype)[6:]}: {len(found)} tokens, against forward",
                "mean entropy": float(-expected.mean()),
                **difference(found, expected),
            }


def random_base(_: Row) -> Rows:
    """And how far two forwards of the engine are apart that differ in their rounding alone: layers compiled
    and not."""
    made, state = engine(), sample.state_of(32, 0)
    made.restore("run", state)
    sampler().hold("same", state)
    asked = requests(prompts(32, [PROMPT // 4], seed=7), [PROMPT // 2], ["same"])
    found = run(asked)
    sampled, expected = compared(made, asked, found)
    yield {
        "work": f"random weights: {len(sampled)} tokens, {str(DTYPE)[6:]}, against forward",
        **difference(sampled, expected),
    }
    if made.base.can_compile:
        layers = made.base._layers
        compiled = [layer._whole for layer in layers]
        for layer in layers:
            layer._whole = layer._eager
        _, again = compared(made, asked, found)
        for layer, one in zip(layers, compiled, strict=True):
            layer._whole = one
        yield {"work": "the same, forward with its layers not compiled", **difference(again, expected)}
        yield {"work": "the same, against that", **difference(sampled, again)}
    sampler().release("same")
    made.drop("run")


def exact(_: Row) -> Rows:
    """Sampling with every answer scored once more by the trainer's forward, in deterministic mode: what it
    takes, and whether forward_backward then says the same, bit for bit."""
    plain, state = engine(), sample.state_of(32, 0)
    made = TorchEngine(plain.base, EngineSettings(max_tokens_per_pass=8192, deterministic=True))
    made.restore("run", state)
    count, tokens = (64, 256) if ON_GPU else (8, 32)
    asked = requests(prompts(count, [PROMPT // 4], seed=3), [tokens], ["same"])

    def with_score(score: bool) -> TorchSampler:
        one = sampler()
        one._score = made.score if score else None
        return one

    sampler().hold("same", state)
    taken: dict[bool, float] = {}
    for score in (False, True):
        one, seeds = with_score(score), itertools.count(100 * score)

        def work(one: TorchSampler = one, seeds: Iterator[int] = seeds) -> None:  # no prompt was read before
            run(requests(prompts(count, [PROMPT // 4], seed=next(seeds)), [tokens], ["same"]), one)

        taken[score] = seconds_of(work, 2)
    found = run(asked, with_score(True))
    differ = total = 0
    for given in asked[:8]:
        sequence = found[given.request_id].sequences[0]
        differ += int((forward(made, given.prompt, sequence.tokens, train=True) != sequence.logprobs).sum())
        total += len(sequence.tokens)
    with_score(False)
    sampler().release("same")
    yield {
        "work": f"{count} x {PROMPT // 4} + {tokens}, the whole run, deterministic",
        "sampler": {"tokens/s": count * tokens / taken[False]},
        "exact": {"tokens/s": count * tokens / taken[True]},
        "times the time without": taken[True] / taken[False],
        f"of {total} logprobs differ from forward_backward's": differ,
    }


PARTS = {"trained": trained, "random": random_base, "exact": exact}

if __name__ == "__main__":
    # Those of bench-sample may be asked for along with them: the base is made once.
    sample.main(sample.PARTS | PARTS, list(PARTS), __doc__)
