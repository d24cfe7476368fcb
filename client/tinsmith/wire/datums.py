"""From the bytes of a ForwardBackwardRequest to a TrainInput, and from a TrainOutput back to bytes.

`read` is the only place that looks into a datum: the control plane calls it to validate, a worker
to train. Tokens go from the message's bytes to an array without passing through Python lists.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from tinsmith.errors import InvalidInput
from tinsmith.wire import loss_graph
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import Array, CustomInput, Float32, Int64, TrainInput, TrainOutput
from tinsmith.wire.losses import LOSSES

Given = TypeVar("Given")
Made = TypeVar("Made")

MAX_TARGETS = 1024
"""Targets per token."""

# A few bytes of a sparse tensor, or one wide datum beside many long ones, could name terabytes.
_MAX_CELLS = 1 << 26
_MAX_DIMENSION = 1 << 31

_DTYPES: dict[int, "np.dtype[np.generic]"] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}


def parse(body: bytes | bytearray) -> pb.ForwardBackwardRequest:
    """The message in `body`; InvalidInput if it is none."""
    try:
        return pb.ForwardBackwardRequest.FromString(body)  # type: ignore[arg-type] # any buffer
    except DecodeError:
        raise InvalidInput("the body is not a ForwardBackwardRequest in protobuf") from None


def read(request: pb.ForwardBackwardRequest, *, vocab_size: int, max_context_length: int) -> TrainInput:
    """Check everything about `request` that does not depend on the run; InvalidInput names the datum."""
    try:
        return _read(request, vocab_size, max_context_length)
    except MemoryError:
        raise InvalidInput("these datums do not fit into memory: send fewer of them at a time") from None


def shape_of(tensor: pb.Tensor) -> tuple[int, ...]:
    """The shape of a wire Tensor, checked but not yet made dense; a missing one means one dimension."""
    shape = tuple(tensor.shape)
    if len(shape) > 2:
        raise InvalidInput(f"it has {len(shape)} dimensions: one or two are possible")
    if shape and not 0 <= min(shape) <= max(shape) <= _MAX_DIMENSION:
        raise InvalidInput(f"its shape {list(shape)} has a negative dimension or one above {_MAX_DIMENSION}")
    if len(shape) == 2 and shape[1] > MAX_TARGETS:
        raise InvalidInput(f"its shape {list(shape)} has more than {MAX_TARGETS} values per token")
    if tensor.WhichOneof("encoding") == "sparse_csr":
        if len(shape) != 2:
            raise InvalidInput("a sparse tensor needs a shape of two dimensions")
        return shape
    size = len(_values(tensor.dense, _dtype(tensor)))
    if shape and math.prod(shape) != size:
        raise InvalidInput(f"its shape {list(shape)} does not hold its {size} values")
    return shape or (size,)


def array(tensor: pb.Tensor) -> npt.NDArray[np.generic]:
    """The values of a wire Tensor, dense, in its shape."""
    dtype, shape = _dtype(tensor), shape_of(tensor)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return _dense(tensor.sparse_csr, dtype, shape)
    return _values(tensor.dense, dtype).reshape(shape)


def _read(request: pb.ForwardBackwardRequest, vocab_size: int, max_context_length: int) -> TrainInput:
    if not request.data:
        raise InvalidInput("`data` is empty: send at least one datum")
    loss, custom = request.loss_fn, None
    if loss == loss_graph.LOSS:
        custom, settings = loss_graph.read(request.custom_loss), {}
    elif loss in LOSSES:
        settings = _settings(request)
    else:
        known = ", ".join(sorted((*LOSSES, loss_graph.LOSS)))
        raise InvalidInput(f"unknown loss_fn {loss!r}: known are {known}")
    tokens = [_at(i, _tokens, datum) for i, datum in enumerate(request.data)]
    lengths_S = np.array([len(t) for t in tokens], np.int64)
    for i, length in enumerate(lengths_S):
        if length > max_context_length:
            raise InvalidInput(
                f"datum {i}: {length} tokens are more than the model's {max_context_length}; shorten it"
            )
    tokens_T = np.concatenate(tokens)
    _check_range("model_input", tokens_T, vocab_size, lengths_S)
    targets_TK, widths_S = _targets(request, lengths_S, vocab_size)
    width = targets_TK.shape[1]
    return TrainInput(
        loss=loss,
        forward_only=request.forward_only,
        lengths_S=lengths_S,
        tokens_T=tokens_T,
        targets_TK=targets_TK,
        target_widths_S=widths_S,
        columns=_columns(request, settings, lengths_S, width, widths_S) if custom is None else {},
        echo=settings,
        custom=None if custom is None else CustomInput(custom, _custom_inputs(request, custom, widths_S)),
    )


def write_output(given: TrainInput, output: TrainOutput) -> bytes:
    """The ForwardBackwardOutput of one operation: logprobs in the shape of its targets, and metrics."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    offsets_S = given.offsets_S
    for width, datums in _runs_of_equal(given.target_widths_S):
        rows = slice(int(offsets_S[datums.start]), int(offsets_S[datums.stop]))
        values = np.ascontiguousarray(output.logprobs_TK[rows, : max(width, 1)], np.float32)
        starts = (offsets_S[datums.start : datums.stop + 1] - offsets_S[datums.start]) * max(width, 1) * 4
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=datums.stop - datums.start)
        field = record.fields["logprobs"]
        field.data = values.tobytes()
        field.offsets = starts.astype("<i8").tobytes()
        field.dtype = pb.DTYPE_FLOAT32
        if width:
            field.trailing_shape.append(width)
    for name, value in metrics(given, output).items():
        message.metrics[name] = value
    return message.SerializeToString()


