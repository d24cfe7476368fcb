"""vLLM as it is, sampling for workers: what it is asked and answers, against our own sampler and transformers.

Asked for by name (`make test-vllm`), for it builds vLLM's environment the first time.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.versions import environments
from tinsmith.errors import InvalidInput
from tinsmith_worker import tiny_base
from tinsmith_worker.contract import AdapterState, Failure, LoraSpec, SampleInput, SampleOutput
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import TorchSampler
from tinsmith_worker.sampler.distribution import Filters, distribution
from tinsmith_worker.vllm import VllmSampler, open_vllm

pytestmark = pytest.mark.timeout(1800)

PROMPT = np.array([1, 319, 201, 42, 75, 383, 900, 77, 1300, 12, 450], np.int32)
SPECS = {
    "wide": LoraSpec(rank=8, seed=1, train_unembed=False),
    "narrow": LoraSpec(rank=3, seed=2, train_mlp=False, train_unembed=False),
    "whole": LoraSpec(rank=8, seed=1),
}
# Both compute in float32, in other orders.
ROUNDING = 2e-3


def command() -> str:
    """vLLM for CPUs, small, and in float32."""
    vllm = environments.vllm().parent / "vllm"
    return f"{vllm} --enforce-eager --dtype float32 --max-loras 4"


@pytest.fixture(scope="module")
def vllm() -> Iterator[VllmSampler]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    engine, sampler = open_vllm(str(tiny_base.FOLDER), command())
    assert (engine.facts.vocab_size, engine.facts.max_context_length) == (4096, 4096)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.load(tiny_base.FOLDER, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(base: Base) -> TorchSampler:
    return TorchSampler(base, AutoTokenizer.from_pretrained(tiny_base.FOLDER))


@pytest.fixture(scope="module")
def states(base: Base) -> dict[str, AdapterState]:
    found = {}
    for number, (name, spec) in enumerate(SPECS.items()):
        state = base.new_adapter(spec).state()
        random = np.random.default_rng(number)
        found[name] = replace(state, weights=random.normal(0, 0.03, state.weights.shape).astype(np.float32))
    return found


def request(request_id: str = "r", sampler_id: str = "", **given: Any) -> SampleInput:
    settled: dict[str, Any] = {
        "prompt": PROMPT, "num_samples": 1, "max_tokens": 12, "seed": 5, "stop_tokens": (), "tenant_id": "t"
    }  # fmt: skip
    return SampleInput(request_id=request_id, sampler_id=sampler_id, **{**settled, **given})


def run(sampler: VllmSampler | TorchSampler, *requests: SampleInput) -> dict[str, SampleOutput | Failure]:
    for given in requests:
        sampler.add(given)
    found: dict[str, SampleOutput | Failure] = {}
    deadline = time.monotonic() + 300
    while len(found) < len(requests):
        assert time.monotonic() < deadline
        for answer in sampler.step():
            if isinstance(answer, SampleOutput):
                found[answer.request_id] = answer
            else:
                found[answer[0]] = answer[1]
        time.sleep(0.01)
    return found


def one(sampler: VllmSampler | TorchSampler, **given: Any) -> SampleOutput:
    answer = run(sampler, request(**given))["r"]
    assert isinstance(answer, SampleOutput), answer
    return answer


def failure(sampler: VllmSampler, **given: Any) -> Failure:
    answer = run(sampler, request(**given))["r"]
    assert isinstance(answer, Failure), answer
    return answer


def logits(tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] of untouched transformers: row i is what comes after token i."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return found


@pytest.mark.parametrize("name", ["", *SPECS])
def test_it_samples_what_our_sampler_samples_at_temperature_0(
    vllm: VllmSampler, ours: TorchSampler, states: dict[str, AdapterState], name: str
) -> None:
    """The base, and adapters given to it as PEFT's files."""
    if name:
        vllm.hold(f"t/{name}", states[name])
        ours.hold(f"t/{name}", states[name])
    asked: dict[str, Any] = {"sampler_id": name and f"t/{name}", "temperature": 0.0, "max_tokens": 24}
    asked |= {"topk_sample_logprobs": 4, "prompt_logprobs": True, "topk_prompt_logprobs": 3}
    theirs, own = one(vllm, **asked), one(ours, **asked)
    (a,), (b,) = theirs.sequences, own.sequences
    assert a.tokens.tolist() == b.tokens.tolist()
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=ROUNDING)
    assert a.topk is not None
    assert b.topk is not None
    np.testing.assert_allclose(a.topk.logprobs, b.topk.logprobs, atol=ROUNDING)
    assert (a.topk.token_ids == b.topk.token_ids).mean() > 0.95, "but where two are as likely"
    assert theirs.prompt_logprobs is not None
    assert own.prompt_logprobs is not None
    assert np.isnan(theirs.prompt_logprobs[0])
    np.testing.assert_allclose(theirs.prompt_logprobs[1:], own.prompt_logprobs[1:], atol=ROUNDING)
    assert theirs.topk_prompt is not None
    assert own.topk_prompt is not None
    np.testing.assert_allclose(theirs.topk_prompt.logprobs, own.topk_prompt.logprobs, atol=ROUNDING)
    assert not a.stopped


