"""Losses on preferences, for `forward_backward_custom`: DPO, KTO, ORPO.

Each function makes a loss of a batch. It gets the datums and their targets' logprobs (torch tensors that
require grad) and returns (loss, metrics); the loss is a mean over pairs or examples. Datums carry `weights`:
1 on the completion's tokens. Where a loss needs a reference, `reference[i]` is the completion's summed
logprob under it, as `totals` gives it before the first step.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tinsmith_cookbook import data
from tinsmith_cookbook.renderers import Message, Renderer
from tinsmith_cookbook.sdk import tinker

Loss = Callable[[Sequence[tinker.Datum], list[Any]], tuple[Any, dict[str, float]]]


def completion(renderer: Renderer, prompt: Sequence[Message], answer: str) -> tinker.Datum:
    """A prompt and one answer to it, of which the answer counts."""
    (example,) = renderer.examples([*prompt, {"role": "assistant", "content": answer}], train_on="last")
    return data.datum(example)


def totals(training: tinker.TrainingClient, datums: Sequence[tinker.Datum]) -> list[float]:
    """The summed logprob of each completion under the weights of this moment."""
    outputs = training.forward(list(datums), "cross_entropy").result().loss_fn_outputs
    # Summed as the losses sum, so that equal logprobs have equal sums, to the last bit.
    return [t.item() for t in _totals(datums, [output["logprobs"].to_torch() for output in outputs])]


def dpo(reference: Sequence[float], *, beta: float = 0.1) -> Loss:
    """Direct preference optimization (Rafailov et al. 2023): -log sigmoid(beta · ((c - c_ref) - (r -
    r_ref))).

    Datums come in pairs, chosen then rejected. Where policy and reference are the same it is ln 2.
    """

    def loss(datums: Sequence[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        rewards = [beta * (t - ref) for t, ref in zip(_totals(datums, logprobs), reference, strict=True)]
        margins = [c - r for c, r in zip(rewards[::2], rewards[1::2], strict=True)]
        mean = sum(_minus_log_sigmoid(margin) for margin in margins) / len(margins)
        return mean, _told([m.item() for m in margins])

    return loss


def kto(reference: Sequence[float], desirable: Sequence[bool], *, beta: float = 0.1) -> Loss:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024), on single answers that are desirable or not:
    1 - sigmoid(±(reward - z)), reward = beta · (logprob - reference), z = beta · KL(policy ‖ reference).

    The first half of the datums are the examples; the second half are the same prompts with each other's
    answers, from which z is estimated: mean log ratio, at least 0, no gradient. Where policy and reference
    are the same it is 1/2.
    """

    def loss(datums: Sequence[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        rewards = [beta * (t - ref) for t, ref in zip(_totals(datums, logprobs), reference, strict=True)]
        half = len(desirable)
        z = max(0.0, sum(r.item() for r in rewards[half:]) / half)
        signed = [(r - z) if good else (z - r) for r, good in zip(rewards[:half], desirable, strict=True)]
        mean = sum(1 - s.sigmoid() for s in signed) / half
        return mean, {"z": z, "accuracy": accuracy([s.item() for s in signed])}

    return loss


def orpo(*, weight: float = 0.1) -> Loss:
    """Odds-ratio preference optimization (Hong et al. 2024): the chosen answers' cross entropy per token,
    plus `weight` times -log sigmoid of the log odds ratio, of mean token probabilities. Pairs as for `dpo`;
    no reference."""

    def loss(datums: Sequence[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        counts = [float(d.loss_fn_inputs["weights"].to_numpy().sum()) for d in datums]
        means = [t / n for t, n in zip(_totals(datums, logprobs), counts, strict=True)]
        odds = [mean - (-mean.exp().clamp(max=1 - 1e-6)).log1p() for mean in means]
        ratios = [c - r for c, r in zip(odds[::2], odds[1::2], strict=True)]
        likelihood = -sum(means[::2]) / len(ratios)
        preference = sum(_minus_log_sigmoid(ratio) for ratio in ratios) / len(ratios)
        told = _told([r.item() for r in ratios])
        return likelihood + weight * preference, {**told, "nll": likelihood.item()}

    return loss


def accuracy(margins: Sequence[float]) -> float:
    """The share of margins above 0; one of exactly 0 is half a point, as a coin would give it."""
    return sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins)


def _totals(datums: Sequence[tinker.Datum], logprobs: list[Any]) -> list[Any]:
    return [
        (p * datum.loss_fn_inputs["weights"].to_torch()).sum()
        for p, datum in zip(logprobs, datums, strict=True)
    ]


def _minus_log_sigmoid(x: Any) -> Any:
    return (-x).logaddexp(x.new_zeros(()))


def _told(margins: list[float]) -> dict[str, float]:
    return {"margin": sum(margins) / len(margins), "accuracy": accuracy(margins)}
