"""A single-tenant worker's model of which every rank holds some rows: of weights, gradient and moments alike.

Layers are gathered when they run, and their gradients summed over the ranks as they are ready (PyTorch's
FSDP2). The embeddings and the last norm are whole on every rank, in the base's dtype; what they are trained
with is cut as the layers are.

Shapes: P elements of a rank's part, V vocabulary, D hidden.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Float32
from tinsmith_worker.adapters import Adapter, Layout, elements
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import AdapterState, LoraSpec
from tinsmith_worker.in_pieces import FLATS, tensors_of
from tinsmith_worker.lora import Deltas
from tinsmith_worker.model import Base
from tinsmith_worker.parallel.group import Group, all_or_none
from tinsmith_worker.parallel.shard import IDLE_ROWS, ShardedBase
from tinsmith_worker.stream import Stream
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.weights import Form, Tuned, lay_out

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class CutForm(Form):
    """`initial` are this rank's rows, as many on every rank: behind a tensor's last row there are zeros,
    which stay zero. `shapes`: those of the whole tensors."""

    shapes: tuple[tuple[int, ...], ...] = ()

    @functools.cached_property
    def whole_layout(self) -> Layout:
        """As the files have it, and a process that holds all."""
        return lay_out(self.names, self.shapes)

    @functools.cached_property
    def layout(self) -> Layout:
        return lay_out(self.names, [tensor.shape for tensor in self.initial])


class Counterparts:
    """What all ranks have of the same thing, under one number: they are added in one order everywhere. On the
    leader a thing lives as long as somebody holds it, and on the others until they are told of its end."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._count = 0
        self._gone: list[int] = []
        self._things: dict[int, Any] = {}

    def __getitem__(self, number: int) -> Any:
        return self._things[number]

    def add(self, thing: Any, mark: Any = None) -> int:
        """Its number. `mark`: what lives as long as it, on the leader; itself, if nothing else does."""
        self._count += 1
        if self._group.leads:
            weakref.finalize(thing if mark is None else mark, self._gone.append, self._count)
        else:
            self._things[self._count] = thing
        return self._count

    def bury(self) -> None:
        """Of the leader: have the others forget what it has forgotten."""
        gone, self._gone[:] = list(self._gone), []
        if gone:
            self._group.tell("forget", gone)

    def forget(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._things[number]


class Shards(Tuned):
    """A rank's rows of one run's weights, or of a sampler's frozen ones, which lie in the host's memory.
    `number`: of its counterparts. `whole_gradients`: where the gradients of parameters that every rank has
    whole are added up until they are dealt out."""

    number = 0

    def __init__(
        self,
        form: CutForm,
        device: torch.device,
        frozen: torch.Tensor | None,
        group: Group,
        whole_gradients: dict[int, torch.Tensor],
        *,
        reserve_bytes: int,
    ) -> None:
        super().__init__(form, device, frozen, reserve_bytes=reserve_bytes)
        self._group = group
        self._whole_gradients = whole_gradients

    def open_gradient(self) -> None:
        super().open_gradient()
        for number, gradient in self._whole_gradients.items():
            self.gradients[number] = gradient

    def norm_of_all(self, norm: torch.Tensor) -> torch.Tensor:
        squares = norm.double().square()
        self._group.sum_up(squares)
        return squares.sqrt().to(norm.dtype)


class ShardedTunedBase(TunedBase, ShardedBase):
    """All ranks make it together, `become` and train together; the leader samples, and the others are told to
    accompany it. Trains all weights and nothing else."""

    def _take_over(self, model: Any, architecture: str, tokenizer: str) -> None:
        self._is_ready = False
        super()._take_over(model, architecture, tokenizer)
        self._whole: CutForm = _cut(self._whole, self._all, self._group)
        self.counterparts = Counterparts(self._group)
        # Of parameters that are whole here: [ranks * rows, ...], so that they can be dealt out.
        self._dealt = {
            number: torch.zeros(
                self._group.ranks * len(self._whole.initial[number]), *parameter.shape[1:], device=self.device
            )
            for number, parameter in enumerate(self._all)
            if not isinstance(parameter, DTensor)
        }
        for number, parameter in enumerate(self._all):
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(self._take_gradient(number))
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                # A run's gradient is the sum over its tokens, wherever they were.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.accompanied: Shards | None = None  # whose weights the next `accompany` is with
        self._is_stale = False
        self._is_ready = True

    def form_of(self, spec: LoraSpec) -> Form:
        if spec.method != "full":
            raise InvalidInput(
                f"this worker's base is cut among several processes, which train all of its weights: method "
                f"{spec.method!r} needs a worker with parallel none"
            )
        return self._whole

    def blank_adapter(
        self, spec: LoraSpec, *, device: torch.device | None = None, frozen: torch.Tensor | None = None
    ) -> Shards:
        """All ranks make it together."""
        self.form_of(spec)
        whole_gradients = {n: g[: len(self._all[n])] for n, g in self._dealt.items()}
        made = Shards(
            self._whole,
            device or self.device,
            frozen,
            self._group,
            whole_gradients,
            reserve_bytes=self.reserve_bytes,
        )
        made.number = self.counterparts.add(made)
        return made

    def _rehearse(self) -> None:
        """Together: nobody goes on with layers as they are while others make passes over programs."""
        with all_or_none():
            super()._rehearse()

    def _enter_form(self, form: Form | None) -> None:
        """There is one, and it is always trained."""

    def _leave_form(self) -> None:
        """There is no other."""

    # -- passes --------------------------------------------------------------------------------------------

    def forward(
        self, stream: Stream, acting: dict[Any, Deltas] | None = None, *, only_forward: bool = False
    ) -> torch.Tensor:
        adapters = {id(segment.adapter): segment.adapter for segment in stream.segments}
        assert len(adapters) == 1, "a pass of a single-tenant worker is one run's"
        (adapter,) = adapters.values()
        assert adapter is None or isinstance(adapter, Shards)
        if isinstance(stream.attention, CausalSequences):
            return self._together(stream, adapter, only_forward=only_forward)
        self.counterparts.bury()
        self._group.tell("accompany", adapter.number if adapter else 0)
        with all_or_none():
            return self._together(stream, adapter, only_forward=only_forward)

    def _together(self, stream: Stream, adapter: Shards | None, *, only_forward: bool) -> torch.Tensor:
        if self._is_ready:
            self._become(adapter)
        if adapter is not None and torch.is_grad_enabled():
            self._look_up_activations(adapter)
        return Base.forward(self, stream, only_forward=only_forward)

    def accompany(self, *, train: bool) -> None:
        """A pass over nothing that counts, with the weights that the others compute with."""
        rows_T = torch.arange(IDLE_ROWS, device=self.device)
        attention = CausalSequences(np.array([IDLE_ROWS]), is_deterministic=self.is_deterministic)
        stream = Stream(torch.zeros_like(rows_T), rows_T, (), attention)
        with torch.set_grad_enabled(train):
            hidden_TD = self._together(stream, self.accompanied, only_forward=not train)
        if train:
            self.backward(hidden_TD, torch.zeros_like(hidden_TD))

    def backward(self, hidden_TD: torch.Tensor, gradient_TD: torch.Tensor) -> None:
        super().backward(hidden_TD, gradient_TD)
        assert self._active is not None
        assert self._active.gradient is not None
        own = self._active.tensors_of(self._active.gradient)
        for number, gradient in self._dealt.items():
            part = torch.empty_like(own[number])
            self._group.sum_and_deal(part, gradient)
            own[number].add_(part)
            gradient.zero_()

    @property
    def form(self) -> CutForm:
        """Of all runs."""
        return self._whole

    def release(self, adapter: Adapter | None) -> None:
        if adapter is not None and adapter is self._active:
            self._active, self._is_stale = None, True

    def weights_changed(self) -> None:
        """Of the run that computed last: what the model has is out of date."""
        self._is_stale = True

    @torch.no_grad()
    def _become(self, adapter: Tuned | None) -> None:
        if adapter is self._active and not self._is_stale:
            return
        views = adapter.tensors_of(adapter.compute) if adapter else list(self._whole.initial)
        for parameter, view in zip(self._all, views, strict=True):
            if isinstance(parameter, DTensor):
                own = parameter.to_local()
                own.copy_(view[: len(own)])
                continue
            shape = self._group.ranks * len(view), *view.shape[1:]
            rows = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._group.gather(rows, view.to(self.device))
            parameter.copy_(rows[: len(parameter)])
        self._active, self._is_stale = adapter, False

    def _take_gradient(self, number: int) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            gradient: Any = parameter.grad
            if self._active is not None:
                own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                self._active.gradients[number][: len(own)].add_(own)
            parameter.grad = None

        return take

    # -- states --------------------------------------------------------------------------------------------

    def adapter_of(
        self, state: AdapterState, *, optimizer: bool = False, device: torch.device | None = None
    ) -> Shards:
        """Of the leader: the others get theirs, row by row. With a `device`, which is the host then, it is
        there to be sampled."""
        self._places(state)  # or nothing of it begins
        self.counterparts.bury()
        self._group.tell("open", state.spec, device is not None)
        made = self.open(state.spec, device is not None)
        self.take(made, state, optimizer=optimizer)
        return made

    def open(self, spec: LoraSpec, is_sampled: bool) -> Shards:
        if not is_sampled:
            return self.blank_adapter(spec)
        frozen = torch.zeros(elements(self._whole.layout), dtype=self.dtype)
        return self.blank_adapter(spec, device=_CPU, frozen=frozen)

    def take(self, adapter: Shards, state: AdapterState, *, optimizer: bool) -> None:
        """Of the leader: all ranks' rows of it become those of `state`. InvalidInput, with nothing changed,
        if its tensors are others than this base's."""
        places = self._places(state)
        self.counterparts.bury()
        flats = [flat for flat in FLATS if getattr(state, flat) is not None]
        flats = flats if optimizer else ["weights"]
        step = state.step if optimizer else 0
        self._group.tell("clear", adapter.number, flats, step)
        self.clear(adapter, flats, step)
        for flat, number, values in tensors_of(state, flats):
            self._group.tell("fill", adapter.number, flat, places[number])
            self.fill(adapter, flat, places[number], values)
        self._group.tell("filled", adapter.number)
        adapter.refresh()

    def clear(self, adapter: Shards, flats: list[str], step: int) -> None:
        adapter.moment1 = adapter.moment2 = None
        adapter.clear_gradient()
        adapter.step = step
        if "moment2" in flats:
            adapter.open_moments()
        elif "moment1" in flats:
            adapter.open_momentum()
        if "gradient" in flats:
            adapter.open_gradient()
            adapter.has_gradient = True
        self.weights_changed()

    def fill(self, adapter: Shards, flat: str, number: int, values: Float32 | None = None) -> None:
        """Take this rank's rows of a tensor that the leader has: the leader's `values`."""
        target = adapter.tensors_of(getattr(adapter, flat))[number]
        rows = torch.empty(target.shape, dtype=torch.float32)
        with all_or_none():
            self._group.deal(rows, None if values is None else torch.from_numpy(values))
        target.copy_(rows)

    def _places(self, state: AdapterState) -> list[int]:
        """Where each tensor of `state` is in this base's order."""
        theirs = {name: shape for name, _, shape in state.tensors}
        ours = {name: shape for name, _, shape in self._whole.whole_layout}
        if theirs != ours:
            odd = sorted(set(theirs) ^ set(ours))
            raise InvalidInput(
                f"these weights belong to a model of other tensors: {odd[0]} is in one of the two only"
                if odd
                else "these weights belong to another base model: their shapes are not this one's"
            )
        at = {name: number for number, (name, _, _) in enumerate(self._whole.whole_layout)}
        return [at[name] for name, _, _ in state.tensors]


def _cut(form: Form, parameters: tuple[nn.Parameter, ...], group: Group) -> CutForm:
    rows = tuple(_own_rows(parameter, group) for parameter in parameters)
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    return CutForm(form.spec, form.names, rows, form.config, form.unembedding, shapes)


def _own_rows(parameter: Any, group: Group) -> torch.Tensor:
    """A copy in host memory, filled up with zeros."""
    each = -(-parameter.shape[0] // group.ranks)
    if isinstance(parameter, DTensor):
        own = parameter.to_local()
    else:
        own = parameter.data[group.rank * each : (group.rank + 1) * each]
    padded = torch.zeros(each, *parameter.shape[1:], dtype=parameter.dtype)
    padded[: len(own)] = own.detach().to(_CPU)
    return padded
