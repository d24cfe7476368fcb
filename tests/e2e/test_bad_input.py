"""Bad input: a 4xx or a failed future of category user, with a sentence; never a 5xx, and the next call works."""

import json
import math
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import RunningService
from tests.e2e.wire import Json, Wire, datum
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.samples import dense

MODEL = "tinsmith/tiny"
LORA = {"rank": 4, "seed": 1}


@pytest.fixture(scope="module")
def wire(service: RunningService) -> Wire:
    return Wire(service.url, service.key)


@pytest.fixture(scope="module")
def run(wire: Wire) -> str:
    return wire.run(MODEL)


class Numbers:
    def __init__(self) -> None:
        self.next = 0

    def __call__(self) -> int:
        self.next += 1
        return self.next


@pytest.fixture(scope="module")
def seq(run: str) -> Numbers:
    return Numbers()


def refused(wire: Wire, answer: Json) -> str:
    """The sentence with which a call was refused, at the door or in its future."""
    if wire.status == 200:
        answer = wire.result(answer)
        assert answer["category"] == "user", answer
        return str(answer["error"])
    assert 400 <= wire.status < 500, (wire.status, answer)
    return str(answer["detail"])


def test_a_wrong_or_missing_key_is_401(service: RunningService) -> None:
    for headers in ({}, {"x-api-key": "tml-wrong"}, {"x-api-key": ""}):
        for method, path in (
            ("POST", "/create_session"),
            ("GET", "/training_runs"),
            ("POST", "/retrieve_future"),
        ):
            answer = httpx.request(method, f"{service.url}/api/v1{path}", headers=headers, json={})
            assert answer.status_code == 401, (method, path)
            assert "key" in answer.json()["detail"]


def test_an_unknown_model_is_refused_with_the_list(wire: Wire) -> None:
    body = {"session_id": wire.session(), "model_seq_id": 0, "lora_config": LORA}
    answer = wire.post("/create_model", base_model="Qwen/Qwen3-8B", **body)
    assert wire.status == 400
    assert MODEL in answer["detail"]
    answer = wire.post(
        "/create_sampling_session",
        session_id=body["session_id"],
        sampling_session_seq_id=0,
        base_model="nope",
    )
    assert wire.status == 400
    assert MODEL in answer["detail"]


@pytest.mark.parametrize("rank", [0, -5, 100_000, "many", None, 1.5])
def test_a_rank_out_of_range_is_refused(wire: Wire, rank: object) -> None:
    wire.post(
        "/create_model",
        session_id=wire.session(),
        model_seq_id=0,
        base_model=MODEL,
        lora_config={"rank": rank},
    )
    assert wire.status == 400


def test_other_optimizers_and_empty_adapters_are_refused(wire: Wire) -> None:
    body = {"session_id": wire.session(), "model_seq_id": 0, "base_model": MODEL}
    answer = wire.post(
        "/create_model", **body, lora_config=LORA, optimizer_config={"type": "dimuon", "version": 1}
    )
    assert wire.status == 400
    assert "adamw" in answer["detail"]
    nothing = {**LORA, "train_attn": False, "train_mlp": False, "train_unembed": False}
    wire.post("/create_model", **body, lora_config=nothing)
    assert wire.status == 400


def _tensor(values: object, kind: type) -> pb.Tensor:
    return dense(np.asarray(values, kind))


def _with(name: str, tensor: pb.Tensor | None) -> pb.Datum:
    message = datum([1, 2, 3, 4])
    if tensor is None:
        del message.loss_fn_inputs[name]
    else:
        message.loss_fn_inputs[name].CopyFrom(tensor)
    return message


def _images() -> pb.Datum:
    message = datum([1, 2, 3, 4])
    message.model_input.add().image.data = b"png"
    return message


