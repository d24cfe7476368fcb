"""Muon on an adapter's flat buffers: momentum whose every matrix is made orthogonal before it is applied.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", as torch.optim.Muon has it, but
in float32 throughout (torch multiplies in bfloat16). Every tensor of an adapter is a matrix, or one for each
expert of a mixture, so all of it is trained so.

Shapes: S matrices of one form side by side, M rows, N columns.
"""

import math
from collections import defaultdict

import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import MuonParams

# The quintic whose iterates bring singular values near 1 within five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_LEAST_NORM = 1e-7


def trouble(params: MuonParams) -> str:
    """Why such a step would make weights that are no numbers; "" if it would not."""
    if not 0 <= params.momentum < 1:
        return f"momentum is {params.momentum}: it must be at least 0 and below 1"
    largest = torch.finfo(torch.float32).max
    # The step of a matrix is scaled by the root of its form, which is less than 1000 for any that there is.
    if not 0 <= params.learning_rate * 1000 * (1 + abs(params.weight_decay)) < largest:
        return (
            f"learning_rate {params.learning_rate} or weight_decay {params.weight_decay} is too large for "
            "float32: choose smaller ones"
        )
    return ""


def apply(adapter: Adapter, gradient: torch.Tensor, params: MuonParams) -> None:
    """One step on the weights and the momentum; the gradient becomes what was left of it."""
    momentum = adapter.open_momentum()
    momentum.lerp_(gradient, 1 - params.momentum)
    update = gradient.lerp_(momentum, params.momentum) if params.nesterov else momentum
    adapter.weights.mul_(1 - params.learning_rate * params.weight_decay)
    weights, updates = _stacks(adapter, adapter.weights), _stacks(adapter, update)
    alike = defaultdict(list)
    for place, stack_SMN in enumerate(weights):
        alike[tuple(stack_SMN.shape[1:])].append(place)
    for (rows, columns), places in alike.items():
        steps_SMN = orthogonal(torch.cat([updates[place] for place in places]))
        size = params.learning_rate * math.sqrt(max(1.0, rows / columns))
        for place, own_SMN in zip(places, steps_SMN.split([len(weights[p]) for p in places]), strict=True):
            weights[place].sub_(own_SMN, alpha=size)


def _stacks(adapter: Adapter, flat: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor as [S, M, N]: experts have a matrix each."""
    return [tensor.view(-1, *tensor.shape[-2:]) for tensor in adapter.tensors_of(flat)]


def orthogonal(matrices_SMN: torch.Tensor) -> torch.Tensor:
    """Of every U diag(s) Vᵀ nearly U Vᵀ: each s, divided by the root of the sum of their squares, goes five
    times through A s + B s³ + C s⁵. Zero stays zero."""
    norms_S11 = torch.linalg.vector_norm(matrices_SMN, dim=(1, 2), keepdim=True)
    x = matrices_SMN / norms_S11.clamp(min=_LEAST_NORM)
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.mT if is_tall else x
