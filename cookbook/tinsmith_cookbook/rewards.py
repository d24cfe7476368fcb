"""Rewards that can be checked: each is a function from the text of an answer to a number, and they combine.

    reward = gated(matches(r"-?\\d+"), number("82"))

Nothing here runs what a model wrote.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal, InvalidOperation

Reward = Callable[[str], float]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


# -- reading an answer ------------------------------------------------------------------------------------


def last_number(text: str) -> Decimal | None:
    """The number an answer ends with: "so it is 1,082." is 1082. A minus counts where no digit, letter or
    closing bracket stands before it: the 2 of "4-2" is no -2."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    digits = found[-1][0].replace(",", "")
    if digits.startswith("-") and re.search(r"[\w)]$", text[: found[-1].start()]):
        digits = digits[1:]
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…}, braces inside included; None without one, or when it is not
    closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for at in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at]
    return None


def normalized(text: str) -> str:
    """Lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,!?;:\"'")


# -- rewards ----------------------------------------------------------------------------------------------


def number(wanted: str | float, *, tolerance: float = 0.0) -> Reward:
    """1 if the last number of the answer is `wanted`, compared as decimals and not as text."""
    target, allowed = Decimal(str(wanted)), Decimal(str(tolerance))

    def reward(text: str) -> float:
        found = last_number(text)
        return float(found is not None and abs(found - target) <= allowed)

    return reward


def exact(wanted: str | Collection[str]) -> Reward:
    """1 if the answer is (one of) `wanted`; case, spacing and outer punctuation do not count."""
    targets = {normalized(one) for one in ([wanted] if isinstance(wanted, str) else wanted)}
    return lambda text: float(normalized(text) in targets)


def contains(*words: str) -> Reward:
    """The share of `words` (or phrases) that occur in the answer, as whole words."""
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]
    return lambda text: sum(bool(pattern.search(text)) for pattern in patterns) / len(patterns)


def matches(pattern: str) -> Reward:
    """1 if the whole answer, outer space aside, has this form."""
    form = re.compile(pattern, re.DOTALL)
    return lambda text: float(form.fullmatch(text.strip()) is not None)


def is_json(*keys: str) -> Reward:
    """1 if the answer is a JSON object with exactly these keys; without keys, any JSON object."""

    def reward(text: str) -> float:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return 0.0
        return float(isinstance(value, dict) and (not keys or set(value) == set(keys)))

    return reward


def at_most(words: int) -> Reward:
    """1 up to that many words, then less by the share that is over: twice as many, and it is 0."""
    return lambda text: max(0.0, min(1.0, 2.0 - len(text.split()) / words))


# -- together ---------------------------------------------------------------------------------------------


def weighted(parts: Mapping[Reward, float]) -> Reward:
    """The weighted sum; weights may be negative, for penalties."""
    return lambda text: sum(weight * part(text) for part, weight in parts.items())


def all_of(*parts: Reward) -> Reward:
    """The product: one 0 makes it 0."""

    def reward(text: str) -> float:
        value = 1.0
        for part in parts:
            value *= part(text)
        return value

    return reward


def gated(gate: Reward, then: Reward, *, otherwise: float = 0.0) -> Reward:
    """`then` where the gate is open (above 0), else a fixed number: right answers in the wrong form earn
    that."""
    return lambda text: then(text) if gate(text) > 0 else otherwise
