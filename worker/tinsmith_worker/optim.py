"""Optimizer steps on adapters' flat buffers: AdamW, as torch.optim.AdamW does it tensor by tensor; Muon is in
`muon.py`."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.optim.adamw import adamw

from tinsmith_worker import muon
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdamParams, Answer, Failure, OptimizerParams
from tinsmith_worker.copies import OnTheWay
from tinsmith_worker.packed import triton_kernels


def begin(wanted: Sequence[tuple[Adapter, OptimizerParams]]) -> Answer[list[dict[str, float] | Failure]]:
    """Apply the accumulated gradient (zeros if there is none) of each adapter and clear it.

    Clipping is torch.nn.utils.clip_grad_norm_ over all of an adapter's tensors. The metrics are `grad_norm`
    (before clipping), `optimizer_step` and `learning_rate`: not `step`, for clients merge them into rows of
    their own, which have one. A gradient that is not finite is a Failure: it is cleared,
    everything else of that adapter stays as it was. Parameters that float32 cannot compute with are a Failure
    that leaves the gradient as well. An adapter's steps are counted by `get`: it must have been called before
    the next step and before anybody asks for the adapter's state.
    """
    assert len({id(adapter) for adapter, _ in wanted}) == len(wanted), (
        "an adapter can take one step at a time"
    )
    begun = [(*each, _begin(*each)) for each in wanted]
    del wanted
    on_device = [norm for _, _, norm in begun if isinstance(norm, torch.Tensor)]
    norms = OnTheWay([torch.stack(on_device)] if on_device else [])
    answered: list[dict[str, float] | Failure] = []

    def get() -> list[dict[str, float] | Failure]:
        found = iter([float(norm) for array in norms.arrays() for norm in array] if begun else ())
        answered.extend(
            _finish(adapter, params, next(found)) if isinstance(norm, torch.Tensor) else norm
            for adapter, params, norm in begun
        )
        begun.clear()  # or an adapter that is dropped would keep its memory until somebody else's step
        return answered

    return Answer(get, norms.wait)


def _begin(adapter: Adapter, params: OptimizerParams) -> torch.Tensor | Failure:
    """The gradient's norm, after which everything happens on the device; only the step is not counted yet."""
    trouble = _trouble(params, adapter.step + 1) if isinstance(params, AdamParams) else muon.trouble(params)
    if trouble:
        return Failure(trouble)
    adapter.open_gradient()
    gradient = adapter.gradient
    assert gradient is not None
    adapter.has_gradient = False
    if isinstance(params, AdamParams) and gradient.is_cuda and triton_kernels() is not None:
        norm = adapter.norm_of_all(torch.linalg.vector_norm(gradient))
        _adamw_in_one_kernel(adapter, gradient, norm, params)
        return norm
    # In parts, as float32 sums of millions would be rounded off.
    norm = adapter.norm_of_all(torch.nn.utils.get_total_norm(gradient.split(1 << 16)))
    if torch.isfinite(norm):
        if params.grad_clip_norm > 0:
            gradient.mul_((params.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if isinstance(params, AdamParams):
            _adamw(adapter, gradient, params)
        else:
            muon.apply(adapter, gradient, params)
        adapter.refresh()
    gradient.zero_()
    return norm


def _finish(adapter: Adapter, params: OptimizerParams, grad_norm: float) -> dict[str, float] | Failure:
    if not math.isfinite(grad_norm):
        return Failure(
            f"the gradient is not finite (its norm is {grad_norm}): it was cleared and the weights were left "
            "as they were; look for extreme weights, advantages or logprobs in the batches of this step"
        )
    adapter.step += 1
    return {
        "grad_norm": grad_norm,
        "optimizer_step": float(adapter.step),
        "learning_rate": params.learning_rate,
    }


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
    """Loshchilov and Hutter 2019, algorithm 2, by torch's own fused kernel: one reading of every buffer."""
    for part, moment1, moment2 in _moments(adapter, gradient.device):
        steps = torch.tensor(float(adapter.step), device=gradient.device)
        adamw(
            [adapter.weights[part]], [gradient[part]], [moment1], [moment2], [], [steps], fused=True,
            amsgrad=False, maximize=False, lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2,
            eps=params.eps, weight_decay=params.weight_decay,
        )  # fmt: skip


def _adamw_in_one_kernel(
    adapter: Adapter, gradient: torch.Tensor, norm: torch.Tensor, params: AdamParams
) -> None:
    """`_adamw`, clipping, `refresh` and the cleared gradient: every buffer is read and written once."""
    step = adapter.step + 1
    for part, moment1, moment2 in _moments(adapter, gradient.device):
        triton_kernels().adamw[(-(-moment1.numel() // _BLOCK),)](
            adapter.weights[part], adapter.compute[part], gradient[part], moment1, moment2, norm,
            moment1.numel(), 1 - params.learning_rate * params.weight_decay, params.beta1, params.beta2,
            params.learning_rate / (1 - params.beta1**step), math.sqrt(1 - params.beta2**step), params.eps,
            params.grad_clip_norm,
            HAS_COPY=adapter.compute is not adapter.weights, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip


def _moments(adapter: Adapter, device: torch.device) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Both moments on the device. Where they lie in host memory, part by part: each comes, is used and goes
    back, all behind one another on the device, and nobody waits."""
    moments = adapter.open_moments()
    size = moments[0].numel()
    step = adapter.part_elements or size
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        moment1, moment2 = (moment[part].to(device, non_blocking=True) for moment in moments)
        yield part, moment1, moment2
        for moment, used in zip(moments, (moment1, moment2), strict=True):
            if moment.device != device:
                moment[part].copy_(used, non_blocking=True)


_BLOCK = 1024
