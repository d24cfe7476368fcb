"""Between the types users hold and the protobuf on the wire."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tinsmith.errors import InvalidInput
from tinsmith.types import (
    Array,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    ModelInput,
    PromptAltTokens,
    ProvenanceSpans,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.datums import array
from tinsmith.wire.samples import dense

MAX_DATUMS = 1024
MAX_BYTES = 5_000_000
"""A forward_backward larger than either goes out as several requests, unless the service says otherwise."""


def pack(
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float | str] | None = None,
    *,
    forward_only: bool = False,
    max_datums: int = MAX_DATUMS,
    max_bytes: int = MAX_BYTES,
) -> list[pb.ForwardBackwardRequest]:
    """One request per chunk of `data`, in order; who sends them fills in model_id and seq_id."""
    if not data:
        raise InvalidInput("`data` is empty: send at least one datum")
    config = {name: _setting(value) for name, value in (loss_fn_config or {}).items()}
    return [
        pb.ForwardBackwardRequest(
            data=chunk, loss_fn=loss_fn, loss_fn_config_v2=config, forward_only=forward_only
        )
        for chunk in _chunks(map(_datum, data), max_datums, max_bytes)
    ]


def unpack(body: bytes) -> ForwardBackwardOutput:
    """The answer to one request."""
    message = pb.ForwardBackwardOutput.FromString(body)
    return ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type,
        loss_fn_outputs=[output for record in message.loss_fn_outputs for output in _record(record)],
        metrics=dict(message.metrics),
    )


# Means over the trained tokens of a chunk, of which it says how many they are.
_OVER_TRAINED_TOKENS = ("kl_sampling:mean",)
_TRAINED_TOKENS = "trained_tokens:sum"


def merge(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """One answer from those of a call's chunks.

    A metric `name:reduction` is reduced over chunks as its name says: means weighted by datums, those over
    trained tokens by these. One that a chunk lacks is left out, unless it had no token to measure it on.
    """
    if len(outputs) == 1:
        return outputs[0]
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for output in outputs for name in output.metrics):
        told = [output for output in outputs if name in output.metrics]
        if any(o.metrics.get(_TRAINED_TOKENS) != 0 for o in outputs if name not in o.metrics):
            continue
        values = [output.metrics[name] for output in told]
        match name.rpartition(":")[2]:
            case "sum":
                metrics[name] = float(np.sum(values))
            case "mean":
                metrics[name] = float(np.average(values, weights=_weights(name, told)))
            case "min":
                metrics[name] = min(values)
            case "max":
                metrics[name] = max(values)
            case "slack":  # how far the largest is above the mean
                metrics[name] = max(values) - float(np.average(values, weights=_weights(name, told)))
            case "hash2":
                metrics[name] = float(sum(int(value) % 2**64 for value in values) % 2**64)
            case "unique":
                metrics[name] = values[0]
                metrics.update({f"{name}_{i}": value for i, value in enumerate(values[1:], 1)})
    return ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[one for output in outputs for one in output.loss_fn_outputs],
        metrics=metrics,
    )


def _weights(name: str, outputs: Sequence[ForwardBackwardOutput]) -> list[float]:
    """How much each chunk counts in a mean. A service that is no Tinsmith may not tell its tokens."""
    if name in _OVER_TRAINED_TOKENS and all(_TRAINED_TOKENS in output.metrics for output in outputs):
        return [output.metrics[_TRAINED_TOKENS] for output in outputs]
    return [float(len(output.loss_fn_outputs)) for output in outputs]


def json_prompt(prompt: ModelInput) -> dict[str, Any]:
    """A prompt in its JSON form."""
    chunks: list[dict[str, Any]] = []
    for chunk in prompt.chunks:
        if isinstance(chunk, EncodedTextChunk):
            chunks.append({"type": chunk.type, "tokens": chunk.tokens})
            continue
        described: dict[str, Any] = {"type": chunk.type, "format": chunk.format}
        if isinstance(chunk, ImageChunk):
            described["data"] = base64.b64encode(chunk.data).decode()
        else:
            described["location"] = chunk.location
        if chunk.expected_tokens is not None:
            described["expected_tokens"] = chunk.expected_tokens
        chunks.append(described)
    return {"chunks": chunks}


def json_tensor(tensor: TensorData) -> dict[str, Any]:
    """A tensor in its JSON form."""
    described: dict[str, Any] = {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
    if tensor.sparse_crow_indices is not None:
        described["sparse_crow_indices"] = tensor.sparse_crow_indices
        described["sparse_col_indices"] = tensor.sparse_col_indices
    return described


def unpack_sample(body: bytes, sequence_ids: Sequence[str]) -> SampleResponse:
    """The answer to one sample call; `sequence_ids` came with its submission."""
    message = pb.SampleResponse.FromString(body)
    alternatives = message.prompt_alt_tokens
    return SampleResponse(
        sequences=[
            SampledSequence(
                stop_reason="length" if sequence.stop_reason == pb.STOP_REASON_LENGTH else "stop",
                sequence_id=sequence_id,
                tokens_np=np.frombuffer(sequence.tokens, "<i4"),
                logprobs_np=_floats(sequence.logprobs),
                topk_logprobs_np=_topk(sequence.topk_sampled_logprobs),
            )
            for sequence, sequence_id in zip(message.sequences, sequence_ids, strict=True)
        ],
        prompt_logprobs_np=_floats(message.prompt_logprobs),
        topk_prompt_logprobs_np=_topk(message.topk_prompt_logprobs),
        target_prompt_logprobs=_tensor(message.target_prompt_logprobs),
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
        prompt_alt_tokens=(
            PromptAltTokens(TensorData(array(alternatives.tokens)), TensorData(array(alternatives.logprobs)))
            if message.HasField("prompt_alt_tokens")
            else None
        ),
    )


def _chunks(data: Iterable[pb.Datum], max_datums: int, max_bytes: int) -> Iterator[list[pb.Datum]]:
    chunk: list[pb.Datum] = []
    size = 0
    for datum in data:
        datum_size = datum.ByteSize()
        if chunk and (len(chunk) == max_datums or size + datum_size > max_bytes):
            yield chunk
            chunk, size = [], 0
        chunk.append(datum)
        size += datum_size
    yield chunk


def _datum(datum: Datum) -> pb.Datum:
    message = pb.Datum()
    for chunk in datum.model_input.chunks:
        if isinstance(chunk, EncodedTextChunk):
            message.model_input.add().encoded_text.tokens = chunk.array.astype("<i4", copy=False).tobytes()
        elif isinstance(chunk, ImageChunk):
            image = message.model_input.add().image
            image.data, image.format = chunk.data, chunk.format
            if chunk.expected_tokens is not None:
                image.expected_tokens = chunk.expected_tokens
        else:
            raise InvalidInput(f"a chunk of type {chunk.type} can be sampled from and not trained on")
    for name, tensor in datum.loss_fn_inputs.items():
        message.loss_fn_inputs[name].CopyFrom(_tensor_message(tensor))
    message.model_input_spans.extend(_spans(datum.model_input_spans or ()))
    message.loss_fn_input_spans.extend(_spans(datum.loss_fn_input_spans or ()))
    return message


def _tensor_message(tensor: TensorData) -> pb.Tensor:
    if tensor.sparse_crow_indices is None:
        return dense(tensor.values)
    message = pb.Tensor(dtype=dense(tensor.values[:0]).dtype, shape=tensor.shape)
    message.sparse_csr.values = dense(tensor.values).dense
    message.sparse_csr.crow_indices = np.asarray(tensor.sparse_crow_indices, "<i8").tobytes()
    message.sparse_csr.col_indices = np.asarray(tensor.sparse_col_indices, "<i8").tobytes()
    return message


def _spans(spans: ProvenanceSpans) -> Iterator[pb.ProvenanceSpan]:
    for span in spans:
        message = pb.ProvenanceSpan()
        sampled = isinstance(span, SampledProvenanceSpan)
        place = message.sampled_tokens if sampled else message.prompt_tokens
        place.sequence_id, place.offset, place.length = span.sequence_id, span.offset, span.length
        yield message


def _setting(value: float | str) -> pb.LossConfigValue:
    return pb.LossConfigValue(text=value) if isinstance(value, str) else pb.LossConfigValue(number=value)


def _record(record: pb.ArrayRecord) -> list[dict[str, TensorData]]:
    outputs: list[dict[str, TensorData]] = [{} for _ in range(record.num_datums)]
    for name, field in record.fields.items():
        offsets = np.frombuffer(field.offsets, "<i8").tolist()
        for output, start, stop in zip(outputs, offsets[:-1], offsets[1:], strict=True):
            values = _values(field.data[start:stop], field.dtype)
            output[name] = TensorData(values.reshape(-1, *field.trailing_shape))
    return outputs


def _values(blob: bytes, dtype: pb.DType) -> Array:
    if dtype == pb.DTYPE_BFLOAT16:
        return (np.frombuffer(blob, "<u2").astype(np.uint32) << 16).view(np.float32)
    return array(pb.Tensor(dense=blob, dtype=dtype))


# A field that is empty says as much as one that is not there: both mean "not asked for".


def _floats(blob: bytes) -> npt.NDArray[np.float32] | None:
    return np.frombuffer(blob, "<f4") if blob else None


def _tensor(tensor: pb.Tensor) -> TensorData | None:
    return TensorData(array(tensor)) if tensor.dtype else None


def _topk(found: pb.TopkLogprobs) -> TopkLogprobs | None:
    if not found.k:
        return None
    shape = (found.length, found.k)
    token_ids = np.frombuffer(found.token_ids, "<i4", found.length * found.k)
    logprobs = np.frombuffer(found.logprobs, "<f4", found.length * found.k)
    return TopkLogprobs(token_ids.reshape(shape), logprobs.reshape(shape))
