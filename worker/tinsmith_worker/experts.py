"""A mixture's experts with many adapters added to them.

Every token goes through K of E experts, and an adapter has matrices for each, "shared outer": the side of the
hidden states is one matrix for all experts (A of gate and up, B of down), the side inside of an expert is its
own. Their rank is the run's over K, so that a token meets as much of an adapter as in a dense layer.

Shapes: T tokens, N tokens of a call, K experts of a token, M = N * K rows in the order of their experts,
E experts, P parts, C columns, D hidden, F inside of an expert, R rank of an expert's matrices.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinsmith_worker.adapters import Adapter, Site
from tinsmith_worker.copies import to_device
from tinsmith_worker.lora import Current, LoraLinear
from tinsmith_worker.stream import Segment

# What `F.grouped_mm` wants strides to be a multiple of, in elements of bfloat16.
_STRIDE = 8


def is_mixture(module: nn.Module) -> bool:
    """Whether it holds experts whose weights are stacked, as transformers has them."""
    experts = getattr(module, "experts", None)
    return isinstance(experts, nn.Module) and any(p.dim() == 3 for p in experts.parameters(recurse=False))


def trouble(block: Any) -> str:
    """Why this mixture cannot be computed here; "" if it can."""
    given = block.experts
    is_plain = getattr(given, "is_concatenated", False) and getattr(given, "has_gate", False)
    is_plain &= not (getattr(given, "is_transposed", True) or getattr(given, "has_bias", True))
    if not is_plain or {name for name, _ in given.named_parameters()} != {"gate_up_proj", "down_proj"}:
        return f"its {type(given).__name__} are more, or others, than gate, up and down"
    if not _active(block):
        return f"its {type(block).__name__} does not say how many experts a token meets"
    return ""


def expert_sites(path: str, block: Any, group: int) -> list[Site]:
    """The maps of a mixture's experts, in the order in which adapters hold them."""
    count, hidden, inside = block.experts.down_proj.shape
    active = _active(block)
    return [
        Site(f"{path}.experts.gate_proj", "mlp", hidden, inside, group, count, active, "A"),
        Site(f"{path}.experts.up_proj", "mlp", hidden, inside, group, count, active, "A"),
        Site(f"{path}.experts.down_proj", "mlp", inside, hidden, group, count, active, "B"),
    ]


def _active(block: nn.Module) -> int:
    return next((k for m in block.modules() if isinstance(k := getattr(m, "top_k", None), int)), 0)


class Mixture:
    """A block's `forward`, which tells its experts whose tokens they are given."""

    def __init__(self, block: Any, group: int, current: Current) -> None:
        self._forward: Callable[[torch.Tensor], torch.Tensor] = block.forward
        self._experts = block.experts = Experts(block.experts, group)
        # Experts that all tokens meet are linear maps like any other.
        self._has_linears = any(isinstance(module, LoraLinear) for module in block.modules())
        self._current = current
        self._block = block
        block.forward = self

    def compile(self) -> None:
        # A compiled layer ends before this and goes on behind it: who is given how many rows, and by whom, is
        # another in every pass, and would be compiled anew.
        self._block.forward = torch.compiler.disable(self.__call__)
        self._experts.compile_between()

    def run_eagerly(self) -> None:
        self._block.forward = self
        self._experts.run_eagerly()

    def __call__(self, x_1TD: torch.Tensor) -> torch.Tensor:
        now, rows = self._current.now, x_1TD.shape[1]
        self._experts.may_compile = now is not None and now.may_compile
        segments = covering(now.segments if now else (), rows)
        if now is None or not now.separate:
            self._experts.parts = merged(segments)
            return self._forward(x_1TD)
        # How many rows an expert is given would follow from everybody's choices, and the bits from that.
        found, of_all = [], now.deltas
        for segment in segments:
            self._experts.parts = [Segment(0, segment.stop - segment.start, segment.adapter)]
            if self._has_linears:
                now.deltas = now.alone(segment)
            found.append(self._forward(x_1TD[:, segment.start : segment.stop]))
        now.deltas = of_all
        return torch.cat(found, 1)


