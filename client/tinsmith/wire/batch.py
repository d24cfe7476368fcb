"""One forward_backward operation as flat arrays, and what the engine answers to it. numpy only.

Shapes: S sequences (datums), T tokens of all sequences one after another, K targets per token.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinsmith.wire.loss_graph import LossGraph

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class CustomInput:
    """A loss of the client's own, and for every datum what the loss takes beside logprobs, in its order."""

    graph: LossGraph
    inputs: tuple[tuple[Array, ...], ...]


@dataclass(frozen=True)
class TrainInput:
    """A validated forward_backward, unpacked once from the wire.

    `columns` holds everything the loss needs per token, settings included: cross_entropy has
    `weights` [T, K]; the others have [T] arrays under the names of `tinsmith.wire.losses`; a custom loss has
    `custom` instead.
    `target_widths` is [S]: 0 where a datum's targets are 1-D, else its own K (columns beyond it are
    padding of weight 0).
    """

    loss: str
    forward_only: bool
    lengths_S: Int64
    tokens_T: Int32
    targets_TK: Int64
    target_widths_S: Int64
    columns: dict[str, Float32]
    echo: dict[str, float] = field(default_factory=dict)  # settings in force, repeated in the metrics
    custom: CustomInput | None = None

    @property
    def tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def offsets_S(self) -> Int64:
        """[S + 1] row at which each sequence starts."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths_S)])


@dataclass(frozen=True)
class TrainOutput:
    """logprobs_TK: log p of every target under the current weights. losses_T: the loss of each row; a custom
    loss of a datum stands in its first. metric_sums: those of a custom loss, summed over datums."""

    logprobs_TK: Float32
    losses_T: Float32
    metric_sums: dict[str, float] = field(default_factory=dict)
