"""Rewards and advantages, by hand."""

import json
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinsmith_cookbook import advantages, rewards

REWARDS = st.lists(st.floats(-10, 10, allow_nan=False), min_size=2, max_size=16)


@pytest.mark.parametrize(
    "text, found",
    [
        ("82", 82),
        ("So 1 + 2 = 3.", 3),
        ("It is 1,082.", 1082),
        ("about -4.50 degrees", Decimal("-4.50")),
        ("= -7", -7),
        ("4-2", 2),
        ("(3)-2", 2),
        ("4 - 2", 2),
        ("3.", 3),
        ("no idea", None),
        ("", None),
        ("-", None),
        ("7\n<|im_end|>", 7),
    ],
)
def test_the_last_number_of_an_answer(text: str, found: int | None) -> None:
    assert rewards.last_number(text) == (None if found is None else Decimal(found))


def test_numbers_are_compared_as_numbers() -> None:
    assert rewards.number("82")("The answer is 82.0") == 1
    assert rewards.number(82)("82 apples and 3 pears") == 0
    assert rewards.number("0.3", tolerance=0.05)("0.34") == 1
    assert rewards.number("0.3", tolerance=0.05)("0.36") == 0
    assert rewards.number(10**30)(str(10**30)) == 1
    assert rewards.number(10**30)(str(10**30 + 1)) == 0


def test_boxed_answers() -> None:
    assert rewards.boxed(r"thus \boxed{\frac{1}{2}} or rather \boxed{\sqrt{x^{2}}}.") == r"\sqrt{x^{2}}"
    assert rewards.boxed(r"\boxed{1") is None
    assert rewards.boxed("1") is None


def test_checks_of_form() -> None:
    assert rewards.exact("Paris")(" paris. ") == 1
    assert rewards.exact(("yes", "true"))("True") == 1
    assert rewards.exact("Paris")("Paris, France") == 0
    assert rewards.contains("red", "blue")("A Blue hundred") == 0.5  # "hundred" has no word "red"
    assert rewards.matches(r"-?\d+")(" 12 ") == 1
    assert rewards.matches(r"-?\d+")("12 or so") == 0
    assert rewards.is_json("a", "b")(json.dumps({"b": 1, "a": 2})) == 1
    assert rewards.is_json("a")(json.dumps({"b": 1})) == 0
    assert rewards.is_json()("[1]") == 0
    assert rewards.is_json()("[" * 100_000) == 0  # nested too deep is no JSON either
    assert [rewards.at_most(2)(text) for text in ("a b", "a b c", "a b c d", "a b c d e")] == [1, 0.5, 0, 0]


def test_rewards_combine() -> None:
    right, short = rewards.number(4), rewards.at_most(1)
    assert rewards.all_of(right, short)("It is 4") == 0
    assert rewards.weighted({right: 1.0, short: -0.5})("4") == 0.5
    gated = rewards.gated(rewards.matches(r"\d+"), right, otherwise=-1)
    assert [gated(text) for text in ("4", "5", "It is 4")] == [1, 0, -1]


@given(REWARDS)
def test_advantages_of_a_group_sum_to_nothing(given_rewards: list[float]) -> None:
    for made in (
        advantages.centred(given_rewards),
        advantages.centred(given_rewards, scaled=True),
        advantages.leave_one_out(given_rewards),
    ):
        assert np.isfinite(made).all()
        assert abs(made.sum()) < 1e-6


def test_advantages_by_hand() -> None:
    np.testing.assert_allclose(advantages.centred([1, 0, 0, 1]), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(advantages.centred([3, 1], scaled=True), [1, -1])
    np.testing.assert_allclose(advantages.centred([2, 2, 2], scaled=True), [0, 0, 0])
    np.testing.assert_allclose(advantages.leave_one_out([1, 0, 0]), [1, -0.5, -0.5])
    with pytest.raises(ValueError, match="no others"):
        advantages.leave_one_out([1.0])
    assert advantages.has_spread([0, 1e-3])
    assert not advantages.has_spread([0.1 + 0.2, 0.3])


def test_gae_is_the_return_at_one_and_the_td_error_at_zero() -> None:
    earned, values = [1.0, 0.0, 2.0], [0.5, 1.0, -1.0]
    returns = np.array([3.0, 2.0, 2.0])
    np.testing.assert_allclose(advantages.gae(earned, values, decay=1.0), returns - values)
    np.testing.assert_allclose(
        advantages.gae(earned, values, discount=0.9, decay=0.0),
        [1 + 0.9 * 1.0 - 0.5, 0 + 0.9 * -1.0 - 1.0, 2.0 + 1.0],
    )
    with pytest.raises(ValueError, match="one of each"):
        advantages.gae([1.0], [])
