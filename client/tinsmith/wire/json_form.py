"""The JSON form of forward_backward and of results, which older clients speak. Read into and written from
the protobuf messages, so that everything behind this file knows one form."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinsmith.errors import InvalidInput
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.datums import array

Json = dict[str, Any]

# The dtype of an input that came without one.
_INTEGER_INPUTS = {"target_tokens"}

# Of float32. JSON has no infinity.
_LARGEST = float(np.finfo(np.float32).max)


def read_request(given: Any, member: str) -> pb.ForwardBackwardRequest:
    """`member` is forward_backward_input or forward_input (then the request is forward_only)."""
    body = _object(given, "the body")
    inner = _object(body.get(member), member)
    data = inner.get("data")
    if not isinstance(data, list):
        raise InvalidInput(f"{member}.data must be a list of datums")
    model_id, seq_id, loss_fn = body.get("model_id"), body.get("seq_id"), inner.get("loss_fn")
    if not isinstance(model_id, str) or not isinstance(loss_fn, str):
        raise InvalidInput(f"model_id and {member}.loss_fn must be strings")
    if not isinstance(seq_id, int) or not 1 <= seq_id < 2**31:
        raise InvalidInput("seq_id must be a number from 1")
    message = pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=member == "forward_input"
    )
    config = inner.get("loss_fn_config")
    for name, value in ({} if config is None else _object(config, "loss_fn_config")).items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise InvalidInput(f"loss_fn_config[{name!r}] must be a number or a text")
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
            continue
        try:
            message.loss_fn_config_v2[name].number = float(value)
        except OverflowError:
            raise InvalidInput(f"loss_fn_config[{name!r}] must be finite") from None
    for index, datum in enumerate(data):
        try:
            _datum(message.data.add(), _object(datum, "a datum"))
        except InvalidInput as error:
            raise InvalidInput(f"datum {index}: {error}") from None
    return message


def read_tensor(given: Any, name: str) -> pb.Tensor:
    """A TensorData object: data, dtype, shape, or the sparse form with sparse_crow_indices."""
    tensor = _object(given, f"`{name}`")
    dtype = tensor.get("dtype") or ("int64" if name in _INTEGER_INPUTS else "float32")
    if dtype not in ("int64", "float32"):
        raise InvalidInput(f"`{name}`: dtype must be int64 or float32, not {dtype!r}")
    values = _array(tensor.get("data"), "<i8" if dtype == "int64" else "<f4", name)
    message = pb.Tensor(dtype=pb.DTYPE_INT64 if dtype == "int64" else pb.DTYPE_FLOAT32)
    message.shape.extend(_array(tensor.get("shape") or [], "<i8", f"{name}.shape").tolist())
    if tensor.get("sparse_crow_indices") is None:
        message.dense = values.tobytes()
    else:
        message.sparse_csr.values = values.tobytes()
        message.sparse_csr.crow_indices = _array(tensor["sparse_crow_indices"], "<i8", name).tobytes()
        message.sparse_csr.col_indices = _array(tensor.get("sparse_col_indices") or [], "<i8", name).tobytes()
    return message


def read_tokens(chunks: Any) -> npt.NDArray[np.int32]:
    """The tokens of a JSON prompt: {"chunks": [{"type": "encoded_text", "tokens": [...]}, ...]}."""
    if not isinstance(chunks, list):
        raise InvalidInput("chunks must be a list")
    parts = [_chunk_tokens(chunk) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def write_output(message: pb.ForwardBackwardOutput) -> Json:
    outputs: list[Json] = []
    for record in message.loss_fn_outputs:
        outputs.extend(
            {name: _tensor_at(field, index) for name, field in record.fields.items()}
            for index in range(record.num_datums)
        )
    return {
        "loss_fn_output_type": message.loss_fn_output_type,
        "loss_fn_outputs": outputs,
        "metrics": _metrics(message.metrics),
    }


def write_sample(message: pb.SampleResponse) -> Json:
    body: Json = {
        "type": "sample",
        "sequences": [_sequence(s) for s in message.sequences],
        "prompt_cache_hit_tokens": message.prompt_cache_hit_tokens,
    }
    if message.HasField("prompt_logprobs"):
        body["prompt_logprobs"] = _floats(message.prompt_logprobs)
    if message.HasField("topk_prompt_logprobs"):
        body["topk_prompt_logprobs"] = _topk(message.topk_prompt_logprobs)
    if message.HasField("target_prompt_logprobs"):
        body["target_prompt_logprobs"] = _tensor(message.target_prompt_logprobs)
    if message.HasField("prompt_alt_tokens"):
        body["prompt_alt_tokens"] = {
            "tokens": _tensor(message.prompt_alt_tokens.tokens),
            "logprobs": _tensor(message.prompt_alt_tokens.logprobs),
        }
    return body


def _datum(message: pb.Datum, given: Json) -> None:
    model_input = _object(given.get("model_input"), "model_input")
    chunks = model_input.get("chunks")
    if not isinstance(chunks, list):
        raise InvalidInput("model_input.chunks must be a list")
    for chunk in chunks:
        message.model_input.add().encoded_text.tokens = _chunk_tokens(chunk).astype("<i4").tobytes()
    for name, tensor in _object(given.get("loss_fn_inputs"), "loss_fn_inputs").items():
        if isinstance(tensor, list):
            tensor = {"data": tensor}
        message.loss_fn_inputs[name].CopyFrom(read_tensor(tensor, name))


def _chunk_tokens(given: Any) -> npt.NDArray[np.int32]:
    chunk = _object(given, "a chunk")
    kind = chunk.get("type") or ("encoded_text" if "tokens" in chunk else "unknown")
    if kind != "encoded_text":
        raise InvalidInput(f"a chunk of type {kind!r} is not supported: this base model takes text only")
    tokens = _array(chunk.get("tokens"), "<i8", "tokens")
    if tokens.size and not -(2**31) <= int(tokens.min()) <= int(tokens.max()) < 2**31:
        raise InvalidInput("tokens must fit into 32 bits")
    return tokens.astype(np.int32)


def _array(given: Any, dtype: str, name: str) -> npt.NDArray[Any]:
    if not isinstance(given, list):
        raise InvalidInput(f"`{name}` must be a flat list of numbers")
    try:
        values = np.array(given, np.float64 if dtype == "<f4" else np.int64, ndmin=1)
        if dtype == "<i8" and any(isinstance(v, float) and v != int(v) for v in given):
            raise InvalidInput(f"`{name}` must hold whole numbers")
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"`{name}` must be a flat list of numbers") from None
    if values.ndim != 1:
        raise InvalidInput(f"`{name}` must be a flat list of numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        return values.astype(dtype)


def _object(given: Any, name: str) -> Json:
    if not isinstance(given, Mapping):
        raise InvalidInput(f"{name} must be an object")
    return dict(given)


def _tensor_at(field: pb.BatchedTensor, index: int) -> Json:
    offsets = np.frombuffer(field.offsets, "<i8")
    values = np.frombuffer(field.data, "<f4")[offsets[index] // 4 : offsets[index + 1] // 4]
    trailing = list(field.trailing_shape)
    rows = values.size // int(np.prod(trailing)) if trailing else values.size
    return {"data": _numbers(values), "dtype": "float32", "shape": [rows, *trailing]}


def _tensor(message: pb.Tensor) -> Json:
    """A TensorData object, which knows two dtypes."""
    values = array(message)
    floats = values.dtype.kind == "f"
    flat = values.reshape(-1)
    return {
        "data": _numbers(flat.astype(np.float32, copy=False)) if floats else flat.tolist(),
        "dtype": "float32" if floats else "int64",
        "shape": list(values.shape),
    }


def _sequence(sequence: pb.SampledSequence) -> Json:
    body: Json = {
        "stop_reason": "stop" if sequence.stop_reason == pb.STOP_REASON_STOP else "length",
        "tokens": np.frombuffer(sequence.tokens, "<i4").tolist(),
    }
    if sequence.HasField("logprobs"):
        body["logprobs"] = _floats(sequence.logprobs)
    if sequence.HasField("topk_sampled_logprobs"):
        body["topk_sampled_logprobs"] = _topk(sequence.topk_sampled_logprobs)
    return body


def _floats(blob: bytes) -> list[float | None]:
    return _numbers(np.frombuffer(blob, "<f4"))


def _numbers(values: npt.NDArray[np.float32]) -> list[float | None]:
    """JSON has neither NaN nor infinity: NaN (no value) becomes null, infinities the largest number."""
    if np.isfinite(values).all():
        return values.tolist()  # type: ignore[no-any-return]
    return [None if math.isnan(v) else max(-_LARGEST, min(_LARGEST, v)) for v in values.tolist()]


def _metrics(given: Mapping[str, float]) -> dict[str, float]:
    """Older clients accept numbers only, and read `loss:sum` of every result: the largest number stands
    for a loss that is none, while any other metric without a value is left out."""
    found = {
        name: math.copysign(_LARGEST, value) if math.isinf(value) else value
        for name, value in given.items()
        if not math.isnan(value)
    }
    if "loss:sum" in given:
        found.setdefault("loss:sum", _LARGEST)
    return found


def _topk(message: pb.TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    shape = (message.length, message.k)
    tokens = np.frombuffer(message.token_ids, "<i4").reshape(shape).tolist()
    logprobs = np.frombuffer(message.logprobs, "<f4").reshape(shape).tolist()
    rows = [
        [(t, p) for t, p in zip(*row, strict=True) if p > -99999.0]
        for row in zip(tokens, logprobs, strict=True)
    ]
    return [row or None for row in rows]
