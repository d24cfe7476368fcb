"""What many adapters add to a step of few rows, by Triton's kernels (kernels.py), in a form that can be
recorded.

Shapes: N rows, I inputs and O outputs of a group of linear maps, M members of a group, S parts of a sum, A
places for adapters.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinsmith_worker.adapters import ALIGNMENT, MOST_MEMBERS, Adapter, Kind, targets
from tinsmith_worker.copies import to_device
from tinsmith_worker.lora import Deltas, Group, Loop
from tinsmith_worker.packed import tiles
from tinsmith_worker.sampler.order import segments
from tinsmith_worker.stream import Segment

_ROWS, _WIDTH, _SPAN, _LANES = 16, 128, 512, 16
_NOWHERE = -(1 << 62)


class Looped(Loop):
    """The base's product of all members at once, then one adapter after the other: for where Triton is
    not."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments, train=False)

    def _base_forward(self, group: Group, x_TI: torch.Tensor) -> list[torch.Tensor]:
        if group.weight is None:
            return super()._base_forward(group, x_TI)
        widths = [member.out_features for member in group.members]
        return list(F.linear(x_TI, group.weight, group.bias).split(widths, 1))

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> dict[Kind, Deltas]:
        """How the adapters of a step act on either kind of group."""
        acting = [s for s in segments if s.adapter is not None]
        kinds: tuple[Kind, ...] = ("attn", "mlp")
        return {
            kind: cls([s for s in acting if s.adapter and targets(s.adapter.spec, kind)]) for kind in kinds
        }


