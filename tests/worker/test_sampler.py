"""The sampler against transformers and PEFT, against the trainer, and against itself in other company."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.worker import tiny
from tinsmith.wire.batch import TrainInput
from tinsmith_worker import tiny_base
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    Failure,
    LoraSpec,
    SampleInput,
    SampleOutput,
    Work,
)
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import SamplerSettings, TorchSampler
from tinsmith_worker.sampler.cache import Cache
from tinsmith_worker.sampler.order import by_adapter
from tinsmith_worker.stream import Stream

PROMPT = np.array([1, 319, 201, 42, 75, 383, 900, 77, 1300, 12, 450], np.int32)
# The base's logits reach 30, where float32 has steps of 2e-6; a handful of them come together.
ROUNDING = 5e-5
SPECS = {
    "wide": LoraSpec(rank=8, seed=1),
    "narrow": LoraSpec(rank=3, seed=2, train_mlp=False),
    "unembed": LoraSpec(rank=4, seed=3, train_attn=False, train_mlp=False),
}
Answer = SampleOutput | tuple[str, Failure]


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_base.FOLDER


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return Base.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def states(base: Base) -> dict[str, AdapterState]:
    """Adapters that say something: a fresh one's B is zero."""
    found = {}
    for number, (name, spec) in enumerate(SPECS.items()):
        state = base.new_adapter(spec).state()
        random = np.random.default_rng(number)
        found[name] = replace(state, weights=random.normal(0, 0.03, state.weights.shape).astype(np.float32))
    return found


@pytest.fixture
def sampler(base: Base, folder: Path, states: dict[str, AdapterState]) -> TorchSampler:
    return make(base, states, tokenizer=AutoTokenizer.from_pretrained(folder))


def make(
    base: Base,
    states: dict[str, AdapterState],
    settings: SamplerSettings | None = None,
    tokenizer: Any = None,
) -> TorchSampler:
    sampler = TorchSampler(base, tokenizer, settings)
    for name, state in states.items():
        sampler.hold(name, state)
    return sampler


def request(request_id: str = "r", sampler_id: str = "", **given: Any) -> SampleInput:
    settled: dict[str, Any] = {
        "prompt": PROMPT,
        "num_samples": 1,
        "max_tokens": 12,
        "seed": 5,
        "stop_tokens": (),
    }
    return SampleInput(request_id=request_id, sampler_id=sampler_id, **{**settled, **given})


def answers(sampler: TorchSampler) -> Iterator[Answer]:
    while sampler.busy:
        yield from sampler.step()


def run(sampler: TorchSampler, *requests: SampleInput) -> dict[str, SampleOutput]:
    for given in requests:
        sampler.add(given)
    found = {}
    for answer in answers(sampler):
        assert isinstance(answer, SampleOutput), answer
        found[answer.request_id] = answer
    return found


def one(sampler: TorchSampler, **given: Any) -> SampleOutput:
    return run(sampler, request(**given))["r"]


def failure(sampler: TorchSampler, **given: Any) -> Failure:
    sampler.add(request(**given))
    (answer,) = answers(sampler)
    assert isinstance(answer, tuple)
    return answer[1]


def assert_same(left: SampleOutput, right: SampleOutput) -> None:
    """Equal tokens; logprobs equal but for the rounding that a batch of another size brings."""
    for a, b in zip(left.sequences, right.sequences, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.stopped == b.stopped
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=ROUNDING)


