"""The base's linear maps with many adapters added to them, each on its own rows of the stream.

y = x Wᵀ + b + (32 / R) (x Aᵀ) Bᵀ, and backward straight into the adapters' float32 gradient buffers.

Maps that are given the same input (queries, keys and values; gate and up) are one group, computed in one go:
their adapters read the input once, and its gradient is written once.

Shapes: T packed tokens, N rows of one segment, I inputs, O outputs, R rank, M members of a group, G adapters.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import library, nn

from tinsmith_worker.activations import Keeping
from tinsmith_worker.adapters import MOST_MEMBERS, Adapter, Kind, targets
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.four_bit import whole_weight
from tinsmith_worker.packed import Packed, Rows
from tinsmith_worker.stream import Attention, Segment


class Deltas(Protocol):
    """A group's maps with what the adapters of a pass add to them. Loop and Packed compute the same."""

    def forward(self, group: "Group", x_TI: torch.Tensor) -> list[torch.Tensor]:
        """[T, O] of every member."""
        ...

    def backward(self, group: "Group", x_TI: torch.Tensor, dys_TO: Sequence[torch.Tensor]) -> torch.Tensor:
        """Accumulate dA and dB in the adapters; [T, I] dL/dx."""
        ...


@dataclass(frozen=True)
class Band:
    """Neighbouring segments of one rank: `lengths` of each, from `start` on."""

    start: int
    lengths: list[int]
    adapters: list[Adapter]

    @property
    def spec(self) -> LoraSpec:
        return self.adapters[0].spec

    def of(self, x_TC: torch.Tensor) -> torch.Tensor:
        return x_TC.narrow(0, self.start, sum(self.lengths))


def bands(segments: Sequence[Segment], *, apart: bool) -> list[Band]:
    """`apart`: every segment by itself."""
    found: list[Band] = []
    stop = -1
    for s in segments:
        if s.adapter is None:
            continue
        if apart or s.start != stop or s.adapter.spec.rank != found[-1].spec.rank:
            found.append(Band(s.start, [], []))
        found[-1].lengths.append(s.stop - s.start)
        found[-1].adapters.append(s.adapter)
        stop = s.stop
    return found


