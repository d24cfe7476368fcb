"""What the engine's work is cut into, and how what was computed of it is put together again.

Shapes: S sequences, N rows of one piece or block, K targets per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tinsmith.wire.batch import Float32, Int64, TrainInput, TrainOutput
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import LoraSpec, Work
from tinsmith_worker.copies import OnTheWay
from tinsmith_worker.stream import Segment


@dataclass(frozen=True)
class Piece:
    """Some whole datums of an operation, which go through the model in one pass: `rows` of its arrays."""

    operation: int  # its place in the work
    adapter: Adapter
    given: TrainInput
    rows: slice
    lengths_S: Int64
    datums: slice

    @property
    def tokens(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Block:
    """Pieces side by side in a pass whose losses are computed in one go. `rows` are the stream's; `results`
    [N, K + 1]: logprobs, then the loss of the row. `metric_sums` of a custom loss, by operation."""

    pieces: list[Piece]
    segments: list[Segment]  # counted from the block's first row
    rows: slice
    loss: str
    lengths_S: Int64
    results: torch.Tensor
    metric_sums: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """results: rows [N, K + 1] of every piece, as a block's. metric_sums: of custom losses, parts of them,
    with their operations."""

    results: list[tuple[Piece, Float32]]
    metric_sums: list[tuple[int, dict[str, float]]]


def by_adapter(pieces: list[Piece]) -> list[Piece]:
    """One adapter's side by side and in order, and near adapters that are like it."""
    seen = {id(piece.adapter): number for number, piece in reversed(list(enumerate(pieces)))}
    return sorted(pieces, key=lambda p: (*_neighbourhood(p.adapter.spec), seen[id(p.adapter)]))


def on_the_way(blocks: list[Block]) -> OnTheWay:
    return OnTheWay([block.results for block in blocks])


def computed_of(blocks: list[Block], results: OnTheWay) -> Computed:
    """`results`: theirs, `on_the_way`; this waits for them."""
    computed = Computed([], [])
    for block, of_block in zip(blocks, results.arrays(), strict=True):
        for piece, segment in zip(block.pieces, block.segments, strict=True):
            computed.results.append((piece, of_block[segment.start : segment.stop]))
        computed.metric_sums.extend(block.metric_sums.items())
    return computed


def outputs_of(work: Sequence[Work], computed: Computed) -> list[TrainOutput]:
    """What was computed of all pieces of `work`, operation by operation."""
    found = [np.empty((o.given.tokens, o.given.targets_TK.shape[1] + 1), np.float32) for o in work]
    for piece, results in computed.results:
        found[piece.operation][piece.rows] = results
    sums: list[dict[str, float]] = [{} for _ in work]
    for operation, own in computed.metric_sums:
        add_up(sums[operation], own)
    return [TrainOutput(f[:, :-1], f[:, -1], own) for f, own in zip(found, sums, strict=True)]


def add_up(sums: dict[str, float], own: dict[str, float]) -> None:
    for name, value in own.items():
        sums[name] = sums.get(name, 0.0) + value


def _neighbourhood(spec: LoraSpec) -> tuple[int, int]:
    """Sorts adapters so that those acting on attention are one stretch of rows, and so are those acting on
    the MLPs; and equal ranks meet, which are padded to the widest of a pass."""
    return {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}[
        spec.train_attn, spec.train_mlp
    ], spec.rank
