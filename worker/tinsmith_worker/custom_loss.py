"""Custom losses, computed node by node with operations of our own (`tinsmith.wire.loss_graph`).

On the CPU, whatever the base is on: a datum's logprobs are a few thousand numbers, and what was tried there
beforehand (`check`) cannot fail later. Shapes: N tokens of a datum, K targets per token.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Array, CustomInput, Float32, Int64
from tinsmith.wire.loss_graph import FUNCTIONS, METHODS, Constant, LossGraph, Node, Ref

# What all nodes of one datum may hold together: 128 MiB of float32.
_MAX_ELEMENTS = 1 << 25
# What the operations of all datums of a call may read and write together: some seconds of the engine's time.
_MAX_WORK = 1 << 28
# An exponential takes longer than so many multiplications of a matrix product.
_PRODUCTS = 64
# Each takes some microseconds of the engine's time, during which nobody's pass runs.
_MAX_STEPS = 1 << 16
_MAX_PLACES = 16  # of a tuple that is put together of shapes

Evaluated = tuple[torch.Tensor, dict[str, float]]


def check(given: CustomInput, lengths: Int64, widths: Int64) -> None:
    """InvalidInput if the loss of one of these datums cannot be computed, or takes too much. `widths`: as in
    TrainInput. Whether it can does not depend on logprobs, so zeros stand for them here."""
    graph = given.graph
    if len(graph.nodes) * len(lengths) > _MAX_STEPS:
        raise InvalidInput(
            f"the custom loss {graph.name} has {len(graph.nodes)} operations: at most "
            f"{_MAX_STEPS // len(graph.nodes)} datums at a time can be computed with it, not {len(lengths)}"
        )
    forms = [
        (length, width, *(array.shape for array in inputs))
        for length, width, inputs in zip(lengths, widths, given.inputs, strict=True)
    ]
    times = Counter(forms)
    limits = _Limits()
    for number, (length, width, *_) in enumerate(forms):
        if not times[forms[number]]:
            continue
        logprobs = torch.zeros((length, width) if width else (length,), requires_grad=True)
        try:
            limits.begin_datum(1 if graph.reads_values else times.pop(forms[number]))
            _differentiate(graph, logprobs, given.inputs[number], limits)
        except InvalidInput as error:
            raise InvalidInput(f"datum {number}: {error}") from None


def evaluate(given: CustomInput, datum: int, logprobs: Float32) -> tuple[float, Float32, dict[str, float]]:
    """(loss, dL/dlogprobs in their shape, metrics) of one datum."""
    leaf = torch.from_numpy(logprobs.copy()).requires_grad_()
    loss, slope, metrics = _differentiate(given.graph, leaf, given.inputs[datum], None)
    return loss, slope, metrics


class _Limits:
    """What the datums of a call may take, counted before each operation is done."""

    def __init__(self) -> None:
        self._work = 0

    def begin_datum(self, times: int) -> None:
        """One that stands for so many."""
        self._held, self._times = 0, times

    def count(
        self, node: Node, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = [
            value for value in _flat((args, tuple(kwargs.values()))) if isinstance(value, torch.Tensor)
        ]
        if not tensors and node.op == "function" and not node.target.startswith("torch."):
            return
        if any(t.dtype == torch.bool for t in tensors[1:]) and node.target == "operator.getitem":
            size = tensors[0].numel()  # at most; without the values nobody can say more
        else:
            size = sum(
                t.numel() for t in _flat((_shapes_only(call, args, kwargs),)) if isinstance(t, torch.Tensor)
            )
        self._held += size
        if self._held > _MAX_ELEMENTS:
            raise InvalidInput(
                f"it takes more than {_MAX_ELEMENTS} numbers: pair tokens of shorter datums, or fewer"
            )
        work = size + sum(t.numel() for t in tensors)
        if node.target.rsplit(".", 1)[-1] in ("matmul", "mm", "mv", "dot") and tensors[0].ndim:
            work += size * tensors[0].shape[-1] // _PRODUCTS
        self._work += work * self._times
        if self._work > _MAX_WORK:
            raise InvalidInput(
                f"the operations of this call's datums read and write more than {_MAX_WORK} numbers: send "
                "fewer datums at a time, or shorter ones"
            )


def _shapes_only(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    given = {key: _map(meta, value) for key, value in kwargs.items()}
    with torch.no_grad(), torch.device("meta"):
        return call(*(_map(meta, value) for value in args), **given)


def _differentiate(
    graph: LossGraph, logprobs: torch.Tensor, inputs: tuple[Array, ...], limits: _Limits | None
) -> tuple[float, Float32, dict[str, float]]:
    with torch.enable_grad():
        loss, metrics = _forward(graph, logprobs, inputs, limits)
        try:
            (slope,) = torch.autograd.grad(loss, logprobs)
        except RuntimeError as error:
            raise InvalidInput(f"custom loss {graph.name} has no gradient: {_first_line(error)}") from None
    # A slope of zeros may be a tensor that stands for them and has no memory.
    return float(loss.detach()), slope.numpy(force=True), metrics


def _forward(
    graph: LossGraph, logprobs: torch.Tensor, inputs: tuple[Array, ...], limits: _Limits | None
) -> Evaluated:
    own, *others = graph.placeholders
    values: dict[str, Any] = {own: logprobs}
    for name, array in zip(others, inputs, strict=True):
        values[name] = torch.from_numpy(np.array(array))  # a copy, whatever is done to it
    for node in graph.nodes:
        try:
            values[node.name] = _call(node, values, limits)
        except InvalidInput as error:
            raise InvalidInput(f"custom loss {graph.name}, node {node.name!r}: {error}") from None
        except Exception as error:  # whatever torch says of arguments that do not fit
            raise InvalidInput(
                f"custom loss {graph.name}, node {node.name!r}: {_first_line(error)}"
            ) from None
    loss = values[graph.loss]
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
        raise InvalidInput(f"custom loss {graph.name} must return a scalar")
    return loss, {name: _number(graph, name, values[ref]) for name, ref in graph.metrics.items()}


def _call(node: Node, values: dict[str, Any], limits: _Limits | None) -> Any:
    def fill(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value.name]
        return _constant(value) if isinstance(value, Constant) else value

    if node.op == "attribute":
        return _attribute(_map(fill, node.args[0]), node.target)
    args = tuple(_map(fill, value) for value in node.args)
    kwargs = {key: _map(fill, value) for key, value in node.kwargs.items()}
    call = _functions()[node.target] if node.op == "function" else _methods()[node.target]
    if limits is not None:
        limits.count(node, call, args, kwargs)
    return call(*args, **kwargs)


def _attribute(of: Any, name: str) -> Any:
    is_pair = isinstance(of, tuple) and name in ("values", "indices")
    if not isinstance(of, torch.Tensor) and not is_pair:
        raise InvalidInput(f"only a tensor has {name}")
    return getattr(of, name)


def _number(graph: LossGraph, name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise InvalidInput(f"custom loss {graph.name}: the metric {name} must be a scalar")
        return float(value.detach())
    if not isinstance(value, int | float):
        raise InvalidInput(f"custom loss {graph.name}: the metric {name} must be a number")
    return float(value)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name in FUNCTIONS:
        room, _, short = name.rpartition(".")
        match room:
            case "operator":
                found[name] = functools.partial(_python, getattr(operator, short))
            case "math":
                found[name] = functools.partial(_number_only, getattr(math, short))
            case "torch":
                found[name] = getattr(torch, short)
            case "torch.nn.functional":
                found[name] = getattr(F, short)
            case "torch.special":
                found[name] = getattr(torch.special, short)
            case "torch.linalg":
                found[name] = getattr(torch.linalg, short)
    # Without the argument that changes what they are given.
    found["torch.nn.functional.relu"] = lambda input: torch.relu(input)
    found["torch.nn.functional.silu"] = lambda input: F.silu(input)
    found["torch.nn.functional.elu"] = lambda input, alpha=1.0: F.elu(input, alpha)
    found["torch.nn.functional.leaky_relu"] = lambda input, negative_slope=0.01: F.leaky_relu(
        input, negative_slope
    )
    found["torch.nn.functional.hardtanh"] = lambda input, min_val=-1.0, max_val=1.0: F.hardtanh(
        input, min_val, max_val
    )
    # With one argument it would say where something holds: how many places depends on the values.
    found["torch.where"] = lambda condition, input, other: torch.where(condition, input, other)
    assert set(found) == FUNCTIONS
    return found


@functools.cache
def _methods() -> dict[str, Callable[..., Any]]:
    return {name: functools.partial(_method, getattr(torch.Tensor, name)) for name in METHODS}


def _method(call: Callable[..., Any], of: Any, /, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(of, torch.Tensor):
        raise InvalidInput("it is called on what is no tensor")
    return call(of, *args, **kwargs)


def _python(call: Callable[..., Any], *args: Any) -> Any:
    """An operator of Python: between tensors, or on numbers and shapes, which stay small."""
    if any(isinstance(arg, torch.Tensor) for arg in args):
        return call(*args)
    first = args[0] if args else None
    if call is operator.getitem and isinstance(first, tuple | list):
        return call(*args)
    if call is operator.add and all(isinstance(arg, tuple) for arg in args):
        if sum(map(len, args)) > _MAX_PLACES:
            raise InvalidInput(f"a tuple of more than {_MAX_PLACES}")
        return call(*args)
    if call is operator.eq or call is operator.ne:
        return call(*args)
    return _number_only(call, *args)


def _number_only(call: Callable[..., Any], *args: Any) -> Any:
    if not all(isinstance(arg, int | float) for arg in args):
        raise InvalidInput("it takes numbers only")
    if call is operator.pow:
        call = math.pow if abs(args[-1]) > 64 or abs(args[0]) > 2**31 else operator.pow
    result = call(*args)
    if isinstance(result, int) and abs(result) >= 2**63:
        raise InvalidInput("a number is too large")
    return result


def _constant(of: Constant) -> Any:
    return torch.device("cpu") if of.kind == "device" else getattr(torch, of.value)


def _map(do: Callable[[Any], Any], value: Any) -> Any:
    """`do` on every leaf."""
    if isinstance(value, slice):
        return slice(*(_map(do, one) for one in (value.start, value.stop, value.step)))
    if isinstance(value, list):
        return [_map(do, one) for one in value]
    if type(value) is tuple:
        return tuple(_map(do, one) for one in value)
    return do(value)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
