"""Attention of a step of few rows over the cache's pages, by Triton's kernels, in a form that can be
recorded."""

from typing import Any

import torch

from tinsmith_worker.sampler.cache import Cache

_BLOCK, _WARPS, _STAGES = 64, 4, 3
# A part of a sequence's past has at least so many tokens: shorter ones cost more to join than they save.
_LEAST_TOKENS = 256


class Paged:
    """N rows, each a token of some sequence: first all keys and values are written, then each row sees its
    sequence up to itself. `tables_NW` (int32) and `positions_N` may change between steps."""

    may_compile = True

    def __init__(
        self, cache: Cache, tables_NW: torch.Tensor, positions_N: torch.Tensor, kernels: Any
    ) -> None:
        self._cache = cache
        self._tables_NW = tables_NW
        self._positions_N = positions_N
        self._kernels = kernels

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows, heads, channels = query_THC.shape
        groups = key_TGC.shape[1]
        splits = _splits(rows * groups)
        parts = query_THC.new_empty((rows, heads, splits, channels), dtype=torch.float32)
        sums = query_THC.new_empty((rows, heads, splits), dtype=torch.float32)
        wide = max(16, 1 << (channels - 1).bit_length())
        size = self._cache.page_tokens
        assert {x.stride(2) for x in (query_THC, key_TGC, value_TGC)} == {1}
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        width = self._tables_NW.stride(0)
        self._kernels.store[(rows, groups)](
            key_TGC, value_TGC, keys, values, self._tables_NW, self._positions_N,
            key_TGC.stride(0), key_TGC.stride(1), value_TGC.stride(0), value_TGC.stride(1), width, groups,
            CHANNELS=channels, PAGE=size, WIDE=wide, num_warps=1,
        )  # fmt: skip
        self._kernels.attend[(rows, groups, splits)](
            query_THC, keys, values, self._tables_NW, self._positions_N, parts, sums, scale,
            query_THC.stride(0), query_THC.stride(1), width, groups,
            HEADS=heads // groups, CHANNELS=channels, PAGE=size, SPLITS=splits, LEAST=_LEAST_TOKENS,
            ROWS=max(16, 1 << (heads // groups - 1).bit_length()),
            BLOCK=_BLOCK if wide <= 128 else 32, WIDE=wide, num_warps=_WARPS,
            num_stages=_STAGES if query_THC.dtype != torch.float32 and wide <= 128 else 2,
        )  # fmt: skip
        out_THC = query_THC.new_empty((rows, heads, channels))
        self._kernels.join_parts[(rows * heads,)](
            parts, sums, out_THC,
            CHANNELS=channels, SPLITS=splits, MOST=max(2, 1 << (splits - 1).bit_length()), WIDE=wide,
            num_warps=2,
        )  # fmt: skip
        return out_THC

    def forward(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, tuple[()]]:
        return self.attend(layer, query_THC, key_TGC, value_TGC, scale), ()


def _splits(groups: int) -> int:
    """Parts of each sequence, so that some thousand programs are there, and a long sequence among short ones
    is never one program's work alone."""
    return min(64, max(8, 2048 // groups))
