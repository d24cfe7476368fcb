"""Learning rates over a run: up over the first steps, then down."""

import math
from typing import Literal

Kind = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    *,
    kind: Kind = "cosine",
    warmup_ratio: float = 0.06,
    floor: float = 0.0,
) -> float:
    """The rate of step `step` (0, 1, … steps - 1); a pure function of the step, so that a resumed run takes
    the rates that an uninterrupted one does.

    The first `warmup_ratio` of the steps rise to `peak` (5-10 % is common practice), the others fall to
    `floor` along a half cosine or a line. The first step's rate is not 0, nor is the last one's unless floor
    is."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    gone = (step - warmup) / max(1, steps - warmup)
    left = {"constant": 1.0, "linear": 1 - gone, "cosine": 0.5 * (1 + math.cos(math.pi * gone))}[kind]
    return floor + (peak - floor) * left