BAD_DATUMS: dict[str, tuple[Callable[[], pb.Datum], str]] = {
    "short targets": (lambda: _with("target_tokens", _tensor([1, 2], np.int64)), "it must be [3]"),
    "long weights": (lambda: _with("weights", _tensor([1, 2, 3, 4], np.float32)), "must be [3]"),
    "float targets": (lambda: _with("target_tokens", _tensor([1, 2, 3], np.float32)), "must be integers"),
    "token out of range": (lambda: datum([1, 2, 10**9 % 2**31, 4]), "outside the vocabulary"),
    "negative token": (lambda: datum([1, -2, 3, 4]), "outside the vocabulary"),
    "target out of range": (
        lambda: _with("target_tokens", _tensor([1, 2, 10**12], np.int64)),
        "outside the vocabulary",
    ),
    "NaN weight": (lambda: datum([1, 2, 3, 4], [1, math.nan, 1]), "not finite"),
    "infinite weight": (lambda: datum([1, 2, 3, 4], [1, math.inf, 1]), "not finite"),
    "no targets": (lambda: _with("target_tokens", None), "lacks `target_tokens`"),
    "no input": (pb.Datum, "model_input is empty"),
    "an image": (_images, "text only"),
    "too long": (lambda: datum([1] * 5000), "more than the model's"),
    "bytes that are no tokens": (
        lambda: pb.Datum(model_input=[{"encoded_text": {"tokens": b"12345"}}]),
        "whole number",
    ),
    "a shape that does not fit": (
        lambda: _with("weights", pb.Tensor(dense=b"\0" * 12, dtype=pb.DTYPE_FLOAT32, shape=[7])),
        "does not hold",
    ),
    "a negative shape": (
        lambda: _with("weights", pb.Tensor(dense=b"\0" * 12, dtype=pb.DTYPE_FLOAT32, shape=[-3])),
        "negative",
    ),
    "a dtype nobody sends": (
        lambda: _with("weights", pb.Tensor(dense=b"\0" * 6, dtype=pb.DTYPE_BFLOAT16)),
        "dtype",
    ),
    "a sparse bomb": (
        lambda: _with(
            "target_tokens", pb.Tensor(sparse_csr={}, dtype=pb.DTYPE_INT64, shape=[1 << 40, 1 << 20])
        ),
        "above",
    ),
    "broken sparse rows": (
        lambda: _with(
            "target_tokens",
            pb.Tensor(
                sparse_csr={"crow_indices": np.array([0, 9], "<i8").tobytes()},
                dtype=pb.DTYPE_INT64,
                shape=[3, 2],
            ),
        ),
        "crow_indices",
    ),
}


@pytest.mark.parametrize("case", BAD_DATUMS)
def test_a_bad_datum_fails_its_call_with_a_sentence(wire: Wire, run: str, seq: Numbers, case: str) -> None:
    make, sentence = BAD_DATUMS[case]
    told = refused(wire, wire.submit(run, seq(), datum([1, 2, 3, 4]), make()))
    assert sentence in told
    assert "datum 1" in told


def test_unknown_losses_settings_and_missing_inputs_are_refused(wire: Wire, run: str, seq: Numbers) -> None:
    good = datum([1, 2, 3])
    assert "cross_entropy" in refused(wire, wire.submit(run, seq(), good, loss="huber"))
    assert "`logprobs`" in refused(wire, wire.submit(run, seq(), good, loss="ppo"))
    assert "epsilon" in refused(wire, wire.submit(run, seq(), good, config={"epsilon": 0.2}))
    policy = datum([1, 2, 3], logprobs=[0, 0], advantages=[1, 1])
    assert "finite" in refused(
        wire, wire.submit(run, seq(), policy, loss="ppo", config={"clip_low_threshold": math.nan})
    )
    assert "empty" in refused(wire, wire.submit(run, seq()))
    wide = datum([1, 2, 3], logprobs=[0, 0], advantages=[1, 1])
    wide.loss_fn_inputs["target_tokens"].CopyFrom(_tensor([[1, 2], [2, 3]], np.int64))
    assert "one target per token" in refused(wire, wire.submit(run, seq(), wide, loss="ppo"))
    spans = datum([1, 2, 3], advantages=[1, 1])
    assert "spans" in refused(wire, wire.submit(run, seq(), spans, loss="stable_reinforce"))