@pytest.mark.parametrize(
    "narrowed",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 20},
        {"top_p": 0.7},
        {"top_k": 30, "top_p": 0.8},
    ],
)
def test_a_token_s_logprob_is_that_of_the_distribution_it_was_drawn_from(
    vllm: VllmSampler, narrowed: dict[str, Any]
) -> None:
    (sequence,) = one(vllm, max_tokens=20, topk_sample_logprobs=2, **narrowed).sequences
    text = [*PROMPT.tolist(), *sequence.tokens.tolist()]
    asked = (narrowed.get("temperature", 1.0), narrowed.get("top_k", -1), narrowed.get("top_p", 1.0))
    rows = logits(text)[len(PROMPT) - 1 : -1]
    wanted = distribution(rows, Filters.of([asked] * len(rows), rows.shape[1], torch.device("cpu")))
    chosen = wanted.gather(1, torch.from_numpy(sequence.tokens.astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(sequence.logprobs, chosen, atol=ROUNDING)
    assert sequence.topk is not None
    np.testing.assert_allclose(sequence.topk.logprobs[:, 0], wanted.amax(1), atol=ROUNDING)


def test_a_seed_reproduces_a_request_and_its_samples_differ(vllm: VllmSampler) -> None:
    first, again = (one(vllm, num_samples=4, seed=2**64 - 1) for _ in range(2))
    tokens = [s.tokens.tolist() for s in first.sequences]
    assert tokens == [s.tokens.tolist() for s in again.sequences]
    assert len(set(map(tuple, tokens))) == 4
    assert tokens != [s.tokens.tolist() for s in one(vllm, num_samples=4, seed=6).sequences]


def test_tokens_that_are_streamed_are_those_of_the_result(vllm: VllmSampler) -> None:
    given = request(
        num_samples=2, max_tokens=40, topk_sample_logprobs=2, prompt=np.arange(1, 300, dtype=np.int32)
    )
    vllm.add(replace(given, is_streamed=True))
    pieces, finished = [], []
    times: list[float] = []
    while not finished:
        finished = vllm.step()
        if came := vllm.pieces():
            pieces += came
            times.append(time.monotonic())
        time.sleep(0.001)
    assert len(times) > 1, "not all at once"
    (whole,) = finished
    assert isinstance(whole, SampleOutput)
    plain = run(vllm, given)["r"]
    assert isinstance(plain, SampleOutput)
    for index, sequence in enumerate(whole.sequences):
        own = [piece for piece in pieces if piece.index == index]
        tokens = np.concatenate([piece.sequence.tokens for piece in own]).tolist()
        assert tokens == sequence.tokens.tolist() == plain.sequences[index].tokens.tolist()
        assert [piece.ends for piece in own] == [False] * (len(own) - 1) + [True]
        np.testing.assert_allclose(sequence.logprobs, plain.sequences[index].logprobs, atol=ROUNDING)
        assert sequence.topk is not None
        assert sequence.topk.logprobs.shape == (40, 2)
    assert whole.cache_hit_tokens >= 0


def test_what_stops_a_sequence_is_what_was_said(vllm: VllmSampler, ours: TorchSampler) -> None:
    """The token or text that stops is the last of the sequence; without one nothing does, the end of the text
    neither."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.FOLDER)
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    prompt = np.array(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"], np.int32
    )
    asked: dict[str, Any] = {"prompt": prompt, "temperature": 0.0, "max_tokens": 48}
    for stops in (
        {"stop_tokens": None},
        {"stop_tokens": ()},
        {"stop_tokens": (), "stop_strings": ("9",)},
        {"stop_tokens": tuple(tokenizer.encode("1"))},
    ):
        (theirs,), (own,) = one(vllm, **asked, **stops).sequences, one(ours, **asked, **stops).sequences
        assert theirs.tokens.tolist() == own.tokens.tolist(), stops
        assert theirs.stopped == own.stopped == (stops != {"stop_tokens": ()}), stops


def test_prompts_are_scored_without_a_token_being_sampled(vllm: VllmSampler, ours: TorchSampler) -> None:
    asked: dict[str, Any] = {"max_tokens": 0, "prompt_logprobs": True, "prompt_logprobs_last_n": 4}
    theirs, own = one(vllm, **asked), one(ours, **asked)
    assert [len(s.tokens) for s in theirs.sequences] == [0]
    assert theirs.prompt_logprobs is not None
    assert own.prompt_logprobs is not None
    assert np.isnan(theirs.prompt_logprobs[:7]).all()
    np.testing.assert_allclose(theirs.prompt_logprobs, own.prompt_logprobs, atol=ROUNDING)


def test_what_it_has_no_word_for_is_refused_with_a_sentence(
    vllm: VllmSampler, states: dict[str, AdapterState]
) -> None:
    with pytest.raises(InvalidInput, match="target_prompt_logprobs is not known to vLLM"):
        vllm.add(request(target_prompt_logprobs=np.zeros((10, 1), np.int64)))
    with pytest.raises(InvalidInput, match="prompt_alt_tokens_k is not known to vLLM"):
        vllm.add(request(prompt_alt_tokens_k=2))
    broken = replace(states["wide"], spec=replace(SPECS["wide"], rank=128))
    vllm.hold("t/broken", broken)
    assert "vLLM does not take this adapter" in failure(vllm, sampler_id="t/broken").message
    too_long = failure(vllm, prompt=np.ones(5000, np.int32))
    assert (too_long.category, "4096" in too_long.message) == ("user", True)
    assert one(vllm).sequences, "and goes on"


def test_a_prompt_is_found_again_by_its_tenant_alone(vllm: VllmSampler) -> None:
    prompt = np.arange(1, 400, dtype=np.int32)
    assert one(vllm, prompt=prompt, tenant_id="a").cache_hit_tokens == 0
    assert one(vllm, prompt=prompt, tenant_id="a").cache_hit_tokens > 200
    assert one(vllm, prompt=prompt, tenant_id="b").cache_hit_tokens == 0


def test_weights_that_are_let_go_of_are_gone_from_vllm_and_the_disk(
    vllm: VllmSampler, states: dict[str, AdapterState]
) -> None:
    def known() -> set[str]:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(vllm._server.socket))) as client:
            return {model["id"] for model in client.get("http://vllm/v1/models").json()["data"]}

    before = known()
    vllm.hold("t/once", states["wide"])
    one(vllm, sampler_id="t/once")
    (name,) = known() - before
    assert (vllm._server.folder / name / "adapter_model.safetensors").exists()
    vllm.release("t/once")
    assert not vllm.holds("t/once")
    deadline = time.monotonic() + 30
    while (vllm._server.folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert known() == before
    assert not (vllm._server.folder / name).exists()


def test_what_is_given_up_stops(vllm: VllmSampler) -> None:
    def running() -> float:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(vllm._server.socket))) as client:
            lines = client.get("http://vllm/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    vllm.add(request("long", max_tokens=4000))
    deadline = time.monotonic() + 60
    while not running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 1
    vllm.cancel("long")
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 0
    assert not vllm.busy
