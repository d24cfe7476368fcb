"""The official SDK, unchanged, against the embedded service on the torch engine."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.conftest import RunningService
from tests.e2e.wire import Wire
from tinsmith.wire import tinsmith_pb2 as pb

MODEL = "tinsmith/tiny"
TEXT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=8, seed=1).result()


def supervised(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def logprobs(output: types.ForwardBackwardOutput) -> np.ndarray:
    return np.concatenate([o["logprobs"].to_numpy() for o in output.loss_fn_outputs])


def train(run: tinker.TrainingClient, steps: int, learning_rate: float = 1e-2) -> list[float]:
    losses = []
    for _ in range(steps):
        passed = run.forward_backward([supervised(TEXT)], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
        losses.append(passed.result().metrics["loss:sum"])
    return losses


def test_training_brings_the_loss_down(run: tinker.TrainingClient) -> None:
    losses = train(run, 12)
    assert losses[-1] < losses[0] / 4


def test_info_and_tokenizer_come_from_the_served_model(run: tinker.TrainingClient) -> None:
    info = run.get_info()
    assert (info.model_data.model_name, info.lora_rank, info.is_lora) == (MODEL, 8, True)
    tokenizer = run.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("two words")) == "two words"


def test_capabilities_list_the_model(service: RunningService) -> None:
    rest = tinker.RestClient(base_url=service.url, api_key=service.key)
    models = rest.get_server_capabilities().result().supported_models
    assert [(m.model_name, m.max_context_length) for m in models] == [(MODEL, 4096)]


def test_what_was_trained_is_what_is_sampled(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=8, seed=2).result()
    train(run, 60, learning_rate=3e-3)
    sampler = run.save_weights_and_get_sampling_client()
    greedy = types.SamplingParams(max_tokens=8, temperature=0, stop=[])
    sample = sampler.sample(types.ModelInput.from_ints(TEXT[:4]), num_samples=1, sampling_params=greedy)
    assert sample.result().sequences[0].tokens == TEXT[4:12]


def test_sampler_and_trainer_agree_on_logprobs(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=8, seed=3).result()
    train(run, 2)
    sampler = run.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=20, temperature=1.0, seed=5, stop=[])
    sampled = sampler.sample(types.ModelInput.from_ints(TEXT), num_samples=2, sampling_params=params).result()
    for sequence in sampled.sequences:
        whole = TEXT + list(sequence.tokens)
        trainer = logprobs(run.forward([supervised(whole)], "cross_entropy").result())
        np.testing.assert_allclose(sequence.logprobs, trainer[len(TEXT) - 1 :], atol=1e-5)
        prompt = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
        assert prompt[0] is None
        np.testing.assert_allclose(prompt[1:], trainer, atol=1e-5)


def test_a_sampler_stays_frozen_while_its_run_trains_on(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=8, seed=4).result()
    train(run, 1)
    sampler = run.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(TEXT)
    before = sampler.compute_logprobs(prompt).result()
    forward = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
    train(run, 2)
    assert sampler.compute_logprobs(prompt).result() == before
    moved = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
    assert np.abs(moved - forward).max() > 1e-3, "training stood still"


def test_inflight_samplers_take_up_what_their_run_saves_and_frozen_ones_do_not(
    client: tinker.ServiceClient,
) -> None:
    run = client.create_lora_training_client(MODEL, rank=8, seed=4).result()
    prompt = types.ModelInput.from_ints(TEXT)
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    frozen = run.save_weights_and_get_sampling_client().result()
    before = first.compute_logprobs(prompt).result()
    train(run, 2)
    assert first.compute_logprobs(prompt).result() == before
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    after = second.compute_logprobs(prompt).result()
    assert after != before
    assert first.compute_logprobs(prompt).result() == after
    assert frozen.compute_logprobs(prompt).result() == before
    rest = client.create_rest_client()
    listed = rest.list_checkpoints(run.get_info().model_id).result().checkpoints
    assert listed == [], "they are no checkpoints of the user's"


def test_samples_of_one_request_differ_and_a_seed_repeats_them(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    params = types.SamplingParams(max_tokens=12, seed=11, stop=[])

    def draw() -> list[list[int]]:
        found = sampler.sample(
            types.ModelInput.from_ints(TEXT), num_samples=4, sampling_params=params
        ).result()
        return [list(s.tokens) for s in found.sequences]

    first = draw()
    assert len({tuple(t) for t in first}) == 4
    assert draw() == first


def test_every_sampling_option_answers_in_its_shape(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints(TEXT)
    found = sampler.sample(
        prompt,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=3, stop=[], top_k=20, top_p=0.9, temperature=0.7),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    assert found.prompt_logprobs[0] is None
    assert all(lp < 0 for lp in found.prompt_logprobs[1:])
    assert [None if row is None else len(row) for row in found.topk_prompt_logprobs] == [None] + [3] * 11
    for row, own in zip(found.topk_prompt_logprobs[1:], found.prompt_logprobs[1:], strict=True):
        assert row[0][1] >= row[1][1] >= row[2][1]
        assert own <= row[0][1] + 1e-6


def test_a_custom_loss_gives_the_gradient_of_its_own_function(client: tinker.ServiceClient) -> None:
    """-sum(lp) as a custom loss takes the same step as cross_entropy with weights of 1."""
    norms, values = [], []
    for custom in (False, True):
        run = client.create_lora_training_client(MODEL, rank=8, seed=6).result()
        if custom:
            passed = run.forward_backward_custom([supervised(TEXT)], _negative_sum).result()
            assert passed.metrics["tokens_seen"] == len(TEXT) - 1
        else:
            passed = run.forward_backward([supervised(TEXT)], "cross_entropy").result()
        values.append(passed.metrics["loss:sum"])
        norms.append(run.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics["grad_norm"])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


def _negative_sum(
    data: list[types.Datum], given: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    return -sum(lp.sum() for lp in given), {"tokens_seen": float(sum(lp.numel() for lp in given))}


def _clipped(
    logprobs: torch.Tensor, q: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ratio = torch.exp(logprobs - q)
    gain = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    return -gain.sum(), {"custom/ratio:mean": ratio.mean(), "custom/tokens:sum": torch.ones_like(q).sum()}


def test_a_custom_loss_is_computed_by_the_service_as_its_client_would(
    client: tinker.ServiceClient, service: RunningService
) -> None:
    """One call of one pass, and the same step, losses and metrics as two passes around the client's own torch."""
    handle = client.create_custom_loss(_clipped, {"logprobs": 1, "q": 1, "advantages": 1}).result()
    assert handle.loss_id is not None
    data = []
    for length in (5, 8, 11):
        tokens = types.ModelInput.from_ints(TEXT[:length])
        inputs = {"target_tokens": TEXT[1 : length + 1], "q": [-2.0] * length, "advantages": [0.5] * length}
        tensors = {name: _tensor(name, values) for name, values in inputs.items()}
        data.append(types.Datum(model_input=tokens, loss_fn_inputs=tensors))

    def by_the_client(data: list[types.Datum], given: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        found = [
            _clipped(lp, datum.loss_fn_inputs["q"].to_torch(), datum.loss_fn_inputs["advantages"].to_torch())
            for lp, datum in zip(given, data, strict=True)
        ]
        ratios = [float(metrics["custom/ratio:mean"].detach()) for _, metrics in found]
        return sum(loss for loss, _ in found), {
            "custom/ratio:mean": sum(ratios) / 3,
            "custom/tokens:sum": 24.0,
        }

    outcomes = []
    for loss in (by_the_client, handle):
        run = client.create_lora_training_client(MODEL, rank=8, seed=6).result()
        metrics = run.forward_backward_custom(data, loss).result().metrics
        norm = run.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"]
        after = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
        outcomes.append((metrics, norm, after))
    (theirs, norm, after), (ours, our_norm, our_after) = outcomes
    for name in ("loss:sum", "custom/ratio:mean", "custom/tokens:sum"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    assert our_norm == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(our_after, after, atol=1e-6)
    kinds = service.sql(
        "select kind from operations where subject = ? order by seq_id", run.get_info().model_id
    )
    assert [kind for (kind,) in kinds] == ["create_model", "forward_backward", "optim_step", "forward"]
    short = [types.Datum(model_input=data[0].model_input, loss_fn_inputs=dict(data[0].loss_fn_inputs))]
    short[0].loss_fn_inputs["advantages"] = _tensor("advantages", [1.0] * 3)
    with pytest.raises(tinker.TinkerError, match="datum 0: custom loss _clipped, node"):
        run.forward_backward_custom(short, handle).result()
    assert run.forward_backward_custom(data, handle).result().metrics["loss:sum"] < 0


def test_a_custom_loss_belongs_to_its_session_and_may_not_do_everything(
    client: tinker.ServiceClient, service: RunningService
) -> None:
    handle = client.create_custom_loss(_negated, {"logprobs": 1}).result()
    other = Wire(service.url, service.key)
    run = other.run(MODEL)
    for config, says in (
        ({"loss_id": handle.loss_id}, "another session"),
        ({"loss_id": "x"}, "no custom loss"),
    ):
        failed = other.result(custom_call(other, run, config, seq=1 if says == "another session" else 2))
        assert (says in failed["error"], failed["category"]) == (True, "user"), failed
    with pytest.raises(tinker.BadRequestError, match=r"rand_like.*not among"):
        client.create_custom_loss(_random, {"logprobs": 1}).result()


def custom_call(wire: Wire, run: str, config: dict[str, str], seq: int) -> dict:
    from tests.e2e.wire import datum

    message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, data=[datum([1, 2, 3])], loss_fn="custom")
    for name, text in config.items():
        message.loss_fn_config_v2[name].text = text
    message.custom_loss = b"what a client puts here is not looked at"
    headers = {"content-type": "application/x-protobuf"}
    return wire.raw("/forward_backward", message.SerializeToString(), **headers)


def _negated(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -2 * logprobs.sum(), {}


def _random(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (torch.rand_like(logprobs) * logprobs).sum(), {}


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_every_policy_loss_trains(
    client: tinker.ServiceClient, run: tinker.TrainingClient, loss: str
) -> None:
    n = len(TEXT) - 1
    inputs = {"target_tokens": TEXT[1:], "logprobs": [-1.0] * n, "advantages": [1.0] * n}
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = [1.0] * n
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TEXT[:-1]),
        loss_fn_inputs={k: _tensor(k, v) for k, v in inputs.items()},
    )
    metrics = run.forward_backward([datum], loss).result().metrics
    assert np.isfinite(metrics["loss:sum"])
    assert {"kl_sampling", "ratio"} <= {name.split(":")[0] for name in metrics}
    run.optim_step(types.AdamParams(learning_rate=0.0)).result()


def _tensor(name: str, values: list[float]) -> types.TensorData:
    kind = np.int64 if name == "target_tokens" else np.float32
    return types.TensorData.from_numpy(np.asarray(values, kind))


def test_stable_reinforce_reads_q_from_the_record_of_the_sample(service: RunningService) -> None:
    """By hand: the SDK attaches spans itself only through its own sampling types."""
    from tests.e2e.wire import Wire, datum
    from tests.e2e.wire import logprobs as of

    wire = Wire(service.url, service.key)
    session = wire.session()
    run = wire.run(MODEL, session=session)
    saved = wire.post("/save_weights_for_sampler", model_id=run, seq_id=1, sampling_session_seq_id=0)
    sampler = wire.result(saved)["sampling_session_id"]
    future = wire.sample(sampler, 0, TEXT, record_stability_info=True)
    sequence = wire.sampled(future).sequences[0]
    drawn = np.frombuffer(sequence.tokens, "<i4").tolist()
    q = np.frombuffer(sequence.logprobs, "<f4")
    whole = TEXT + drawn
    prompt_targets = len(TEXT) - 1
    sample_id = future["sample_sequence_ids"][0]
    message = datum(whole, advantages=[0.0] * prompt_targets + [2.0] * len(drawn))
    message.loss_fn_input_spans.add().prompt_tokens.length = prompt_targets
    span = message.loss_fn_input_spans.add().sampled_tokens
    span.sequence_id, span.offset, span.length = sample_id, 0, len(drawn)
    output = wire.output(wire.submit(run, 2, message, loss="stable_reinforce", config={"kl_coeff": 0.5}))
    lp = of(output)[prompt_targets:]
    expected = -(np.minimum(np.exp(lp - q), 1) * 2.0 * lp).sum() + 0.5 * 0.5 * ((lp - q) ** 2).sum()
    np.testing.assert_allclose(output.metrics["loss:sum"], expected, rtol=1e-4)
    span.offset = 1  # not what was sampled there
    span.length = len(drawn)
    failed = wire.result(wire.submit(run, 3, message, loss="stable_reinforce"))
    assert failed["category"] == "user"


def test_2d_targets_dense_or_sparse_are_honoured(run: tinker.TrainingClient) -> None:
    tokens, k = TEXT[:-1], 20
    targets = torch.zeros(len(tokens), k, dtype=torch.int64)
    weights = torch.zeros(len(tokens), k)
    targets[0, 0], targets[2, 3], targets[5, 19] = 30, 31, 32
    weights[0, 0], weights[2, 3], weights[5, 19] = 0.25, -0.5, 1.5
    inputs = {
        "target_tokens": types.TensorData.from_torch(targets),
        "weights": types.TensorData.from_torch(weights),
    }
    output = run.forward(
        [types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)], "cross_entropy"
    ).result()
    found = output.loss_fn_outputs[0]["logprobs"].to_torch()
    assert found.shape == targets.shape
    np.testing.assert_allclose(output.metrics["loss:sum"], -(found * weights).sum().item(), rtol=1e-5)


