"""What one pass of the base model runs over: a packed stream of tokens, cut into segments.

Shapes: T packed tokens, H query heads, G key/value heads, C channels of a head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from tinsmith_worker.adapters import Adapter

LEAST_ROWS = 64
"""A training pass has a multiple of so many rows, the last of them padding. A product of fewer rows may take
another kernel, and so give other bits, than the same rows among more."""


class Attention(Protocol):
    """How the tokens of a stream see each other. Trainer and sampler bring their own. `may_compile`: whether
    layers may be compiled around it, where they can be at all: they call `forward` then."""

    @property
    def may_compile(self) -> bool: ...

    def attend(
        self,
        layer: int,
        query_THC: torch.Tensor,
        key_TGC: torch.Tensor,
        value_TGC: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention of every token over its own sequence: [T, H, C]."""
        ...


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the stream, which pass through one adapter (None: the base model alone).

    A segment is a piece of one operation, never of two: gradients are then summed in the order of the
    operations, whatever shares the pass.
    """

    start: int
    stop: int
    adapter: Adapter | None


@dataclass(frozen=True)
class Stream:
    """tokens_T and positions_T (within each sequence), segments in row order covering all T rows.

    Rows after the last segment are padding up to a token bucket; their results are garbage.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    segments: tuple[Segment, ...]
    attention: Attention
