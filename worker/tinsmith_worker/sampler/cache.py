"""The keys and values of the sequences under way, one slot each, and the two ways to attend to them.

Shapes: S slots, L length of a slot, N rows (one token of N sequences), T packed tokens, H query heads,
G key/value heads, C channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_STEP = 128  # slots grow by so many tokens: copying the cache at every token would be all we do


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) of the sequence in `slot`: the next `stop - start` rows of a stream."""

    slot: int
    start: int
    stop: int


def whole_steps(length: int) -> int:
    """What a slot takes that is to hold `length` tokens."""
    return -(-length // _STEP) * _STEP


class Cache:
    """[S, G, L, C] keys and values for each layer; the values' C may be another.

    Slots are used densely from 0. What lies past the end of a sequence is finite, so that a mask can remove
    it (0 * NaN would not be 0): a slot given up must be made `clean`.
    """

    def __init__(self) -> None:
        """Without layers: they are made by the first pass, which should be of a single token."""
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.slots = 0
        self.length = 0

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers; 0 before the first pass."""
        tensors = (*self.keys, *self.values)
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)

    def reserve(self, slots: int, length: int, max_bytes: int = 0) -> None:
        """Hold at least `slots` x `length`; what the first `slots` slots have is kept.

        Some more slots are made ready as far as `max_bytes` allows. Where memory ends, torch's RuntimeError
        rises and every sequence that was held is still held.
        """
        if slots <= self.slots and length <= self.length:
            return
        length = whole_steps(length)
        affordable = max_bytes // max(1, self.token_bytes * length)
        slots = max(slots, min(slots + slots // 4, affordable))
        # Until all tensors have grown, what the smallest of them holds is what the cache holds.
        self.slots, self.length = min(self.slots, slots), min(self.length, length)
        for tensors in (self.keys, self.values):
            for layer, tensor_SGLC in enumerate(tensors):
                # One at a time: a layer's old tensor is free before the next one grows.
                tensors[layer] = self._grown(tensor_SGLC, slots, length)
        self.slots, self.length = slots, length

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Slot by slot; none may be in both."""
        for tensor_SGLC in (*self.keys, *self.values) if targets else ():
            tensor_SGLC[list(targets)] = tensor_SGLC[list(sources)]

    def clean(self, slots: slice) -> None:
        for tensor_SGLC in (*self.keys, *self.values):
            tensor_SGLC[slots].zero_()

    def clear(self) -> None:
        """Give the memory back."""
        for tensors in (self.keys, self.values):
            tensors[:] = [t.new_zeros((0, t.shape[1], 0, t.shape[3])) for t in tensors]
        self.slots = self.length = 0

    def layer(
        self, layer: int, key_TGC: torch.Tensor, value_TGC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values, made in the form of these if this is its first pass."""
        while len(self.keys) <= layer:
            made = [
                x.new_zeros((self.slots, x.shape[1], self.length, x.shape[2])) for x in (key_TGC, value_TGC)
            ]
            self.keys.append(made[0])
            self.values.append(made[1])
        return self.keys[layer], self.values[layer]

    def _grown(self, old_SGLC: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        new_SGLC = old_SGLC.new_zeros((slots, old_SGLC.shape[1], length, old_SGLC.shape[3]))
        new_SGLC[: self.slots, :, : self.length] = old_SGLC[: self.slots, :, : self.length]
        return new_SGLC


class Prefill:
    """Attention of a stream made of pieces of prompts: store what they bring, attend over all their past."""

    def __init__(self, cache: Cache, pieces: Sequence[Piece]) -> None:
        self.cache = cache
        self.pieces = pieces

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        keys_SGLC, values_SGLC = self.cache.layer(layer, key_TGC, value_TGC)
        attended_THC = query_THC.new_empty((*query_THC.shape[:2], value_TGC.shape[2]))
        row = 0
        for piece in self.pieces:
            rows = slice(row, row + piece.stop - piece.start)
            row = rows.stop
            slot, past = piece.slot, slice(piece.start, piece.stop)
            keys_SGLC[slot, :, past] = key_TGC[rows].transpose(0, 1)
            values_SGLC[slot, :, past] = value_TGC[rows].transpose(0, 1)
            attended_THC[rows] = _continue(
                query_THC[rows].transpose(0, 1),
                keys_SGLC[slot, :, : piece.stop],
                values_SGLC[slot, :, : piece.stop],
                piece,
                scale,
            ).transpose(0, 1)
        return attended_THC


def _continue(
    query_HTC: torch.Tensor, key_GLC: torch.Tensor, value_GLC: torch.Tensor, piece: Piece, scale: float
) -> torch.Tensor:
    repeats = query_HTC.shape[0] // key_GLC.shape[0]
    mask_TL = None
    if piece.start:
        positions_L = torch.arange(piece.stop, device=query_HTC.device)
        mask_TL = positions_L <= positions_L[piece.start :, None]
    if query_HTC.is_cuda and repeats > 1 and (piece.start or query_HTC.dtype == torch.float32):
        # No such kernel on CUDA shares key/value heads; the fallback would hold all T x L scores.
        key_GLC, value_GLC = (x.repeat_interleave(repeats, 0) for x in (key_GLC, value_GLC))
        repeats = 1
    return F.scaled_dot_product_attention(
        query_HTC[None],
        key_GLC[None],
        value_GLC[None],
        attn_mask=mask_TL,
        is_causal=mask_TL is None,
        scale=scale,
        enable_gqa=repeats > 1,
    )[0]


class Decode:
    """Attention of a stream that brings one token of each of N sequences, row n of slot `slots_N[n]`.

    `positions_N` is where each token stands, `slots` how many are in use and `longest` the longest sequence
    with its new token. All slots attend at once, in their own order: rows are permuted, never the cache.
    """

    def __init__(
        self, cache: Cache, slots_N: torch.Tensor, positions_N: torch.Tensor, *, slots: int, longest: int
    ) -> None:
        self.cache = cache
        self.slots_N = slots_N
        self.positions_N = positions_N
        self.slots = slots
        self.longest = longest
        # A slot without a row (its prompt is half read) sees its position 0 and is ignored.
        last_S = positions_N.new_zeros(slots)
        last_S[slots_N] = positions_N
        seen_SL = torch.arange(longest, device=positions_N.device) <= last_S[:, None]
        self.mask_S11L = seen_SL[:, None, None]

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        keys_SGLC, values_SGLC = self.cache.layer(layer, key_TGC, value_TGC)
        keys_SGLC[self.slots_N, :, self.positions_N] = key_TGC
        values_SGLC[self.slots_N, :, self.positions_N] = value_TGC
        rows, heads, channels = query_THC.shape
        groups = key_TGC.shape[1]
        # The query heads of one key head stand where query positions would: no key is repeated in memory.
        query_SGRC = query_THC.new_zeros((self.slots, groups, heads // groups, channels))
        query_SGRC[self.slots_N] = query_THC.view(rows, groups, heads // groups, channels)
        attended_SGRC = F.scaled_dot_product_attention(
            query_SGRC,
            keys_SGLC[: self.slots, :, : self.longest],
            values_SGLC[: self.slots, :, : self.longest],
            attn_mask=self.mask_S11L,
            scale=scale,
        )
        return attended_SGRC[self.slots_N].reshape(rows, heads, value_TGC.shape[2])
