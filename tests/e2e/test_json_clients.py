"""Older clients speak JSON where newer ones speak protobuf; both get the same numbers."""

import numpy as np
import pytest

from tests.conftest import RunningService
from tests.e2e.wire import Wire, datum, logprobs

MODEL = "tinsmith/tiny"
TOKENS = [5, 6, 7, 8]
DATUM = {
    "model_input": {"chunks": [{"tokens": TOKENS[:-1]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": TOKENS[1:], "dtype": "int64"},
        "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32"},
    },
}


@pytest.fixture(scope="module")
def wire(service: RunningService) -> Wire:
    return Wire(service.url, service.key)


def test_json_and_protobuf_train_alike(wire: Wire) -> None:
    run = wire.run(MODEL)
    given = {"data": [DATUM], "loss_fn": "cross_entropy", "loss_fn_config": None}
    forward = wire.result(wire.post("/forward", model_id=run, seq_id=1, forward_input=given))
    passed = wire.result(wire.post("/forward_backward", model_id=run, seq_id=2, forward_backward_input=given))
    output = wire.output(wire.submit(run, 3, datum(TOKENS)))
    for answer in (forward, passed):
        assert answer["loss_fn_outputs"][0]["logprobs"]["shape"] == [3]
        np.testing.assert_array_equal(
            np.float32(answer["loss_fn_outputs"][0]["logprobs"]["data"]), logprobs(output)
        )
        assert answer["metrics"]["loss:sum"] == output.metrics["loss:sum"]


def test_samples_come_as_json_to_those_who_do_not_ask_for_protobuf(wire: Wire) -> None:
    session = wire.session()
    made = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "num_samples": 2}
    future = wire.sample(made["sampling_session_id"], 0, TOKENS, **fields)
    answer, message = wire.result(future), wire.sampled(future)
    assert [s["tokens"] for s in answer["sequences"]] == [
        np.frombuffer(s.tokens, "<i4").tolist() for s in message.sequences
    ]
    assert answer["sequences"][0]["stop_reason"] == "length"
    assert answer["prompt_logprobs"][0] is None
    assert answer["topk_prompt_logprobs"][0] is None
    assert [len(row) for row in answer["topk_prompt_logprobs"][1:]] == [2, 2, 2]


def test_a_large_sampling_number_stays_exact(wire: Wire) -> None:
    session = wire.session()
    made = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    sampler = made["sampling_session_id"]
    first, next_one = 10**18 + 1, 10**18 + 2
    one, two = wire.sample(sampler, first, TOKENS), wire.sample(sampler, next_one, TOKENS)
    assert one["request_id"] != two["request_id"]
    assert wire.sample(sampler, first, TOKENS) == one
