"""The base's linear maps with many adapters added to them, each on its own rows of the stream.

y = x Wᵀ + b + (32 / R) (x Aᵀ) Bᵀ, and backward straight into the adapters' float32 gradient buffers.

Shapes: N rows, I inputs, O outputs, R rank, G groups of rows (one adapter each).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinsmith_worker.adapters import Adapter, Kind, Site, targets
from tinsmith_worker.copies import to_device
from tinsmith_worker.stream import Attention, Segment, Stream


class Deltas(Protocol):
    """What the adapters of a pass add at the sites of one kind. Loop and Grouped compute the same."""

    def add(self, site: str, x_NI: torch.Tensor, y_NO: torch.Tensor) -> Any:
        """Add to `y_NO` in place; returns the scaled x Aᵀ that `backward` wants back."""
        ...

    def backward(
        self, site: str, shrunk: Any, x_NI: torch.Tensor, dy_NO: torch.Tensor, dx_NI: torch.Tensor
    ) -> None:
        """Accumulate dA and dB in the adapters, add to `dx_NI` in place."""
        ...


class Loop:
    """One segment after the other: each adapter's numbers depend on its own rows alone."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._parts = [(slice(s.start, s.stop), s.adapter) for s in segments if s.adapter is not None]

    def add(self, site: str, x_NI: torch.Tensor, y_NO: torch.Tensor) -> list[torch.Tensor]:
        shrunk = []
        for rows, adapter in self._parts:
            A, B = adapter.views[site]
            u_NR = (x_NI[rows] @ A.T).mul_(adapter.scale)
            y_NO[rows].addmm_(u_NR, B.T)
            shrunk.append(u_NR)
        return shrunk

    def backward(
        self,
        site: str,
        shrunk: list[torch.Tensor],
        x_NI: torch.Tensor,
        dy_NO: torch.Tensor,
        dx_NI: torch.Tensor,
    ) -> None:
        for (rows, adapter), u_NR in zip(self._parts, shrunk, strict=True):
            A, B = adapter.views[site]
            gradient_A, gradient_B = adapter.gradient_views[site]
            du_NR = (dy_NO[rows] @ B).mul_(adapter.scale)
            accumulate(gradient_B, dy_NO[rows].T, u_NR)
            accumulate(gradient_A, du_NR.T, x_NI[rows])
            dx_NI[rows].addmm_(du_NR, A)