def test_bad_bodies_are_refused_and_count_as_calls_where_they_say_which(
    wire: Wire, run: str, seq: Numbers
) -> None:
    wire.raw("/forward_backward", b"\xff\xff\xff", **{"content-type": "application/x-protobuf"})
    assert wire.status == 400
    wire.raw("/optim_step", b"{", **{"content-type": "application/json"})
    assert wire.status == 400
    wire.raw("/optim_step", b"[1, 2]", **{"content-type": "application/json"})
    assert wire.status == 400
    wire.raw("/optim_step", json.dumps({"model_id": run}).encode(), **{"content-encoding": "zstd"})
    assert wire.status == 415
    for field, value in (("beta1", 1.5), ("eps", -1), ("learning_rate", "fast"), ("grad_clip_norm", -1)):
        assert field in refused(wire, wire.optim(run, seq(), **{field: value}))
    wire.post("/optim_step", model_id=run, seq_id=0, adam_params={})
    assert wire.status == 400
    wire.post("/optim_step", model_id=run, seq_id=2**40, adam_params={})
    assert wire.status == 400
    wire.post(
        "/forward_backward", model_id=run, seq_id=seq(), forward_backward_input={"data": 5, "loss_fn": "ppo"}
    )
    assert wire.status == 400


def test_a_body_over_the_limit_is_413(wire: Wire) -> None:
    wire.raw("/create_session", b" " * (2 << 20))
    assert wire.status == 413
    # Without a length in front of it, too.
    answer = wire.http.post("/create_session", content=(b" " * 65536 for _ in range(40)))
    assert answer.status_code == 413


def test_a_call_far_above_its_runs_numbers_is_refused_and_consumes_nothing(wire: Wire) -> None:
    run = wire.run(MODEL)
    calls = {
        "optim_step": lambda seq: wire.optim(run, seq),
        "a refused optim_step": lambda seq: wire.optim(run, seq, beta1=7),
        "forward_backward": lambda seq: wire.submit(run, seq, datum([1, 2, 3])),
        "a refused forward_backward": lambda seq: wire.submit(run, seq, loss="none"),
        "save_weights": lambda seq: wire.post("/save_weights", model_id=run, seq_id=seq, path="far"),
    }
    for far in (2**31 - 1, 10_001):
        for name, call in calls.items():
            assert "seq_id" in call(far)["detail"], name
            assert wire.status == 400, name
    assert wire.get("/training_runs/" + run)["last_checkpoint"] is None
    assert wire.result(wire.optim(run, 1))["metrics"]["optimizer_step"] == 1
    ahead = wire.optim(run, 10_001)
    assert "request_id" in ahead
    assert wire.optim(run, 10_001) == ahead
    wire.optim(run, 20_002)
    assert wire.status == 400


def test_settings_nobody_knows_are_refused_by_name(wire: Wire, run: str, seq: Numbers) -> None:
    body = {"session_id": wire.session(), "model_seq_id": 0, "base_model": MODEL}
    answer = wire.post("/create_model", **body, lora_config={**LORA, "type": "lora", "alpha": 64})
    assert wire.status == 400
    assert "lora_config.alpha" in answer["detail"]
    assert "adam_params.amsgrad" in refused(wire, wire.optim(run, seq(), amsgrad=1))
    answer = wire.sample(_base_sampler(wire), 0, [1, 2], params={"min_p": 0.1})
    assert wire.status == 400
    assert "sampling_params.min_p" in answer["detail"]
    # A tag is no setting.
    assert "request_id" in wire.sample(_base_sampler(wire), 0, [1, 2], params={"type": "sampling_params"})