class Table:
    """Where the matrices of the adapters are that may take part in a step, in the device's memory.

    `most_rows` of a step. An adapter keeps its number until it is taken out.
    """

    def __init__(self, groups: Sequence[int], most_adapters: int, most_rank: int, most_rows: int,
                 device: torch.device, dtype: torch.dtype) -> None:  # fmt: skip
        """`groups`: the inputs of each group of sites, by its number."""
        self._device = device
        self.most_rank = most_rank
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.anchor = torch.zeros(ALIGNMENT, dtype=dtype, device=device)
        self._places = np.full((len(groups), 1 + MOST_MEMBERS, most_adapters), _NOWHERE, np.int64)
        self.places = to_device(self._places.copy(), device)
        self._ranks = np.zeros(most_adapters, np.int32)
        self.ranks = {step: torch.zeros(most_adapters, dtype=torch.int32, device=device) for step in (1, 8)}
        self.scales = torch.zeros(most_adapters, dtype=torch.float32, device=device)
        self.tiles = torch.zeros(most_rows, 3, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.partial = torch.empty(
            -(-max(groups) // _SPAN), most_rows, MOST_MEMBERS * most_rank, dtype=torch.float32, device=device
        )
        self.shrunk = torch.empty(self.partial.shape[1:], dtype=dtype, device=device)
        self._numbers: dict[int, int] = {}  # by the adapter's id
        self._free = list(range(most_adapters - 1, -1, -1))

    @property
    def is_full(self) -> bool:
        return not self._free

    def enter(self, adapter: Adapter) -> None:
        number = self._numbers[id(adapter)] = self._free.pop()
        unit = ALIGNMENT * self.anchor.element_size()
        apart = adapter.compute.data_ptr() - self.anchor.data_ptr()
        assert not apart % unit, apart
        self._places[..., number] = np.where(adapter.places < 0, _NOWHERE, adapter.places + apart // unit)
        self._ranks[number] = adapter.spec.rank
        self.places[..., number] = to_device(self._places[..., number].copy(), self._device)
        for step, ranks in self.ranks.items():
            ranks[number] = adapter.spec.rank // step
        self.scales[number] = adapter.scale

    def leave(self, adapter: Adapter) -> None:
        self._free.append(self._numbers.pop(id(adapter)))

    def beside(self) -> contextlib.AbstractContextManager[object]:
        """What is launched within runs beside what is launched after it, until `together`."""
        if self._side is None:
            return contextlib.nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._side)

    def together(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def seat(self, rows: Sequence[Adapter | None]) -> int:
        """Whose the rows of the next step are; those of one adapter lie side by side. Returns what all ranks
        are multiples of (1 or 8); 0 if there are none."""
        cut = tiles(segments([(a, 1) for a in rows]), self._numbers, len(rows), tile_rows=_ROWS)
        cut = cut[cut[:, 2] >= 0]
        if not len(cut):
            return 0
        self.tiles[: len(cut)].copy_(to_device(cut, self._device))
        self.count.copy_(to_device(np.array([len(cut)], np.int32), self._device))
        return 1 if (self._ranks[cut[:, 2]] % 8).any() else 8


class Gathered:
    """Keeps `lora.Deltas` for a step that a Table describes. `step`: what all ranks are multiples of; 0:
    there are no adapters."""

    def __init__(self, table: Table, step: int, kernels: Any) -> None:
        self._table = table
        self._step = step
        self._kernels = kernels
        self._blocks: dict[int, torch.Tensor] = {}

    def prepare(self, group: int, widths: Sequence[int]) -> None:
        """Lay out the outputs of a group's members, side by side."""
        self._blocks[group] = to_device(column_blocks(widths), self._table.anchor.device)

    def forward(self, group: Group, x_TI: torch.Tensor) -> list[torch.Tensor]:
        return list(self.joined(group, x_TI).split([m.out_features for m in group.members], 1))

    def joined(self, group: Group, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, O] of all members side by side."""
        members = len(group.members)
        with self._shrunk(group.number, members, x_TI):
            if group.weight is None:
                y_TO = torch.cat([F.linear(x_TI, m.weight, m.bias) for m in group.members], 1)
            else:
                y_TO = F.linear(x_TI, group.weight, group.bias)
        self._expand(group.number, y_TO)
        return y_TO

    def add(self, group: int, x_NI: torch.Tensor, product: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `product` makes of x [N, O], and what the adapters say to x. For a group of one member."""
        with self._shrunk(group, 1, x_NI):
            y_NO = product()
        self._expand(group, y_NO)
        return y_NO

    def backward(self, group: Group, x_TI: torch.Tensor, dys_TO: Sequence[torch.Tensor]) -> torch.Tensor:
        raise AssertionError("a sampler's step has no backward")

    @contextlib.contextmanager
    def _shrunk(self, group: int, members: int, x_NI: torch.Tensor) -> Iterator[None]:
        """Beside the base's product, which takes longer and leaves room: what adapters shrink x (contiguous)
        to."""
        if not self._step:
            yield
            return
        table, step, (rows, inputs) = self._table, self._step, x_NI.shape
        partial = table.partial
        with table.beside():
            self._kernels.shrink[(min(_LANES, rows), 2, self._parts(inputs))](
                x_NI, partial, table.anchor, table.places[group], table.tiles, table.count,
                table.ranks[step], table.scales, inputs, partial.stride(1), partial.stride(0), members, _SPAN,
                STEP=step, ROWS=_ROWS, WIDTH=32, DEPTH=128, LANES=min(_LANES, rows),
                num_warps=4, num_stages=3,
            )  # fmt: skip
            self._kernels.fold[(rows, -(-members * table.most_rank // 128))](
                partial, table.shrunk, members * table.most_rank, partial.stride(1), partial.stride(0),
                PARTS=self._parts(inputs), BLOCK=128, num_warps=1,
            )  # fmt: skip
        yield
        table.together()

    def _expand(self, group: int, y_NO: torch.Tensor) -> None:
        if not self._step:
            return
        table, step, lanes = self._table, self._step, min(_LANES, len(y_NO))
        blocks, places = self._blocks[group], table.places[group]
        self._kernels.expand[(len(blocks), lanes)](
            table.shrunk, y_NO, table.anchor, places, blocks, table.tiles, table.count, table.ranks[step],
            places.shape[1], y_NO.shape[1], table.shrunk.stride(0),
            STEP=step, ROWS=_ROWS, WIDTH=_WIDTH, DEPTH=32, LANES=lanes, num_warps=4, num_stages=2,
        )  # fmt: skip

    def _parts(self, inputs: int) -> int:
        return -(-inputs // _SPAN)


def column_blocks(widths: Sequence[int]) -> np.ndarray:
    """[blocks, 4]: member, first column of it, first column of all members together, how many columns."""
    found, before = [], 0
    for member, width in enumerate(widths):
        found += [(member, at, before + at, min(_WIDTH, width - at)) for at in range(0, width, _WIDTH)]
        before += width
    return np.array(found, np.int32)