def plain_logprobs(folder: Path, tokens: npt.NDArray[np.int32]) -> torch.Tensor:
    """[T, V] of untouched transformers: row i is the distribution of token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)


def in_peft(folder: Path, state: AdapterState) -> Any:
    """The adapter as PEFT computes it."""
    tensors = {
        name: torch.tensor(state.weights[offset : offset + int(np.prod(shape))]).view(shape)
        for name, offset, shape in state.tensors
    }
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = peft.LoraConfig(r=state.spec.rank, lora_alpha=32, target_modules=modules)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    loaded = peft.set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys
    return model.eval()


# Against transformers, PEFT and the trainer


@pytest.mark.parametrize("name", ["", *SPECS])
def test_greedy_is_generate_of_transformers_and_peft(
    name: str, sampler: TorchSampler, folder: Path, states: dict[str, AdapterState]
) -> None:
    if name:
        model = in_peft(folder, states[name])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.from_numpy(PROMPT.astype(np.int64))[None]
    wanted = model.generate(
        input_ids=prompt, attention_mask=prompt > 0, max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    found = one(sampler, sampler_id=name, temperature=0, max_tokens=24).sequences[0]
    assert found.tokens.tolist() == wanted[0, len(PROMPT) :].tolist()
    with torch.no_grad():
        logprobs = model(input_ids=wanted).logits[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    np.testing.assert_allclose(found.logprobs, logprobs.amax(-1), atol=ROUNDING)


@pytest.mark.parametrize("name", SPECS)
def test_sampled_logprobs_are_the_trainers_forward(
    name: str, sampler: TorchSampler, base: Base, states: dict[str, AdapterState]
) -> None:
    engine = TorchEngine(base)
    engine.restore("run", states[name])
    before = engine.state("run").weights.copy()
    found = one(sampler, sampler_id=name, num_samples=3, max_tokens=40, prompt_logprobs=True)
    assert found.prompt_logprobs is not None
    for sequence in found.sequences:
        trained = engine.forward_backward(
            [Work("run", forward_of(np.concatenate([PROMPT, sequence.tokens])))]
        )
        wanted = trained[0].logprobs_TK[:, 0]
        np.testing.assert_allclose(found.prompt_logprobs[1:], wanted[: len(PROMPT) - 1], atol=ROUNDING)
        np.testing.assert_allclose(sequence.logprobs, wanted[len(PROMPT) - 1 :], atol=ROUNDING)
    assert np.array_equal(engine.state("run").weights, before)
    assert engine.state("run").gradient is None


@pytest.mark.parametrize("name", ["", *SPECS])
def test_exact_logprobs_are_a_later_forward_backwards_bit_for_bit(
    name: str, base: Base, states: dict[str, AdapterState]
) -> None:
    threads = torch.get_num_threads()
    engine = TorchEngine(base, EngineSettings(deterministic=True))
    try:
        exact = TorchSampler(base, score=engine.score)
        exact.hold(name, states.get(name) or states["wide"])
        asked = [
            request(str(n), name, num_samples=2, max_tokens=9 + n, seed=n, temperature=n % 2)
            for n in range(3)
        ]
        found = run(exact, *asked, request("narrowed", name, temperature=0.5))
        plain = run(make(base, states), *asked, request("narrowed", name, temperature=0.5))
        engine.create("neighbour", SPECS["narrow"])
        if name:
            engine.restore("run", states[name])
        else:
            engine.create("run", SPECS["wide"])
        for one in [*asked, request("narrowed")]:
            for sequence, other in zip(
                found[one.request_id].sequences, plain[one.request_id].sequences, strict=True
            ):
                assert sequence.tokens.tolist() == other.tokens.tolist()
                np.testing.assert_allclose(sequence.logprobs, other.logprobs, atol=ROUNDING)
                if one.request_id == "narrowed":
                    continue
                text = np.concatenate([PROMPT, sequence.tokens])
                work = [
                    Work("neighbour", forward_of(PROMPT, train=True)),
                    Work("run", forward_of(text, train=True)),
                ]
                trained = engine.forward_backward(work)[1].logprobs_TK[len(PROMPT) - 1 :, 0]
                assert np.array_equal(sequence.logprobs, trained)
    finally:
        base.is_deterministic = False
        torch.set_num_threads(threads)


def test_sampled_logprobs_of_the_base_are_those_of_transformers(sampler: TorchSampler, folder: Path) -> None:
    sequence = one(sampler, max_tokens=40).sequences[0]
    logprobs = plain_logprobs(folder, np.concatenate([PROMPT, sequence.tokens]))
    wanted = logprobs[len(PROMPT) - 1 : -1].gather(
        1, torch.from_numpy(sequence.tokens.astype(np.int64))[:, None]
    )
    np.testing.assert_allclose(sequence.logprobs, wanted[:, 0], atol=ROUNDING)


def forward_of(tokens: npt.NDArray[np.int32], *, train: bool = False) -> TrainInput:
    length = len(tokens) - 1
    return TrainInput(
        loss="cross_entropy",
        forward_only=not train,
        lengths_S=np.array([length]),
        tokens_T=tokens[:-1],
        targets_TK=tokens[1:, None].astype(np.int64),
        target_widths_S=np.zeros(1, np.int64),
        columns={"weights": np.ones((length, 1), np.float32)},
    )


# Randomness and company


def test_a_seed_reproduces_a_request_and_its_samples_differ(sampler: TorchSampler) -> None:
    first, again = (one(sampler, num_samples=4) for _ in range(2))
    assert_same(first, again)
    assert len({tuple(s.tokens.tolist()) for s in first.sequences}) == 4
    other = one(sampler, num_samples=4, seed=6)
    assert first.sequences[0].tokens.tolist() != other.sequences[0].tokens.tolist()


def mixed_requests() -> list[SampleInput]:
    return [
        request("a", "wide", num_samples=3, max_tokens=20),
        request("b", "", max_tokens=9, temperature=0.7, top_k=50, prompt=PROMPT[:3]),
        request("c", "narrow", max_tokens=30, top_p=0.8, topk_sample_logprobs=2, prompt=np.tile(PROMPT, 5)),
        request("d", "unembed", num_samples=2, max_tokens=15, temperature=0),
        request("e", "wide", max_tokens=1, prompt_logprobs=True, prompt_alt_tokens_k=2),
    ]


def test_many_adapters_and_settings_in_one_batch_equal_each_alone(sampler: TorchSampler) -> None:
    together = run(sampler, *mixed_requests())
    for given in mixed_requests():
        alone = run(sampler, given)[given.request_id]
        assert_same(together[given.request_id], alone)
        if given.prompt_logprobs:
            np.testing.assert_allclose(
                together[given.request_id].prompt_logprobs, alone.prompt_logprobs, atol=ROUNDING
            )


def test_side_by_side_or_gathered_from_pages_gives_the_same_tokens(
    base: Base, states: dict[str, AdapterState]
) -> None:
    """Sequences of many lengths and adapters, of which some leave early and one outgrows its room."""
    asked = [
        request(str(n), ["", *SPECS][n % 4], max_tokens=5 + 13 * n, seed=n, prompt=PROMPT[: 3 + n])
        for n in range(8)
    ]
    side_by_side, gathered = make(base, states), make(base, states)
    assert gathered._runner._side is not None
    gathered._runner._side._most_bytes = 0
    found = [run(sampler, *asked) for sampler in (side_by_side, gathered)]
    assert side_by_side._runner._side is not None
    assert side_by_side._runner._side.keys
    assert not gathered._runner._side.keys
    for given in asked:
        assert_same(found[0][given.request_id], found[1][given.request_id])


def test_requests_are_scored_together_and_one_that_cannot_be_fails_alone(
    base: Base, states: dict[str, AdapterState]
) -> None:
    engine, calls = TorchEngine(base, EngineSettings()), []

    def score(texts: Sequence[tuple[Adapter, npt.NDArray[np.int32]]]) -> list[npt.NDArray[np.float32]]:
        calls.append(len(texts))
        if any(len(text) == len(PROMPT) + 3 for _, text in texts):
            raise RuntimeError("no memory")
        return engine.score(texts)

    exact = TorchSampler(base, score=score)
    exact.hold("wide", states["wide"])
    for given in [request("a", max_tokens=4), request("b", "wide", max_tokens=6), request("c", max_tokens=3)]:
        exact.add(given)
    found = named(answers(exact))
    assert calls == [3, 1, 1, 1]
    assert isinstance(found["a"], SampleOutput)
    assert isinstance(found["b"], SampleOutput)
    failed = found["c"]
    assert isinstance(failed, tuple)
    assert "could not be scored" in failed[1].message


def test_requests_that_join_or_leave_midway_change_nobodys_tokens(sampler: TorchSampler) -> None:
    expected = {given.request_id: run(sampler, given)[given.request_id] for given in mixed_requests()}
    found: dict[str, SampleOutput] = {}
    arrivals = mixed_requests()
    sampler.add(request("gone", "narrow", num_samples=2, max_tokens=1000))
    for number in range(200):
        if number % 3 == 1 and arrivals:
            sampler.add(arrivals.pop(0))
        if number == 7:
            sampler.cancel("gone")
        for answer in sampler.step():
            assert isinstance(answer, SampleOutput)
            found[answer.request_id] = answer
    assert not sampler.busy
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        assert_same(answer, expected[name])


def test_a_prompt_read_in_many_passes_gives_what_one_pass_gives(
    base: Base, states: dict[str, AdapterState], sampler: TorchSampler
) -> None:
    asked: dict[str, Any] = {
        "prompt": np.tile(PROMPT, 9),
        "sampler_id": "wide",
        "num_samples": 2,
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "prompt_alt_tokens_k": 2,
        "target_prompt_logprobs": np.arange(98 * 2).reshape(98, 2),
    }
    whole = one(sampler, **asked)
    pieces = one(make(base, states, SamplerSettings(max_pass_tokens=16)), **asked)
    assert_same(whole, pieces)
    np.testing.assert_allclose(whole.prompt_logprobs, pieces.prompt_logprobs, atol=ROUNDING)
    np.testing.assert_allclose(whole.target_prompt_logprobs, pieces.target_prompt_logprobs, atol=ROUNDING)
    assert whole.topk_prompt is not None
    assert pieces.topk_prompt is not None
    assert np.array_equal(whole.topk_prompt.token_ids, pieces.topk_prompt.token_ids)
    assert whole.prompt_alt_tokens is not None
    assert pieces.prompt_alt_tokens is not None
    assert np.array_equal(whole.prompt_alt_tokens.token_ids, pieces.prompt_alt_tokens.token_ids)


# A token's keys and values in the built-in base: 6 layers, 2 heads of 64, twice, float32.
CELL_BYTES = 6 * 2 * 64 * 2 * 4


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(cache_bytes=90 * CELL_BYTES, page_tokens=2),
        SamplerSettings(cache_bytes=96 * CELL_BYTES, page_tokens=16, max_pass_tokens=16),
        SamplerSettings(max_sequences=2),
    ],
)
def test_what_does_not_fit_waits_and_is_sampled_all_the_same(
    settings: SamplerSettings, base: Base, states: dict[str, AdapterState], sampler: TorchSampler
) -> None:
    expected = run(sampler, *mixed_requests())
    found = run(make(base, states, settings), *mixed_requests())
    assert found.keys() == expected.keys()
    for name, answer in found.items():
        assert_same(answer, expected[name])


def test_a_held_sampler_stays_as_it_was_while_training_goes_on(base: Base) -> None:
    engine, sampler = TorchEngine(base), TorchSampler(base)
    engine.create("run", SPECS["wide"])

    def train() -> None:
        engine.forward_backward([Work("run", forward_of(PROMPT, train=True))])
        tiny.step(engine, "run", AdamParams(learning_rate=0.01))

    train()
    sampler.hold("step 1", engine.state("run"))
    before = one(sampler, sampler_id="step 1")
    train()
    sampler.hold("step 1", engine.state("run"))  # the name is taken: what it holds stays
    sampler.hold("step 2", engine.state("run"))
    sampler.hold("a copy of step 2", engine.frozen("run"))
    assert_same(one(sampler, sampler_id="step 1"), before)
    after = one(sampler, sampler_id="step 2")
    assert not np.allclose(after.sequences[0].logprobs, before.sequences[0].logprobs, atol=1e-3)
    train()
    assert_same(one(sampler, sampler_id="a copy of step 2"), after)
    sampler.release("step 1")
    assert not sampler.holds("step 1")
    assert sampler.holds("step 2")


# Where a sequence ends


def test_a_stop_token_is_the_last_token_sampled(sampler: TorchSampler) -> None:
    free = one(sampler).sequences[0]
    stop = int(free.tokens[4])
    stopped = one(sampler, stop_tokens=(stop,)).sequences[0]
    assert stopped.tokens.tolist() == free.tokens[: free.tokens.tolist().index(stop) + 1].tolist()
    assert stopped.stopped
    assert not free.stopped


def test_the_models_own_end_stops_unless_nothing_shall(base: Base, sampler: TorchSampler) -> None:
    (end, _) = sorted(base.end_tokens, reverse=True)
    taught = np.append(PROMPT, [end, 7]).astype(np.int32)
    engine = TorchEngine(base)
    engine.create("run", SPECS["wide"])
    for _ in range(15):
        engine.forward_backward([Work("run", forward_of(taught, train=True))])
        tiny.step(engine, "run", AdamParams(learning_rate=0.005))
    sampler.hold("taught", engine.state("run"))
    asked: dict[str, Any] = {"sampler_id": "taught", "temperature": 0, "max_tokens": 2}
    default = one(sampler, **asked, stop_tokens=None).sequences[0]
    assert (default.tokens.tolist(), default.stopped) == ([end], True)
    free = one(sampler, **asked, stop_tokens=()).sequences[0]
    assert (free.tokens.tolist(), free.stopped) == ([end, 7], False)


def test_a_stop_string_ends_at_the_token_that_completes_it(sampler: TorchSampler) -> None:
    free = one(sampler, max_tokens=30).sequences[0].tokens
    assert sampler.tokenizer is not None

    def text(count: int) -> str:
        assert sampler.tokenizer is not None
        decoded: str = sampler.tokenizer.decode(
            free[:count].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return decoded

    across_tokens = text(12)[-6:]
    expected = next(n for n in range(1, 31) if across_tokens in text(n))
    found = one(sampler, max_tokens=30, stop_strings=("never said", across_tokens)).sequences[0]
    assert found.tokens.tolist() == free[:expected].tolist()
    assert found.stopped


def test_a_sequence_ends_where_the_context_ends(sampler: TorchSampler) -> None:
    room = 5
    prompt = np.resize(PROMPT, tiny_base.CONTEXT - room)
    found = one(sampler, prompt=prompt, max_tokens=100).sequences[0]
    assert (len(found.tokens), found.stopped) == (room, False)


def test_max_tokens_zero_scores_the_prompt_only(sampler: TorchSampler) -> None:
    found = one(sampler, max_tokens=0, num_samples=2, prompt_logprobs=True, topk_sample_logprobs=3)
    assert found.prompt_logprobs is not None
    assert np.isfinite(found.prompt_logprobs[1:]).all()
    for sequence in found.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 0
        assert sequence.topk is not None
        assert sequence.topk.token_ids.shape == (0, 3)


# What is said about the distribution


def test_sampled_logprobs_are_of_the_narrowed_distribution(sampler: TorchSampler, folder: Path) -> None:
    found = one(sampler, sampler_id="", temperature=0.6, top_k=4, max_tokens=20, topk_sample_logprobs=6)
    sequence = found.sequences[0]
    logprobs = plain_logprobs(folder, np.concatenate([PROMPT, sequence.tokens]))[len(PROMPT) - 1 : -1]
    best = logprobs.topk(4, dim=-1)
    wanted = (best.values / 0.6).log_softmax(-1).numpy()
    assert sequence.topk is not None
    np.testing.assert_allclose(sequence.topk.logprobs[:, :4], wanted, atol=ROUNDING)
    assert np.array_equal(sequence.topk.token_ids[:, :4], best.indices.numpy())
    assert (sequence.topk.logprobs[:, 4:] == -99999.0).all()
    assert (sequence.topk.token_ids[:, 4:] == 0).all()
    chosen = (sequence.topk.token_ids[:, :4] == sequence.tokens[:, None]).argmax(1)
    np.testing.assert_allclose(sequence.logprobs, wanted[np.arange(20), chosen], atol=ROUNDING)


def test_first_tokens_of_many_samples_follow_the_model(sampler: TorchSampler, folder: Path) -> None:
    count = 4000
    found = one(sampler, num_samples=count, max_tokens=1, top_k=5)
    best = plain_logprobs(folder, PROMPT)[-1].topk(5)
    drawn = np.array([s.tokens[0] for s in found.sequences])
    observed = np.array([(drawn == token).sum() for token in best.indices.tolist()])
    expected = best.values.softmax(-1).numpy() * count
    assert observed.sum() == count
    assert (
        (observed - expected) ** 2 / expected
    ).sum() < 18.5  # 4 degrees of freedom, one seed in a thousand


def test_prompt_scores_are_the_plain_models_whatever_the_sampling(
    sampler: TorchSampler, folder: Path
) -> None:
    targets = np.array([[i, -1, 2 * i] for i in range(len(PROMPT) - 1)])
    found = one(
        sampler,
        temperature=0.5,
        top_k=2,
        prompt_logprobs=True,
        topk_prompt_logprobs=3,
        target_prompt_logprobs=targets,
    )
    logprobs = plain_logprobs(folder, PROMPT)[:-1].numpy()
    rows = np.arange(len(PROMPT) - 1)
    assert found.prompt_logprobs is not None
    assert np.isnan(found.prompt_logprobs[0])
    np.testing.assert_allclose(found.prompt_logprobs[1:], logprobs[rows, PROMPT[1:]], atol=ROUNDING)
    assert found.topk_prompt is not None
    assert found.topk_prompt.token_ids[0].tolist() == [0, 0, 0]
    assert found.topk_prompt.logprobs[0].tolist() == [-99999.0] * 3
    best = np.argsort(-logprobs, axis=1)[:, :3]
    assert np.array_equal(found.topk_prompt.token_ids[1:], best)
    np.testing.assert_allclose(found.topk_prompt.logprobs[1:], logprobs[rows[:, None], best], atol=ROUNDING)
    assert found.target_prompt_logprobs is not None
    wanted = np.where(targets < 0, 0.0, logprobs[rows[:, None], targets])
    np.testing.assert_allclose(found.target_prompt_logprobs, wanted, atol=ROUNDING)


def test_the_last_n_prompt_logprobs_leave_the_rest_empty(sampler: TorchSampler) -> None:
    asked: dict[str, Any] = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "target_prompt_logprobs": np.full((len(PROMPT) - 1, 1), 7),
    }
    whole, last = one(sampler, **asked), one(sampler, **asked, prompt_logprobs_last_n=3)
    assert last.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs[:-3]).all()
    np.testing.assert_allclose(last.prompt_logprobs[-3:], whole.prompt_logprobs[-3:], atol=ROUNDING)
    assert last.topk_prompt is not None
    assert whole.topk_prompt is not None
    assert (last.topk_prompt.logprobs[:-3] == -99999.0).all()
    assert np.array_equal(last.topk_prompt.token_ids[-3:], whole.topk_prompt.token_ids[-3:])
    np.testing.assert_allclose(last.target_prompt_logprobs, whole.target_prompt_logprobs, atol=ROUNDING)


def test_alternatives_are_draws_at_the_requests_temperature(sampler: TorchSampler, folder: Path) -> None:
    count = 3000
    found = one(sampler, prompt_alt_tokens_k=count, temperature=0.5, top_k=1).prompt_alt_tokens
    assert found is not None
    assert found.token_ids.shape == found.logprobs.shape == (len(PROMPT) - 1, count)
    logprobs = plain_logprobs(folder, PROMPT)[:-1]
    taken = logprobs.gather(1, torch.from_numpy(found.token_ids.astype(np.int64)))
    np.testing.assert_allclose(found.logprobs, taken, atol=ROUNDING)
    cold = (logprobs / 0.5).softmax(-1)
    likeliest = cold.argmax(-1, keepdim=True)
    expected = cold.gather(1, likeliest)[:, 0].numpy()
    observed = (found.token_ids == likeliest.numpy()).mean(1)
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()
    greedy = one(sampler, prompt_alt_tokens_k=2, temperature=0).prompt_alt_tokens
    assert greedy is not None
    assert np.array_equal(greedy.token_ids, np.repeat(likeliest.numpy(), 2, axis=1))


# What goes wrong


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"sampler_id": "nobody"}, "no sampler 'nobody'"),
        ({"prompt": PROMPT[:0]}, "prompt is empty"),
        ({"prompt": np.array([3, 4096], np.int32)}, r"outside the vocabulary 0\.\.4095"),
        ({"prompt": np.array([-1], np.int32)}, "outside the vocabulary"),
        ({"prompt": np.ones(4097, np.int32)}, "4097 tokens are more than the model's 4096"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 1.5}, "top_p must be between"),
        ({"stop_strings": ("",)}, "stop string is empty"),
        ({"target_prompt_logprobs": np.zeros((3, 1), np.int64)}, r"it must be \[10, K\]"),
        ({"target_prompt_logprobs": np.full((10, 1), 5000)}, "target_prompt_logprobs holds tokens outside"),
    ],
)
def test_a_bad_request_fails_alone(wrong: dict[str, Any], sentence: str, sampler: TorchSampler) -> None:
    expected = one(sampler, sampler_id="wide")
    sampler.add(request("good", "wide"))
    sampler.add(request("bad", **wrong))
    found = {a.request_id if isinstance(a, SampleOutput) else a[0]: a for a in answers(sampler)}
    bad, good = found["bad"], found["good"]
    assert isinstance(bad, tuple)
    assert bad[1].category == "user"
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(bad[1].message)
    assert isinstance(good, SampleOutput)
    assert_same(good, expected)


def test_stop_strings_without_a_tokenizer_are_refused(base: Base) -> None:
    assert "need a tokenizer" in failure(TorchSampler(base), stop_strings=("x",)).message


def test_diverged_weights_fail_their_requests_and_leave_nothing_behind(
    base: Base, states: dict[str, AdapterState], sampler: TorchSampler
) -> None:
    expected = one(sampler, sampler_id="wide", max_tokens=30)
    diverged = replace(states["wide"], weights=np.full_like(states["wide"].weights, np.nan))
    sampler.hold("diverged", diverged)
    # Slots that held NaN are used again by others, before and while they decode.
    for number in range(3):
        sampler.add(request(f"bad {number}", "diverged", num_samples=3, max_tokens=30))
    sampler.add(request("good", "wide", max_tokens=30))
    sampler.step()
    sampler.add(request("bad 3", "diverged", num_samples=3))
    found = {a.request_id if isinstance(a, SampleOutput) else a[0]: a for a in answers(sampler)}
    good = found["good"]
    assert isinstance(good, SampleOutput)
    assert_same(good, expected)
    bad = found["bad 3"]
    assert isinstance(bad, tuple)
    assert "not finite" in bad[1].message


class Poisoned:
    """A base on which a pass fails when one certain token is in it."""

    def __init__(self, base: Base, token: int) -> None:
        self._base, self._token = base, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def forward(self, stream: Stream, *acting: Any) -> torch.Tensor:
        if bool((stream.tokens_T == self._token).any()):
            raise RuntimeError("out of memory")
        return self._base.forward(stream, *acting)


def test_a_prompt_that_cannot_be_read_fails_alone(base: Base, sampler: TorchSampler) -> None:
    expected = one(sampler, temperature=0)
    poisoned: Any = Poisoned(base, 1999)
    shaky = TorchSampler(poisoned)
    for given in (
        request("good", temperature=0),
        request("bad", prompt=np.array([4, 1999], np.int32), num_samples=3),
    ):
        shaky.add(given)
    found = {a.request_id if isinstance(a, SampleOutput) else a[0]: a for a in answers(shaky)}
    bad, good = found["bad"], found["good"]
    assert isinstance(bad, tuple)
    assert (bad[1].category, "out of memory" in bad[1].message) == ("server", True)
    assert isinstance(good, SampleOutput)
    assert_same(good, expected)


def named(answers: Iterator[Answer]) -> dict[str, Answer]:
    return {a.request_id if isinstance(a, SampleOutput) else a[0]: a for a in answers}


def test_a_token_that_cannot_be_sampled_fails_its_own_request_alone(
    base: Base, sampler: TorchSampler
) -> None:
    """The others' tokens are those of an undisturbed run: trying again draws no other number."""
    asked = [request("good", num_samples=2), request("bad", seed=77), request("waiting", seed=6)]
    expected = run(sampler, *asked)
    others = {t for name in ("good", "waiting") for s in expected[name].sequences for t in s.tokens.tolist()}
    poison = next(t for t in expected["bad"].sequences[0].tokens[2:].tolist() if t not in others)
    shaky: Any = Poisoned(base, poison)
    shaken = TorchSampler(shaky, settings=SamplerSettings(max_sequences=3))
    for given in asked:
        shaken.add(given)
    found = named(answers(shaken))
    bad = found.pop("bad")
    assert isinstance(bad, tuple)
    assert (bad[1].category, "out of memory" in bad[1].message) == ("server", True)
    assert found.keys() == {"good", "waiting"}
    for name, answer in found.items():
        assert isinstance(answer, SampleOutput), answer
        assert_same(answer, expected[name])


