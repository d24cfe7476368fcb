"""The keys and values of the sequences under way, in pages, and the two ways to attend to them.

Shapes: E cells (one token each; `page_tokens` of them are a page), N rows (one token of N sequences), W
pages of a row's sequence, L tokens of the longest, T packed tokens, H query heads, G key/value heads, C
channels of a head.
"""

import contextlib
import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tinsmith_worker.copies import to_device

_aten: Any = torch.ops.aten


class Cache:
    """[E, G, C] keys and values for each layer; the values' C may be another.

    All cells are finite from the start, so that a mask can remove them (0 * NaN would not be 0): cells that
    held something that was not must be made `clean`.
    """

    def __init__(self, shapes: Sequence[tuple[torch.Size, torch.Size]], page_tokens: int) -> None:
        """`shapes`: [G, C] of each layer's keys and values."""
        self.page_tokens = page_tokens
        self._shapes = shapes
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def is_uniform(self) -> bool:
        """Whether values are as wide as keys, which is all that the kernels know."""
        return all(keys == values for keys, values in self._shapes)

    def page_bytes(self, dtype: torch.dtype) -> int:
        return sum(k.numel() + v.numel() for k, v in self._shapes) * dtype.itemsize * self.page_tokens

    def open(self, pages: int, *, device: torch.device, dtype: torch.dtype) -> None:
        """Make room for so many pages. RuntimeError where there is no memory for them."""
        cells = pages * self.page_tokens
        self.keys = [_zeros((cells, *k), device, dtype) for k, _ in self._shapes]
        self.values = [_zeros((cells, *v), device, dtype) for _, v in self._shapes]

    def cells(self, pages: Sequence[int], start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where positions [start, stop) of a sequence with these pages are."""
        positions = np.arange(start, stop)
        of_page = np.asarray(pages, np.int64)[positions // self.page_tokens]
        return of_page * self.page_tokens + positions % self.page_tokens

    def copy(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> None:
        """Cell by cell; none may be in both."""
        if not len(targets):
            return
        device = self.keys[0].device
        sources_E, targets_E = to_device(sources, device), to_device(targets, device)
        for tensor in (*self.keys, *self.values):
            tensor[targets_E] = tensor[sources_E]

    def clean(self, pages: Sequence[int]) -> None:
        for page in pages:
            cells = slice(page * self.page_tokens, (page + 1) * self.page_tokens)
            for tensor in (*self.keys, *self.values):
                tensor[cells].zero_()


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type == "cpu":
        # The system gives such memory only when it is first written to; torch would write to all of it. In
        # large pages if it has them: a small one at a time took a tenth of all sampling.
        memory = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


class Shapes:
    """Attends to nothing, and notes what keys and values of each layer look like."""

    may_compile = False

    def __init__(self) -> None:
        self.found: list[tuple[torch.Size, torch.Size]] = []

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert layer == len(self.found), (layer, len(self.found))
        self.found.append((key_TGC.shape[1:], value_TGC.shape[1:]))
        return query_THC.new_zeros((*query_THC.shape[:2], value_TGC.shape[2]))


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) of a sequence that has these pages: the next `stop - start` rows of a
    stream."""

    pages: Sequence[int]
    start: int
    stop: int


class Prefill:
    """Attention of a stream made of pieces of prompts: store what they bring, attend over all their past.

    On CUDA in half precision one kernel takes them all.
    """

    may_compile = True

    def __init__(self, cache: Cache, pieces: Sequence[Piece], rows: int) -> None:
        """`rows` of the stream; those after the last piece are padding."""
        self._cache = cache
        # Whole ones of one length, side by side, go together; others each by itself.
        self._alike = [
            list(alike) for _, alike in itertools.groupby(pieces, lambda p: p.stop if not p.start else id(p))
        ]
        device = cache.keys[0].device
        cells = [cache.cells(p.pages, p.start, p.stop) for p in pieces]
        padding = rows - sum(map(len, cells))
        self._cells_T = to_device(np.concatenate([*cells, np.zeros(padding, np.int64)]), device)
        self._is_continued = any(p.start for p in pieces)
        if device.type == "cuda":
            # Rows of padding attend to one cell of nobody's page.
            self._of_queries = _bounds([*(p.stop - p.start for p in pieces), padding], device)
            self._of_keys = _bounds([*(p.stop for p in pieces), padding], device)
            self._longest = (
                max([padding, *(p.stop - p.start for p in pieces)]),
                max([padding, *(p.stop for p in pieces)]),
            )
            if self._is_continued:
                pasts = [cache.cells(p.pages, 0, p.stop) for p in pieces]
                self._past_L = to_device(np.concatenate([*pasts, np.zeros(padding, np.int64)]), device)

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        if (
            query_THC.is_cuda
            and query_THC.dtype != torch.float32
            and query_THC.shape[2] == value_TGC.shape[2]
        ):
            return self.forward(layer, query_THC, key_TGC, value_TGC, scale)[0]
        keys, values = self._store(layer, key_TGC, value_TGC)
        attended_THC = query_THC.new_zeros((*query_THC.shape[:2], value_TGC.shape[2]))
        row = 0
        for pieces in self._alike:
            first, count = pieces[0], len(pieces)
            length = first.stop - first.start
            rows = slice(row, row + count * length)
            row = rows.stop
            if first.start:
                cells = torch.from_numpy(self._cache.cells(first.pages, 0, first.stop)).to(keys.device)
                key_LGC, value_LGC = keys[cells], values[cells]
            else:
                key_LGC, value_LGC = key_TGC[rows], value_TGC[rows]
            query_SLHC, key_SLGC, value_SLGC = (
                x.unflatten(0, (count, -1)) for x in (query_THC[rows], key_LGC, value_LGC)
            )
            attended_SLHC = _continue(query_SLHC, key_SLGC, value_SLGC, first.start, scale)
            attended_THC[rows] = attended_SLHC.flatten(0, 1)
        return attended_THC

    def forward(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, tuple[()]]:
        """`attend` on CUDA in half precision."""
        keys, values = self._store(layer, key_TGC, value_TGC)
        if self._is_continued:
            key_TGC, value_TGC = keys[self._past_L], values[self._past_L]
        # The kernel's causal mask is aligned to the last query and the last key.
        output_THC, *_ = _aten._flash_attention_forward(
            query_THC, key_TGC, value_TGC, self._of_queries, self._of_keys, *self._longest,
            0.0, True, False, scale=scale,
        )  # fmt: skip
        return output_THC, ()

    def _store(
        self, layer: int, key_TGC: torch.Tensor, value_TGC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._cells_T], values[self._cells_T] = key_TGC, value_TGC
        return keys, values


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)


