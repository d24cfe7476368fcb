"""Our own client against the real service: the tiny base, the torch engine."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import tinsmith
from tests.conftest import RunningService
from tinsmith.types import AdamParams, Datum, ModelInput, SamplingParams, TensorData

BASE = "tinsmith/tiny"


@pytest.fixture
def client(service: RunningService) -> Iterator[tinsmith.ServiceClient]:
    with tinsmith.ServiceClient(base_url=service.url, api_key=service.key) as client:
        yield client


@pytest.fixture
def training(client: tinsmith.ServiceClient) -> tinsmith.TrainingClient:
    return client.create_lora_training_client(BASE, rank=8, seed=1).result(60)


def datum(seed: int, length: int, weights: float = 1.0) -> Datum:
    tokens = np.random.default_rng(seed).integers(3, 2000, length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": np.full(length, weights, np.float32)}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


DATA = [datum(seed, length) for seed, length in ((0, 7), (1, 12), (2, 5))]


def step(training: tinsmith.TrainingClient, learning_rate: float = 1e-2) -> float:
    forward_backward = training.forward_backward(DATA, "cross_entropy")
    training.optim_step(AdamParams(learning_rate=learning_rate)).result(60)
    return forward_backward.result(60).metrics["loss:sum"]


def logprobs(training: tinsmith.TrainingClient) -> list[list[float]]:
    outputs = training.forward(DATA, "cross_entropy").result(60).loss_fn_outputs
    return [output["logprobs"].tolist() for output in outputs]


def test_training_lowers_the_loss_and_samplers_stay_as_saved(training: tinsmith.TrainingClient) -> None:
    first = step(training)
    early = training.save_weights_and_get_sampling_client().result(60)
    prompt = DATA[0].model_input
    before = early.compute_logprobs(prompt).result(60)
    losses = [step(training) for _ in range(8)]
    assert losses[-1] < 0.7 * first
    assert early.compute_logprobs(prompt).result(60) == before
    late = training.save_weights_and_get_sampling_client().result(60)
    assert late.compute_logprobs(prompt).result(60) != before


@pytest.mark.parametrize("has_arrived", [False, True])
def test_a_run_goes_on_after_ctrl_c_while_a_call_was_sent(
    training: tinsmith.TrainingClient, monkeypatch: pytest.MonkeyPatch, has_arrived: bool
) -> None:
    """Whether the call had reached the service or not; it is applied once, or not at all."""
    request = httpx.Client.request

    class Interrupted(BaseException):
        """As KeyboardInterrupt, which would end pytest."""

    def interrupted(self: httpx.Client, method: str, url: str, **rest: Any) -> httpx.Response:
        if rest.get("content"):
            monkeypatch.setattr(httpx.Client, "request", request)
            if has_arrived:
                request(self, method, url, **rest)
            raise Interrupted
        return request(self, method, url, **rest)

    before = training.forward_backward(DATA, "cross_entropy").result(60).metrics["loss:sum"]
    monkeypatch.setattr(httpx.Client, "request", interrupted)
    with pytest.raises(Interrupted):
        training.optim_step(AdamParams(learning_rate=1e-2))
    after = training.forward(DATA, "cross_entropy").result(60).metrics["loss:sum"]
    assert (after < 0.9 * before) == has_arrived
    assert [row["kind"] for row in training.metrics()].count("optim_step") == has_arrived


def test_an_await_and_a_result_are_the_same(training: tinsmith.TrainingClient) -> None:
    async def both() -> tuple[float, float]:
        future = training.forward(DATA, "cross_entropy")
        return (await future).metrics["loss:sum"], future.result(60).metrics["loss:sum"]

    awaited, waited = asyncio.run(both())
    assert awaited == waited


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_a_custom_cross_entropy_trains_like_the_built_in(client: tinsmith.ServiceClient, arrays: str) -> None:
    def cross_entropy(data, logprobs):  # type: ignore[no-untyped-def]
        loss = -sum(lp.sum() for lp in logprobs)
        if arrays == "torch":
            return loss, {}
        return loss, [-np.ones_like(lp) for lp in logprobs], {}

    built_in, custom = [client.create_lora_training_client(BASE, rank=8, seed=3).result(60) for _ in range(2)]
    expected = built_in.forward_backward(DATA, "cross_entropy")
    built_in.optim_step(AdamParams(learning_rate=1e-2))
    found = custom.forward_backward_custom(DATA, cross_entropy, arrays=arrays)
    custom.optim_step(AdamParams(learning_rate=1e-2))
    assert found.result(60).metrics["loss:sum"] == pytest.approx(expected.result(60).metrics["loss:sum"])
    assert logprobs(custom) == logprobs(built_in)


def test_a_run_resumed_with_its_optimizer_goes_on_exactly(client: tinsmith.ServiceClient) -> None:
    training = client.create_lora_training_client(BASE, rank=8, seed=5).result(60)
    for _ in range(2):
        step(training)
    path = training.save_state("half").result(60).path
    step(training)
    resumed = client.create_training_client_from_state_with_optimizer(path).result(60)
    step(resumed)
    assert logprobs(resumed) == logprobs(training)
    training.load_state_with_optimizer(path).result(60)
    step(training)
    assert logprobs(resumed) == logprobs(training)
    fresh = client.create_training_client_from_state(path).result(60)
    step(fresh)
    assert logprobs(fresh) != logprobs(training)


def test_a_saved_sampler_answers_everything_asked(
    client: tinsmith.ServiceClient, training: tinsmith.TrainingClient
) -> None:
    step(training)
    path = training.save_weights_for_sampler("one").result(60).path
    sampler = client.create_sampling_client(path).result(60)
    prompt = DATA[1].model_input
    length = prompt.length
    response = sampler.sample(
        prompt,
        2,
        SamplingParams(max_tokens=5, seed=11, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        target_prompt_logprobs=TensorData(np.array(prompt.to_ints())[1:, None]),
        prompt_alt_tokens_k=2,
    ).result(60)
    assert [len(sequence.tokens) for sequence in response.sequences] == [5, 5]
    assert response.sequences[0].tokens != response.sequences[1].tokens
    assert all(sequence.stop_reason == "length" for sequence in response.sequences)
    assert all(sequence.topk_logprobs and len(sequence.topk_logprobs) == 5 for sequence in response.sequences)
    scores = response.prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == length
    assert response.topk_prompt_logprobs is not None
    assert [row is None or len(row) for row in response.topk_prompt_logprobs] == [True] + [3] * (length - 1)
    assert response.target_prompt_logprobs is not None
    assert response.target_prompt_logprobs.to_numpy()[:, 0] == pytest.approx(
        np.array(scores[1:], float), abs=1e-5
    )
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.logprobs.shape == [length - 1, 2]
    trained = (
        training.forward([DATA[1]], "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].to_numpy()
    )
    assert np.array(scores[1:], float) == pytest.approx(trained[:-1], abs=1e-4)


def test_every_mistake_is_a_sentence_and_the_next_call_works(
    client: tinsmith.ServiceClient, training: tinsmith.TrainingClient
) -> None:
    with pytest.raises(tinsmith.InvalidInput, match="unknown base_model"):
        client.create_lora_training_client("no/such").result(60)
    with pytest.raises(tinsmith.TinsmithError, match="name"):
        training.save_state("a/b").result(60)
    outside = Datum(ModelInput.from_ints([5]), {"target_tokens": [10**6], "weights": [1.0]})
    with pytest.raises(tinsmith.TinsmithError, match="vocabulary"):
        training.forward_backward([outside], "cross_entropy").result(60)
    with pytest.raises(tinsmith.NotFound):
        client.create_sampling_client("tinker://nobody:train:0/sampler_weights/x").result(60)
    assert step(training) > 0


def test_a_wrong_key_is_told_so(service: RunningService) -> None:
    client = tinsmith.ServiceClient(base_url=service.url, api_key="tml-wrong")
    with pytest.raises(tinsmith.AuthenticationError):
        client.get_server_capabilities()
    client.close().result(10)


@pytest.mark.parametrize("package", ["tinker", "tinsmith"])
def test_the_lines_in_the_readme_run_on_both_clients(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", service.key)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(lines.replace("tinker", package).replace(f"{package}/tiny", "tinsmith/tiny"), {})
    assert float(capsys.readouterr().out.split()[0]) > 0


def test_four_hundred_samples_at_once(client: tinsmith.ServiceClient) -> None:
    """Awaited and waited for; each answers what it was asked."""
    sampler = client.create_sampling_client(base_model=BASE).result(60)
    prompts = [ModelInput.from_ints([5, 6, 7 + i]) for i in range(400)]
    params = SamplingParams(max_tokens=1, temperature=0.0, stop=[])

    async def gathered() -> list[list[int]]:
        found = await asyncio.gather(*(sampler.sample(prompt, 1, params) for prompt in prompts))
        return [one.sequences[0].tokens for one in found]

    awaited = asyncio.run(gathered())
    futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
    assert [future.result(120).sequences[0].tokens for future in futures] == awaited
    assert len({tuple(tokens) for tokens in awaited}) > 10


def test_metrics_cost_and_fork_of_a_run(client: tinsmith.ServiceClient) -> None:
    training = client.create_lora_training_client(BASE, rank=4, seed=2).result(60)
    losses = [step(training) for _ in range(3)]
    training.save_state("step-3").result(60)
    now, then = training.fork().result(60), training.fork(3).result(60)
    assert logprobs(now) == logprobs(then) == logprobs(training)
    for run in (training, now, then):
        step(run)
    assert logprobs(now) == logprobs(then) == logprobs(training)
    table = training.metrics()
    passes = [row for row in table if row["kind"] == "forward_backward"]
    assert [row["loss:sum"] for row in passes][:3] == losses
    assert all(row["tokens"] == sum(d.model_input.length for d in DATA) for row in passes)
    assert all(row["grad_norm"] > 0 for row in table if row["kind"] == "optim_step")
    assert all(row["compute_seconds"] > 0 for row in passes)
    cost = training.cost()
    assert cost.steps == 4
    assert cost.tokens == sum(row["tokens"] or 0 for row in table)
    assert cost.storage_bytes > 0


def test_an_export_is_what_was_trained(
    client: tinsmith.ServiceClient, training: tinsmith.TrainingClient, tmp_path: Path
) -> None:
    """PEFT and transformers, with the files alone, find the service's logprobs."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for _ in range(3):
        step(training, 1e-2)
    texts = [[*d.model_input.to_ints(), int(d.loss_fn_inputs["target_tokens"].data[-1])] for d in DATA]
    expected = training.logprobs(texts).result(60)
    base = str(training.get_info().model_data.tokenizer_id)
    adapter = training.export(tmp_path / "adapter")
    merged = training.export(tmp_path / "merged", "merged", base=base, dtype="float32")
    loaded = [
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
        ),
        AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
    ]
    for model in loaded:
        for text, own in zip(texts, expected, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0]
            found = torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(text[1:])[:, None])[
                :, 0
            ]
            np.testing.assert_allclose(found.numpy(), own[1:], atol=2e-4)
