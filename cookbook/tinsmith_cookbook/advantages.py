"""Advantages: how much better a rollout was than its like.

The like are the other rollouts of the same prompt, so no critic is needed (GRPO: Shao et al. 2024,
"DeepSeekMath").
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Group = TypeVar("Group")


def centred(rewards: Sequence[float], *, scaled: bool = False) -> Floats:
    """r - mean of the group; scaled: over its standard deviation too, as GRPO was published.

    Unscaled is the safer default: scaling counts a group the more, the less its rewards differ (Liu et al.
    2025, "Understanding R1-Zero-Like Training").
    """
    values = np.asarray(rewards, np.float64)
    advantages: Floats = values - values.mean()
    return advantages / values.std() if scaled and has_spread(rewards) else advantages


def leave_one_out(rewards: Sequence[float]) -> Floats:
    """r - mean of the others of the group: unbiased (RLOO: Ahmadian et al. 2024, "Back to Basics"). It is
    n / (n - 1) times the centred one."""
    count = len(rewards)
    if count < 2:
        raise ValueError(f"a group of {count} has no others to compare with: sample at least 2 per prompt")
    return centred(rewards) * (count / (count - 1))


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether there is anything to learn: where all rewards are equal, all advantages are 0."""
    return float(np.ptp(np.asarray(rewards, np.float64))) > 1e-9


def gae(
    rewards: Sequence[float], values: Sequence[float], *, discount: float = 1.0, decay: float = 0.95
) -> Floats:
    """Generalized advantage estimation over the steps of one episode, for those who bring a critic.

    values[t] is the critic's estimate before step t; after the last step it is 0.
    A[t] = r[t] + discount v[t+1] - v[t] + discount decay A[t+1] (Schulman et al. 2015).
    """
    if len(rewards) != len(values):
        raise ValueError(f"{len(rewards)} rewards and {len(values)} values: give one of each per step")
    advantages = np.zeros(len(rewards))
    following, next_value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discount * next_value - values[t] + discount * decay * following
        advantages[t], next_value = following, values[t]
    return advantages
