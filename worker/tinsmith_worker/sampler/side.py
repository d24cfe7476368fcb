"""The keys and values of the sequences that grow, side by side: for a CPU, where gathering the pages of all
of them at every step would take longer than attending to them.

Shapes: N rows of a step, S slots (a step's rows are in the first N), L tokens that a slot has room for, H
query heads, G key/value heads, C channels of a head.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from tinsmith_worker.sampler.cache import Cache, attend_rows

_ROOM_TOKENS = 64  # of the first slots; it is doubled when a sequence outgrows it


class SideBySide:
    """Copies of what the pages hold. The pages stay the truth: what is missing here is read from them.

    `most_bytes`: what all slots may take.
    """

    def __init__(self, cache: Cache, most_bytes: int) -> None:
        self._cache = cache
        self._most_bytes = most_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything, as when some of it was not finite, which no mask removes."""
        self.keys: list[torch.Tensor] = []  # [S, L, G, C] of each layer
        self.values: list[torch.Tensor] = []
        self._owners: dict[Hashable, int] = {}  # the slots of the last step's rows
        self._held = np.zeros(0, np.int64)  # how many tokens of its owner a slot holds

    def step(
        self, rows: Sequence[Hashable], pages: Sequence[Sequence[int]], positions: np.ndarray
    ) -> "Step | None":
        """The attention of a step that brings the token at `positions` of each row, whose sequence has these
        pages. None if side by side they would take too much memory."""
        if not self._make_room(len(rows), int(positions.max()) + 1):
            return None
        before = np.array([self._owners.get(row, -1) for row in rows], np.int64)
        is_kept = (before >= 0) & (before < len(rows))
        slots = before.copy()
        slots[~is_kept] = np.setdiff1d(np.arange(len(rows)), before[is_kept])
        is_held = (before >= 0) & (self._held[before] == positions)
        moved = np.flatnonzero(is_held & ~is_kept)
        for side in (*self.keys, *self.values):
            side[slots[moved]] = side[before[moved]]
        for row in np.flatnonzero(~is_held).tolist():
            self._read(int(slots[row]), pages[row], int(positions[row]))
        self._owners = dict(zip(rows, slots.tolist(), strict=True))
        self._held[slots] = positions + 1
        size = self._cache.page_tokens
        cells = [page[p // size] * size + p % size for page, p in zip(pages, positions.tolist(), strict=True)]
        return Step(self, self._cache, np.array(cells, np.int64), slots, positions)

    def _read(self, slot: int, pages: Sequence[int], tokens: int) -> None:
        cells = torch.from_numpy(self._cache.cells(pages, 0, tokens))
        for ours, theirs in zip(
            (*self.keys, *self.values), (*self._cache.keys, *self._cache.values), strict=True
        ):
            torch.index_select(theirs, 0, cells, out=ours[slot, :tokens])

    def _make_room(self, rows: int, tokens: int) -> bool:
        slots, room = self.keys[0].shape[:2] if self.keys else (0, _ROOM_TOKENS)
        if rows <= slots and tokens <= room:
            return True
        while room < tokens:
            room *= 2
        slots = max(slots, rows)
        cache = self._cache
        if slots * room * cache.page_bytes(cache.keys[0].dtype) > self._most_bytes * cache.page_tokens:
            return False
        self.keys = _grown(self.keys, cache.keys, slots, room)
        self.values = _grown(self.values, cache.values, slots, room)
        self._held = np.resize(self._held, slots)
        return True


def _grown(
    side: Sequence[torch.Tensor], cache: Sequence[torch.Tensor], slots: int, room: int
) -> list[torch.Tensor]:
    grown = [theirs.new_zeros((slots, room, *theirs.shape[1:])) for theirs in cache]
    for new, old in zip(grown, side, strict=False):
        new[: old.shape[0], : old.shape[1]] = old
    return grown


class Step:
    """Keeps `stream.Attention` for a stream of one token of each row; each sees its sequence up to itself."""

    may_compile = False

    def __init__(
        self, side: SideBySide, cache: Cache, cells: np.ndarray, slots: np.ndarray, positions: np.ndarray
    ) -> None:
        self._side, self._cache = side, cache
        rows, self._longest = len(slots), int(positions.max()) + 1
        self._cells_N = torch.from_numpy(cells)
        self._new_N = torch.from_numpy(slots * side.keys[0].shape[1] + positions)
        row_of_slot = np.argsort(slots)
        # Rows are ordered by adapter, slots as sequences came.
        self._orders = None
        if (row_of_slot != np.arange(rows)).any():
            self._orders = torch.from_numpy(row_of_slot), torch.from_numpy(slots)
        self._mask_N11L = None
        if positions.min() + 1 < self._longest:
            seen_N = torch.from_numpy(positions[row_of_slot])
            self._mask_N11L = (torch.arange(self._longest) <= seen_N[:, None])[:, None, None]

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        past = []
        for new_TGC, side, cache in (
            (key_TGC, self._side.keys[layer], self._cache.keys[layer]),
            (value_TGC, self._side.values[layer], self._cache.values[layer]),
        ):
            cache.index_copy_(0, self._cells_N, new_TGC)
            side.view(-1, *side.shape[2:]).index_copy_(0, self._new_N, new_TGC)
            past.append(side[: len(query_THC), : self._longest].transpose(1, 2))
        key_NGLC, value_NGLC = past
        if self._orders is None:
            return attend_rows(query_THC, key_NGLC, value_NGLC, self._mask_N11L, scale)
        of_slots, of_rows = self._orders
        query_NHC = query_THC.index_select(0, of_slots)
        return attend_rows(query_NHC, key_NGLC, value_NGLC, self._mask_N11L, scale).index_select(0, of_rows)
