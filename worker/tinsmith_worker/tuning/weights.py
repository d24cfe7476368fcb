"""What a single-tenant run trains, in flat buffers as an adapter has them: any parameters of a model.

Shapes: P elements, V vocabulary, D hidden.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinsmith_worker.adapters import ALIGNMENT, MOST_MEMBERS, Adapter, Layout, elements
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.copies import free_bytes

# Of moments in host memory, what is on the device at once: 256 MB of each.
_PART = 1 << 26


@dataclass(frozen=True, eq=False)
class Form:
    """The parameters that runs of this spec train, by their names in the files, and what they are before the
    first step; `config`: JSON that others want beside such files. `unembedding`: where among them the output
    embedding's weight and bias are, -1 for what is not trained."""

    spec: LoraSpec
    names: tuple[str, ...]
    initial: tuple[torch.Tensor, ...]
    config: str
    unembedding: tuple[int, int] = (-1, -1)

    @property
    def layout(self) -> Layout:
        return lay_out(self.names, [tensor.shape for tensor in self.initial])

    @property
    def dtype(self) -> torch.dtype:
        return self.initial[0].dtype


def lay_out(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Layout:
    layout, offset = [], 0
    for name, shape in zip(names, shapes, strict=True):
        layout.append((name, offset, tuple(shape)))
        offset += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return tuple(layout)


class Tuned(Adapter):
    """One run's weights, or a sampler's frozen ones. `weights`, `compute`, gradient and moments are as an
    Adapter's, but it acts nowhere beside the base: the model's parameters become views of `compute`.

    Moments for which a GPU has no room, beside `reserve_bytes` for passes, lie in the host's memory."""

    def __init__(
        self,
        form: Form,
        device: torch.device,
        frozen: torch.Tensor | None = None,
        *,
        reserve_bytes: int = 0,
    ) -> None:
        self._reserve_bytes = reserve_bytes
        self.spec, self.form, self.config = form.spec, form, form.config
        self.scale, self.sites = 1.0, ()
        self.layout = form.layout
        self._open(elements(self.layout), device, form.dtype, frozen)
        self.views, self.expert_views = {}, {}
        self.places = np.full((1, 1 + MOST_MEMBERS), -1, np.int64)

    def initialise(self) -> None:
        for target, initial in zip(self.tensors_of(self.weights), self.form.initial, strict=True):
            target.copy_(initial)
        self.refresh()

    def open_gradient(self) -> None:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weights)
            self.gradients = self.tensors_of(self.gradient)

    def _new_moment(self) -> torch.Tensor:
        if self.weights.is_cuda and not self._has_room():
            self.part_elements = _PART
            return torch.zeros(self.weights.shape, dtype=torch.float32, pin_memory=True)
        return super()._new_moment()

    def _has_room(self) -> bool:
        """For what is still to be made of gradient and moments. Both moments are made at once, or it was the
        same when the first was."""
        if self.moment1 is not None:
            return self.moment1.is_cuda
        device, size = self.weights.device, 4 * self.weights.numel()
        needed = size * (2 if self.gradient is not None else 3) + self._reserve_bytes
        return free_bytes(device) >= needed
