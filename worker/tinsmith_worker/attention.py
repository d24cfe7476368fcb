"""How the sequences of a training stream attend: each to itself, causally.

Shapes: T packed tokens, S sequences, L their length, H query heads, G key/value heads, C channels of a head.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tinsmith_worker.copies import to_device

# Rows of padding attend among themselves in pieces of at most this many, so that their cost stays linear.
_PADDING_LENGTH = 64
# cuDNN plans anew for every length it meets, for a tenth of a second: it gets multiples of this only.
_PLANNED_LENGTH = 128

_aten: Any = torch.ops.aten


class CausalSequences:
    """Sequences of the given lengths, one after another; rows behind the last one are padding.

    On CUDA in half precision one kernel takes them all, elsewhere each goes by itself. `is_deterministic`: a
    sequence's numbers are its own bit for bit.
    """

    may_compile = True

    def __init__(self, lengths_S: npt.NDArray[np.int64], *, is_deterministic: bool = False) -> None:
        self._lengths: list[int] = lengths_S.tolist()
        self._is_deterministic = is_deterministic
        self._bounds: torch.Tensor | None = None
        self._longest = 0
        self.in_one_call = False  # whether `attend` was one kernel's work

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[T, H, C of the values]; rows of padding hold finite values without meaning."""
        of_one_width = query_THC.shape[-1] == value_TGC.shape[-1]  # the kernel for all knows no other
        self.in_one_call = query_THC.is_cuda and query_THC.dtype != torch.float32 and of_one_width
        if self.in_one_call:
            return self.forward(layer, query_THC, key_TGC, value_TGC, scale)[0]
        return self._each(query_THC, key_TGC, value_TGC, scale)

    def forward(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        """`attend` on CUDA in half precision, and what `backward` wants back."""
        if self._alike(len(query_THC)):
            query, key, value = (self._side_by_side(x) for x in (query_THC, key_TGC, value_TGC))
            output, *kept, _ = _aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, True, 0.0, True, False, scale=scale
            )
            return output.transpose(1, 2).reshape(query_THC.shape), tuple(kept)
        bounds, longest = self._bounds_in(query_THC)
        output_THC, *kept, _ = _aten._flash_attention_forward(
            query_THC, key_TGC, value_TGC, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )
        return output_THC, tuple(kept)

    def backward(
        self,
        gradient_THC: torch.Tensor,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        output_THC: torch.Tensor,
        kept: tuple[Any, ...],
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """dL/dquery, dL/dkey, dL/dvalue."""
        if self._alike(len(query_THC)):
            gradient, query, key, value, output = (
                self._side_by_side(x) for x in (gradient_THC, query_THC, key_TGC, value_TGC, output_THC)
            )
            log_sums, *bounds_and_lengths, seed, offset = kept
            found = _aten._scaled_dot_product_cudnn_attention_backward(
                gradient, query, key, value, output, log_sums, seed, offset, None, *bounds_and_lengths,
                0.0, True, scale=scale,
            )  # fmt: skip
            shapes = (query_THC.shape, key_TGC.shape, value_TGC.shape)
            return tuple(x.transpose(1, 2).reshape(shape) for x, shape in zip(found, shapes, strict=True))
        bounds, longest = self._bounds_in(query_THC)
        log_sums, *random = kept
        return _aten._flash_attention_backward(
            gradient_THC.contiguous(), query_THC, key_TGC, value_TGC, output_THC, log_sums, bounds, bounds,
            longest, longest, 0.0, True, *random, scale=scale,
        )  # fmt: skip

    def _alike(self, rows: int) -> bool:
        """Whether they are of one length and no row is padding. cuDNN, which is the fastest for those, may
        add up in another order with other sequences about."""
        length = self._lengths[0]
        return (
            not self._is_deterministic
            and length % _PLANNED_LENGTH == 0
            and rows == length * len(self._lengths)
            and self._lengths.count(length) == len(self._lengths)
        )

    def _side_by_side(self, x_THC: torch.Tensor) -> torch.Tensor:
        return x_THC.view(len(self._lengths), self._lengths[0], *x_THC.shape[1:]).transpose(1, 2)

    def _bounds_in(self, query_THC: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self._bounds is None:
            padding = query_THC.shape[0] - sum(self._lengths)
            lengths = self._lengths + [_PADDING_LENGTH] * (padding // _PADDING_LENGTH)
            lengths += [padding % _PADDING_LENGTH] if padding % _PADDING_LENGTH else []
            self._longest = max(lengths)
            if self._is_deterministic:
                # While sequences times heads are fewer than its processors, the kernel's backward shares a
                # sequence among several, and adds up otherwise. Empty sequences cost nothing.
                processors = torch.cuda.get_device_properties(query_THC.device).multi_processor_count
                lengths += [0] * (processors // query_THC.shape[1] + 1)
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            self._bounds = to_device(ends, query_THC.device)
        return self._bounds, self._longest

    def _each(
        self, query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, scale: float
    ) -> torch.Tensor:
        count, length = len(self._lengths), self._lengths[0]
        padding = query_THC.shape[0] - sum(self._lengths)
        if not self._is_deterministic and self._lengths.count(length) == count:
            query, key, value = (
                x.split([count * length, padding])[0].view(count, length, *x.shape[1:])
                for x in (query_THC, key_TGC, value_TGC)
            )
            together_THC = _causal(query, key, value, scale).reshape(count * length, query_THC.shape[1], -1)
            return F.pad(together_THC, (0, 0, 0, 0, 0, padding))
        # Not slices: the backward of each would be a tensor as long as the stream.
        parts = (x.split([*self._lengths, padding]) for x in (query_THC, key_TGC, value_TGC))
        each = list(zip(*parts, strict=True))[: len(self._lengths)]
        outputs = [_causal(q[None], k[None], v[None], scale).squeeze(0) for q, k, v in each]
        return torch.cat([*outputs, query_THC.new_zeros(padding, query_THC.shape[1], value_TGC.shape[2])])


def _causal(
    query_SLHC: torch.Tensor, key_SLGC: torch.Tensor, value_SLGC: torch.Tensor, scale: float
) -> torch.Tensor:
    """S sequences of one length L."""
    query_SHLC, key_SGLC, value_SGLC = (x.transpose(1, 2) for x in (query_SLHC, key_SLGC, value_SLGC))
    repeats = query_SHLC.shape[1] // key_SGLC.shape[1]
    if query_SHLC.is_cuda and query_SHLC.dtype == torch.float32 and repeats > 1:
        # No float32 kernel on CUDA shares key/value heads; the fallback would hold all L x L scores.
        key_SGLC, value_SGLC = (x.repeat_interleave(repeats, 1) for x in (key_SGLC, value_SGLC))
        repeats = 1
    output_SHLC = F.scaled_dot_product_attention(
        query_SHLC, key_SGLC, value_SGLC, is_causal=True, scale=scale, enable_gqa=repeats > 1
    )
    return output_SHLC.transpose(1, 2)
