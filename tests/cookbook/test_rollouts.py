"""Rollouts: what is trained on and what is only read; and that a failed one neither hangs nor ends a run."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinsmith
from tinsmith_cookbook import rollouts
from tinsmith_cookbook.rollouts import Rollout


def sequence(name: str, tokens: list[int], logprobs: list[float]) -> Any:
    return SimpleNamespace(sequence_id=name, tokens=tokens, logprobs=logprobs)


def two_turns() -> Rollout:
    """Prompt 1 2 3, written 4 5, tool output 6 7, written 8."""
    rollout = Rollout()
    rollout.read([1, 2, 3])
    assert rollout.write(sequence("a", [4, 5], [-0.4, -0.5])) == [4, 5]
    rollout.read([6, 7])
    rollout.write(sequence("b", [8], [-0.8]))
    return rollout


def values(datum: tinsmith.Datum, name: str) -> list[float]:
    return [round(float(v), 6) for v in datum.loss_fn_inputs[name].to_numpy()]


def test_only_what_the_model_wrote_is_trained_on() -> None:
    datum = two_turns().datum(advantage=2.0)
    assert datum.model_input.to_ints() == [1, 2, 3, 4, 5, 6, 7]
    assert values(datum, "target_tokens") == [2, 3, 4, 5, 6, 7, 8]
    assert values(datum, "advantages") == [0, 0, 2, 2, 0, 0, 2]
    assert values(datum, "logprobs") == [0, 0, -0.4, -0.5, 0, 0, -0.8]
    assert set(datum.loss_fn_inputs) == {"target_tokens", "advantages", "logprobs"}
    assert two_turns().written == [4, 5, 8]


def test_gspo_is_told_which_tokens_make_the_ratio() -> None:
    assert values(two_turns().datum(0.0, "gspo"), "sequence_ratio_mask") == [0, 0, 1, 1, 0, 0, 1]


def test_stable_reinforce_names_the_sample_behind_every_position() -> None:
    datum = two_turns().datum(1.0, "stable_reinforce")
    assert "logprobs" not in datum.loss_fn_inputs
    assert datum.model_input_spans is not None
    assert datum.loss_fn_input_spans is not None
    inputs = [(s.sequence_id, s.offset, s.length) for s in datum.model_input_spans]
    targets = [(s.sequence_id, s.offset, s.length) for s in datum.loss_fn_input_spans]
    # The second prompt was all of 1 … 7: its new part begins at 5.
    assert inputs == [("a", 0, 3), ("a", 0, 2), ("b", 5, 2), ("b", 0, 0)]
    assert targets == [("a", 1, 2), ("a", 0, 2), ("b", 5, 2), ("b", 0, 1)]


def test_dro_needs_what_was_read_to_have_logprobs() -> None:
    rollout = Rollout()
    rollout.read([1, 2, 3], [None, -0.2, -0.3])
    rollout.write(sequence("a", [4], [-0.4]))
    assert values(rollout.datum(1.0, "dro"), "logprobs") == [-0.2, -0.3, -0.4]


def test_a_logprob_that_is_missing_is_no_zero() -> None:
    for logprobs in ([], [None, -1.0], [None, None, -1.0]):
        with pytest.raises(ValueError, match="without all of their logprobs"):
            Rollout().read([1, 2, 3], logprobs)
    rollout = Rollout()
    rollout.read([1, 2], [None, -1.0])
    with pytest.raises(ValueError, match="without all of their logprobs"):
        rollout.read([3], [None])
    assert (rollout.tokens, rollout.logprobs) == ([1, 2], [0.0, -1.0])


def test_a_sample_without_logprobs_is_refused() -> None:
    with pytest.raises(ValueError, match="without its logprobs"):
        Rollout().write(SimpleNamespace(sequence_id="a", tokens=[1], logprobs=None))


def test_kl_counts_sampled_tokens_only() -> None:
    rollout = two_turns()
    lp = np.array([-9, -9, -0.5, -0.5, -9, -9, -0.5], np.float32)  # of the trainer
    output = SimpleNamespace(loss_fn_outputs=[{"logprobs": tinsmith.TensorData.from_numpy(lp)}])
    found = rollouts.kl([rollout], output)
    differences = np.array([0.1, 0.0, -0.3])
    assert found["kl"] == pytest.approx(differences.mean(), abs=1e-6)
    assert found["kl_k2"] == pytest.approx((differences**2).mean() / 2, abs=1e-6)


async def rollout(number: int) -> int:
    if number == 1:
        raise ConnectionError("the tool is away")
    if number == 2:
        await asyncio.sleep(3600)
    return number


def test_failed_and_hanging_rollouts_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = asyncio.run(rollouts.gather((rollout(n) for n in range(6)), timeout_seconds=0.2))
    assert done == [0, 3, 4, 5]
    assert "ConnectionError: the tool is away" in caplog.text
    assert "TimeoutError" in caplog.text


def test_when_most_rollouts_fail_that_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"2 of 3 rollouts failed.*the tool is away"):
        asyncio.run(rollouts.gather((rollout(n) for n in (1, 1, 3)), timeout_seconds=5))


def test_cancelling_a_gathering_cancels_its_rollouts() -> None:
    async def run() -> None:
        task = asyncio.create_task(rollouts.gather([rollout(2)]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), 5))
