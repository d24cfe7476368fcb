"""All adapters of a pass at once, through Triton's kernels (`kernels.py`).

Shapes: T packed tokens, I inputs, O outputs, R rank, M members of a group, G adapters, X = M * R.
"""

import functools
import importlib
import logging
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from tinsmith_worker.adapters import ALIGNMENT, MOST_MEMBERS, Adapter
from tinsmith_worker.copies import to_device
from tinsmith_worker.stream import Segment

if TYPE_CHECKING:
    from tinsmith_worker.lora import Group

log = logging.getLogger("tinsmith.worker")


class Packed:
    """All adapters at once through Triton's kernels.

    What they add is written first, and the base's product added to it: the product reads it while it
    computes, whereas adding to the product would be another reading.
    """

    def __init__(self, rows: "Rows", *, train: bool) -> None:
        self._rows = rows
        self._train = train
        self._shrunk: dict[int, torch.Tensor] = {}

    def forward(self, group: "Group", x_TI: torch.Tensor) -> list[torch.Tensor]:
        u_TX = self._rows.shrink(x_TI, group)
        ys = self._rows.expand(u_TX, group)
        for y_TO, member in zip(ys, group.members, strict=True):
            y_TO.addmm_(x_TI, member.weight.T)
        if self._train:
            self._shrunk[group.number] = u_TX
        return ys

    def backward(self, group: "Group", x_TI: torch.Tensor, dys_TO: Sequence[torch.Tensor]) -> torch.Tensor:
        u_TX = self._shrunk.pop(group.number)
        du_TX = self._rows.shrink_back(dys_TO, group)
        self._rows.correlate(u_TX, dys_TO, du_TX, x_TI, group)
        dx_TI = self._rows.expand_back(du_TX, group)
        for member, dy_TO in zip(group.members, dys_TO, strict=True):
            dx_TI.addmm_(dy_TO, member.weight)
        return dx_TI


# Rows of a tile, and of what becomes one partial sum of a gradient. Both are counted from a segment's start.
TILE_ROWS, CHUNK_ROWS = 64, 1024