def _continue(
    query_SLHC: torch.Tensor, key_SLGC: torch.Tensor, value_SLGC: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """S sequences. The queries are those of positions from `start` on, the keys those of all positions."""
    query_SHLC, key_SGLC, value_SGLC = (x.transpose(1, 2) for x in (query_SLHC, key_SLGC, value_SLGC))
    repeats = query_SHLC.shape[1] // key_SGLC.shape[1]
    mask_TL = None
    if start:
        positions_L = torch.arange(key_SGLC.shape[2], device=query_SHLC.device)
        mask_TL = positions_L <= positions_L[start:, None]
    if query_SHLC.is_cuda and repeats > 1 and (start or query_SHLC.dtype == torch.float32):
        # No such kernel on CUDA shares key/value heads; the fallback would hold all T x L scores.
        key_SGLC, value_SGLC = (x.repeat_interleave(repeats, 1) for x in (key_SGLC, value_SGLC))
        repeats = 1
    return F.scaled_dot_product_attention(
        query_SHLC,
        key_SGLC,
        value_SGLC,
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=scale,
        enable_gqa=repeats > 1,
    ).transpose(1, 2)


class Decode:
    """Attention of a stream that brings one token of each of N sequences, in plain torch.

    `tables_NW`: each sequence's pages; `positions_N`: where its token stands; `longest`: of the sequences
    with their new token.
    """

    may_compile = False

    def __init__(
        self, cache: Cache, tables_NW: torch.Tensor, positions_N: torch.Tensor, *, longest: int
    ) -> None:
        self._cache = cache
        size = cache.page_tokens
        positions_L = torch.arange(longest, device=positions_N.device)
        cells_NL = tables_NW[:, positions_L // size] * size + positions_L % size
        self._new_N = cells_NL.gather(1, positions_N[:, None])[:, 0]
        self._cells = cells_NL.flatten()
        self._mask_N11L = (positions_L <= positions_N[:, None])[:, None, None]

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._new_N], values[self._new_N] = key_TGC, value_TGC
        rows, groups = len(query_THC), key_TGC.shape[1]
        key_NGLC, value_NGLC = (
            x.index_select(0, self._cells).view(rows, -1, groups, x.shape[2]).transpose(1, 2)
            for x in (keys, values)
        )
        return attend_rows(query_THC, key_NGLC, value_NGLC, self._mask_N11L, scale)


def attend_rows(
    query_NHC: torch.Tensor,
    key_NGLC: torch.Tensor,
    value_NGLC: torch.Tensor,
    mask_N11L: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[N, H, C of the values]: one query of each of N sequences."""
    rows, heads, channels = query_NHC.shape
    groups = key_NGLC.shape[1]
    # The query heads of one key head stand where query positions would: no key is repeated in memory.
    attended_NGRC = F.scaled_dot_product_attention(
        query_NHC.reshape(rows, groups, heads // groups, channels),
        key_NGLC,
        value_NGLC,
        attn_mask=mask_N11L,
        scale=scale,
    )
    return attended_NGRC.reshape(rows, heads, value_NGLC.shape[3])
