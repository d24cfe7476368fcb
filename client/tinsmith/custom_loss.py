"""Losses of one's own: computed here from the service's logprobs, and sent back as a gradient."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith.types import Array, CustomLossInputRank, Datum, TensorData

CustomLoss = Callable[[Sequence[Datum], list[Any]], tuple[Any, ...]]
PerDatumLossFn = Callable[..., tuple[Any, Mapping[str, Any]]]
Differentiated = tuple[float, list[Array], dict[str, float]]


@dataclass(frozen=True)
class LossHandle:
    """A loss of one datum: `fn(logprobs, *inputs)` returns a scalar tensor and metrics, whose names end in
    `:sum` or `:mean`. `inputs` names what it reads of `loss_fn_inputs`, each with its rank."""

    name: str
    fn: PerDatumLossFn
    inputs: Mapping[str, CustomLossInputRank]

    def __call__(self, data: Sequence[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        losses, metrics = [], []
        for index, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            taken = [self._input(index, datum, name) for name in self.inputs if name != "logprobs"]
            loss, measured = self.fn(own, *taken)
            losses.append(loss)
            metrics.append({name: _number(value) for name, value in measured.items()})
        return sum(losses), {
            name: math.fsum(m[name] for m in metrics) / (len(metrics) if name.endswith(":mean") else 1)
            for name in metrics[0]
        }

    def _input(self, index: int, datum: Datum, name: str) -> Any:
        tensor = datum.loss_fn_inputs.get(name)
        if tensor is None:
            raise InvalidInput(f"datum {index} has no {name!r} in loss_fn_inputs, which {self.name} reads")
        if len(tensor.shape) != self.inputs[name]:
            raise InvalidInput(
                f"datum {index}: {name!r} has rank {len(tensor.shape)}, "
                f"{self.name} takes rank {self.inputs[name]}"
            )
        return tensor.to_torch()


def _number(value: Any) -> float:
    return float(value.detach() if hasattr(value, "detach") else value)


def for_logprobs(datum: Datum) -> Datum:
    """What is asked first: the targets' logprobs, under a loss that any service knows."""
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise InvalidInput("a custom loss needs `target_tokens` in every datum's loss_fn_inputs")
    weights = datum.loss_fn_inputs.get("weights", TensorData(np.zeros(targets.shape, np.float32)))
    return replace(datum, loss_fn_inputs={"target_tokens": targets, "weights": weights})


def for_gradient(datum: Datum, gradient: Array) -> Datum:
    """The cross entropy of weights -dC/dlogprob has the gradient of C."""
    weights = TensorData(-np.asarray(gradient, np.float32))
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weights}
    return replace(datum, loss_fn_inputs=inputs)


def differentiate_torch(loss_fn: CustomLoss, data: Sequence[Datum], logprobs: list[Array]) -> Differentiated:
    import torch

    leaves = [torch.from_numpy(values.copy()).requires_grad_() for values in logprobs]
    loss, metrics = loss_fn(data, leaves)
    loss.sum().backward()
    zero = [np.zeros_like(values) for values in logprobs]
    gradients = [z if leaf.grad is None else leaf.grad.numpy() for z, leaf in zip(zero, leaves, strict=True)]
    return float(loss.detach().sum()), gradients, metrics


def differentiate_numpy(loss_fn: CustomLoss, data: Sequence[Datum], logprobs: list[Array]) -> Differentiated:
    loss, gradients, metrics = loss_fn(data, logprobs)
    shapes = [np.shape(gradient) for gradient in gradients], [values.shape for values in logprobs]
    if shapes[0] != shapes[1]:
        raise InvalidInput(
            f"a custom loss gives one gradient per datum, of the shape of its logprobs: {shapes[1]}, "
            f"and not {shapes[0]}"
        )
    return float(loss), gradients, metrics
