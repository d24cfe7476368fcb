"""Every loss of `tinsmith.wire.losses`, row by row, with its slope worked out by hand.

Shapes: N rows (tokens) of one operation, K targets per row. With lp = log p(target), q = `logprobs`,
A = `advantages`, r = exp(lp - q), all float32. A ratio that overflows makes its own rows infinite, no others.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from tinsmith.wire.losses import REINFORCE_MASK
from tinsmith_worker.copies import to_device

Columns = dict[str, torch.Tensor]
LossAndSlope = tuple[torch.Tensor, torch.Tensor]

SEQUENCE_LOG_RATIO = "sequence_log_ratio"


def evaluate(loss: str, logprobs_NK: torch.Tensor, columns: Columns) -> LossAndSlope:
    """(loss of every row [N], dL/dlogprob [N, K]). gspo needs the column of `sequence_log_ratio` besides."""
    if loss == "cross_entropy":
        return _cross_entropy(logprobs_NK, columns["weights"])
    losses_N, slopes_N = _POLICY_LOSSES[loss](logprobs_NK[:, 0], columns)
    return losses_N, slopes_N.unsqueeze(1)


def needs_whole_sequences(loss: str) -> bool:
    """Whether a row's loss depends on the logprobs of its whole sequence."""
    return loss == "gspo"


def sequence_log_ratio(
    logprobs_N: torch.Tensor, columns: Columns, lengths_S: npt.NDArray[np.int64]
) -> torch.Tensor:
    """[N] mean of lp - q over the tokens of the row's sequence whose mask is not 0; 0 where none is.

    gspo's log s (Zheng et al. 2025, "Group Sequence Policy Optimization", eq. 7), the same for all its rows.
    """
    device = logprobs_N.device
    masked_N = columns["sequence_ratio_mask"] != 0
    log_ratio_N = _where(masked_N, logprobs_N - columns["logprobs"])
    # Sequences side by side in a padded [S, L]: each is summed in the same order, whatever stands next to it.
    starts_S = np.cumsum(lengths_S) - lengths_S
    columns_L = np.arange(int(lengths_S.max()))
    inside_SL = to_device(columns_L < lengths_S[:, None], device)
    rows_SL = to_device(np.minimum(starts_S[:, None] + columns_L, len(logprobs_N) - 1), device)
    sums_S = _where(inside_SL, log_ratio_N[rows_SL]).sum(1)
    counts_S = (inside_SL & masked_N[rows_SL]).sum(1).clamp(min=1)
    sequence_N = to_device(np.repeat(np.arange(len(lengths_S)), lengths_S), device)
    return (sums_S / counts_S)[sequence_N]


def _cross_entropy(logprobs_NK: torch.Tensor, weights_NK: torch.Tensor) -> LossAndSlope:
    # Targets that only fill a row up weigh 0, and 0 times the logprob of an impossible one is not a number.
    return _where(weights_NK != 0, -weights_NK * logprobs_NK).sum(1), -weights_NK


def _importance_sampling(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    gain = _gain(torch.exp(lp - columns["logprobs"]), columns["advantages"])
    return -gain, -gain


def _ppo(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    return _clipped(torch.exp(lp - columns["logprobs"]), columns)


def _gspo(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    # s = exp(L + lp - sg(lp)): the value of the sequence's ratio, the slope of one by its own token.
    return _clipped(torch.exp(columns[SEQUENCE_LOG_RATIO]), columns)


def _clipped(ratio: torch.Tensor, columns: Columns) -> LossAndSlope:
    """-min(r A, clamp(r) A), for any r with dr/dlp = r."""
    advantages = columns["advantages"]
    gain = _gain(ratio, advantages)
    clipped = _gain(_clamp(ratio, columns), advantages)
    return -torch.minimum(gain, clipped), -_where(gain <= clipped, gain)


def _cispo(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    slope = -_clamp(torch.exp(lp - columns["logprobs"]), columns) * columns["advantages"]
    return _where(slope != 0, slope * lp), slope


def _dro(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    advantages, beta, log_ratio = columns["advantages"], columns["beta"], lp - columns["logprobs"]
    return -(_gain(lp, advantages) - beta / 2 * log_ratio**2), -(advantages - beta * log_ratio)


def _stable_reinforce(lp: torch.Tensor, columns: Columns) -> LossAndSlope:
    sampled = columns[REINFORCE_MASK] != 0
    log_ratio, kl_coeff = lp - columns["logprobs"], columns["kl_coeff"]
    push = -torch.exp(log_ratio).clamp(max=1.0) * columns["advantages"]
    loss = _where(push != 0, push * lp) + kl_coeff / 2 * log_ratio**2
    return _where(sampled, loss), _where(sampled, push + kl_coeff * log_ratio)


def _clamp(ratio: torch.Tensor, columns: Columns) -> torch.Tensor:
    return torch.clamp(ratio, columns["clip_low_threshold"], columns["clip_high_threshold"])


def _gain(value: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """value * A, and 0 where A is 0, however large the value: such a token is not trained on."""
    return _where(advantages != 0, value * advantages)


def _where(condition: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, value, 0.0)


_POLICY_LOSSES: dict[str, Callable[[torch.Tensor, Columns], LossAndSlope]] = {
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
    "stable_reinforce": _stable_reinforce,
}
