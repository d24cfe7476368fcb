"""What the client promises of training calls, against a scripted service."""

import asyncio
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinsmith
from tests.client.stub import PROTOBUF, Answer, Request, Stub
from tinsmith import messages
from tinsmith.types import Datum, ModelInput
from tinsmith.wire import datums
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import TrainOutput
from tinsmith.wire.samples import dense


def datum(tokens: list[int], **inputs: object) -> Datum:
    return Datum(
        ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": [1.0] * len(tokens), **inputs}
    )


def output(lengths: list[int], metrics: dict[str, float]) -> bytes:
    """Logprobs 0, -1, -2, … over all datums of these lengths."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(lengths))
    field = record.fields["logprobs"]
    field.data = (-np.arange(sum(lengths), dtype="<f4")).tobytes()
    field.offsets = (np.cumsum([0, *lengths]) * 4).astype("<i8").tobytes()
    field.dtype = pb.DTYPE_FLOAT32
    message.metrics.update(metrics)
    return message.SerializeToString()


def passes(stub: Stub) -> list[pb.ForwardBackwardRequest]:
    return [pb.ForwardBackwardRequest.FromString(r.body) for r in stub.of("forward_backward")]


def answer_every_pass(stub: Stub) -> None:
    """Each pass gets the logprobs of its datums and loss:sum = their count."""

    def promise(request: Request) -> Answer:
        message = pb.ForwardBackwardRequest.FromString(request.body)
        lengths = [len(d.model_input[0].encoded_text.tokens) // 4 for d in message.data]
        request_id = f"fb{message.seq_id}"
        stub.results[request_id] = Answer(body=output(lengths, {"loss:sum": float(len(lengths))}))
        return Answer(body={"request_id": request_id})

    stub.answers["forward_backward"] = promise


def wait_until(holds: Callable[[], bool]) -> None:
    """For what is sent and not waited for."""
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_pass_carries_its_data_bit_for_bit(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    data = [datum([5, 6, 7], advantages=np.array([0.5, -1, 2], np.float32)), datum([1])]
    result = training.forward_backward(data, "ppo", {"clip_low_threshold": 0.7}).result(10)
    (sent,) = passes(stub)
    assert (sent.model_id, sent.seq_id, sent.loss_fn, sent.forward_only) == ("s1:train:0", 1, "ppo", False)
    assert sent.loss_fn_config_v2["clip_low_threshold"].number == 0.7
    assert np.frombuffer(sent.data[0].model_input[0].encoded_text.tokens, "<i4").tolist() == [5, 6, 7]
    assert sent.data[0].loss_fn_inputs["target_tokens"] == dense(np.array([5, 6, 7], np.int64))
    assert sent.data[0].loss_fn_inputs["advantages"] == dense(np.array([0.5, -1, 2], np.float32))
    assert [out["logprobs"].tolist() for out in result.loss_fn_outputs] == [[0, -1, -2], [-3]]
    assert stub.of("retrieve_future")[-1].headers["accept"] == PROTOBUF
    assert all(request.headers["x-api-key"] == "tml-test" for request in stub.requests)


def test_calls_are_numbered_in_the_order_they_are_made(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    futures = [
        training.forward([datum([1])], "cross_entropy"),
        training.optim_step(tinsmith.AdamParams(learning_rate=3e-4)),
        training.save_state("a"),
        training.forward_backward([datum([1])], "cross_entropy"),
    ]
    stub.results["r2"] = Answer(body={"metrics": {"grad_norm": 1.5}})
    stub.results["r3"] = Answer(body={"path": "tinker://s1:train:0/weights/a"})
    done = [future.result(10) for future in futures]
    assert done[1].metrics == {"grad_norm": 1.5}
    assert done[2].path == "tinker://s1:train:0/weights/a"
    submitted = [
        r.path for r in stub.requests if r.path in ("forward_backward", "optim_step", "save_weights")
    ]
    assert submitted == ["forward_backward", "optim_step", "save_weights", "forward_backward"]
    assert [p.seq_id for p in passes(stub)] == [1, 4]
    assert [p.forward_only for p in passes(stub)] == [True, False]
    assert stub.of("optim_step")[0].json["seq_id"] == 2
    assert stub.of("optim_step")[0].json["adam_params"]["learning_rate"] == 3e-4


def test_a_lost_answer_is_asked_for_again_with_the_same_number(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    troubles = [Answer(body=None), Answer(503, {"detail": "starting"}, {"Retry-After": "0.01"})]
    stub.answers["optim_step"] = lambda request: (
        troubles.pop(0) if troubles else Answer(body={"request_id": "done"})
    )
    assert training.optim_step().result(10).metrics is None
    bodies = [request.body for request in stub.of("optim_step")]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_a_rejected_call_raises_a_sentence_and_the_next_one_works(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    answer_every_pass(stub)
    stub.answers["save_weights"] = lambda request: Answer(400, {"detail": "the name has a slash"})
    with pytest.raises(tinsmith.InvalidInput, match="the name has a slash"):
        training.save_state("a/b").result(10)
    assert training.forward_backward([datum([1])], "cross_entropy").result(10).metrics == {"loss:sum": 1.0}
    assert [p.seq_id for p in passes(stub)] == [2]


@pytest.mark.parametrize(
    "status, kind",
    [
        (401, tinsmith.AuthenticationError),
        (404, tinsmith.NotFound),
        (422, tinsmith.InvalidInput),
        (403, tinsmith.AuthenticationError),
        (410, tinsmith.NotFound),
    ],
)
def test_each_status_has_its_error(
    stub: Stub, training: tinsmith.TrainingClient, status: int, kind: type[Exception]
) -> None:
    stub.answers["optim_step"] = lambda request: Answer(status, {"detail": "why"})
    with pytest.raises(kind, match="why") as refused:
        training.optim_step().result(10)
    assert refused.value.status_code == status
    assert len(stub.of("optim_step")) == 1


def test_a_failed_future_says_whose_fault_it_was(stub: Stub, training: tinsmith.TrainingClient) -> None:
    stub.answers["optim_step"] = lambda request: Answer(body={"request_id": "bad"})
    stub.results["bad"] = Answer(body={"error": "the gradient is not finite", "category": "user"})
    with pytest.raises(tinsmith.RequestFailed, match="not finite") as failed:
        training.optim_step().result(10)
    assert (failed.value.category, failed.value.request_id) == ("user", "bad")


def test_waiting_goes_on_until_there_is_a_result(stub: Stub, training: tinsmith.TrainingClient) -> None:
    pending = [
        Answer(408, {"type": "try_again", "queue_state": "active"}),
        Answer(200, {"type": "try_again"}),
    ]
    stub.answers["optim_step"] = lambda request: Answer(body={"request_id": "slow"})
    stub.answers["retrieve_future"] = lambda request: (
        pending.pop(0) if pending else Answer(body={"metrics": {"a": 1.0}})
    )
    assert training.optim_step().result(10).metrics == {"a": 1.0}


def test_a_service_that_is_gone_is_reported_in_time() -> None:
    client = tinsmith.ServiceClient(base_url="http://127.0.0.1:9", api_key="tml-test", give_up_seconds=0.1)
    with pytest.raises(tinsmith.ServiceUnavailable, match=r"127\.0\.0\.1:9"):
        client.get_server_capabilities()
    client.close().result(10)
    with pytest.raises(tinsmith.TinsmithError, match="closed"):
        client.get_server_capabilities()


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_call_that_was_given_up_is_sent_again_when_it_is_asked_for_again(stub: Stub, in_loop: bool) -> None:
    """Under its own number: the calls behind it wait for that."""
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", give_up_seconds=0.1)
    training = client.create_lora_training_client("m").result(10)
    is_away = True
    stub.answers["optim_step"] = lambda request: (
        Answer(503, {"detail": "starting"}) if is_away else Answer(body={"request_id": "done"})
    )

    async def submit() -> "tinsmith.Future[tinsmith.OptimStepResponse]":
        return training.optim_step()

    future = asyncio.run(submit()) if in_loop else training.optim_step()
    with pytest.raises(tinsmith.ServiceUnavailable, match="503 starting"):
        future.result(10)
    client._connection._give_up_seconds = 60
    for _ in range(2):  # asking again keeps the time it is given
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            future.result(0.2)
        assert time.monotonic() - started < 2
    is_away = False
    assert future.result(10).metrics is None
    assert asyncio.run(future.result_async(10)).metrics is None
    assert len({request.body for request in stub.of("optim_step")}) == 1
    client.close().result(10)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_client_or_record_asked_for_while_the_service_was_away_is_asked_for_again(
    stub: Stub, in_loop: bool
) -> None:
    is_away = True
    bodies = {"create_session": {"session_id": "s1"}, "get_server_capabilities": {"supported_models": []}}
    for path, body in bodies.items():
        stub.answers[path] = lambda _, body=body: Answer(503) if is_away else Answer(body=body)  # type: ignore[misc]
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", give_up_seconds=0.3)

    def ask() -> tuple[Any, Any, Any]:
        return (
            client.create_lora_training_client("m"),
            client.create_sampling_client(base_model="m"),
            client.create_rest_client().get_server_capabilities(),
        )

    async def ask_in_loop() -> tuple[Any, Any, Any]:
        return ask()

    futures = asyncio.run(ask_in_loop()) if in_loop else ask()
    for future in futures:
        with pytest.raises(tinsmith.ServiceUnavailable):
            future.result(10)
    is_away = False
    training, sampler, capabilities = (future.result(10) for future in futures)
    assert (training.model_id, sampler.sampling_session_id) == ("s1:train:0", "s1:sample:0")
    assert capabilities.supported_models == []


def test_a_custom_loss_goes_on_under_its_numbers_when_the_service_is_back(stub: Stub) -> None:
    answer_every_pass(stub)
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", give_up_seconds=0.3)
    training = client.create_lora_training_client("m").result(10)
    promise = stub.answers["forward_backward"]
    stub.answers["forward_backward"] = lambda request: Answer(503, {"detail": "restarting"})
    custom = training.forward_backward_custom(
        [datum([1, 2])], lambda _, logprobs: (5.0, [2 * lp for lp in logprobs], {}), arrays="numpy"
    )
    with pytest.raises(tinsmith.ServiceUnavailable):
        custom.result(10)
    stub.answers["forward_backward"] = promise
    assert custom.result(10).metrics["loss:sum"] == 5.0
    assert [(p.seq_id, p.forward_only) for p in passes(stub)][-2:] == [(1, True), (2, False)]


def test_a_large_call_is_sent_in_chunks_and_answered_as_one(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    answer_every_pass(stub)
    data = [datum([i]) for i in range(messages.MAX_DATUMS + 3)]
    result = training.forward_backward(data, "cross_entropy").result(30)
    assert [(p.seq_id, len(p.data)) for p in passes(stub)] == [(1, messages.MAX_DATUMS), (2, 3)]
    assert len(result.loss_fn_outputs) == len(data)
    assert result.metrics == {"loss:sum": float(len(data))}


def test_chunks_keep_under_the_byte_limit_and_a_giant_goes_alone() -> None:
    small, giant = datum([1] * 100_000), datum([1] * 400_000)
    requests = messages.pack([small, small, giant, small, small, small, small], "cross_entropy")
    assert [len(request.data) for request in requests] == [2, 1, 3, 1]
    assert sum(request.ByteSize() > messages.MAX_BYTES for request in requests) == 1


def test_metrics_of_chunks_are_reduced_as_their_names_say() -> None:
    names = ("loss:sum", "kl:mean", "ratio:max", "ratio:min", "beta:unique")
    first = messages.unpack(output([1, 1, 1], dict(zip(names, (1.0, 1.0, 5.0, 0.5, 0.1), strict=True))))
    second = messages.unpack(
        output([1], dict(zip(names, (2.0, 5.0, 4.0, 0.1, 0.1), strict=True)) | {"only:sum": 1.0})
    )
    merged = messages.merge([first, second])
    assert merged.metrics == {
        "loss:sum": 3.0,
        "kl:mean": 2.0,
        "ratio:max": 5.0,
        "ratio:min": 0.1,
        "beta:unique": 0.1,
        "beta:unique_1": 0.1,
    }
    assert len(merged.loss_fn_outputs) == 4


def test_the_sampling_kl_of_chunks_is_that_of_the_same_call_in_one_piece() -> None:
    """A mean over trained tokens, so it is weighted by these; a chunk without any has nothing to say."""
    rng = np.random.default_rng(0)
    lengths, trained = [9, 2, 5, 3], [9, 1, 0, 2]
    data = []
    for length, count in zip(lengths, trained, strict=True):
        advantages = np.zeros(length, np.float32)
        advantages[:count] = 1
        tensors = {"logprobs": rng.normal(size=length).astype(np.float32), "advantages": advantages}
        data.append(Datum(ModelInput.from_ints([1] * length), {"target_tokens": [1] * length, **tensors}))

    def answer(chunk: list[Datum]) -> Any:
        (request,) = messages.pack(chunk, "importance_sampling")
        given = datums.read(request, vocab_size=9, max_context_length=99)
        rows = given.tokens
        found = TrainOutput(np.full((rows, 1), -1, np.float32), np.ones(rows, np.float32))
        return messages.unpack(datums.write_output(given, found))

    whole, merged = answer(data), messages.merge([answer(data[:2]), answer(data[2:3]), answer(data[3:])])
    assert set(whole.metrics) == set(merged.metrics) == {*whole.metrics, "kl_sampling:mean", "ratio:max"}
    assert merged.metrics == pytest.approx(whole.metrics)
    # Weighted by datums, as before, it would be another number.
    assert whole.metrics["kl_sampling:mean"] != pytest.approx(
        np.average(
            [answer(data[:2]).metrics["kl_sampling:mean"], answer(data[3:]).metrics["kl_sampling:mean"]],
            weights=[2, 1],
        )
    )


def test_results_keep_their_shape_and_bfloat16_is_widened() -> None:
    message = pb.ForwardBackwardOutput()
    field = message.loss_fn_outputs.add(num_datums=2).fields["logprobs"]
    field.data = (np.array([1.5, -2, 0, 8, 0.5, 3], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    field.offsets = np.array([0, 8, 12], "<i8").tobytes()
    field.dtype = pb.DTYPE_BFLOAT16
    field.trailing_shape.append(2)
    first, second = messages.unpack(message.SerializeToString()).loss_fn_outputs
    assert first["logprobs"].tolist() == [[1.5, -2.0], [0.0, 8.0]]
    assert second["logprobs"].tolist() == [[0.5, 3.0]]


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
def test_a_custom_loss_sends_back_its_own_gradient(
    stub: Stub, training: tinsmith.TrainingClient, arrays: str
) -> None:
    answer_every_pass(stub)
    seen = []

    def squares(data, logprobs):  # type: ignore[no-untyped-def]
        seen.append([np.asarray(lp.detach() if arrays == "torch" else lp).tolist() for lp in logprobs])
        loss = sum((lp**2).sum() for lp in logprobs)
        if arrays == "torch":
            return loss, {"mine:mean": 7.0}
        return loss, [2 * lp for lp in logprobs], {"mine:mean": 7.0}

    data = [datum([1, 2], extra=[9.0, 9.0]), datum([3])]
    custom = training.forward_backward_custom(data, squares, arrays=arrays)
    optim = training.optim_step()
    result = custom.result(20)
    optim.result(10)
    forward, backward = passes(stub)
    assert seen == [[[0.0, -1.0], [-2.0]]]
    assert (forward.forward_only, forward.seq_id, backward.forward_only, backward.seq_id) == (
        True,
        1,
        False,
        2,
    )
    assert set(forward.data[0].loss_fn_inputs) == {"target_tokens", "weights"}
    assert [np.frombuffer(d.loss_fn_inputs["weights"].dense, "<f4").tolist() for d in backward.data] == [
        [0.0, 2.0],
        [4.0],
    ]
    assert stub.of("optim_step")[0].json["seq_id"] == 3
    assert result.metrics == {"surrogate_loss:sum": 2.0, "loss:sum": 5.0, "mine:mean": 7.0}


def test_a_custom_loss_that_fails_leaves_no_gap(stub: Stub, training: tinsmith.TrainingClient) -> None:
    """The second pass's number was taken; the service would wait for it."""
    answer_every_pass(stub)

    def broken(data, logprobs):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        training.forward_backward_custom([datum([1])], broken, arrays="numpy").result(10)
    training.optim_step().result(10)
    wait_until(lambda: len(passes(stub)) == 2)
    assert [(p.seq_id, p.forward_only) for p in passes(stub)] == [(1, True), (2, True)]
    assert stub.of("optim_step")[0].json["seq_id"] == 3


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end pytest."""


@pytest.mark.parametrize("call", ["forward_backward", "optim_step", "save_state", "custom"])
def test_a_call_ended_by_ctrl_c_while_the_service_is_away_leaves_no_gap(
    stub: Stub, training: tinsmith.TrainingClient, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    answer_every_pass(stub)
    calls: dict[str, Callable[[], Any]] = {
        "forward_backward": lambda: training.forward_backward([datum([1])], "cross_entropy"),
        "optim_step": training.optim_step,
        "save_state": lambda: training.save_state("x"),
        "custom": lambda: training.forward_backward_custom(
            [datum([1])], lambda _, logprobs: (0.0, logprobs, {}), arrays="numpy"
        ),
    }

    def interrupt(_: float) -> None:
        monkeypatch.setattr(training._connection, "_closed", closed)
        raise Interrupted

    closed = training._connection._closed
    path = {"save_state": "save_weights", "custom": "forward_backward"}.get(call, call)
    answer = stub.answers.get(path, stub.promise)
    stub.answers[path] = lambda request: Answer(503)
    monkeypatch.setattr(
        training._connection, "_closed", types.SimpleNamespace(is_set=closed.is_set, wait=interrupt)
    )
    with pytest.raises(Interrupted):
        calls[call]()
    stub.answers[path] = answer
    training.optim_step().result(10)
    taken = {"custom": [1, 2]}.get(call, [1])
    assert stub.of("optim_step")[-1].json["seq_id"] == taken[-1] + 1
    tried = {"custom": 1}.get(call, 0)  # the forward pass that was interrupted
    wait_until(lambda: {p.seq_id for p in passes(stub)[tried:] if p.forward_only} >= set(taken))


def test_what_json_has_no_form_for_is_refused_and_leaves_no_gap(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    answer_every_pass(stub)
    with pytest.raises(tinsmith.InvalidInput, match="nan"):
        training.optim_step(tinsmith.AdamParams(learning_rate=float("nan")))
    training.optim_step().result(10)
    assert [request.json["seq_id"] for request in stub.of("optim_step")] == [2]
    wait_until(lambda: [p.seq_id for p in passes(stub)] == [1])


@pytest.mark.parametrize("given", [[[1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
def test_a_custom_loss_gives_a_gradient_for_every_logprob(
    stub: Stub, training: tinsmith.TrainingClient, given: list[list[float]]
) -> None:
    """One too few would be a datum that is not learnt from, and nobody would know."""
    answer_every_pass(stub)
    data = [datum([1, 2]), datum([3])]
    custom = training.forward_backward_custom(
        data, lambda _, logprobs: (0.0, [np.array(g, np.float32) for g in given], {}), arrays="numpy"
    )
    with pytest.raises(tinsmith.InvalidInput, match="one gradient per datum"):
        custom.result(10)
    wait_until(lambda: [p.forward_only for p in passes(stub)] == [True, True])


def test_a_future_can_be_awaited_and_asked_twice(stub: Stub, training: tinsmith.TrainingClient) -> None:
    async def steps() -> list[object]:
        future = training.optim_step()
        return [await future, await future, future.result(0)]

    first, second, third = asyncio.run(steps())
    assert first == second == third


def test_giving_up_the_wait_leaves_the_call_running(stub: Stub, training: tinsmith.TrainingClient) -> None:
    def slow(request: Request) -> Answer:
        time.sleep(0.3)
        return Answer(body={"metrics": {"a": 1.0}})

    stub.answers["retrieve_future"] = slow
    future = training.optim_step()
    with pytest.raises(TimeoutError):
        future.result(0.05)

    async def impatient() -> None:
        await asyncio.wait_for(future, 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    assert future.result(10).metrics == {"a": 1.0}


def test_a_run_from_a_checkpoint_has_the_name_the_wire_fixes(
    stub: Stub, client: tinsmith.ServiceClient
) -> None:
    client.create_lora_training_client("m").result(10)
    resumed = client.create_training_client_from_state_with_optimizer("tinker://a/weights/b").result(10)
    assert resumed.model_id == "s1:train:1"
    assert stub.of("load_weights")[0].json == {
        "session_id": "s1",
        "model_seq_id": 1,
        "path": "tinker://a/weights/b",
        "optimizer": True,
    }
    assert len(stub.of("create_session")) == 1


def test_leaving_the_block_finishes_the_session_and_says_how(stub: Stub) -> None:
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")
    client.create_lora_training_client("m").result(10)
    with pytest.raises(ZeroDivisionError), client:
        raise ZeroDivisionError
    (finish,) = stub.of("sessions/s1/finish")
    assert finish.json["reason"] == {"type": "errored"}


def test_an_error_inside_the_block_is_not_hidden_by_one_of_leaving_it(stub: Stub) -> None:
    stub.answers["sessions/s1/finish"] = lambda request: Answer(401, {"detail": "revoked"})
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")

    def program() -> None:
        with client:
            client.create_lora_training_client("m").result(10)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program()
    with pytest.raises(tinsmith.TinsmithError, match="closed"):
        client.get_server_capabilities()


def test_settings_come_from_the_environment(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINSMITH_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    with pytest.raises(tinsmith.AuthenticationError, match="TINSMITH_API_KEY"):
        tinsmith.ServiceClient(base_url=stub.url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-env")
    monkeypatch.setenv("TINKER_BASE_URL", stub.url)
    stub.answers["get_server_capabilities"] = lambda request: Answer(
        body={"supported_models": [{"model_name": "m"}]}
    )
    with tinsmith.ServiceClient() as client:
        assert [model.model_name for model in client.get_server_capabilities().supported_models] == ["m"]
    assert stub.requests[0].headers["x-api-key"] == "tml-env"
    assert not stub.of("create_session")


def test_closing_cancels_what_is_under_way(stub: Stub) -> None:
    stub.answers["optim_step"] = lambda request: Answer(body={"request_id": "slow"})
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")
    training = client.create_lora_training_client("m").result(10)
    stub.answers["retrieve_future"] = lambda request: Answer(408, {"type": "try_again"})
    waiting = training.optim_step()
    client.close().result(10)
    with pytest.raises(tinsmith.TinsmithError, match="closed"):
        waiting.result(10)


def test_another_server_at_the_address_is_noticed(stub: Stub) -> None:
    stub.answers["get_server_capabilities"] = lambda request: Answer(body=b"<html>a router</html>")
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")
    with pytest.raises(tinsmith.TinsmithError, match="a router"):
        client.get_server_capabilities()
    client.close().result(10)
