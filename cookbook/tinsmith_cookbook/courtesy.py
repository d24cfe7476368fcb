"""A toy of taste: small talk and easy questions, and a rater who likes warm answers.

The rater is a rule, so that what a learnt judge or reward model believes can be held against it.
"""

import random
import re
from collections.abc import Mapping

from tinsmith_cookbook.rewards import Reward, at_most, matches, weighted

_KIND = r"thank|glad|happy|hope|sorry|pleasure|nice|welcome|of course|wonderful|great|good question"

RUBRIC: Mapping[str, tuple[Reward, float]] = {
    "says something kind": (lambda text: float(bool(re.search(_KIND, text, re.IGNORECASE))), 0.4),
    "asks back or offers help": (lambda text: float("?" in text), 0.3),
    "is a whole sentence": (matches(r"[A-Z].*[.!?]"), 0.2),
    "is not long": (at_most(25), 0.1),
}
warmth: Reward = weighted(dict(RUBRIC.values()))
"""0 to 1."""

_CAPITALS = """Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Germany Berlin, Belgium Brussels,
Turkey Ankara, Russia Moscow, Morocco Rabat, Australia Canberra, Brazil Brasilia, Thailand Bangkok, Vietnam
Hanoi"""
_OPPOSITES = "hot cold, big small, old new, fast slow, happy sad, day night, open closed, full empty"
_TALK = (
    "Hello!",
    "Hi",
    "Good morning!",
    "How are you?",
    "How are you today?",
    "Who are you?",
    "What is your name?",
    "Thank you!",
    "Thanks a lot!",
    "Goodbye!",
    "Can you help me?",
    "I need help.",
    "What can you do?",
    "I am sad.",
    "I had a bad day.",
    "I am happy today!",
    "I had a great day.",
    "What should I do today?",
    "I am bored.",
    "Tell me a story in one sentence.",
)


def questions(seed: int = 0) -> list[str]:
    """All of them, in an order of the seed."""
    every = list(_TALK)
    every += [f"What is the capital of {land}?" for land, _ in _pairs(_CAPITALS)]
    every += [f"What is the opposite of {word}?" for word, _ in _pairs(_OPPOSITES)]
    random.Random(seed).shuffle(every)
    return every


def facts() -> list[tuple[str, str]]:
    """The questions among them that have one right answer, and that."""
    return [
        *((f"What is the capital of {land}?", capital) for land, capital in _pairs(_CAPITALS)),
        *((f"What is the opposite of {word}?", other) for word, other in _pairs(_OPPOSITES)),
    ]


def demonstrations(count: int, seed: int) -> list[tuple[str, str]]:
    """What people might write: right answers in the manners of several of them."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        land, capital = draw.choice(_pairs(_CAPITALS))
        word, other = draw.choice(_pairs(_OPPOSITES))
        question, full = draw.choice(
            (
                (f"What is the capital of {land}?", f"The capital of {land} is {capital}."),
                (f"What is the opposite of {word}?", f"The opposite of {word} is {other}."),
            )
        )
        said = draw.choice(
            ("{}", "{} I hope that helps.", "Good question! {}", "{} Can I help you with more?")
        )
        made.append((question, said.format(full)))
    return made


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(a, b) for a, b in map(str.split, text.split(","))]