def metrics(given: TrainInput, output: TrainOutput) -> dict[str, float]:
    """What people look at, under names of the form `name:reduction`.

    `kl_sampling` is the mean over trained tokens of q - lp, an estimate of KL(sampling policy || current
    policy) from the sampling policy's own samples (Schulman, "Approximating KL Divergence", estimator k1).
    """
    found = {"loss:sum": float(output.losses_T.sum(dtype=np.float64)), "tokens:sum": float(given.tokens)}
    if given.loss == loss_graph.LOSS:
        datums = {"sum": 1, "mean": len(given.lengths_S)}
        own = {name: value / datums[name.rpartition(":")[2]] for name, value in output.metric_sums.items()}
        return found | own
    if given.loss == "cross_entropy":
        weights = given.columns["weights"]
        found["weights:sum"] = float(weights.sum(dtype=np.float64))
        return found
    trained = given.columns["advantages"] != 0
    found["trained_tokens:sum"] = float(trained.sum())
    log_ratio = (output.logprobs_TK[:, 0].astype(np.float64) - given.columns["logprobs"])[trained]
    if log_ratio.size:
        with np.errstate(over="ignore"):
            found["kl_sampling:mean"] = float(-log_ratio.mean())
            found["ratio:max"] = float(np.exp(log_ratio.max()))
            found["ratio:min"] = float(np.exp(log_ratio.min()))
    for name, value in given.echo.items():
        found[f"{name}:unique"] = value
    return found