def test_sampler_names_are_taken_once_unless_overwritten(wire: Wire) -> None:
    run = wire.run(MODEL)

    def save(seq: int, **fields: object) -> Json:
        return wire.post("/save_weights_for_sampler", model_id=run, seq_id=seq, path="s", **fields)

    assert wire.result(save(1))["path"].endswith("/sampler_weights/s")
    assert "exists" in refused(wire, save(2))
    assert wire.result(save(3, overwrite=True))["path"].endswith("/sampler_weights/s")
    assert "inflight" in refused(wire, save(4, overwrite=True, kind="inflight"))


def test_an_unnamed_save_never_answers_with_another_sampler(wire: Wire) -> None:
    session = wire.session()
    run = wire.run(MODEL, session=session)
    body = {"session_id": session, "sampling_session_seq_id": 3, "base_model": MODEL}
    taken = wire.post("/create_sampling_session", **body)["sampling_session_id"]
    unnamed = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 3}
    told = refused(wire, wire.post("/save_weights_for_sampler", **unnamed))
    assert "exists" in told
    assert taken in told
    assert "model_path" not in wire.get(f"/samplers/{taken}")
    unnamed = {"model_id": run, "seq_id": 2, "sampling_session_seq_id": 4}
    made = wire.result(wire.post("/save_weights_for_sampler", **unnamed))
    # Sent again, it is the same save.
    assert wire.result(wire.post("/save_weights_for_sampler", **unnamed)) == made
    again = {"model_id": run, "seq_id": 3, "sampling_session_seq_id": 4}
    assert "exists" in refused(wire, wire.post("/save_weights_for_sampler", **again))


def test_more_sequences_than_one_query_takes_are_looked_up(wire: Wire, run: str, seq: Numbers) -> None:
    message = datum([1] * 2)
    message.loss_fn_input_spans.extend(
        pb.ProvenanceSpan(sampled_tokens={"sequence_id": f"none-{i}"})
        for i in range(260_000)  # SQLite takes 250,000 here
    )
    told = refused(wire, wire.submit(run, seq(), message, loss="stable_reinforce"))
    assert "no record of sequence" in told


def test_names_are_checked_and_taken_once(wire: Wire, run: str, seq: Numbers) -> None:
    for name in ("a/b", "", "..", "x" * 300, "\n", "tinker://x"):
        told = refused(wire, wire.post("/save_weights", model_id=run, seq_id=seq(), path=name))
        assert "name" in told
    assert wire.result(wire.post("/save_weights", model_id=run, seq_id=seq(), path="once"))["path"]
    told = refused(wire, wire.post("/save_weights", model_id=run, seq_id=seq(), path="once"))
    assert "exists" in told
    again = wire.post("/save_weights", model_id=run, seq_id=seq(), path="once", overwrite=True)
    assert wire.result(again)["path"].endswith("/weights/once")
    told = refused(wire, wire.post("/save_weights", model_id=run, seq_id=seq(), path="brief", ttl_seconds=5))
    assert "ttl_seconds" in told


def test_loading_what_is_not_there_or_does_not_fit_is_refused(wire: Wire, run: str, seq: Numbers) -> None:
    path = f"tinker://{run}/weights/never-saved"
    assert "never-saved" in refused(wire, wire.post("/load_weights", model_id=run, seq_id=seq(), path=path))
    other = wire.run(MODEL, rank=8)
    saved = wire.result(wire.post("/save_weights", model_id=other, seq_id=1, path="rank8"))["path"]
    assert "rank" in refused(wire, wire.post("/load_weights", model_id=run, seq_id=seq(), path=saved))
    sampler = wire.result(wire.post("/save_weights_for_sampler", model_id=other, seq_id=2, path="s"))["path"]
    told = refused(wire, wire.post("/load_weights", model_id=run, seq_id=seq(), path=sampler, optimizer=True))
    assert "optimizer" in told