def test_what_could_never_fit_is_refused_and_nobody_else_is(base: Base, sampler: TorchSampler) -> None:
    asked = [request("too long", max_tokens=700), request("fits", max_tokens=20, num_samples=3)]
    expected = run(sampler, asked[1])
    small = make(base, {}, SamplerSettings(cache_bytes=128 * CELL_BYTES))
    for given in asked:
        small.add(given)
    found = named(answers(small))
    refused, fits = found["too long"], found["fits"]
    assert isinstance(refused, tuple)
    assert (refused[1].category, "set a smaller max_tokens" in refused[1].message) == ("user", True)
    assert isinstance(fits, SampleOutput)
    assert_same(fits, expected["fits"])


class Scarce(Cache):
    """A machine that has no memory for more than `most` pages."""

    most = 40

    def open(self, pages: int, **where: Any) -> None:
        if pages > self.most:
            raise RuntimeError("no memory")
        super().open(pages, **where)


def test_a_cache_that_finds_no_memory_is_made_smaller(
    base: Base, sampler: TorchSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(sampler, request("r", num_samples=20))
    monkeypatch.setattr("tinsmith_worker.sampler.runner.Cache", Scarce)
    small = TorchSampler(base)
    assert small._places.pages.count in range(20, 40)
    assert_same(run(small, request("r", num_samples=20))["r"], expected["r"])


def test_sequences_that_step_back_are_what_they_would_have_been(
    base: Base, sampler: TorchSampler, states: dict[str, AdapterState]
) -> None:
    """Eight grow to 41 tokens where there is room for some 100: they make room for each other many times."""
    asked = [
        request(str(n), "wide" if n % 2 else "", num_samples=2, seed=n, max_tokens=30, topk_sample_logprobs=1)
        for n in range(4)
    ]
    expected = run(sampler, *asked)
    small = make(base, states, SamplerSettings(cache_bytes=100 * CELL_BYTES, page_tokens=4))
    steps_back = 0
    step_back = small._places.step_back

    def counted() -> Any:
        nonlocal steps_back
        steps_back += 1
        return step_back()

    small._places.step_back = counted  # type: ignore[method-assign]
    found = run(small, *asked)
    assert steps_back > 3
    for name, answer in found.items():
        assert_same(answer, expected[name])
    assert small._places.pages.available == small._places.pages.count


def test_tokens_that_are_streamed_are_those_of_the_result_once_each(
    base: Base, states: dict[str, AdapterState]
) -> None:
    """Where sequences make room for each other, too."""
    small = make(base, states, SamplerSettings(cache_bytes=100 * CELL_BYTES, page_tokens=4))
    asked = [
        request(
            str(n), "wide" if n % 2 else "", num_samples=2, seed=n, max_tokens=30, topk_sample_logprobs=n,
            is_streamed=n < 3,
        )
        for n in range(4)
    ]  # fmt: skip
    for given in asked:
        small.add(given)
    pieces, found, first_seen = [], {}, 0
    while small.busy:
        for done in small.step():
            assert isinstance(done, SampleOutput)
            found[done.request_id] = done
        pieces += small.pieces()
        first_seen = first_seen or (len(pieces) and not found)
    assert first_seen, "before anything was finished"
    assert {piece.request_id for piece in pieces} == {"0", "1", "2"}
    for given in asked[:3]:
        for index, whole in enumerate(found[given.request_id].sequences):
            own = [p for p in pieces if (p.request_id, p.index) == (given.request_id, index)]
            assert [p.start for p in own] == list(range(30))
            assert [p.ends for p in own] == [False] * 29 + [True]
            assert np.concatenate([p.sequence.tokens for p in own]).tolist() == whole.tokens.tolist()
            assert np.concatenate([p.sequence.logprobs for p in own]).tolist() == whole.logprobs.tolist()
            if whole.topk is not None:
                tops = [p.sequence.topk.token_ids for p in own if p.sequence.topk is not None]
                assert np.concatenate(tops).tolist() == whole.topk.token_ids.tolist()


def test_what_is_scored_at_its_end_is_not_streamed_before(base: Base) -> None:
    engine = TorchEngine(base)
    exact = TorchSampler(base, score=engine.score)
    exact.add(request("plain", is_streamed=True))
    exact.add(request("narrowed", is_streamed=True, top_k=3))
    pieces = []
    while exact.busy:
        exact.step()
        pieces += exact.pieces()
    assert {piece.request_id for piece in pieces} == {"narrowed"}


def test_adapters_that_do_not_fit_beside_each_other_take_turns(
    base: Base, sampler: TorchSampler, states: dict[str, AdapterState]
) -> None:
    asked = mixed_requests()
    expected = run(sampler, *asked)
    small = make(base, states, SamplerSettings(adapter_bytes=1))  # one always may be there
    for given in asked:
        small.add(given)
    found: dict[str, Answer] = {}
    there = 0
    while small.busy:
        found |= named(iter(small.step()))
        there = max(there, sum(held.adapter is not None for held in small._shelf._held.values()))
    assert there == 1
    for name, answer in expected.items():
        sampled = found[name]
        assert isinstance(sampled, SampleOutput)
        assert_same(sampled, answer)


def test_weights_that_are_sampled_stay_while_others_are_saved(base: Base) -> None:
    """A recorded step finds them on the device, or nobody's next token can be had."""
    engine, sampler = TorchEngine(base), make(base, {}, SamplerSettings(adapter_bytes=1))
    engine.create("run", SPECS["wide"])
    for name in ("sampled", "saved later", "and another"):
        sampler.hold(name, engine.frozen("run"))
        if name == "sampled":
            sampler.add(request("r", name))
            sampler.step()
    there = {name: held.adapter is not None for name, held in sampler._shelf._held.items()}
    assert there == {"sampled": True, "saved later": False, "and another": False}
    assert [type(answer) for answer in answers(sampler)] == [SampleOutput]
    same = one(sampler, sampler_id="and another")
    assert_same(same, one(sampler, sampler_id="sampled"))


# What was read before


def test_a_prompt_is_read_once_for_all_who_ask_of_the_same_weights(sampler: TorchSampler) -> None:
    prompt = np.resize(PROMPT, 100)  # three pages of 32 and a bit
    asked = [
        request("first", "wide", prompt=prompt),
        request("same", "wide", prompt=prompt, seed=6),  # waits for the first to be read
        request("longer", "wide", prompt=np.append(prompt[:70], PROMPT)),
        request("scored", "wide", prompt=prompt, prompt_logprobs=True),
        request("scored at its end", "wide", prompt=prompt, prompt_logprobs=True, prompt_logprobs_last_n=20),
        request("other weights", "narrow", prompt=prompt),
        request("other tenant", "wide", prompt=prompt, tenant_id="b"),
    ]
    alone = {given.request_id: run(fresh(sampler), given)[given.request_id] for given in asked}
    assert {answer.cache_hit_tokens for answer in alone.values()} == {0}
    together = run(fresh(sampler), *asked)
    hits = {name: answer.cache_hit_tokens for name, answer in together.items()}
    assert hits == {
        "first": 0,
        "same": 96,
        "longer": 64,
        "scored": 0,
        "scored at its end": 64,  # the row before position 80 says how likely its token is
        "other weights": 0,
        "other tenant": 0,
    }
    for name, answer in together.items():
        assert_same(answer, alone[name])


def fresh(sampler: TorchSampler) -> TorchSampler:
    """One that has read nothing yet."""
    made = TorchSampler(sampler.base, sampler.tokenizer, sampler.settings)
    made._shelf = sampler._shelf
    return made


def test_a_conversation_goes_on_from_what_was_sampled(sampler: TorchSampler) -> None:
    first = run(sampler, request("1", "wide", max_tokens=60))["1"].sequences[0]
    prompt = np.concatenate([PROMPT, first.tokens, PROMPT]).astype(np.int32)
    asked = request("2", "wide", prompt=prompt)
    found, alone = run(sampler, asked)["2"], run(fresh(sampler), asked)["2"]
    assert (found.cache_hit_tokens, alone.cache_hit_tokens) == (64, 0)
    assert_same(found, alone)


def test_what_was_read_makes_way_for_what_is_read(base: Base, states: dict[str, AdapterState]) -> None:
    small = make(base, states, SamplerSettings(cache_bytes=128 * CELL_BYTES, page_tokens=16))
    prompts = [np.roll(np.resize(PROMPT, 60), n).astype(np.int32) for n in range(3)]
    hits = [
        run(small, request(str(n), prompt=prompts[n], max_tokens=4))[str(n)].cache_hit_tokens
        for n in (0, 1, 1, 2, 0)
    ]
    assert hits == [0, 0, 48, 0, 16]  # the end of a text makes way before its beginning


def test_alternatives_at_a_temperature_near_zero_are_the_likeliest_tokens(sampler: TorchSampler) -> None:
    greedy, cold = (one(sampler, prompt_alt_tokens_k=2, temperature=t).prompt_alt_tokens for t in (0, 1e-42))
    assert greedy is not None
    assert cold is not None
    assert np.array_equal(cold.token_ids, greedy.token_ids)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_targets_as_they_come_from_the_wire_are_taken_without_a_warning(sampler: TorchSampler) -> None:
    targets = np.frombuffer(np.full((len(PROMPT) - 1, 1), 7).tobytes(), np.int64).reshape(-1, 1)
    assert not targets.flags.writeable
    assert one(sampler, target_prompt_logprobs=targets).target_prompt_logprobs is not None


def test_rows_of_the_base_alone_are_no_gap_among_the_adapters_rows(base: Base) -> None:
    wide, narrow = base.new_adapter(SPECS["wide"]), base.new_adapter(SPECS["narrow"])
    adapters = [wide, None, narrow, None, wide]
    assert by_adapter(range(5), adapters) == [1, 3, 0, 4, 2]


def test_a_cancelled_request_is_gone_wherever_it_was(base: Base) -> None:
    sampler = TorchSampler(base, settings=SamplerSettings(max_sequences=2, max_pass_tokens=8))
    sampler.add(request("growing", prompt=PROMPT[:2], max_tokens=1000))
    sampler.step()
    sampler.add(request("reading", prompt=np.tile(PROMPT, 3)))
    sampler.step()
    sampler.add(request("waiting"))
    for name in ("unknown", "growing", "reading"):
        sampler.cancel(name)
        assert sampler.busy
        assert sampler.step() == []
    sampler.cancel("waiting")
    assert not sampler.busy
