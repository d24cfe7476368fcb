"""From the base's last hidden states to logprobs and back, a chunk of rows at a time.

All logits of a pass at once would be its largest tensor by far (8192 tokens x 152k words: 5 GB), so a
chunk's logits become logprobs, then the loss's slope, then gradients, before the next chunk's are made.

Shapes: N rows, D hidden, V vocabulary, K targets per row, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.lora import accumulate
from tinsmith_worker.packed import triton_kernels
from tinsmith_worker.stream import Segment

# Logits of one chunk: 2^28 float32 are 1 GB.
_CHUNK_LOGITS = 1 << 28
# With more targets per row, the kernel that looks for them in every column would be slower than scattering.
_MOST_TARGETS = 32
# Stretches of the inputs whose float32 products are summed: with 5 of 64, logprobs of the built-in base are
# off by a quarter of what they are with one.
_LEAST_STRETCH, _MOST_STRETCHES = 64, 8

SlopeOf = Callable[[slice, torch.Tensor], torch.Tensor]


class Head:
    """The base's frozen output embedding, at which adapters can act as the `group` of sites.

    `chunk_rows`: how many rows' logits exist at once.
    """

    def __init__(self, group: int, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        self.group = group
        self._weight_VD = weight_VD
        self._bias_V = bias_V
        rows = _CHUNK_LOGITS // weight_VD.shape[0]
        self.chunk_rows = max(1, rows // 128 * 128 or rows)
        self._kernels: Any = triton_kernels() if weight_VD.is_cuda else None

    def logits(self, hidden_ND: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        """float32 logits [N, V] with `adapter`'s unembedding (None: the base alone). No gradient."""
        with torch.no_grad():
            return self._logits(hidden_ND, [Segment(0, len(hidden_ND), adapter)])[0]

    def logprobs(
        self, hidden_ND: torch.Tensor, segments: Sequence[Segment], targets_NK: torch.Tensor
    ) -> torch.Tensor:
        """log p of every target, float32 [N, K]; `segments` say which rows pass through which adapter. No
        gradient."""
        found = []
        with torch.no_grad():
            for rows in self._chunks(hidden_ND):
                logits_NV, _ = self._logits(hidden_ND[rows], _within(segments, rows))
                found.append(self._logprobs(logits_NV, targets_NK[rows])[1])
        return torch.cat(found)

    def backward(
        self,
        hidden_ND: torch.Tensor,
        segments: Sequence[Segment],
        targets_NK: torch.Tensor,
        slope_of: SlopeOf,
        gradient_ND: torch.Tensor,
    ) -> None:
        """Write dL/dhidden into `gradient_ND` and accumulate the unembedding's dA and dB in the adapters.

        `slope_of(rows, logprobs)` is asked once for every chunk, in order: given log p [n, K] of these rows
        it answers dL/dlogprob [n, K].
        """
        with torch.no_grad():
            for rows in self._chunks(hidden_ND):
                acting = _within(segments, rows)
                logits_NV, shrunk = self._logits(hidden_ND[rows], acting)
                made_NV, logprobs_NK, sums_N = self._logprobs(logits_NV, targets_NK[rows])
                del logits_NV
                slope_NK = slope_of(rows, logprobs_NK)
                dlogits_NV = self._dlogits(made_NV, sums_N, targets_NK[rows], slope_NK)
                del made_NV
                torch.mm(dlogits_NV, self._weight_VD, out=gradient_ND[rows])
                for segment, shrunk_NR in zip(acting, shrunk, strict=True):
                    of = slice(segment.start, segment.stop)
                    hidden, gradient = hidden_ND[rows][of], gradient_ND[rows][of]
                    self._backward_adapter(segment.adapter, dlogits_NV[of], shrunk_NR, hidden, gradient)

    def _logits(
        self, hidden_ND: torch.Tensor, segments: Sequence[Segment]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Logits, and for every segment the scaled x Aᵀ (None: no adapter acts)."""
        logits_NV = _mm_float32(hidden_ND, self._weight_VD.T)
        if self._bias_V is not None:
            logits_NV += self._bias_V
        shrunk: list[torch.Tensor | None] = []
        for segment in segments:
            adapter, rows = segment.adapter, slice(segment.start, segment.stop)
            if adapter is None or self.group not in adapter.views:
                shrunk.append(None)
                continue
            A_RD, (B_VR,) = adapter.views[self.group]
            shrunk_NR = (hidden_ND[rows] @ A_RD.T).mul_(adapter.scale)
            if shrunk_NR.dtype == logits_NV.dtype:
                logits_NV[rows].addmm_(shrunk_NR, B_VR.T)
            else:
                logits_NV[rows] += _mm_float32(shrunk_NR, B_VR.T)
            shrunk.append(shrunk_NR)
        return logits_NV, shrunk

    def _logprobs(
        self, logits_NV: torch.Tensor, targets_NK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `_dlogits` wants back, log p of every target [N, K], and what sums [N] it also wants. In plain
        torch the logits become exp of what they are without their maximum, else they stay."""
        if self._kernels is None:
            # In place: memory that is new costs more than all the rest. log_softmax takes some, and is off by
            # as much again as the logits.
            logits_NV -= logits_NV.amax(1, keepdim=True)
            chosen_NK = logits_NV.gather(1, targets_NK)
            sums_N = logits_NV.exp_().sum(1)
            return logits_NV, chosen_NK.sub_(sums_N.log()[:, None]), sums_N
        rows, vocabulary = logits_NV.shape
        maxima_N, sums_N = logits_NV.new_empty((2, rows))
        self._kernels.log_sums[(rows,)](logits_NV, maxima_N, sums_N, vocabulary, BLOCK=4096, num_warps=8)
        # One after the other: their sum would be rounded as coarsely as the logits are.
        logprobs_NK = logits_NV.gather(1, targets_NK).sub_(maxima_N[:, None]).sub_(sums_N[:, None])
        return logits_NV, logprobs_NK, maxima_N.add_(sums_N)

    def _dlogits(
        self,
        made_NV: torch.Tensor,
        sums_N: torch.Tensor,
        targets_NK: torch.Tensor,
        slope_NK: torch.Tensor,
    ) -> torch.Tensor:
        """dL/dlogits = onehot(target) * slope - softmax * sum of slopes, in the base's dtype."""
        (rows, vocabulary), width = made_NV.shape, slope_NK.shape[1]
        if self._kernels is not None and width <= _MOST_TARGETS:
            dlogits_NV = torch.empty_like(made_NV, dtype=self._weight_VD.dtype)
            self._kernels.logit_slopes[(rows, -(-vocabulary // 4096))](
                made_NV, sums_N, targets_NK.contiguous(), slope_NK.contiguous(), dlogits_NV,
                vocabulary, width, BLOCK=4096, num_warps=8,
            )  # fmt: skip
            return dlogits_NV
        total_N = slope_NK.sum(1)
        if self._kernels is not None:
            made_NV.sub_(sums_N[:, None]).exp_().mul_(-total_N[:, None])
        else:
            made_NV.mul_((-total_N / sums_N)[:, None])
        for k in range(width):  # one column at a time: a row may name a target twice
            made_NV.scatter_add_(1, targets_NK[:, k : k + 1], slope_NK[:, k : k + 1])
        return made_NV.to(self._weight_VD.dtype)

    def _backward_adapter(
        self,
        adapter: Adapter | None,
        dlogits_NV: torch.Tensor,
        shrunk_NR: torch.Tensor | None,
        hidden_ND: torch.Tensor,
        gradient_ND: torch.Tensor,
    ) -> None:
        if adapter is None or shrunk_NR is None:
            return
        A_RD, (B_VR,) = adapter.views[self.group]
        gradient_A, (gradient_B,) = adapter.gradient_views[self.group]
        du_NR = (dlogits_NV @ B_VR).mul_(adapter.scale)
        accumulate(gradient_B, dlogits_NV.T, shrunk_NR)
        accumulate(gradient_A, du_NR.T, hidden_ND)
        gradient_ND.addmm_(du_NR, A_RD)

    def _chunks(self, hidden_ND: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(hidden_ND), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, len(hidden_ND)))


def _within(segments: Sequence[Segment], rows: slice) -> list[Segment]:
    """What of `segments` lies within `rows`, counted from there."""
    cut = [
        Segment(max(s.start, rows.start) - rows.start, min(s.stop, rows.stop) - rows.start, s.adapter)
        for s in segments
    ]
    return [s for s in cut if s.start < s.stop]


def _mm_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product as float32; but for CUDA, a half-precision one has been rounded to that first.

    A float32 one is the sum of several, each of a stretch of the inputs: a trained model's logits are tens,
    and a sum that has become so large rounds whatever else is added to it.
    """
    if left.dtype == torch.float32:
        stretch = max(_LEAST_STRETCH, -(-left.shape[1] // _MOST_STRETCHES))
        first, *others = zip(left.split(stretch, 1), right.split(stretch), strict=True)
        total = torch.mm(*first)
        for part in others:
            total.addmm_(*part)
        return total
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()