class Loop:
    """One segment after the other in plain torch; none at all is the base alone.

    What can be done once for all segments of a rank is: with many small ones, a step is the number of calls.

    `block`: rows of one product with the base, all of them unless given. A CPU's library chooses its kernel,
    and with it the bits, by the number of rows: 64 rows of 896 were added up otherwise than 128 (oneMKL on a
    Xeon of the fourth generation). Blocks of one size do not know how many there are. Nor does a segment know
    of others then: its rows lie where they would lie without them.
    """

    def __init__(self, segments: Sequence[Segment], *, train: bool, block: int | None = None) -> None:
        self._bands = bands(segments, apart=block is not None)
        self._train = train
        self._block = block
        self._shrunk: dict[int, list[torch.Tensor]] = {}  # by group, from forward to backward

    def forward(self, group: "Group", x_TI: torch.Tensor) -> list[torch.Tensor]:
        ys, shrunk = self._base_forward(group, x_TI), []
        for band in self._bands:
            views = [adapter.views[group.number] for adapter in band.adapters]
            x_NI, rank = band.of(x_TI), band.spec.rank
            u_NX = x_NI.new_empty(len(x_NI), rank * len(group.members))
            for x, u, (A, _) in zip(x_NI.split(band.lengths), u_NX.split(band.lengths), views, strict=True):
                torch.mm(x, A.T, out=u)
            u_NX.mul_(band.adapters[0].scale)
            for member, (y_TO, u_NR) in enumerate(zip(ys, u_NX.split(rank, 1), strict=True)):
                of_segments = zip(
                    band.of(y_TO).split(band.lengths), u_NR.split(band.lengths), views, strict=True
                )
                for y, u, (_, Bs) in of_segments:
                    y.addmm_(u, Bs[member].T)
            shrunk.append(u_NX)
        if self._train:
            self._shrunk[group.number] = shrunk
        return ys

    def backward(self, group: "Group", x_TI: torch.Tensor, dys_TO: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = [weight_OI for _, weight_OI in group.weights()]
        dx_TI = join(
            [self._base_backward(weights, dys) for dys in zip(*map(self._blocks, dys_TO), strict=True)]
        )
        for band, u_NX in zip(self._bands, self._shrunk.pop(group.number, ()), strict=True):
            views = [adapter.views[group.number] for adapter in band.adapters]
            gradients = [adapter.gradient_views[group.number] for adapter in band.adapters]
            du_NX, lengths, rank = torch.empty_like(u_NX), band.lengths, band.spec.rank
            for member, (dy_TO, du_NR, u_NR) in enumerate(
                zip(dys_TO, du_NX.split(rank, 1), u_NX.split(rank, 1), strict=True)
            ):
                dys = band.of(dy_TO).split(lengths)
                for dy, du, (_, Bs) in zip(dys, du_NR.split(lengths), views, strict=True):
                    torch.mm(dy, Bs[member], out=du)
                for dy, u, (_, gradient_Bs) in zip(dys, u_NR.split(lengths), gradients, strict=True):
                    accumulate(gradient_Bs[member], dy.T, u)
            du_NX.mul_(band.adapters[0].scale)
            of_segments = zip(
                du_NX.split(lengths), band.of(x_TI).split(lengths), band.of(dx_TI).split(lengths),
                views, gradients, strict=True,
            )  # fmt: skip
            for du, x, dx, (A, _), (gradient_A, _) in of_segments:
                accumulate(gradient_A, du.T, x)
                dx.addmm_(du, A)
        return dx_TI

    def _blocks(self, of_TX: torch.Tensor) -> Sequence[torch.Tensor]:
        return of_TX.split(self._block) if self._block else (of_TX,)

    def _base_forward(self, group: "Group", x_TI: torch.Tensor) -> list[torch.Tensor]:
        return [
            join([F.linear(rows_NI, weight_OI, member.bias) for rows_NI in self._blocks(x_TI)])
            for member, weight_OI in group.weights()
        ]

    def _base_backward(self, weights: Sequence[torch.Tensor], dys_NO: Sequence[torch.Tensor]) -> torch.Tensor:
        dx_NI = torch.mm(dys_NO[0], weights[0])
        for weight_OI, dy_NO in zip(weights[1:], dys_NO[1:], strict=True):
            dx_NI.addmm_(dy_NO, weight_OI)
        return dx_NI


def join(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def accumulate(gradient: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """gradient += left @ right, the sum in float32."""
    if left.dtype == gradient.dtype:
        gradient.addmm_(left, right)
    else:
        gradient.add_(left @ right)


def deltas(
    segments: Sequence[Segment],
    rows: int,
    device: torch.device,
    *,
    kernels: bool,
    train: bool,
    block: int | None = None,
) -> dict[Kind, Deltas]:
    """How the adapters of a pass act on either kind of group. `kernels`: through
    Triton's; `block`: as in Loop."""
    shared: dict[tuple[int, ...], Rows] = {}
    found: dict[Kind, Deltas] = {}
    for kind in ("attn", "mlp"):
        acting = [s for s in segments if s.adapter is not None and targets(s.adapter.spec, kind)]
        if not kernels or not acting:
            found[kind] = Loop(acting, train=train, block=block)
            continue
        which = tuple(s.start for s in acting)
        if which not in shared:
            shared[which] = Rows(acting, rows, device, train=train)
        found[kind] = Packed(shared[which], train=train)
    return found


@dataclass
class Pass:
    """What the base's modules need to know of the stream under way."""

    attention: Attention
    deltas: dict[Kind, Deltas]
    train: bool
    may_compile: bool = False
    keeping: Keeping = field(default_factory=Keeping)
    segments: tuple[Segment, ...] = ()
    separate: bool = False  # whether a segment's bits must not depend on what shares the pass
    make: Callable[[Sequence[Segment], int], dict[Kind, Deltas]] | None = None  # of segments, and rows in all
    of_segments: dict[int, dict[Kind, Deltas]] = field(default_factory=dict)
    kept: dict[int, Any] = field(default_factory=dict)  # what an attention layer's backward wants, by its key

    def alone(self, segment: Segment) -> dict[Kind, Deltas]:
        """`deltas` of this segment, as if no other shared the pass."""
        if segment.start not in self.of_segments:
            assert self.make is not None
            rows = segment.stop - segment.start
            self.of_segments[segment.start] = self.make([Segment(0, rows, segment.adapter)], rows)
        return self.of_segments[segment.start]


class Current:
    """Where the base's modules find the pass under way; `now` is None between passes."""

    now: Pass | None = None
    joined = False  # whether a group's outputs are wanted side by side, as a sampler's step does


class Group:
    """Linear maps that are given the same input, one after the other, as one map.

    `number` is where adapters find their matrices, `key` how an operator of a compiled layer finds this.
    """

    def __init__(self, number: int, linears: Sequence[nn.Linear], kind: Kind, current: Current) -> None:
        self.number = number
        self.kind = kind
        self.inputs = linears[0].in_features
        self.members = tuple(LoraLinear(linear, self, place) for place, linear in enumerate(linears))
        self.current = current
        self.key = register(self)
        self.outputs: tuple[torch.Tensor, ...] = ()  # of the members that have not been asked yet
        self.weight: torch.Tensor | None = None  # all members' side by side, once they are joined
        self.bias: torch.Tensor | None = None

    def join(self, *, transposed: bool) -> None:
        """Lay the members' weights side by side, for one product instead of several; theirs become views.

        `transposed`: as [I, O] in memory, which a CPU's library need not pack anew for every product: of 64
        rows it is a fifth faster.
        """
        biases: list[torch.Tensor] = [m.bias for m in self.members if m.bias is not None]
        if self.weight is not None or len(biases) not in (0, len(self.members)):
            return
        widths = [m.out_features for m in self.members]
        if transposed:
            self.weight = torch.cat([m.weight.T for m in self.members], 1).T
        elif len(widths) > 1:
            self.weight = torch.cat([m.weight for m in self.members])
        else:
            self.weight = self.members[0].weight
        self.bias = torch.cat(biases) if biases else None
        for member, weight in zip(self.members, self.weight.split(widths), strict=True):
            member._linear[0].weight = nn.Parameter(weight, requires_grad=False)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., I] to [..., O] of every member; outside of a pass the base alone."""
        x_TI = x.reshape(-1, self.inputs)
        if torch.compiler.is_compiling():
            widths = [m.out_features for m in self.members] + [0] * (MOST_MEMBERS - len(self.members))
            if self.current.joined:
                y = group_joined(x_TI, self.key, sum(widths))
                ys = y.split(widths[: len(self.members)], 1)
            else:
                ys = group_forward(x_TI, self.key, *widths)[: len(self.members)]
        elif self.current.now is None:
            ys = tuple(F.linear(x_TI, m.weight, m.bias) for m in self.members)
        elif not torch.is_grad_enabled():
            ys = tuple(self.deltas.forward(self, x_TI))
        else:
            ys = _Apply.apply(x_TI, self, self.current.now.deltas[self.kind])
        return tuple(y.view(*x.shape[:-1], m.out_features) for y, m in zip(ys, self.members, strict=True))

    def weights(self) -> list[tuple["LoraLinear", torch.Tensor]]:
        """Every member with its weight [O, I], whole: of a base in four bits it is made for this call."""
        return [(member, member.weight) for member in self.members]

    @property
    def deltas(self) -> Deltas:
        assert self.current.now is not None
        return self.current.now.deltas[self.kind]


class LoraLinear(nn.Module):
    """An nn.Linear of the base. The first of its group computes for all; they are called in order."""

    def __init__(self, linear: nn.Linear, group: Group, place: int) -> None:
        super().__init__()
        # No child of this module: who shards the base exchanges the weights of the linear that it found.
        self._linear = (linear,)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group = group
        self._place = place

    @property
    def weight(self) -> torch.Tensor:
        return whole_weight(self._linear[0])

    @property
    def bias(self) -> torch.Tensor | None:
        return self._linear[0].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.group
        if self._place == 0:
            group.outputs = group(x)
        y = group.outputs[self._place]
        if self._place == len(group.members) - 1:
            group.outputs = ()
        return y


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, group: Group, deltas: Deltas) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x_TI)
        ctx.group, ctx.deltas = group, deltas
        return tuple(deltas.forward(group, x_TI))

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x_TI,) = ctx.saved_tensors
        return ctx.deltas.backward(ctx.group, x_TI, [dy.contiguous() for dy in dys]), None, None


# A compiled layer is one program for all layers and all passes: what differs from layer to layer it must be
# given as a tensor (`key`), and what differs from pass to pass its operators look up when they run.

_keys = itertools.count()
_known: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def register(owner: Any) -> torch.Tensor:
    """A key by which an operator finds `owner`; it is forgotten with it."""
    number = next(_keys)
    _known[number] = owner
    return torch.tensor(number)


def owner_of(key: torch.Tensor) -> Any:
    return _known[int(key)]


@library.custom_op("tinsmith::group_forward", mutates_args=())
def group_forward(
    x_TI: torch.Tensor, key: torch.Tensor, width0: int, width1: int, width2: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group: Group = owner_of(key)
    ys = group.deltas.forward(group, x_TI)
    y0, y1, y2 = ys + [x_TI.new_empty(0) for _ in range(MOST_MEMBERS - len(ys))]
    return y0, y1, y2


@group_forward.register_fake
def _(
    x_TI: torch.Tensor, key: torch.Tensor, width0: int, width1: int, width2: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(width: int) -> torch.Tensor:
        return x_TI.new_empty(x_TI.shape[0], width) if width else x_TI.new_empty(0)

    return empty(width0), empty(width1), empty(width2)


@library.custom_op("tinsmith::group_joined", mutates_args=())
def group_joined(x_TI: torch.Tensor, key: torch.Tensor, width: int) -> torch.Tensor:
    """No gradient: a sampler's."""
    group: Group = owner_of(key)
    return group.deltas.joined(group, x_TI)  # type: ignore[attr-defined]


@group_joined.register_fake
def _(x_TI: torch.Tensor, key: torch.Tensor, width: int) -> torch.Tensor:
    return x_TI.new_empty(x_TI.shape[0], width)


@library.custom_op("tinsmith::group_backward", mutates_args=())
def group_backward(
    x_TI: torch.Tensor, key: torch.Tensor, dy0: torch.Tensor, dy1: torch.Tensor, dy2: torch.Tensor
) -> torch.Tensor:
    group: Group = owner_of(key)
    dys = (dy0, dy1, dy2)[: len(group.members)]
    return group.deltas.backward(group, x_TI, [dy.contiguous() for dy in dys])


@group_backward.register_fake
def _(
    x_TI: torch.Tensor, key: torch.Tensor, dy0: torch.Tensor, dy1: torch.Tensor, dy2: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x_TI)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    x_TI, key = ctx.saved_tensors
    return group_backward(x_TI, key, *dys), None, None, None, None


group_forward.register_autograd(_backward, setup_context=_keep)
