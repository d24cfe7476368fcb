"""From the base's last hidden states to logprobs and back, a chunk of rows at a time.

All logits of a pass at once would be its largest tensor by far (8192 tokens x 152k words: 5 GB), so a
chunk's logits become logprobs, then the loss's slope, then gradients, before the next chunk's are made.

Shapes: N rows of one segment, D hidden, V vocabulary, K targets per row, R rank.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.lora import accumulate

# Logits of one chunk: 2^27 float32 are 512 MB.
_CHUNK_LOGITS = 1 << 27

SlopeOf = Callable[[slice, torch.Tensor], torch.Tensor]


class Head:
    """The base's frozen output embedding, at which adapters can act under the name `site`.

    `chunk_rows`: how many rows' logits exist at once.
    """

    def __init__(self, site: str, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        self.site = site
        self._weight_VD = weight_VD
        self._bias_V = bias_V
        self.chunk_rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])

    def logits(self, hidden_ND: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        """float32 logits [N, V] with `adapter`'s unembedding (None: the base alone). No gradient."""
        with torch.no_grad():
            return self._logits(hidden_ND, adapter)[0]

    def logprobs(
        self, hidden_ND: torch.Tensor, adapter: Adapter | None, targets_NK: torch.Tensor
    ) -> torch.Tensor:
        """log p of every target, float32 [N, K]. No gradient."""
        found = [
            F.log_softmax(self.logits(hidden_ND[rows], adapter), dim=1).gather(1, targets_NK[rows])
            for rows in self._chunks(hidden_ND)
        ]
        return torch.cat(found)

    def backward(
        self,
        hidden_ND: torch.Tensor,
        adapter: Adapter | None,
        targets_NK: torch.Tensor,
        slope_of: SlopeOf,
        gradient_ND: torch.Tensor,
    ) -> None:
        """Write dL/dhidden into `gradient_ND` and accumulate the unembedding's dA and dB in `adapter`.

        `slope_of(rows, logprobs)` is asked once for every chunk, in order: given log p [n, K] of these rows
        it answers dL/dlogprob [n, K].
        """
        with torch.no_grad():
            for rows in self._chunks(hidden_ND):
                logits_NV, shrunk_NR = self._logits(hidden_ND[rows], adapter)
                all_NV = F.log_softmax(logits_NV, dim=1)
                del logits_NV
                slope_NK = slope_of(rows, all_NV.gather(1, targets_NK[rows]))
                # dL/dlogits = onehot(target) * slope - softmax * sum of slopes
                dlogits_NV = all_NV.exp_().mul_(-slope_NK.sum(1, keepdim=True))
                for k in range(slope_NK.shape[1]):  # one column at a time: a row may name a target twice
                    dlogits_NV.scatter_add_(1, targets_NK[rows, k : k + 1], slope_NK[:, k : k + 1])
                dlogits_NV = dlogits_NV.to(self._weight_VD.dtype)
                torch.mm(dlogits_NV, self._weight_VD, out=gradient_ND[rows])
                if adapter is not None and shrunk_NR is not None:
                    self._backward_adapter(adapter, dlogits_NV, shrunk_NR, hidden_ND[rows], gradient_ND[rows])

    def _logits(
        self, hidden_ND: torch.Tensor, adapter: Adapter | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits_NV = _mm_float32(hidden_ND, self._weight_VD.T)
        if self._bias_V is not None:
            logits_NV += self._bias_V
        if adapter is None or self.site not in adapter.views:
            return logits_NV, None
        A_RD, B_VR = adapter.views[self.site]
        shrunk_NR = (hidden_ND @ A_RD.T).mul_(adapter.scale)
        if shrunk_NR.dtype == logits_NV.dtype:
            logits_NV.addmm_(shrunk_NR, B_VR.T)
        else:
            logits_NV += _mm_float32(shrunk_NR, B_VR.T)
        return logits_NV, shrunk_NR

    def _backward_adapter(
        self,
        adapter: Adapter,
        dlogits_NV: torch.Tensor,
        shrunk_NR: torch.Tensor,
        hidden_ND: torch.Tensor,
        gradient_ND: torch.Tensor,
    ) -> None:
        A_RD, B_VR = adapter.views[self.site]
        gradient_A, gradient_B = adapter.gradient_views[self.site]
        du_NR = (dlogits_NV @ B_VR).mul_(adapter.scale)
        accumulate(gradient_B, dlogits_NV.T, shrunk_NR)
        accumulate(gradient_A, du_NR.T, hidden_ND)
        gradient_ND.addmm_(du_NR, A_RD)

    def _chunks(self, hidden_ND: torch.Tensor) -> Iterator[slice]:
        for start in range(0, len(hidden_ND), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, len(hidden_ND)))


def _mm_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product as float32; but for CUDA, a half-precision one has been rounded to that first."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()
