"""What the sampler says of its tokens against what the trainer's forward says, and what it costs that both say the same.

    make bench-agree                                         # this machine's tables
    PYTHONPATH=client:api:worker python3 tests/benchmarks/agree.py --parts trained,exact --to run.json

`trained` and `truth` need the built-in base, whose weights were trained; the others take the base of bench-sample. Otherwise as
bench-sample.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import sample
import torch
from sample import DTYPE, ON_GPU, PROMPT, Row, Rows, engine, prompts, requests, run, sampler, seconds_of
from train import DEVICE, batch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

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
        "above 1e-5": int((np.abs(delta) > 1e-5).sum()),
        "KL": float((np.exp(-delta) - 1 + delta).mean()),
    }


def questions(of_each: int) -> list[np.ndarray]:
    """Prompts of the tasks that the built-in base was trained on."""
    words = AutoTokenizer.from_pretrained(tiny_base.FOLDER)
    random = Random("agreement")
    examples = [tasks.held_out(name, random) for name in tasks.TASKS for _ in range(of_each)]
    return [
        np.array(words(text.chat(made.turns[:-1], made.tools)).input_ids, np.int32)
        for made in examples
        if made.turns[0][0]
    ]


def trained(_: Row) -> Rows:
    """The built-in base, which was trained, on prompts of tasks it knows; alone, and with an adapter."""
    asked_of = questions(8)
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
                SampleInput(str(n), "same" if spread else "", prompt, 4, 128, seed=n)
                for n, prompt in enumerate(asked_of)
            ]
            found, expected = compared(made, asked, run(asked, one))
            yield {
                "work": f"the built-in base, {name}, {str(dtype)[6:]}: {len(found)} tokens, against forward",
                "mean entropy": float(-expected.mean()),
                **difference(found, expected),
            }


def truth(_: Row) -> Rows:
    """In float32, the built-in base and a deep random one against transformers in float64: what each says of
    the same tokens, and how far the trainer is from itself when sequences share its passes."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 28, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "initializer_range": 0.08}
    random = np.random.default_rng(0)
    lengths = random.integers(16, 48, 64)
    for name, model, asked_of in (
        ("the built-in base", AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=torch.float32), questions(4)),
        ("28 random layers of 128", Qwen3ForCausalLM(Qwen3Config(**shape)), [random.integers(0, 4096, n).astype(np.int32) for n in lengths]),
    ):  # fmt: skip
        exact = copy.deepcopy(model).to(DEVICE).double().eval()
        plain = copy.deepcopy(model).to(DEVICE).eval()
        made = TorchEngine(Base(model.to(DEVICE)), EngineSettings(max_tokens_per_pass=8192))
        made.create("run", LoraSpec(8, 0))
        one = TorchSampler(made.base, settings=SamplerSettings(cache_bytes=1 << 29))
        asked = [SampleInput(str(n), "", p, 1, 64, seed=n, stop_tokens=()) for n, p in enumerate(asked_of)]
        found = run(asked, one)
        sampled, alone = compared(made, asked, found)
        texts = [(a.prompt, found[a.request_id].sequences[0].tokens) for a in asked]
        said = {
            "the sampler": sampled,
            "the trainer, each alone": alone,
            "the trainer, all packed": forward_of_all(made, texts),
            "transformers": by_transformers(plain, texts),
        }
        true = by_transformers(exact, texts)
        yield {
            "work": f"{name}, float32: {len(true)} tokens",
            "against float64": {who: difference(what, true) for who, what in said.items()},
            "sampler against trainer": difference(sampled, alone),
            "the trainer packed against each alone": difference(said["the trainer, all packed"], alone),
        }


def forward_of_all(made: TorchEngine, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    wholes = [np.concatenate(text) for text in texts]
    given = replace(
        batch([len(whole) - 1 for whole in wholes], 4000, 0),
        forward_only=True,
        tokens_T=np.concatenate([whole[:-1] for whole in wholes]),
        targets_TK=np.concatenate([whole[1:] for whole in wholes])[:, None].astype(np.int64),
    )
    said = made.forward_backward([Work("run", given)])[0].logprobs_TK[:, 0]
    ends = np.cumsum([len(whole) - 1 for whole in wholes])
    return np.concatenate([said[end - len(t) : end] for end, (_, t) in zip(ends, texts, strict=True)])


def by_transformers(model: Any, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    found = []
    for prompt, tokens in texts:
        ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64)).to(DEVICE)
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
        found.append(logprobs_TV.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].cpu().numpy())
    return np.concatenate(found)


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


PARTS = {"trained": trained, "truth": truth, "random": random_base, "exact": exact}

if __name__ == "__main__":
    # Those of bench-sample may be asked for along with them: the base is made once.
    sample.main(sample.PARTS | PARTS, list(PARTS), __doc__)