class Experts(nn.Module):
    """In the place of the library's own. `parts`: whose the tokens of the next call are."""

    def __init__(self, given: Any, group: int) -> None:
        super().__init__()
        # No child of this module: who cuts the base exchanges the weights of the module that it found.
        self._given = (given,)
        self.act_fn = given.act_fn
        self._group = group
        self.parts: list[Segment] = []
        self.may_compile = False
        self.run_eagerly()

    def run_eagerly(self) -> None:
        self._fast_inside: Callable[..., torch.Tensor] = self._inside
        self._fast_weighed: Callable[..., torch.Tensor] = _weighed

    def compile_between(self) -> None:
        """What stands between the products, for calls that `may_compile`: one by one, its operations would
        each move all bytes again."""
        self._fast_inside = torch.compile(self._inside, dynamic=True)
        self._fast_weighed = torch.compile(_weighed, dynamic=True)

    @property
    def gate_up_proj(self) -> torch.Tensor:
        return self._given[0].gate_up_proj

    @property
    def down_proj(self) -> torch.Tensor:
        return self._given[0].down_proj

    def forward(self, x_ND: torch.Tensor, chosen_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        inside = self._fast_inside if self.may_compile else self._inside
        weighed = self._fast_weighed if self.may_compile else _weighed
        rows = _Rows(chosen_NK, len(self.down_proj))
        h_MF = grouped(rows.of(x_ND), self.gate_up_proj, rows.ends_E)
        if not any(part.adapter and self._group in part.adapter.expert_views for part in self.parts):
            y_MD = grouped(inside(h_MF), self.down_proj, rows.ends_E)
            return weighed(rows.back(y_MD), weights_NK)
        added = _Added(x_ND, self.parts, self._group, rows)
        a_MF = inside(h_MF, *added.to_gate_and_up(x_ND))
        y_MD = grouped(a_MF, self.down_proj, rows.ends_E)
        v_MR = added.inside_of_down(a_MF)
        return weighed(rows.back(y_MD), weights_NK) + added.to_down(weighed(rows.back(v_MR), weights_NK))

    def _inside(
        self,
        h_MF: torch.Tensor,
        gate_added_MF: torch.Tensor | None = None,
        up_added_MF: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`h_MF`: gate and up side by side; `_added`: what adapters add to each."""
        gate_MF, up_MF = h_MF.chunk(2, -1)
        if gate_added_MF is not None and up_added_MF is not None:
            gate_MF, up_MF = gate_MF + gate_added_MF, up_MF + up_added_MF
        return self.act_fn(gate_MF) * up_MF


class _Rows:
    """Every token as often as it has experts, in the order of the experts. Within one they keep the order of
    the stream: an adapter's lie side by side there, too."""

    def __init__(self, chosen_NK: torch.Tensor, experts: int) -> None:
        self.experts, self._active = experts, chosen_NK.shape[1]
        self.chosen_M, self._order_M = chosen_NK.flatten().sort(stable=True)
        self._places_M = torch.empty_like(self._order_M)
        self._places_M[self._order_M] = torch.arange(len(self._order_M), device=chosen_NK.device)
        self.token_M = self._order_M // self._active
        self.ends_E = ends(self.chosen_M, experts)

    def of(self, x_NC: torch.Tensor) -> torch.Tensor:
        """[M, C]."""
        found: torch.Tensor = _Taken.apply(x_NC, self.token_M, self._places_M, self._active)
        return found

    def back(self, x_MC: torch.Tensor) -> torch.Tensor:
        """[N, K, C]."""
        found: torch.Tensor = _Taken.apply(x_MC, self._places_M, self._order_M, 1)
        return found.view(-1, self._active, x_MC.shape[1])


class _Taken(torch.autograd.Function):
    """x[rows], every row of x being in it `each` times, at `places`. What autograd makes of x[rows] adds up
    row by row, in any order or slowly."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, each: int
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.each = each
        return x[rows]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return gradient[places].view(-1, ctx.each, gradient.shape[1]).sum(1), None, None, None


class _Added:
    """What the adapters of some parts add. Matrices of several parts are stacked, padded to one rank."""

    def __init__(self, x_ND: torch.Tensor, parts: Sequence[Segment], group: int, rows: _Rows) -> None:
        self._parts, self._rows = parts, rows
        self._of_part = [_matrices(x_ND, part.adapter, group) for part in parts]
        self._scales = [
            part.adapter.expert_scale(group) if part.adapter and found else 0.0
            for part, found in zip(parts, self._of_part, strict=True)
        ]
        ranks = [found[0].shape[-2] for found in self._of_part if found]
        self._rank = -(-max(ranks) // _STRIDE) * _STRIDE
        self._some = next(found for found in self._of_part if found)
        stops_P = to_device(np.array([part.stop for part in parts[:-1]], np.int64), x_ND.device)
        part_M = torch.searchsorted(stops_P, rows.token_M, right=True)
        self._ends = ends(rows.chosen_M * len(parts) + part_M, rows.experts * len(parts))

    def to_gate_and_up(self, x_ND: torch.Tensor) -> list[torch.Tensor]:
        """[M, F] of each."""
        shrunk = []
        for place in (0, 1):
            found = [
                F.linear(x_ND[part.start : part.stop], A_1RD[0]) * scale
                for part, A_1RD, scale in zip(self._parts, self._each(place, -2), self._scales, strict=True)
            ]
            shrunk.append(torch.cat(found))
        Bs = [self._stacked(self._each(place, -1)) for place in (3, 4)]
        u_MR = [self._rows.of(u_NR) for u_NR in shrunk]
        return [grouped(u, B, self._ends) for u, B in zip(u_MR, Bs, strict=True)]

    def inside_of_down(self, a_MF: torch.Tensor) -> torch.Tensor:
        """[M, R]."""
        return grouped(a_MF, self._stacked(self._each(2, -2)), self._ends)

    def to_down(self, v_NR: torch.Tensor) -> torch.Tensor:
        """[N, D]."""
        found = [
            F.linear(v_NR[part.start : part.stop], B_1DR[0]) * scale
            for part, B_1DR, scale in zip(self._parts, self._each(5, -1), self._scales, strict=True)
        ]
        return torch.cat(found)

    def _each(self, place: int, axis: int) -> list[torch.Tensor]:
        """That matrix of every part, its rank (at `axis`) filled up with zeros; zeros for none."""
        found = []
        for matrices in self._of_part:
            matrix = matrices[place] if matrices else torch.zeros_like(self._some[place])
            missing = self._rank - matrix.shape[axis]
            found.append(F.pad(matrix, (0, 0) * (-1 - axis) + (0, missing)))
        return found

    def _stacked(self, of_parts: list[torch.Tensor]) -> torch.Tensor:
        """[E, …] of every part as [E * P, …]."""
        return of_parts[0] if len(of_parts) == 1 else torch.stack(of_parts, 1).flatten(0, 1)


def _matrices(x: torch.Tensor, adapter: Adapter | None, group: int) -> tuple[torch.Tensor, ...]:
    if adapter is None or group not in adapter.expert_views:
        return ()
    found: tuple[torch.Tensor, ...] = _Matrices.apply(x, adapter, group)
    return found


class _Matrices(torch.autograd.Function):
    """An adapter's matrices, whose gradients go to its float32 buffer. `x` makes autograd record them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, adapter: Adapter, group: int) -> tuple[torch.Tensor, ...]:
        ctx.adapter, ctx.group = adapter, group
        return tuple(view.view(view.shape) for view in adapter.expert_views[group])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None]:
        for total, gradient in zip(ctx.adapter.expert_gradients[ctx.group], gradients, strict=True):
            total.add_(gradient)
        return None, None, None


def grouped(x_MI: torch.Tensor, weights_GOI: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """x Wᵀ of row after row, each with the weights of the group that it lies in: [M, O]."""
    if x_MI.is_cuda and x_MI.dtype == torch.bfloat16:
        return F.grouped_mm(x_MI, weights_GOI.transpose(1, 2), offs=ends_G)
    return one_by_one(x_MI, weights_GOI, ends_G)


def one_by_one(x_MI: torch.Tensor, weights_GOI: torch.Tensor, ends_G: torch.Tensor) -> torch.Tensor:
    """`grouped`, where there is no kernel for it. Waits for the device."""
    bounds = [0, *ends_G.tolist()]
    found = [
        F.linear(x_MI[start:stop], weights_GOI[group])
        for group, (start, stop) in enumerate(itertools.pairwise(bounds))
        if start < stop
    ]
    return torch.cat(found)


def ends(sorted_M: torch.Tensor, count: int) -> torch.Tensor:
    """Where the rows of each number below `count` end."""
    numbers = torch.arange(count, device=sorted_M.device)
    return torch.searchsorted(sorted_M, numbers, right=True).to(torch.int32)


def _weighed(x_NKC: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    return (x_NKC * weights_NK.unsqueeze(-1)).sum(1)


def covering(segments: Sequence[Segment], rows: int) -> list[Segment]:
    """The segments, and what is left of the rows without an adapter."""
    stop = segments[-1].stop if segments else 0
    return [*segments, *([Segment(stop, rows, None)] if stop < rows else [])]


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one adapter as one."""
    found: list[Segment] = []
    for segment in segments:
        if found and found[-1].adapter is segment.adapter:
            segment = Segment(found.pop().start, segment.stop, segment.adapter)
        found.append(segment)
    return found