def accumulate(gradient: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """gradient += left @ right, the sum in float32."""
    if left.dtype == gradient.dtype:
        gradient.addmm_(left, right)
    else:
        gradient.add_(left @ right)


class Grouped:
    """All adapters at once through grouped_mm, ranks padded with zeros to the widest.

    Its rows are one stretch without gaps, each adapter in one group: grouped_mm leaves garbage outside of its
    groups, and two groups could not add to one gradient at once.
    """

    def __init__(
        self, start: int, stops: Sequence[int], adapters: Sequence[Adapter], device: torch.device
    ) -> None:
        assert len(set(map(id, adapters))) == len(adapters) == len(stops)
        self._rows = slice(start, stops[-1])
        self._adapters = adapters
        # Rows of 16 bytes or a multiple are what the kernel can load, so ranks are padded to 8.
        self._rank = -(-max(a.spec.rank for a in adapters) // 8) * 8
        self._padded = any(a.spec.rank != self._rank for a in adapters)
        self._ends_G = to_device(np.array(stops, np.int32) - np.int32(start), device)
        scales_N = np.repeat([a.scale for a in adapters], np.diff([start, *stops]))
        self._scales_N1 = to_device(scales_N.astype(np.float32)[:, None], device)

    def add(self, site: str, x_NI: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
        A_GRI, B_GOR = self._stacked(site)
        u_NR = F.grouped_mm(x_NI[self._rows], A_GRI.mT, offs=self._ends_G).mul_(self._scales_N1)
        y_NO[self._rows] += F.grouped_mm(u_NR, B_GOR.mT, offs=self._ends_G)
        return u_NR

    def backward(
        self, site: str, shrunk: torch.Tensor, x_NI: torch.Tensor, dy_NO: torch.Tensor, dx_NI: torch.Tensor
    ) -> None:
        A_GRI, B_GOR = self._stacked(site)
        dy_NO = dy_NO[self._rows]
        du_NR = F.grouped_mm(dy_NO, B_GOR, offs=self._ends_G).mul_(self._scales_N1)
        dx_NI[self._rows] += F.grouped_mm(du_NR, A_GRI, offs=self._ends_G)
        dA_GRI = F.grouped_mm(du_NR.T, x_NI[self._rows], offs=self._ends_G)
        dB_GOR = F.grouped_mm(dy_NO.T, shrunk, offs=self._ends_G)
        self._accumulate(site, dA_GRI, dB_GOR)

    def _stacked(self, site: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Copied anew for the backward: holding every layer's stacks would cost all adapters' size again."""
        pairs = [adapter.views[site] for adapter in self._adapters]
        if not self._padded:
            return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
        A, B = pairs[0]
        A_GRI = A.new_zeros(len(pairs), self._rank, A.shape[1])
        B_GOR = B.new_zeros(len(pairs), B.shape[0], self._rank)
        for g, (A, B) in enumerate(pairs):
            A_GRI[g, : A.shape[0]] = A
            B_GOR[g, :, : B.shape[1]] = B
        return A_GRI, B_GOR

    def _accumulate(self, site: str, dA_GRI: torch.Tensor, dB_GOR: torch.Tensor) -> None:
        gradients = [adapter.gradient_views[site] for adapter in self._adapters]
        ranks = [adapter.spec.rank for adapter in self._adapters]
        # foreach runs as one kernel only where dtypes agree.
        dA, dB = dA_GRI.float().unbind(), dB_GOR.float().unbind()
        torch._foreach_add_([A for A, _ in gradients], [d[:r] for d, r in zip(dA, ranks, strict=True)])
        torch._foreach_add_([B for _, B in gradients], [d[:, :r] for d, r in zip(dB, ranks, strict=True)])


def deltas(segments: Sequence[Segment], kind: Kind, *, grouped: bool, device: torch.device) -> Deltas | None:
    """How to add the adapters that act on sites of `kind`; None where none does. Such rows cost nothing."""
    acting = [s for s in segments if s.adapter is not None and targets(s.adapter.spec, kind)]
    if not acting:
        return None
    if not grouped:
        return Loop(acting)
    stops: list[int] = []
    adapters: list[Adapter] = []
    end = acting[0].start
    for segment in acting:
        if segment.start != end:
            return Loop(acting)
        end = segment.stop
        assert segment.adapter is not None
        if adapters and adapters[-1] is segment.adapter:
            stops[-1] = end
        else:
            stops.append(end)
            adapters.append(segment.adapter)
    if len(adapters) == 1 or len(set(map(id, adapters))) < len(adapters):
        return Loop(acting)
    return Grouped(acting[0].start, stops, adapters, device)


class Pass:
    """What the base's modules need to know of the stream under way."""

    def __init__(self, stream: Stream, *, grouped: bool) -> None:
        device = stream.tokens_T.device
        self.attention: Attention = stream.attention
        self.deltas: dict[Kind, Deltas | None] = {
            "attn": deltas(stream.segments, "attn", grouped=grouped, device=device),
            "mlp": deltas(stream.segments, "mlp", grouped=grouped, device=device),
        }


class Current:
    """Where the base's modules find the pass under way; `now` is None between passes."""

    now: Pass | None = None


class LoraLinear(nn.Module):
    """An nn.Linear of the base, with the adapters of the pass under way."""

    def __init__(self, linear: nn.Linear, site: Site, current: Current) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._site = site
        self._current = current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]; outside of a pass the base alone."""
        now = self._current.now
        acting = now.deltas[self._site.kind] if now else None
        if acting is None:
            return F.linear(x, self.weight, self.bias)
        y_NO = _Apply.apply(x.reshape(-1, self.in_features), self.weight, self.bias, self._site.name, acting)
        return y_NO.view(*x.shape[:-1], self.out_features)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        site: str,
        acting: Deltas,
    ) -> torch.Tensor:
        y_NO = F.linear(x_NI, weight, bias)
        ctx.shrunk = acting.add(site, x_NI, y_NO)
        ctx.save_for_backward(x_NI, weight)
        ctx.site, ctx.acting = site, acting
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        x_NI, weight = ctx.saved_tensors
        dy_NO = gradients[0].contiguous()
        dx_NI = dy_NO @ weight
        ctx.acting.backward(ctx.site, ctx.shrunk, x_NI, dy_NO, dx_NI)
        return dx_NI, None, None, None, None
