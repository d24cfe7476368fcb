"""From wire bytes to arrays and back."""

import contextlib
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.wire import datum
from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import TrainOutput
from tinsmith.wire.losses import LOSSES
from tinsmith.wire.samples import dense, topk

LIMITS = {"vocab_size": 1000, "max_context_length": 64}


def request(*data: pb.Datum, loss: str = "cross_entropy", **fields: object) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(model_id="r", seq_id=1, data=data, loss_fn=loss, **fields)  # type: ignore[arg-type]


def wide(rows: int, k: int, *, sparse: bool) -> pb.Datum:
    message = datum(list(range(rows + 1)))
    targets, weights = np.zeros((rows, k), np.int64), np.zeros((rows, k), np.float32)
    targets[0, k - 1], weights[0, k - 1] = 7, 0.5
    targets[rows - 1, 0], weights[rows - 1, 0] = 8, -2.0
    for name, values in (("target_tokens", targets), ("weights", weights)):
        tensor = dense(values)
        if sparse:
            crow = np.concatenate([[0], np.cumsum((values != 0).sum(1))]).astype("<i8")
            csr = pb.SparseCsr(
                values=values[values != 0].tobytes(),
                crow_indices=crow.tobytes(),
                col_indices=np.nonzero(values)[1].astype("<i8").tobytes(),
            )
            tensor = pb.Tensor(sparse_csr=csr, dtype=tensor.dtype, shape=tensor.shape)
        message.loss_fn_inputs[name].CopyFrom(tensor)
    return message


def test_datums_of_many_lengths_become_flat_arrays() -> None:
    found = datums.read(request(datum([1, 2, 3]), datum([4, 5]), datum([6, 7, 8, 9])), **LIMITS)
    assert found.lengths_S.tolist() == [2, 1, 3]
    assert found.tokens_T.tolist() == [1, 2, 4, 6, 7, 8]
    assert found.targets_TK[:, 0].tolist() == [2, 3, 5, 7, 8, 9]
    assert found.offsets_S.tolist() == [0, 2, 3, 6]
    assert found.columns["weights"].shape == (6, 1)


def test_sparse_and_dense_say_the_same() -> None:
    dense_form = datums.read(request(wide(5, 20, sparse=False)), **LIMITS)
    sparse_form = datums.read(request(wide(5, 20, sparse=True)), **LIMITS)
    np.testing.assert_array_equal(dense_form.targets_TK, sparse_form.targets_TK)
    np.testing.assert_array_equal(dense_form.columns["weights"], sparse_form.columns["weights"])
    assert sparse_form.targets_TK.shape == (5, 20)


def test_widths_of_targets_may_differ_and_come_back_as_sent() -> None:
    given_input = datums.read(
        request(datum([1, 2, 3]), wide(4, 3, sparse=False), wide(2, 5, sparse=False)), **LIMITS
    )
    assert given_input.targets_TK.shape == (8, 5)
    logprobs = np.arange(40, dtype=np.float32).reshape(8, 5)
    message = pb.ForwardBackwardOutput.FromString(
        datums.write_output(given_input, TrainOutput(logprobs, np.ones(8, np.float32)))
    )
    shapes, values = [], []
    for record in message.loss_fn_outputs:
        field = record.fields["logprobs"]
        offsets = np.frombuffer(field.offsets, "<i8") // 4
        for a, b in itertools.pairwise(offsets):
            values.append(np.frombuffer(field.data, "<f4")[a:b].reshape(-1, *field.trailing_shape))
            shapes.append(values[-1].shape)
    assert shapes == [(2,), (4, 3), (2, 5)]
    np.testing.assert_array_equal(values[1], logprobs[2:6, :3])
    np.testing.assert_array_equal(values[2], logprobs[6:8, :5])
    assert sum(r.num_datums for r in message.loss_fn_outputs) == 3
    assert message.metrics["loss:sum"] == 8


def test_settings_become_columns_and_per_token_inputs_win() -> None:
    inputs = {"logprobs": [0, 0], "advantages": [1, 1]}
    plain, own = datum([1, 2, 3], **inputs), datum([1, 2, 3], **inputs, clip_high_threshold=[3, 4])
    message = request(plain, own, loss="ppo")
    message.loss_fn_config["clip_low_threshold"] = 0.1  # the older map
    message.loss_fn_config["clip_high_threshold"] = 9
    message.loss_fn_config_v2["clip_high_threshold"].number = 2  # the newer one wins
    found = datums.read(message, **LIMITS)
    assert found.columns["clip_low_threshold"].tolist() == pytest.approx([0.1] * 4)
    assert found.columns["clip_high_threshold"].tolist() == [2, 2, 3, 4]
    assert found.echo == {"clip_low_threshold": 0.1, "clip_high_threshold": 2}


