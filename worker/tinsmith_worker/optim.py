"""AdamW on an adapter's flat buffers, as torch.optim.AdamW does it tensor by tensor."""

import math

import numpy as np
import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdamParams, Failure


def step(adapter: Adapter, params: AdamParams) -> dict[str, float] | Failure:
    """Apply the accumulated gradient (zeros if there is none) and clear it.

    Clipping is torch.nn.utils.clip_grad_norm_ over all of the adapter's tensors. The metrics are `grad_norm`
    (before clipping), `step` and `learning_rate`. A gradient that is not finite is a Failure: it is cleared,
    everything else stays as it was. Parameters that float32 cannot compute with are a Failure that leaves
    the gradient as well. Waits for the device, once.
    """
    if trouble := _trouble(params, adapter.step + 1):
        return Failure(trouble)
    adapter.open_gradient()
    gradient = adapter.gradient
    assert gradient is not None
    norm = torch.nn.utils.get_total_norm(adapter.tensors_of(gradient))
    grad_norm = norm.item()
    if not math.isfinite(grad_norm):
        adapter.clear_gradient()
        return Failure(
            f"the gradient is not finite (its norm is {grad_norm}): it was cleared and the weights were left "
            "as they were; look for extreme weights, advantages or logprobs in the batches of this step"
        )
    if params.grad_clip_norm > 0:
        gradient.mul_((params.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
    _adamw(adapter, gradient, params)
    adapter.refresh()
    adapter.clear_gradient()
    return {"grad_norm": grad_norm, "step": float(adapter.step), "learning_rate": params.learning_rate}


def _trouble(params: AdamParams, step: int) -> str:
    """Why this step would break off half-way or make weights that are no numbers; "" if it would not."""
    if not 0 < _float32(params.eps) < math.inf:
        return (
            f"eps is {params.eps}, which is {_float32(params.eps)} in float32: AdamW needs one above 0, "
            "or a zero gradient divides 0 by 0"
        )
    for name, beta in (("beta1", params.beta1), ("beta2", params.beta2)):
        if not (0 <= beta < 1):
            return f"{name} is {beta}: it must be at least 0 and below 1"
    if not math.isfinite(_float32(params.learning_rate / (1 - params.beta1**step))):
        return (
            f"learning_rate {params.learning_rate} makes a step too large for float32: choose a smaller one"
        )
    if not math.isfinite(_float32(1 - params.learning_rate * params.weight_decay)):
        return (
            f"learning_rate {params.learning_rate} times weight_decay {params.weight_decay} is too large for "
            "float32: choose smaller ones"
        )
    return ""


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _adamw(adapter: Adapter, gradient: torch.Tensor, params: AdamParams) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in torch's operations and order: the same bits."""
    moment1, moment2 = adapter.open_moments()
    adapter.step += 1
    adapter.weights.mul_(1 - params.learning_rate * params.weight_decay)
    moment1.lerp_(gradient, 1 - params.beta1)
    moment2.mul_(params.beta2).addcmul_(gradient, gradient, value=1 - params.beta2)
    step_size = params.learning_rate / (1 - params.beta1**adapter.step)
    root_of_correction2 = math.sqrt(1 - params.beta2**adapter.step)
    denominator = (moment2.sqrt() / root_of_correction2).add_(params.eps)
    adapter.weights.addcdiv_(moment1, denominator, value=-step_size)
