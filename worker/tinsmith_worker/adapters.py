"""A LoRA adapter: its weights and optimizer state in flat buffers, with a view for every place it acts on.

Shapes: R rank, I inputs and O outputs of a site, P parameters of an adapter (alignment included).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import LORA_ALPHA, AdapterState, LoraSpec
from tinsmith_worker.copies import on_host

Kind = Literal["attn", "mlp", "unembed"]
# By group of sites: the As of its members on top of each other [M * R, I], and every member's B [O, R].
Views = dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
# By group of a mixture's experts: the As of gate, up and down, then the Bs.
ExpertViews = dict[int, tuple[torch.Tensor, ...]]
Layout = tuple[tuple[str, int, tuple[int, ...]], ...]

# Every tensor starts on 64 bytes in float32 and on 32 in bfloat16, as vector loads like it.
ALIGNMENT = 16
# Maps in one group of sites at most: queries, keys and values.
MOST_MEMBERS = 3


@dataclass(frozen=True)
class Site:
    """One linear map of the base that an adapter can act on; `name` is its module path, as in `lm_head`.

    Sites of one `group` follow one another and are given the same input, which is then read once for all.
    Of a mixture's `experts`, a token meets `active`; one matrix is `shared` by all, the other is each one's.
    """

    name: str
    kind: Kind
    inputs: int
    outputs: int
    group: int
    experts: int = 0
    active: int = 1
    shared: Literal["", "A", "B"] = ""

    def rank(self, spec: LoraSpec) -> int:
        return max(1, spec.rank // self.active)

    def shape(self, spec: LoraSpec, matrix: Literal["A", "B"]) -> tuple[int, ...]:
        rank = self.rank(spec)
        shape = (rank, self.inputs) if matrix == "A" else (self.outputs, rank)
        return (1 if self.shared == matrix else self.experts, *shape) if self.experts else shape


def targets(spec: LoraSpec, kind: Kind) -> bool:
    return {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}[kind]


def lay_out(spec: LoraSpec, sites: Sequence[Site]) -> Layout:
    """(name in PEFT's saved form, offset, shape) of every tensor: of each group the As, then the Bs."""
    layout: list[tuple[str, int, tuple[int, ...]]] = []
    offset = 0
    for _, group in itertools.groupby((s for s in sites if targets(spec, s.kind)), key=lambda s: s.group):
        members = list(group)
        matrices: tuple[Literal["A", "B"], ...] = ("A", "B")
        for matrix in matrices:
            for site in members:
                shape = site.shape(spec, matrix)
                layout.append((f"base_model.model.{site.name}.lora_{matrix}.weight", offset, shape))
                offset += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return tuple(layout)


def adapter_elements(spec: LoraSpec, sites: Sequence[Site]) -> int:
    """P, the length of its flat buffers."""
    return elements(lay_out(spec, sites))


def elements(layout: Layout) -> int:
    """The length of a flat buffer that is laid out so."""
    if not layout:
        return 0
    _, offset, shape = layout[-1]
    return -(-(offset + math.prod(shape)) // ALIGNMENT) * ALIGNMENT


class Adapter:
    """One run's adapter, or a sampler's frozen one, on the base's device.

    `weights` are the float32 masters [P]. `compute` is what the base multiplies with: a copy in the base's
    dtype, or the masters themselves when that is float32. `views` are of `compute`, and `places` says where
    in a flat buffer they are: [groups, 1 + MOST_MEMBERS] in ALIGNMENTs, -1 for what it does not act on.
    Gradient and moments are made at first use, so that a frozen adapter costs its weights alone.
    `part_elements` of the moments are brought to the device at once for a step; 0: they lie there.
    """

    part_elements = 0
    config = ""  # AdapterState's

    def __init__(
        self,
        spec: LoraSpec,
        sites: Sequence[Site],
        *,
        device: torch.device,
        dtype: torch.dtype,
        frozen: torch.Tensor | None = None,
    ) -> None:
        """All weights zero; follow with `initialise` or `take`. Or those of `frozen` [P], which are sampled
        and not trained: there are no masters."""
        self.spec = spec
        self.scale = LORA_ALPHA / spec.rank
        self.sites = tuple(site for site in sites if targets(spec, site.kind))
        if not self.sites:
            raise InvalidInput(
                "this adapter would train nothing: set one of train_attn, train_mlp, train_unembed"
            )
        self.layout = lay_out(spec, sites)
        self._open(elements(self.layout), device, dtype, frozen)
        self.views, self.expert_views = self._views(self.compute)
        self.places = np.full((sites[-1].group + 1, 1 + MOST_MEMBERS), -1, np.int64)
        start, unit = self.compute.data_ptr(), ALIGNMENT * self.compute.element_size()
        for number, (A, Bs) in self.views.items():
            found = [(x.data_ptr() - start) // unit for x in (A, *Bs)]
            self.places[number, : len(found)] = found

    def _open(self, size: int, device: torch.device, dtype: torch.dtype, frozen: torch.Tensor | None) -> None:
        if frozen is None:
            self.weights = torch.zeros(size, dtype=torch.float32, device=device)
            self.compute = self.weights if dtype == torch.float32 else self.weights.to(dtype)
        else:
            assert (frozen.shape, frozen.dtype) == ((size,), dtype), (frozen.shape, frozen.dtype)
            self.weights = self.compute = frozen
        self.gradient: torch.Tensor | None = None
        self.gradient_views: Views = {}
        self.expert_gradients: ExpertViews = {}
        self.moment1: torch.Tensor | None = None
        self.moment2: torch.Tensor | None = None
        self.step = 0
        self.has_gradient = False

    def initialise(self) -> None:
        """A as PEFT draws it, uniform in ±1/sqrt(I), B zero. It depends on the seed, not on the device."""
        generator = torch.Generator().manual_seed(short_seed(self.spec.seed))
        for name, offset, shape in self.layout:
            if ".lora_A." in name:
                drawn = torch.empty(shape)
                torch.nn.init.kaiming_uniform_(drawn.view(-1, shape[-1]), a=math.sqrt(5), generator=generator)
                self.weights[offset : offset + drawn.numel()] = drawn.view(-1).to(self.weights.device)
        self.refresh()

    def refresh(self) -> None:
        """Bring `compute` up to date with the masters."""
        if self.compute is not self.weights:
            self.compute.copy_(self.weights)

    def open_gradient(self) -> None:
        """Make the gradient buffer, zero, if there is none yet."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.weights)
            self.gradient_views, self.expert_gradients = self._views(self.gradient)

    def open_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.moment1 is None or self.moment2 is None:
            self.moment1 = self._new_moment()
            self.moment2 = self._new_moment()
        return self.moment1, self.moment2

    def open_momentum(self) -> torch.Tensor:
        """As the first moment, for an optimizer that has no second."""
        if self.moment1 is None:
            self.moment1 = self._new_moment()
        return self.moment1

    def norm_of_all(self, norm: torch.Tensor) -> torch.Tensor:
        """The whole gradient's norm; `norm` is that of the part that lies here, which is all of it."""
        return norm

    def _new_moment(self) -> torch.Tensor:
        return torch.zeros_like(self.weights)

    def clear_gradient(self) -> None:
        if self.gradient is not None:
            self.gradient.zero_()
        self.has_gradient = False

    def tensors_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat buffer [P], one for each entry of the layout."""
        return [flat[offset : offset + math.prod(shape)].view(shape) for _, offset, shape in self.layout]

    def take(self, state: AdapterState, *, optimizer: bool) -> None:
        """Become what `state` says: its weights, and with `optimizer` its moments, step and gradient.

        InvalidInput, with nothing changed, if its tensors are others than this adapter's.
        """
        moves = _moves(state, self.layout, self.weights.numel())
        _fill(self.weights, state.weights, moves)
        self.refresh()
        self.moment1 = self.moment2 = None
        self.step = 0
        self.clear_gradient()
        if not optimizer:
            return
        self.step = state.step
        if state.moment1 is not None:
            _fill(self.open_momentum(), state.moment1, moves)
        if state.moment2 is not None:
            self.moment2 = self._new_moment()
            _fill(self.moment2, state.moment2, moves)
        if state.gradient is not None:
            self.open_gradient()
            assert self.gradient is not None
            _fill(self.gradient, state.gradient, moves)
            self.has_gradient = True

    def flats(self) -> dict[str, torch.Tensor]:
        """The buffers that are to be kept, by their names in `AdapterState`."""
        found = {"weights": self.weights, "moment1": self.moment1, "moment2": self.moment2}
        if self.has_gradient:
            found["gradient"] = self.gradient
        return {name: flat for name, flat in found.items() if flat is not None}

    def state(self) -> AdapterState:
        """A copy of everything in host memory. Waits for the device."""
        return self.state_maker()(**{name: on_host(flat) for name, flat in self.flats().items()})

    def state_maker(self) -> Callable[..., AdapterState]:
        """What makes its state, of this moment, of copies of `flats`."""
        return functools.partial(AdapterState, self.spec, self.layout, step=self.step, config=self.config)

    def expert_scale(self, group: int) -> float:
        return LORA_ALPHA / next(site.rank(self.spec) for site in self.sites if site.group == group)

    def _views(self, flat: torch.Tensor) -> tuple[Views, ExpertViews]:
        views: Views = {}
        of_experts: ExpertViews = {}
        tensors = iter(self.tensors_of(flat))
        for number, group in itertools.groupby(self.sites, key=lambda site: site.group):
            members = list(group)
            As, Bs = ([next(tensors) for _ in members] for _ in "AB")
            if members[0].experts:
                of_experts[number] = (*As, *Bs)
                continue
            rows, inputs = len(members) * self.spec.rank, members[0].inputs
            views[number] = As[0].as_strided((rows, inputs), (inputs, 1)), tuple(Bs)
        return views, of_experts


def short_seed(seed: int) -> int:
    """Torch's generator on the CPU looks at 32 bits of a seed; the upper ones are to count as well."""
    upper, lower = divmod(seed % 2**64, 2**32)
    return (lower + 0x9E3779B1 * upper) % 2**32


_Move = tuple[int, int, int]  # from, to, how many elements


def _moves(state: AdapterState, layout: Layout, size: int) -> list[_Move]:
    """How the buffers of `state` map onto `layout`: in one stroke when both are laid out alike."""
    theirs = {name: (offset, shape) for name, offset, shape in state.tensors}
    ours = {name: shape for name, _, shape in layout}
    if {name: shape for name, (_, shape) in theirs.items()} != ours:
        odd = sorted(set(theirs) ^ set(ours))
        raise InvalidInput(
            f"these weights belong to an adapter of other tensors: {odd[0]} is in one of the two only"
            if odd
            else "these weights belong to an adapter of another rank or another base model"
        )
    if state.tensors == layout and state.weights.size == size:
        return [(0, 0, size)]
    return [(theirs[name][0], offset, math.prod(shape)) for name, offset, shape in layout]


def _fill(target: torch.Tensor, source: npt.NDArray[np.float32], moves: list[_Move]) -> None:
    on_host = torch.tensor(source)
    for start, target_start, count in moves:
        target[target_start : target_start + count].copy_(on_host[start : start + count])