def _dense(
    csr: pb.SparseCsr, dtype: "np.dtype[np.generic]", shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    rows, columns = shape
    if rows * columns > _MAX_CELLS:
        raise InvalidInput(f"its shape {[rows, columns]} has more than {_MAX_CELLS} cells")
    crow = _values(csr.crow_indices, np.dtype("<i8")).astype(np.int64)
    column = _values(csr.col_indices, np.dtype("<i8")).astype(np.int64)
    values = _values(csr.values, dtype)
    counts = np.diff(crow)
    # The last: differences of numbers near 2**63 wrap around, and would pass for rising.
    if (
        crow.size != rows + 1
        or crow[0] != 0
        or crow[-1] != values.size
        or (counts < 0).any()
        or crow.max() > values.size
    ):
        raise InvalidInput("crow_indices must hold rows + 1 rising numbers from 0 to the count of values")
    if column.size != values.size or (column.size and not 0 <= column.min() <= column.max() < columns):
        raise InvalidInput("col_indices must hold one column below the tensor's width for every value")
    dense = np.zeros(shape, dtype)
    dense[np.repeat(np.arange(rows), counts), column] = values
    return dense


def _dtype(tensor: pb.Tensor) -> "np.dtype[np.generic]":
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidInput("its dtype must be float32, int64 or int32")
    return dtype


def _values(blob: bytes, dtype: "np.dtype[np.generic]") -> npt.NDArray[np.generic]:
    if len(blob) % dtype.itemsize:
        raise InvalidInput(f"its {len(blob)} bytes are not a whole number of {dtype.name} values")
    return np.frombuffer(blob, dtype)


def _at(index: int, make: Callable[[Given], Made], given: Given, name: str = "") -> Made:
    try:
        return make(given)
    except InvalidInput as error:
        raise InvalidInput(f"datum {index}: {f'`{name}`: ' if name else ''}{error}") from None


def _tokens(datum: pb.Datum) -> npt.NDArray[np.int32]:
    parts = []
    for chunk in datum.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise InvalidInput("this base model takes text only: leave out image and audio chunks")
        parts.append(_values(chunk.encoded_text.tokens, np.dtype("<i4")).astype(np.int32, copy=False))
    if not sum(len(p) for p in parts):
        raise InvalidInput("model_input is empty")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _settings(request: pb.ForwardBackwardRequest) -> dict[str, float]:
    loss = LOSSES[request.loss_fn]
    found = dict(loss.settings)
    given: dict[str, float] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidInput(f"loss_fn_config[{name!r}] must be a number")
        given[name] = value.number
    for name, number in given.items():
        known = loss.aliases.get(name, name)
        if known not in loss.settings:
            raise InvalidInput(
                f"{request.loss_fn} has no setting {name!r}: "
                f"it knows {', '.join(sorted(loss.settings)) or 'none'}"
            )
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise InvalidInput(f"loss_fn_config[{name!r}] must be finite in float32, got {number}")
        found[known] = float(number)
    return found


def _targets(request: pb.ForwardBackwardRequest, lengths_S: Int64, vocab_size: int) -> tuple[Int64, Int64]:
    shapes: list[tuple[int, ...]] = []
    for i, (datum, length) in enumerate(zip(request.data, lengths_S, strict=True)):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise InvalidInput(f"datum {i}: loss_fn_inputs lacks `target_tokens`")
        shape = _at(i, shape_of, datum.loss_fn_inputs["target_tokens"], "target_tokens")
        if shape[0] != length or 0 in shape:
            raise InvalidInput(
                f"datum {i}: `target_tokens` has shape {list(shape)}, but the input has {length} tokens: "
                f"it must be [{length}] or [{length}, K]"
            )
        if len(shape) == 2 and request.loss_fn not in ("cross_entropy", loss_graph.LOSS):
            raise InvalidInput(
                f"datum {i}: {request.loss_fn} takes one target per token, `target_tokens` is 2-D"
            )
        shapes.append(shape)
    widths_S = np.array([shape[1] if len(shape) == 2 else 0 for shape in shapes], np.int64)
    width = max(1, int(widths_S.max()))
    # Looked at before anything is made wide.
    if int(lengths_S.sum()) * width > _MAX_CELLS:
        raise InvalidInput(
            f"{lengths_S.sum()} tokens with up to {width} targets each are more than {_MAX_CELLS} cells: "
            "send fewer datums at a time"
        )
    found = []
    for i, datum in enumerate(request.data):
        targets = _at(i, array, datum.loss_fn_inputs["target_tokens"], "target_tokens")
        if targets.dtype.kind != "i":
            raise InvalidInput(f"datum {i}: `target_tokens` must be integers, got {targets.dtype.name}")
        found.append(targets)
    targets_TK = _stack(found, lengths_S, width, np.dtype(np.int64))
    _check_range("target_tokens", targets_TK, vocab_size, lengths_S)
    return targets_TK, widths_S


def _columns(
    request: pb.ForwardBackwardRequest,
    settings: dict[str, float],
    lengths_S: Int64,
    width: int,
    widths_S: Int64,
) -> dict[str, Float32]:
    loss = LOSSES[request.loss_fn]
    shapes = [(int(n),) for n in lengths_S]
    columns: dict[str, Float32] = {}
    for name in loss.inputs:
        if name == "weights":
            # As wide as the targets. Without weights every target counts once.
            wide = [(int(n), int(k)) if k else (int(n),) for n, k in zip(lengths_S, widths_S, strict=True)]
            columns[name] = _column(request, name, wide, lengths_S, width, default=1.0)
        else:
            columns[name] = _column(request, name, shapes, lengths_S, 1, default=None)[:, 0]
    for name, value in settings.items():
        if name in loss.token_settings and any(name in datum.loss_fn_inputs for datum in request.data):
            columns[name] = _column(request, name, shapes, lengths_S, 1, default=value)[:, 0]
        else:
            columns[name] = np.full(int(lengths_S.sum()), value, np.float32)
    return columns


def _custom_inputs(
    request: pb.ForwardBackwardRequest, loss: loss_graph.LossGraph, widths_S: Int64
) -> tuple[tuple[Array, ...], ...]:
    """What the loss takes of every datum beside logprobs: of any shape, of the rank it was created for."""
    rank = loss.inputs[0][1]
    cells = 0
    for i, (datum, width) in enumerate(zip(request.data, widths_S, strict=True)):
        if rank != (2 if width else 1):
            raise InvalidInput(
                f"datum {i}: `target_tokens` has {2 if width else 1} dimensions, and {loss.name} takes "
                f"logprobs of {rank}"
            )
        for name, rank_of_input in loss.inputs[1:]:
            tensor = datum.loss_fn_inputs.get(name)
            if tensor is None:
                raise InvalidInput(f"datum {i}: {loss.name} needs `{name}` in loss_fn_inputs")
            shape = _at(i, shape_of, tensor, name)
            # One number without a shape is a scalar where one is taken, and a list of one elsewhere.
            is_scalar = not tensor.shape and shape == (1,) and rank_of_input == 0
            if rank_of_input != (0 if is_scalar else len(shape)):
                raise InvalidInput(
                    f"datum {i}: `{name}` has shape {list(shape)}, and {loss.name} takes "
                    f"{rank_of_input} dimensions"
                )
            cells += math.prod(shape)
    if cells > _MAX_CELLS:  # looked at before anything is made dense
        raise InvalidInput(
            f"the inputs of {loss.name} have more than {_MAX_CELLS} cells: send fewer datums at a time"
        )
    return tuple(
        tuple(_custom_input(i, datum.loss_fn_inputs[name], name, rank) for name, rank in loss.inputs[1:])
        for i, datum in enumerate(request.data)
    )


def _custom_input(index: int, tensor: pb.Tensor, name: str, rank: int) -> Array:
    values = _at(index, array, tensor, name)
    return values if rank else values.reshape(())


def _column(
    request: pb.ForwardBackwardRequest,
    name: str,
    shapes: Sequence[tuple[int, ...]],
    lengths_S: Int64,
    width: int,
    *,
    default: float | None,
) -> Float32:
    """[T, width]: input `name` of all datums, each of its shape; `default` where a datum leaves it out."""
    found: list[npt.NDArray[np.generic]] = []
    for i, (datum, shape) in enumerate(zip(request.data, shapes, strict=True)):
        tensor = datum.loss_fn_inputs.get(name)
        if tensor is None:
            if default is None:
                raise InvalidInput(f"datum {i}: {request.loss_fn} needs `{name}` in loss_fn_inputs")
            found.append(np.full(shape, default, np.float32))
            continue
        given = _at(i, shape_of, tensor, name)
        if given != shape:
            raise InvalidInput(
                f"datum {i}: `{name}` has shape {list(given)}, "
                f"it must be {list(shape)} like its target_tokens"
            )
        found.append(_at(i, array, tensor, name))
    column: Float32 = _stack(found, lengths_S, width, np.dtype(np.float32))
    bad = ~np.isfinite(column)
    if bad.any():
        raise InvalidInput(f"datum {_datum_of(bad, lengths_S)}: `{name}` has values that are not finite")
    return column


def _stack(
    parts: list[npt.NDArray[np.generic]], lengths_S: Int64, width: int, dtype: "np.dtype[np.generic]"
) -> npt.NDArray:  # type: ignore[type-arg]
    """[T, width], a narrower part padded with zeros on the right."""
    if width == 1:
        return np.concatenate([p.reshape(-1) for p in parts]).astype(dtype, copy=False).reshape(-1, 1)
    stacked = np.zeros((int(lengths_S.sum()), width), dtype)
    row = 0
    for part in parts:
        values = part.reshape(len(part), -1)
        stacked[row : row + len(values), : values.shape[1]] = values
        row += len(values)
    return stacked


def _check_range(name: str, tokens: npt.NDArray[np.integer[Any]], vocab_size: int, lengths_S: Int64) -> None:
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        worst = tokens[bad].reshape(-1)[0]
        raise InvalidInput(
            f"datum {_datum_of(bad, lengths_S)}: `{name}` holds token {worst}, "
            f"outside the vocabulary 0..{vocab_size - 1}"
        )


def _datum_of(bad: npt.NDArray[np.bool_], lengths_S: Int64) -> int:
    row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
    return int(np.searchsorted(np.cumsum(lengths_S), row, side="right"))


def _runs_of_equal(values: Int64) -> Iterable[tuple[int, slice]]:
    """Stretches of equal neighbours: (value, slice of positions)."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts = [0, *edges.tolist()]
    stops = [*edges.tolist(), len(values)]
    return [(int(values[a]), slice(a, b)) for a, b in zip(starts, stops, strict=True)]
