"""The losses are their papers' formulas, and begin where they must."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import tinsmith
from tinsmith_cookbook import preferences

BETA = 0.3


def datum(length: int, counted: int) -> tinsmith.Datum:
    weights = [0.0] * (length - counted) + [1.0] * counted
    inputs = {"target_tokens": list(range(length)), "weights": weights}
    return tinsmith.Datum(tinsmith.ModelInput.from_ints(list(range(length))), inputs)


DATUMS = [datum(*shape) for shape in ((6, 3), (8, 5), (4, 2), (7, 4))]


@pytest.fixture
def logprobs() -> list[torch.Tensor]:
    draw = np.random.default_rng(0)
    return [
        torch.tensor(-draw.exponential(size=d.model_input.length), dtype=torch.float32, requires_grad=True)
        for d in DATUMS
    ]


def totals(logprobs: list[torch.Tensor]) -> list[float]:
    pairs = zip(logprobs, DATUMS, strict=True)
    return [float((p.detach().numpy() * d.loss_fn_inputs["weights"].to_numpy()).sum()) for p, d in pairs]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_its_formula(logprobs: list[torch.Tensor]) -> None:
    reference = [-1.0, -2.0, -3.0, -0.5]
    loss, metrics = preferences.dpo(reference, beta=BETA)(DATUMS, logprobs)
    rewards = [BETA * (t - r) for t, r in zip(totals(logprobs), reference, strict=True)]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    assert loss.item() == pytest.approx(-np.mean([math.log(sigmoid(m)) for m in margins]), rel=1e-5)
    assert metrics["margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    loss.backward()
    gradient = logprobs[0].grad
    assert gradient is not None
    expected = -BETA * sigmoid(-margins[0]) / 2
    assert gradient.tolist() == pytest.approx([0, 0, 0, *[expected] * 3], rel=1e-5)


def test_where_the_policy_is_the_reference_dpo_is_ln_2_and_pulls(logprobs: list[torch.Tensor]) -> None:
    reference = [
        (p * torch.from_numpy(d.loss_fn_inputs["weights"].to_numpy())).sum().item()
        for p, d in zip(logprobs, DATUMS, strict=True)
    ]
    loss, metrics = preferences.dpo(reference, beta=BETA)(DATUMS, logprobs)
    assert loss.item() == np.float32(math.log(2))
    assert metrics == {"margin": 0.0, "accuracy": 0.5}
    loss.backward()
    # The chosen answer's logprobs are to rise, the rejected one's to fall: half the sigmoid at 0, over two pairs.
    assert [float(p.grad[-1]) for p in logprobs] == pytest.approx([-BETA / 4, BETA / 4] * 2)  # type: ignore[index]


def test_kto_is_its_formula_and_begins_at_one_half(logprobs: list[torch.Tensor]) -> None:
    reference = [-4.0, -2.0, -3.0, -4.5]
    loss, metrics = preferences.kto(reference, [True, False], beta=BETA)(DATUMS, logprobs)
    rewards = [BETA * (t - r) for t, r in zip(totals(logprobs), reference, strict=True)]
    z = max(0.0, (rewards[2] + rewards[3]) / 2)
    expected = ((1 - sigmoid(rewards[0] - z)) + (1 - sigmoid(z - rewards[1]))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["z"] == pytest.approx(z)
    loss.backward()
    assert logprobs[2].grad is None or not logprobs[2].grad.any()  # the estimate of z has no gradient
    same, _ = preferences.kto(totals(logprobs), [True, False], beta=BETA)(DATUMS, logprobs)
    assert same.item() == pytest.approx(0.5, abs=1e-6)


def test_orpo_is_its_formula(logprobs: list[torch.Tensor]) -> None:
    loss, metrics = preferences.orpo(weight=BETA)(DATUMS, logprobs)
    counts = [float(d.loss_fn_inputs["weights"].to_numpy().sum()) for d in DATUMS]
    means = [t / n for t, n in zip(totals(logprobs), counts, strict=True)]
    odds = [m - math.log(1 - math.exp(m)) for m in means]
    ratios = [odds[0] - odds[1], odds[2] - odds[3]]
    nll = -(means[0] + means[2]) / 2
    expected = nll - BETA * np.mean([math.log(sigmoid(r)) for r in ratios])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("margin", [-1e4, -100.0, 100.0, 1e4])
def test_no_margin_is_too_large(margin: float, logprobs: list[Any]) -> None:
    reference = [t - m for t, m in zip(totals(logprobs), [margin / BETA, 0, margin / BETA, 0], strict=True)]
    loss, _ = preferences.dpo(reference, beta=BETA)(DATUMS, logprobs)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -margin), rel=1e-4, abs=1e-6)
    assert all(torch.isfinite(p.grad).all() for p in logprobs)


def test_a_tie_counts_half() -> None:
    assert preferences.accuracy([1.0, 0.0, -1.0, 0.5]) == 0.625