class Rows:
    """Which rows of a pass are whose, where every adapter's matrices are, and the kernels that ask."""

    def __init__(self, segments: Sequence[Segment], rows: int, device: torch.device, *, train: bool) -> None:
        adapters = list({id(s.adapter): s.adapter for s in segments if s.adapter is not None}.values())
        number = {id(adapter): n for n, adapter in enumerate(adapters)}
        ranks = np.array([adapter.spec.rank for adapter in adapters], np.int32)
        # Told that ranks are multiples of 8, the compiler loads 16 bytes at a time.
        self._step = 8 if not (ranks % 8).any() else 1
        self._most = int(ranks.max())
        self._anchor = adapters[0].compute
        self._ranks = to_device(ranks // np.int32(self._step), device)
        self._scales = to_device(np.array([a.scale for a in adapters], np.float32), device)
        self._places = to_device(_places(adapters, [a.compute for a in adapters]), device)
        self._adapters = self._places.shape[2]
        cut = tiles(segments, number, rows)
        self._tile_count = len(cut)
        self._tiles = to_device(cut, device)
        self._rows = rows
        self._kernels = triton_kernels()
        if train:
            gradients = [a.gradient for a in adapters if a.gradient is not None]
            assert len(gradients) == len(adapters)
            self._gradient_anchor = gradients[0]
            places = _places(adapters, gradients)
            self._gradient_places = to_device(places, device)
            # How much the matrices of a group take of an adapter's buffer, but for the last B.
            self._apart = (places[:, 1:, : len(adapters)] - places[:, :1, : len(adapters)]) * ALIGNMENT
            self._host_ranks = ranks
            parts, spans = chunks(segments, number)
            self._chunk_count, self._span_count = len(parts), len(spans)
            self._partials = int(parts[:, 3].max()) + 1
            self._chunks = to_device(parts, device)
            self._spans = to_device(spans, device) if len(spans) else None

    def shrink(self, x_TI: torch.Tensor, group: "Group") -> torch.Tensor:
        """x Aᵀ of all members, scaled: [T, M * R], the ranks of an adapter side by side."""
        return self._shrink([x_TI], group, len(group.members), of_a=True)

    def shrink_back(self, dys_TO: Sequence[torch.Tensor], group: "Group") -> torch.Tensor:
        """dy B of every member, scaled: [T, M * R]."""
        return self._shrink(dys_TO, group, 1, of_a=False)

    def _shrink(
        self, xs: Sequence[torch.Tensor], group: "Group", at_once: int, *, of_a: bool
    ) -> torch.Tensor:
        members, most = len(group.members), at_once * self._most
        u_TX = xs[0].new_empty(self._rows, members * self._most)
        width = _block(most)
        self._kernels.shrink[(self._tile_count, -(-most // width), members // at_once)](
            *_three(xs), u_TX, self._anchor, self._places[group.number], self._adapters, self._tiles,
            self._ranks, self._scales, *_three([x.shape[1] for x in xs]), u_TX.shape[1],
            OF_A=of_a, MEMBERS=members, STEP=self._step, ROWS=TILE_ROWS, WIDTH=width,
            DEPTH=128 if width <= 64 else 64, num_warps=4, num_stages=4 if width <= 64 else 5,
        )  # fmt: skip
        return u_TX

    def expand(self, u_TX: torch.Tensor, group: "Group") -> list[torch.Tensor]:
        """[T, O] u Bᵀ (+ bias) of every member."""
        outputs = [member.out_features for member in group.members]
        return self._expand(u_TX, outputs, [member.bias for member in group.members], group, of_a=False)

    def expand_back(self, du_TX: torch.Tensor, group: "Group") -> torch.Tensor:
        """[T, I] du A of all members."""
        return self._expand(du_TX, [group.inputs], [None], group, of_a=True)[0]

    def _expand(
        self,
        u_TX: torch.Tensor,
        outputs: Sequence[int],
        biases: Sequence[torch.Tensor | None],
        group: "Group",
        *,
        of_a: bool,
    ) -> list[torch.Tensor]:
        ys, members = [u_TX.new_empty(self._rows, width) for width in outputs], len(group.members)
        has_bias = [bias is not None for bias in biases] + [False] * (MOST_MEMBERS - len(biases))
        self._kernels.expand[(-(-max(outputs) // 128), self._tile_count, len(outputs))](
            u_TX, *_three(ys), *_three([u_TX if bias is None else bias for bias in biases]), self._anchor,
            self._places[group.number], self._adapters, self._tiles, self._ranks, *_three(outputs),
            u_TX.shape[1], OF_A=of_a, MEMBERS=members,
            BIAS0=has_bias[0], BIAS1=has_bias[1], BIAS2=has_bias[2], STEP=self._step,
            ROWS=TILE_ROWS, WIDTH=128, DEPTH=min(64, _block((members if of_a else 1) * self._most)),
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return ys

    def correlate(
        self,
        u_TX: torch.Tensor,
        dys_TO: Sequence[torch.Tensor],
        du_TX: torch.Tensor,
        x_TI: torch.Tensor,
        group: "Group",
    ) -> None:
        """gradients of every member's B += dyᵀ u, and of all As += duᵀ x."""
        members, last_width = len(group.members), dys_TO[-1].shape[1]
        places, partial, room = self._gradient_places[group.number], self._gradient_anchor, 0
        if self._spans is not None:
            sizes = self._apart[group.number, members - 1] + last_width * self._host_ranks
            room = int(sizes.max())
            filled = self._host_ranks * (members * group.inputs + sum(dy.shape[1] for dy in dys_TO))
            # What lies between two matrices stays zero.
            make = torch.empty if (sizes == filled).all() else torch.zeros
            partial = make(self._partials * room, dtype=torch.float32, device=x_TI.device)
        for narrow_TX, wides, at_once in ((u_TX, dys_TO, 1), (du_TX, [x_TI], members)):
            widths, most = [wide.shape[1] for wide in wides], at_once * self._most
            depth = _block(most)
            width = 64 if depth == 128 else 128
            grid = -(-max(widths) // width), self._chunk_count, -(-most // depth) * len(wides)
            self._kernels.correlate[grid](
                narrow_TX, *_three(wides), self._gradient_anchor, partial, places, self._adapters,
                self._chunks, self._ranks, *_three(widths), narrow_TX.shape[1], room,
                OF_A=wides is not dys_TO, MEMBERS=members, STEP=self._step, ROWS=64, WIDTH=width, DEPTH=depth,
                num_warps=4, num_stages=3,
            )  # fmt: skip
        if self._spans is not None:
            self._kernels.fold[(-(-room // 1024), self._span_count)](
                partial, self._gradient_anchor, places, self._adapters, self._spans, self._ranks, last_width,
                room, MEMBERS=members, STEP=self._step, BLOCK=1024,
            )  # fmt: skip


V = TypeVar("V")


def _three(of_members: Sequence[V]) -> tuple[V, V, V]:
    """One for each member a kernel can have; what is missing it does not look at."""
    first, second, third = (*of_members, *[of_members[0]] * (MOST_MEMBERS - len(of_members)))
    return first, second, third


def _block(width: int) -> int:
    """A power of two, as Triton's blocks are, that holds so many columns or is one of several."""
    return min(128, max(16, 1 << (width - 1).bit_length()))


def _places(adapters: Sequence[Adapter], buffers: Sequence[torch.Tensor]) -> np.ndarray:
    """[groups, 1 + MOST_MEMBERS, G]: how far from the first of `buffers` every matrix lies, in ALIGNMENTs.
    G is even: a group's are aligned then, whichever it is, and one kernel serves all."""
    unit = ALIGNMENT * buffers[0].element_size()
    apart = [buffer.data_ptr() - buffers[0].data_ptr() for buffer in buffers]
    assert not any(bytes_ % unit for bytes_ in apart), apart
    found = [a.places + bytes_ // unit for a, bytes_ in zip(adapters, apart, strict=True)]
    return np.stack(found + found[:1] * (len(found) % 2), -1)


def tiles(
    segments: Sequence[Segment], number: dict[int, int], rows: int, *, tile_rows: int = TILE_ROWS
) -> np.ndarray:
    """[tiles, 3]: first row, last row + 1, adapter (-1: none), covering all rows."""
    found, at = [], 0
    for start, stop, adapter in [
        *((s.start, s.stop, number[id(s.adapter)]) for s in segments if s.adapter is not None),
        (rows, rows, -1),
    ]:
        found += [(row, min(row + tile_rows, start), -1) for row in range(at, start, tile_rows)]
        found += [(row, min(row + tile_rows, stop), adapter) for row in range(start, stop, tile_rows)]
        at = stop
    return np.array(found, np.int32)


def chunks(segments: Sequence[Segment], number: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """[chunks, 4]: first row, last row + 1, adapter, slot among the partial sums (-1: none is needed); and
    [adapters with several chunks, 3]: adapter, first slot, last slot + 1."""
    found: dict[int, list[tuple[int, int]]] = {}
    for s in segments:
        if s.adapter is not None:
            found.setdefault(number[id(s.adapter)], []).extend(
                (row, min(row + CHUNK_ROWS, s.stop)) for row in range(s.start, s.stop, CHUNK_ROWS)
            )
    every, spans, slot = [], [], 0
    for adapter, parts in found.items():
        several = len(parts) > 1
        every += [(*part, adapter, slot + n if several else -1) for n, part in enumerate(parts)]
        if several:
            spans.append((adapter, slot, slot + len(parts)))
            slot += len(parts)
    return np.array(every, np.int32), np.array(spans, np.int32)


@functools.cache
def triton_kernels() -> Any:
    """The module of Triton's kernels, on a machine with a GPU. None where they cannot be compiled: everything
    works without them, only slower."""
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        log.warning("training is slow without a C compiler, which Triton needs: install gcc")
        return None
    return importlib.import_module("tinsmith_worker.kernels")