def test_resume_continues_bit_for_bit(client: tinker.ServiceClient) -> None:
    """Uninterrupted equals saved, reloaded with its optimizer, and continued."""
    straight = client.create_lora_training_client(MODEL, rank=4, seed=9).result()
    train(straight, 3)
    path = straight.save_state("half").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert train(straight, 3) == train(resumed, 3)
    weights_only = client.create_training_client_from_state(path).result()
    first = train(weights_only, 1)
    assert first != train(weights_only, 1)
    assert weights_only.optim_step(types.AdamParams()).result().metrics["optimizer_step"] == 3


def test_load_state_into_a_living_run(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4, seed=10).result()
    train(run, 1)
    path = run.save_state("here").result().path
    there = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
    train(run, 2)
    run.load_state(path).result()
    back = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
    np.testing.assert_array_equal(there, back)


def test_records_tell_of_runs_and_checkpoints(service: RunningService, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4, user_metadata={"who": "test"}).result()
    path = run.save_state("first", ttl_seconds=7200).result().path
    sampler_path = run.save_weights_for_sampler("second").result().path
    rest = client.create_rest_client()
    run_id = run.get_info().model_id
    found = rest.get_training_run(run_id).result()
    assert (found.base_model, found.lora_rank, found.user_metadata) == (MODEL, 4, {"who": "test"})
    assert found.last_checkpoint.tinker_path == path
    assert found.last_sampler_checkpoint.tinker_path == sampler_path
    listed = rest.list_checkpoints(run_id).result().checkpoints
    assert {c.tinker_path: c.checkpoint_type for c in listed} == {path: "training", sampler_path: "sampler"}
    assert next(c for c in listed if c.tinker_path == path).expires_at is not None
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank) == (MODEL, 4)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert [c.tinker_path for c in rest.list_checkpoints(run_id).result().checkpoints] == [sampler_path]
    assert rest.list_training_runs(limit=1).result().cursor.total_count >= 1


def test_a_failed_call_fails_alone(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    bad = run.forward_backward([supervised([1, 2, 10**7])], "cross_entropy")
    good = run.forward_backward([supervised(TEXT)], "cross_entropy")
    with pytest.raises(tinker.TinkerError, match="outside the vocabulary"):
        bad.result()
    assert good.result().metrics["loss:sum"] > 0


def test_async_calls_pipeline(client: tinker.ServiceClient) -> None:
    async def steps() -> list[float]:
        run = await client.create_lora_training_client_async(MODEL, rank=4, seed=12)
        submitted = []
        for _ in range(5):
            passed = await run.forward_backward_async([supervised(TEXT)], "cross_entropy")
            submitted.append((passed, await run.optim_step_async(types.AdamParams(learning_rate=1e-2))))
        losses = []
        for passed, stepped in submitted:
            losses.append((await passed).metrics["loss:sum"])
            await stepped
        return losses

    losses = asyncio.run(steps())
    assert losses[-1] < losses[0]