BAD_SAMPLES: dict[str, Json] = {
    "num_samples 0": {"num_samples": 0},
    "num_samples huge": {"num_samples": 10**6},
    "negative temperature": {"params": {"temperature": -1}},
    "top_p 0": {"params": {"top_p": 0}},
    "top_k -7": {"params": {"top_k": -7}},
    "stop out of range": {"params": {"stop": [10**9]}},
    "empty stop string": {"params": {"stop": [""]}},
    "too many stop strings": {"params": {"stop": [f"stop {n}" for n in range(10_000)]}},
    "a long stop string": {"params": {"stop": ["and", "x" * 1025]}},
    "too many stop tokens": {"params": {"stop": [7] * 257}},
    "negative max_tokens": {"params": {"max_tokens": -1}},
    "targets of another length": {"target_prompt_logprobs": {"data": [1], "shape": [1, 1]}},
    "targets that are no tensor": {"target_prompt_logprobs": {"data": "x"}},
    "top-k of everything": {"topk_prompt_logprobs": 10**6},
    "top_k over 32 bits": {"params": {"top_k": 2**31}},
    "max_tokens over 32 bits": {"params": {"max_tokens": 2**31}},
    "a seed over 64 bits": {"params": {"seed": 2**64}},
    "a seed under 64 bits": {"params": {"seed": -(2**63) - 1}},
    "prompt_logprobs_last_n over 32 bits": {"prompt_logprobs_last_n": 2**31},
    "numbers beyond any": {"params": {"max_tokens": 10**400}},
    "too many targets": {"target_prompt_logprobs": {"data": [0] * 2050, "shape": [2, 1025]}},
    "another base model": {"base_model": "tinsmith/other"},
    "other weights": {"model_path": "tinker://a/sampler_weights/b"},
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_refused(wire: Wire, case: str) -> None:
    sampler = _base_sampler(wire)
    wire.sample(sampler, 0, [1, 2, 3], **BAD_SAMPLES[case])
    assert wire.status == 400


def test_a_result_that_would_be_too_large_is_refused_with_what_to_change(wire: Wire) -> None:
    sampler = _base_sampler(wire)
    many = {"num_samples": 1024, "topk_sample_logprobs": 128, "params": {"max_tokens": 1000}}
    answer = wire.sample(sampler, 0, [1, 2, 3], **many)
    assert wire.status == 400
    assert "max_tokens" in answer["detail"]


def test_a_sample_without_a_sampling_session_is_told_how_to_get_one(wire: Wire) -> None:
    body = {"seq_id": 0, "prompt": {"chunks": [{"tokens": [1, 2]}]}, "base_model": MODEL}
    answer = wire.post("/asample", **body)
    assert wire.status == 400
    assert "create_sampling_session" in answer["detail"]
    made = wire.post("/asample", **body, sampling_session_id=_base_sampler(wire))
    assert "request_id" in made


def test_every_seed_of_64_bits_samples(wire: Wire) -> None:
    sampler = _base_sampler(wire)
    for number, seed in enumerate((2**64 - 1, -1, -(2**63), 0)):
        made = wire.sample(sampler, number, [1, 2], params={"seed": seed})
        assert len(wire.sampled(made).sequences) == 1


def test_runs_are_listed_by_project_with_their_last_checkpoints(service: RunningService, wire: Wire) -> None:
    project = "a-project-of-this-test"
    service.admin("projects", "create", "local", project)
    sessions = [wire.post("/create_session", project_id=project)["session_id"], wire.session()]
    one, other = (wire.run(MODEL, session=session) for session in sessions)
    for number, name in enumerate(("first", "second"), start=1):
        wire.result(wire.post("/save_weights", model_id=one, seq_id=number, path=name))
    listed = wire.get("/training_runs", project_id=project)
    assert [r["training_run_id"] for r in listed["training_runs"]] == [one]
    assert listed["cursor"]["total_count"] == 1
    assert listed["training_runs"][0]["last_checkpoint"]["checkpoint_id"] == "weights/second"
    assert listed["training_runs"][0] == wire.get(f"/training_runs/{one}")
    everything = wire.get("/training_runs", limit=1000)["training_runs"]
    assert {one, other} <= {r["training_run_id"] for r in everything}
    assert "no project 'another'" in wire.get("/training_runs", project_id="another")["detail"]


def test_bad_prompts_are_refused(wire: Wire) -> None:
    sampler = _base_sampler(wire)
    for prompt in ([], [-1], [10**9], [1] * 5000, ["a"], [2**40], [1.5]):
        wire.sample(sampler, 0, prompt)
        assert wire.status == 400, prompt
    assert len(wire.sampled(wire.sample(sampler, 1, [1, 2])).sequences) == 1


def test_a_sampler_that_there_is_not_is_told_so(wire: Wire) -> None:
    answer = wire.sample("none:sample:0", 0, [1, 2])
    assert wire.status == 404
    assert "none:sample:0" in answer["detail"]
    session = wire.session()
    for weights in ({"model_path": "tinker://none/sampler_weights/a"}, {"base_model": "none"}):
        wire.post("/create_sampling_session", session_id=session, sampling_session_seq_id=0, **weights)
        assert wire.status in (400, 404)


def test_diverged_weights_fail_their_samples_and_nobody_elses(wire: Wire) -> None:
    """Sampled in one batch: a model whose logits are not finite, and the base model."""
    run = wire.run(MODEL, rank=4)
    for step in range(3):
        wire.submit(run, 2 * step + 1, datum([1, 2, 3, 4, 5]))
        wire.result(wire.optim(run, 2 * step + 2, learning_rate=1e30))
    path = wire.result(wire.post("/save_weights_for_sampler", model_id=run, seq_id=7, path="diverged"))
    opened = wire.post(
        "/create_sampling_session",
        session_id=wire.session(),
        sampling_session_seq_id=0,
        model_path=path["path"],
    )
    params = {"max_tokens": 100, "stop": []}
    others = [wire.sample(_base_sampler(wire), 0, [1, 2, 3], params=params) for _ in range(2)]
    failed = wire.result(wire.sample(opened["sampling_session_id"], 0, [1, 2, 3], params=params))
    assert "diverged" in failed["error"]
    assert failed["category"] == "user"
    for other in others:
        assert len(wire.sampled(other).sequences[0].tokens) == 400


def test_after_all_that_the_run_still_trains(wire: Wire, run: str, seq: Numbers) -> None:
    assert wire.output(wire.submit(run, seq(), datum([1, 2, 3]))).metrics["loss:sum"] > 0
    assert wire.result(wire.optim(run, seq()))["metrics"]["optimizer_step"] == 1


PATHS = (
    "/create_session",
    "/create_model",
    "/load_weights",
    "/optim_step",
    "/save_weights",
    "/asample",
    "/get_info",
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(
    st.sampled_from(["session_id", "model_seq_id", "base_model", "lora_config", "model_id", "seq_id", "path", "prompt",
                     "sampling_session_id", "sampling_params", "adam_params", "optimizer", "ttl_seconds"]),
    ANYTHING,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=FIELDS | ANYTHING)
def test_no_json_gets_a_5xx(wire: Wire, path: str, body: object) -> None:
    answer = wire.http.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500, (path, body, answer.text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_get_a_5xx(wire: Wire, body: bytes) -> None:
    headers = {"content-type": "application/x-protobuf"}
    answer = wire.http.post("/forward_backward", content=body, headers=headers)
    assert answer.status_code < 500, answer.text


def _base_sampler(wire: Wire) -> str:
    answer = wire.post(
        "/create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model=MODEL
    )
    return str(answer["sampling_session_id"])
