"""Where to begin: rules of thumb for the learning rate, rank and batch, each with its source.

Sizes are counts (parameters, tokens, examples); learning rates are AdamW's. They are starting points: what
counts is a sweep on your own data (recipes/sweep.py).
"""

from dataclasses import dataclass
from typing import Literal

# The wire has no field for alpha: a service applies LoRA at scale ALPHA / rank, whatever the rank.
ALPHA = 32.0

Family = Literal["llama", "qwen"]

# The exponents of the rule that the official cookbook publishes (hyperparam_utils), by model family.
_EXPONENTS: dict[str, float] = {"llama": 0.781, "qwen": 0.0775}


def lora_learning_rate(hidden_size: int, family: Family = "qwen") -> float:
    """5e-5 · 10 · (2000 / hidden_size)^p: the official cookbook's rule for LoRA, p 0.781 for Llama and 0.0775
    for Qwen. The 10 is what LoRA wants over full fine-tuning; with alpha fixed the rate hardly depends on
    rank.

    It was fitted on models of 1B and more. A model of a few million parameters takes more:
    recipes/sweep.py finds how much.
    """
    if family not in _EXPONENTS:
        raise ValueError(f"no rule for the family {family!r}: there is one for {', '.join(_EXPONENTS)}")
    return float(5e-5 * 10 * (2000 / hidden_size) ** _EXPONENTS[family])


def learning_rate_by_size(parameters: float) -> float:
    """From 2e-4 at 7B parameters down to 2e-5 at 70B (published practice for LoRA), a line in log-log
    between, and constant outside. 1e-4 is the common default, 3e-5 where training is unstable."""
    small, large = 7e9, 70e9
    return 2e-4 * small / min(max(parameters, small), large)


def scaled_to_batch(learning_rate: float, batch: int, tuned_at: int) -> float:
    """The best rate grows about with the root of the batch."""
    return float(learning_rate * (batch / tuned_at) ** 0.5)


def lora_parameters(shapes: list[tuple[int, int]], rank: int) -> int:
    """Trained parameters of an adapter on linears of these (in, out) shapes."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


@dataclass(frozen=True)
class RankAdvice:
    rank: int
    why: str


def rank(completion_tokens: int, shapes: list[tuple[int, int]], *, reinforcement: bool = False) -> RankAdvice:
    """The smallest usual rank (8 to 64, powers of two) whose adapter has at least one parameter for each
    completion token to be learnt (the capacity rule of thumb). Reinforcement learning takes in so little per
    episode that very small ranks do. Train all linears: attention and MLP together matter more than rank."""
    if reinforcement:
        return RankAdvice(8, "reinforcement learning gets by with a small rank")
    for chosen in (8, 16, 32, 64):
        if (have := lora_parameters(shapes, chosen)) >= completion_tokens:
            return RankAdvice(chosen, f"{have:,} parameters for {completion_tokens:,} completion tokens")
    return RankAdvice(64, f"{completion_tokens:,} completion tokens are more than a usual adapter can hold")


def expert_rank(rank: int, active_experts: int) -> int:
    """Mixture of experts: rank / active experts for each expert, at least 1."""
    return max(1, rank // active_experts)


def batch(examples: int, *, epochs: int = 1, at_least_steps: int = 100, largest: int = 128) -> int:
    """The largest power of two that leaves `at_least_steps` steps. LoRA tolerates very large batches less
    well than full fine-tuning does, so it stops at `largest`; 16 is a common effective batch."""
    fits = max(1, examples * epochs // at_least_steps)
    return int(min(largest, 1 << (fits.bit_length() - 1)))
