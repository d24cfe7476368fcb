"""How the sequences of a training stream attend: each to itself, causally.

Shapes: T packed tokens, S sequences, H query heads, G key/value heads, C channels of a head.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tinsmith_worker.copies import to_device

# Rows of padding attend among themselves in pieces of at most this many, so that their cost stays linear.
_PADDING_LENGTH = 64


class CausalSequences:
    """Sequences of the given lengths, one after another; rows behind the last one are padding.

    On CUDA in half precision one kernel takes them all, elsewhere each goes by itself. That kernel's backward
    adds up in an order that may depend on the other sequences: `one_by_one` avoids it, so that a
    sequence's numbers are its own bit for bit.
    """

    def __init__(self, lengths_S: npt.NDArray[np.int64], *, one_by_one: bool = False) -> None:
        self._lengths: list[int] = lengths_S.tolist()
        self._one_by_one = one_by_one
        self._bounds: torch.Tensor | None = None

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
        if query_THC.is_cuda and query_THC.dtype != torch.float32 and of_one_width and not self._one_by_one:
            return self._together(query_THC, key_TGC, value_TGC, scale)
        return self._each(query_THC, key_TGC, value_TGC, scale)

    def _together(
        self, query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if self._bounds is None:
            padding = query_THC.shape[0] - sum(self._lengths)
            lengths = self._lengths + [_PADDING_LENGTH] * (padding // _PADDING_LENGTH)
            lengths += [padding % _PADDING_LENGTH] if padding % _PADDING_LENGTH else []
            self._longest = max(lengths)
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            self._bounds = to_device(ends, query_THC.device)
        bounds, longest = self._bounds, self._longest
        return _varlen()(query_THC, key_TGC, value_TGC, bounds, bounds, longest, longest, scale=scale)

    def _each(
        self, query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, scale: float
    ) -> torch.Tensor:
        padding = query_THC.shape[0] - sum(self._lengths)
        # Not slices: the backward of each would be a tensor as long as the stream.
        parts = (x.split([*self._lengths, padding]) for x in (query_THC, key_TGC, value_TGC))
        each = list(zip(*parts, strict=True))[: len(self._lengths)]
        outputs = [_causal(query, key, value, scale) for query, key, value in each]
        return torch.cat([*outputs, query_THC.new_zeros(padding, query_THC.shape[1], value_TGC.shape[2])])


def _causal(
    query_THC: torch.Tensor, key_TGC: torch.Tensor, value_TGC: torch.Tensor, scale: float
) -> torch.Tensor:
    query_1HTC, key_1GTC, value_1GTC = (
        x.transpose(0, 1).unsqueeze(0) for x in (query_THC, key_TGC, value_TGC)
    )
    repeats = query_THC.shape[1] // key_TGC.shape[1]
    if query_THC.is_cuda and query_THC.dtype == torch.float32 and repeats > 1:
        # No float32 kernel on CUDA shares key/value heads; the fallback would hold all T x T scores.
        key_1GTC, value_1GTC = (x.repeat_interleave(repeats, 1) for x in (key_1GTC, value_1GTC))
        repeats = 1
    output_1HTC = F.scaled_dot_product_attention(
        query_1HTC, key_1GTC, value_1GTC, is_causal=True, scale=scale, enable_gqa=repeats > 1
    )
    return output_1HTC.squeeze(0).transpose(0, 1)


@functools.cache
def _varlen() -> Callable[..., Any]:
    """torch's varlen_attn, causal: how to say so has changed between its releases."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)
