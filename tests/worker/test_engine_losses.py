"""The losses by themselves: each against its formula written out in plain Python, its slope against autograd."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith.wire.batch import TrainInput
from tinsmith.wire.losses import LOSSES
from tinsmith_worker import losses

LENGTHS = (40, 1, 25)


def logprobs_of(given: TrainInput) -> torch.Tensor:
    random = np.random.default_rng(7)
    near = random.normal(-math.log(tiny.VOCABULARY), 0.4, given.targets_TK.shape)
    return torch.from_numpy(near.astype(np.float32))


def columns_of(given: TrainInput) -> losses.Columns:
    return {name: torch.from_numpy(values) for name, values in given.columns.items()}


def evaluate(given: TrainInput, lp: torch.Tensor) -> losses.LossAndSlope:
    columns = columns_of(given)
    if losses.needs_whole_sequences(given.loss):
        ratio = losses.sequence_log_ratio(lp[:, 0], columns, given.lengths_S)
        columns[losses.SEQUENCE_LOG_RATIO] = ratio
    return losses.evaluate(given.loss, lp, columns)


def in_plain_python(given: TrainInput, lp: torch.Tensor) -> Iterator[float]:
    """The loss of every row in double precision, token by token."""
    columns = {name: values.astype(np.float64) for name, values in given.columns.items()}
    sequence = np.repeat(np.arange(len(given.lengths_S)), given.lengths_S)
    for i, row in enumerate(lp.double().tolist()):
        c = {name: values[i] for name, values in columns.items()}
        if given.loss == "cross_entropy":
            yield sum(-w * x for w, x in zip(c["weights"], row, strict=True))
            continue
        x, q, advantage = row[0], c["logprobs"], c["advantages"]
        r = math.exp(x - q)
        if given.loss == "gspo":
            mine = np.flatnonzero((sequence == sequence[i]) & (columns["sequence_ratio_mask"] != 0))
            differences = [float(lp[j, 0]) - columns["logprobs"][j] for j in mine]
            r = math.exp(sum(differences) / len(differences)) if differences else 1.0
        clipped = min(max(r, c.get("clip_low_threshold", 0)), c.get("clip_high_threshold", math.inf))
        if given.loss == "importance_sampling":
            yield -r * advantage
        elif given.loss in ("ppo", "gspo"):
            yield -min(r * advantage, clipped * advantage)
        elif given.loss == "cispo":
            yield -clipped * x * advantage
        elif given.loss == "dro":
            yield -(x * advantage - c["beta"] / 2 * (x - q) ** 2)
        else:
            assert given.loss == "stable_reinforce"
            value = -min(r, 1.0) * advantage * x + c["kl_coeff"] / 2 * (x - q) ** 2
            yield value if c["sampled_mask"] else 0.0


CASES = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.02}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("dro", {}),
    ("dro", {"beta": 2.0}),
    ("gspo", {}),
    ("gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
    ("stable_reinforce", {}),
    ("stable_reinforce", {"kl_coeff": 0.7}),
]


def test_every_loss_of_the_wire_is_tested_here() -> None:
    assert {loss for loss, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize("loss, settings", CASES, ids=str)
def test_every_loss_equals_its_formula_in_plain_python(loss: str, settings: dict[str, float]) -> None:
    given = tiny.batch(loss, LENGTHS, **settings)
    lp = logprobs_of(given)
    expected = torch.tensor(list(in_plain_python(given, lp)))
    assert tiny.worst(evaluate(given, lp)[0], expected) <= 1e-5


@pytest.mark.parametrize("loss, settings", CASES, ids=str)
def test_every_slope_equals_autograd(loss: str, settings: dict[str, float]) -> None:
    given = tiny.batch(loss, LENGTHS, **settings)
    lp = logprobs_of(given).requires_grad_()
    columns, start = columns_of(given), 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        tiny.loss_by_autograd(loss, lp[rows], {name: c[rows] for name, c in columns.items()}).sum().backward()
        start += length
    assert lp.grad is not None
    assert tiny.worst(evaluate(given, lp.detach())[1], lp.grad) <= 1e-5


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_clip_thresholds_are_each_tokens_own(loss: str) -> None:
    given = tiny.batch(loss, LENGTHS)
    random = np.random.default_rng(1)
    tokens = len(given.tokens_T)
    given.columns["clip_low_threshold"][:] = random.uniform(0.5, 1, tokens)
    given.columns["clip_high_threshold"][:] = random.uniform(1, 1.5, tokens)
    lp = logprobs_of(given)
    expected = torch.tensor(list(in_plain_python(given, lp)))
    assert tiny.worst(evaluate(given, lp)[0], expected) <= 1e-5


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"cross_entropy", "dro"}))
def test_tokens_without_advantage_are_zero_however_far_their_ratio_is(loss: str) -> None:
    """Prompts come with logprobs that mean nothing: 0 times an overflowing ratio must not become NaN."""
    given = tiny.batch(loss, LENGTHS)
    given.columns["advantages"][:10] = 0
    given.columns["logprobs"][:10] = -1e4
    if loss == "gspo":
        given.columns["sequence_ratio_mask"][:10] = 0
    found, slope = evaluate(given, logprobs_of(given))
    assert torch.isfinite(found).all()
    assert not found[:10].any()
    assert not slope[:10].any()


def test_a_target_of_weight_zero_counts_nothing_even_where_it_is_impossible() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    lp = torch.tensor([[-2.0, -math.inf], [-math.inf, -1.0]])
    found, slope = losses.evaluate("cross_entropy", lp, {"weights": weights})
    assert found.tolist() == [2.0, 0.0]
    assert slope.tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def test_gspo_of_a_sequence_without_masked_tokens_takes_the_ratio_one() -> None:
    given = tiny.batch("gspo", (6, 4))
    given.columns["sequence_ratio_mask"][:6] = 0
    found, slope = evaluate(given, logprobs_of(given))
    assert torch.equal(found[:6], -torch.from_numpy(given.columns["advantages"][:6]))
    assert torch.equal(slope[:6, 0], -torch.from_numpy(given.columns["advantages"][:6]))