def test_every_metric_has_one_colon_and_every_loss_reports_its_sum() -> None:
    for name, loss in LOSSES.items():
        inputs = {k: [0.5, 0.0] for k in loss.inputs}
        found = datums.read(request(datum([1, 2, 3], **inputs), loss=name), **LIMITS)
        metrics = datums.metrics(
            found, TrainOutput(np.full((2, 1), -1, np.float32), np.array([1, 2], np.float32))
        )
        assert metrics["loss:sum"] == 3
        assert all(key.count(":") == 1 for key in metrics)
        for setting in loss.settings:
            assert f"{setting}:unique" in metrics


def test_the_sampling_kl_counts_trained_tokens_only() -> None:
    given_input = datums.read(
        request(datum([1, 2, 3], logprobs=[-1, -50], advantages=[1, 0]), loss="importance_sampling"), **LIMITS
    )
    output = TrainOutput(np.array([[-1.5], [-2]], np.float32), np.zeros(2, np.float32))
    metrics = datums.metrics(given_input, output)
    assert metrics["kl_sampling:mean"] == pytest.approx(0.5)
    assert metrics["trained_tokens:sum"] == 1
    assert metrics["ratio:max"] == pytest.approx(np.exp(-0.5))


def test_missing_weights_count_every_target_once() -> None:
    message = datum([1, 2, 3])
    del message.loss_fn_inputs["weights"]
    found = datums.read(request(message), **LIMITS)
    assert found.columns["weights"].tolist() == [[1], [1]]


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_invalid_input(body: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        datums.read(datums.parse(body), **LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "data",
                    "chunks",
                    "tokens",
                    "type",
                    "model_input",
                    "loss_fn_inputs",
                    "target_tokens",
                    "dtype",
                    "shape",
                    "loss_fn",
                    "loss_fn_config",
                    "model_id",
                    "seq_id",
                    "forward_input",
                    "sparse_crow_indices",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@given(JSON)
def test_any_json_is_a_request_or_invalid_input(body: object) -> None:
    with contextlib.suppress(InvalidInput):
        datums.read(json_form.read_request(body, "forward_input"), **LIMITS)


def test_the_json_form_reads_as_its_protobuf_twin() -> None:
    body = {
        "model_id": "r",
        "seq_id": 1,
        "forward_backward_input": {
            "loss_fn": "ppo",
            "loss_fn_config": {"clip_low_threshold": 0.5},
            "data": [
                {
                    "model_input": {"chunks": [{"tokens": [1]}, {"type": "encoded_text", "tokens": [2]}]},
                    "loss_fn_inputs": {
                        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                        "logprobs": {"data": [-1.0, -2.0], "dtype": "float32"},
                        "advantages": [1, 2],
                    },
                }
            ],
        },
    }
    found = datums.read(json_form.read_request(body, "forward_backward_input"), **LIMITS)
    twin = datum([1, 2, 3], logprobs=[-1, -2], advantages=[1, 2])
    message = request(twin, loss="ppo")
    message.loss_fn_config_v2["clip_low_threshold"].number = 0.5
    expected = datums.read(message, **LIMITS)
    assert found.tokens_T.tolist() == expected.tokens_T.tolist()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)


def test_a_nan_in_a_result_is_null_in_json() -> None:
    given_input = datums.read(request(datum([1, 2, 3])), **LIMITS)
    output = TrainOutput(np.array([[np.nan], [-1]], np.float32), np.array([np.nan, 1], np.float32))
    message = pb.ForwardBackwardOutput.FromString(datums.write_output(given_input, output))
    body = json_form.write_output(message)
    assert body["loss_fn_outputs"][0]["logprobs"]["data"] == [None, -1.0]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_every_json_result_has_a_finite_loss(loss: float) -> None:
    message = pb.ForwardBackwardOutput(metrics={"loss:sum": loss, "ratio:max": np.nan, "tokens:sum": 2})
    metrics = json_form.write_output(message)["metrics"]
    assert abs(metrics["loss:sum"]) == np.finfo(np.float32).max
    assert (metrics["loss:sum"] < 0) == (loss < 0)
    assert metrics["tokens:sum"] == 2
    assert "ratio:max" not in metrics


def with_targets(shape: list[int], **encoding: object) -> pb.Datum:
    message = datum([1, 2, 3])
    tensor = pb.Tensor(dtype=pb.DTYPE_INT64, shape=shape, **encoding)  # type: ignore[arg-type]
    message.loss_fn_inputs["target_tokens"].CopyFrom(tensor)
    return message


@pytest.mark.parametrize(
    "shape", [[1] * 70, [0, 2**62], [2**62, 0], [2**62, 2**62], [2, 1025], [2**31, 1024], [1, 1, 2]]
)
@pytest.mark.parametrize("encoding", [{"dense": b""}, {"sparse_csr": {}}, {"dense": b"\0" * 8}])
def test_no_shape_is_more_than_invalid_input(shape: list[int], encoding: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="datum 0"):
        datums.read(request(with_targets(shape, **encoding)), **LIMITS)


def test_sparse_rows_that_wrap_around_64_bits_are_refused() -> None:
    crow = np.array([0, 2**63 - 1, -2, 0], "<i8").tobytes()
    message = datum([1, 2, 3, 4])
    message.loss_fn_inputs["target_tokens"].CopyFrom(
        pb.Tensor(sparse_csr={"crow_indices": crow}, dtype=pb.DTYPE_INT64, shape=[3, 2])
    )
    with pytest.raises(InvalidInput, match="crow_indices"):
        datums.read(request(message), **LIMITS)


def test_one_wide_datum_beside_many_long_ones_does_not_become_gigabytes() -> None:
    crow = np.zeros(2, "<i8").tobytes()
    wide_one = datum([1, 2])
    wide_one.loss_fn_inputs["target_tokens"].CopyFrom(
        pb.Tensor(sparse_csr={"crow_indices": crow}, dtype=pb.DTYPE_INT64, shape=[1, 1024])
    )
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="cells"):
            datums.read(request(wide_one, *[datum([1] * 65)] * 1024), **LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_running_out_of_memory_is_told_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(datums, "_stack", full)
    with pytest.raises(InvalidInput, match="memory"):
        datums.read(request(datum([1, 2])), **LIMITS)


@pytest.mark.parametrize("config", [[1], "text", 5, {"a": 10**400}, {"a": None}, {"a": [1]}, {"a": True}])
def test_a_loss_config_that_is_none_is_invalid_input(config: object) -> None:
    inner = {"loss_fn": "ppo", "data": [], "loss_fn_config": config}
    with pytest.raises(InvalidInput, match="loss_fn_config"):
        json_form.read_request({"model_id": "r", "seq_id": 1, "forward_input": inner}, "forward_input")


def test_a_number_too_large_for_a_tensor_is_invalid_input() -> None:
    for name, number in (("weights", 10**400), ("target_tokens", 2**63), ("weights", 1e300)):
        inputs = {"target_tokens": [2], "weights": [1], name: [number]}
        inner = {
            "loss_fn": "cross_entropy",
            "data": [{"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": inputs}],
        }
        body = {"model_id": "r", "seq_id": 1, "forward_input": inner}
        with pytest.raises(InvalidInput, match=name):
            datums.read(json_form.read_request(body, "forward_input"), **LIMITS)


def test_a_setting_that_float32_cannot_hold_is_invalid_input() -> None:
    message = request(datum([1, 2], logprobs=[0], advantages=[1]), loss="ppo")
    message.loss_fn_config_v2["clip_high_threshold"].number = 1e300
    with pytest.raises(InvalidInput, match="finite"):
        datums.read(message, **LIMITS)


def test_everything_a_sample_can_hold_is_in_its_json_form() -> None:
    ids, scores = np.array([[4, 5], [6, 0]], np.int32), np.array([[-1, -2], [-3, -99999]], np.float32)
    message = pb.SampleResponse(
        sequences=[pb.SampledSequence(tokens=ids[0].tobytes(), topk_sampled_logprobs=topk(ids, scores))],
        target_prompt_logprobs=dense(scores),
        prompt_alt_tokens=pb.PromptAltTokens(tokens=dense(ids), logprobs=dense(scores)),
    )
    body = json_form.write_sample(message)
    assert body["sequences"][0]["topk_sampled_logprobs"] == [[(4, -1.0), (5, -2.0)], [(6, -3.0)]]
    floats = {"data": [-1.0, -2.0, -3.0, -99999.0], "dtype": "float32", "shape": [2, 2]}
    assert body["target_prompt_logprobs"] == floats
    assert body["prompt_alt_tokens"]["logprobs"] == floats
    assert body["prompt_alt_tokens"]["tokens"] == {"data": [4, 5, 6, 0], "dtype": "int64", "shape": [2, 2]}
