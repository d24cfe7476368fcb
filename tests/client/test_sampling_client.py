"""What the client promises of sampling calls, against a scripted service."""

import math

import numpy as np
import pytest

import tinsmith
from tests.client.stub import Answer, Request, Stub
from tinsmith.types import ModelInput, SamplingParams, TensorData
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.samples import dense, topk

PROMPT = ModelInput.from_ints([1, 2, 3])


def answer(stub: Stub, message: pb.SampleResponse) -> None:
    stub.answers["asample"] = lambda request: Answer(
        body={"request_id": "q", "sample_sequence_ids": ["a", "b"]}
    )
    stub.results["q"] = Answer(body=message.SerializeToString())


def two_sequences() -> pb.SampleResponse:
    message = pb.SampleResponse()
    for tokens, reason in (([4, 5], pb.STOP_REASON_STOP), ([6], pb.STOP_REASON_LENGTH)):
        values = np.array(tokens)
        message.sequences.add(
            tokens=values.astype("<i4").tobytes(),
            logprobs=(-values).astype("<f4").tobytes(),
            stop_reason=reason,
        )
    return message


def test_samples_come_back_with_their_logprobs_and_names(stub: Stub, client: tinsmith.ServiceClient) -> None:
    answer(stub, two_sequences())
    sampler = client.create_sampling_client(base_model="m").result(10)
    params = SamplingParams(max_tokens=4, stop=[], temperature=0.5, seed=2**60)
    response = sampler.sample(PROMPT, 2, params).result(10)
    assert [(s.tokens, s.logprobs, s.stop_reason, s.sequence_id) for s in response.sequences] == [
        ([4, 5], [-4.0, -5.0], "stop", "a"),
        ([6], [-6.0], "length", "b"),
    ]
    assert response.prompt_logprobs is None
    assert response.topk_prompt_logprobs is None
    assert response.sequences[0].topk_logprobs is None
    sent = stub.of("asample")[0].json
    assert sent["prompt"] == {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    assert sent["sampling_params"] == {
        "max_tokens": 4,
        "stop": [],
        "temperature": 0.5,
        "seed": 2**60,
        "top_k": -1,
        "top_p": 1.0,
    }
    assert (sent["seq_id"], sent["num_samples"], sent["sampling_session_id"]) == (0, 2, "s1:sample:0")


def test_everything_asked_of_a_prompt_is_sent_and_read(stub: Stub, client: tinsmith.ServiceClient) -> None:
    message = two_sequences()
    message.prompt_logprobs = np.array([math.nan, -1, -2], "<f4").tobytes()
    message.topk_prompt_logprobs.CopyFrom(
        topk(np.array([[0, 0], [7, 8]], np.int32), np.array([[-99999, -99999], [-1, -2]], np.float32))
    )
    message.target_prompt_logprobs.CopyFrom(dense(np.array([[-1.0], [-2.0]], np.float32)))
    message.prompt_alt_tokens.tokens.CopyFrom(dense(np.array([[4], [5]], np.int32)))
    message.prompt_alt_tokens.logprobs.CopyFrom(dense(np.array([[-3.0], [-4.0]], np.float32)))
    answer(stub, message)
    sampler = client.create_sampling_client("tinker://s/sampler_weights/x").result(10)
    targets = TensorData(np.array([[3], [-1]]))
    response = sampler.sample(
        PROMPT,
        2,
        SamplingParams(),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=1,
        prompt_logprobs_last_n=2,
    ).result(10)
    assert response.prompt_logprobs == [None, -1.0, -2.0]
    assert response.topk_prompt_logprobs == [None, [(7, -1.0), (8, -2.0)]]
    assert response.target_prompt_logprobs is not None
    assert response.target_prompt_logprobs.tolist() == [[-1.0], [-2.0]]
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.tolist() == [[4], [5]]
    sent = stub.of("asample")[0].json
    assert sent["target_prompt_logprobs"] == {"data": [3, -1], "dtype": "int64", "shape": [2, 1]}
    asked = (
        "prompt_logprobs",
        "topk_prompt_logprobs",
        "topk_sample_logprobs",
        "prompt_alt_tokens_k",
        "prompt_logprobs_last_n",
    )
    assert [sent[name] for name in asked] == [True, 2, 3, 1, 2]


def test_compute_logprobs_is_the_prompts_own(stub: Stub, client: tinsmith.ServiceClient) -> None:
    message = pb.SampleResponse(prompt_logprobs=np.array([math.nan, -1, -2], "<f4").tobytes())
    message.sequences.add(tokens=np.array([1], "<i4").tobytes())
    stub.answers["asample"] = lambda request: Answer(body={"request_id": "q", "sample_sequence_ids": ["a"]})
    stub.results["q"] = Answer(body=message.SerializeToString())
    sampler = client.create_sampling_client(base_model="m").result(10)
    assert sampler.compute_logprobs(PROMPT).result(10) == [None, -1.0, -2.0]


def test_a_sampler_of_the_moment_is_a_call_of_the_run(stub: Stub, training: tinsmith.TrainingClient) -> None:
    def promise(request: Request) -> Answer:
        stub.results["saved"] = Answer(body={"sampling_session_id": "s1:sample:9"})
        return Answer(body={"request_id": "saved"})

    stub.answers["save_weights_for_sampler"] = promise
    sampler = training.save_weights_and_get_sampling_client().result(10)
    assert sampler.sampling_session_id == "s1:sample:9"
    sent = stub.of("save_weights_for_sampler")[0].json
    assert sent == {"model_id": "s1:train:0", "seq_id": 1, "kind": "snapshot", "sampling_session_seq_id": 0}


def test_many_samples_run_side_by_side(stub: Stub, client: tinsmith.ServiceClient) -> None:
    answer(stub, two_sequences())
    sampler = client.create_sampling_client(base_model="m").result(10)
    futures = [sampler.sample(PROMPT, 2, SamplingParams()) for _ in range(50)]
    assert all(len(future.result(20).sequences) == 2 for future in futures)
    assert sorted(request.json["seq_id"] for request in stub.of("asample")) == list(range(50))


def test_a_sampler_is_of_weights_or_of_a_base_model(client: tinsmith.ServiceClient) -> None:
    with pytest.raises(tinsmith.InvalidInput, match="either model_path or base_model"):
        client.create_sampling_client()
