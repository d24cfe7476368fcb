"""AdamW on an adapter's flat buffers, as torch.optim.AdamW does it tensor by tensor."""

import math

import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdamParams, Failure


def step(adapter: Adapter, params: AdamParams) -> dict[str, float] | Failure:
    """Apply the accumulated gradient (zeros if there is none) and clear it.

    Clipping is torch.nn.utils.clip_grad_norm_ over all of the adapter's tensors. The metrics are `grad_norm`
    (before clipping), `step` and `learning_rate`. A gradient that is not finite is a Failure: it is cleared,
    everything else stays as it was. Waits for the device, once.
    """
    if not params.eps > 0:
        return Failure(f"eps is {params.eps}: AdamW needs one above 0, or a zero gradient divides 0 by 0")
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
