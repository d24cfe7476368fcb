"""What a training pass keeps of its layers' activations for the backward, as the device's memory allows.

A layer keeps all of them; or it is lean, and makes anew what costs no product (norms, SwiGLU): three quarters
of the bytes for a hundredth of the time; or it keeps its input alone, and all of its forward runs again.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Keeping:
    """The first layers run again, the next ones are lean, all others keep everything."""

    recomputed_layers: int = 0
    lean_layers: int = 0


@dataclass
class Activations:
    """Bytes of a token that one layer keeps: 0 until a pass has shown it.

    `always_lean`: what a layer keeps must not depend on what memory is left, for a lean layer's gradients may
    be rounded otherwise.
    """

    layers: int
    always_lean: bool = False
    whole_bytes: float = 0.0
    lean_bytes: float = 0.0

    def keeping(self, tokens: int, room_bytes: int) -> Keeping:
        """As little made anew as fits into the room."""
        room = room_bytes / tokens
        leanest = self.lean_bytes or self.whole_bytes
        if not leanest:
            return Keeping(0, self.layers if self.always_lean else 0)
        recomputed = _at_least(self.layers - room / leanest, self.layers)
        if recomputed or self.always_lean:
            leans = self.always_lean or self.lean_bytes > 0
            return Keeping(recomputed, self.layers - recomputed if leans else 0)
        saved = self.whole_bytes - leanest
        beyond = self.layers * self.whole_bytes - room
        return Keeping(0, _at_least(beyond / saved, self.layers) if saved > 0 else 0)

    def learn(self, kept: Keeping, tokens: int, taken_bytes: int) -> None:
        """A pass of so many tokens took so much."""
        each = taken_bytes / tokens / self.layers
        if kept == Keeping():
            self.whole_bytes = each
        elif kept == Keeping(0, self.layers):
            self.lean_bytes = each


def _at_least(layers: float, most: int) -> int:
    return min(most, max(0, math.ceil(layers)))
