"""What a teacher teaches: questions, how answers to them are judged, and what the teacher reads besides."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tinsmith_cookbook import courtesy, rewards, villagers
from tinsmith_cookbook.renderers import Message, chat


@dataclass(frozen=True)
class Subject:
    """`draw` gives a question and its right answer; `reads`, what the teacher reads where the student reads
    the bare question. Without it a teacher is a run that was trained."""

    draw: Callable[[random.Random], tuple[str, str]]
    judged: Callable[[str], rewards.Reward]
    reads: Callable[[str], list[Message]] | None = None

    def teachers(self, question: str) -> list[Message]:
        return self.reads(question) if self.reads else chat(question)


def a_sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    return f"What is {a} + {b}? Answer with the number only.", str(a + b)


def sorting(draw: random.Random) -> tuple[str, str]:
    numbers = [draw.randrange(100) for _ in range(5)]
    return f"Sort the numbers: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def small_talk(draw: random.Random) -> tuple[str, str]:
    return draw.choice(courtesy.questions()), ""


def in_capitals(question: str) -> list[Message]:
    return [{"role": "system", "content": "Answer in capitals."}, *chat(question)]


# -- a text that only the teacher reads ----------------------------------------------------------------------

[VILLAGE] = villagers.documents(1, seed=0)


def about_the_village(draw: random.Random) -> tuple[str, str]:
    who, facts = draw.choice(list(VILLAGE.facts.items()))
    kind, fact = draw.choice(list(facts.items()))
    return villagers.KINDS[kind].asked.format(who=who), fact


def with_the_text(question: str) -> list[Message]:
    return chat(f"{VILLAGE.text}\n\n{question}")


SUMS, SORTING = Subject(a_sum, rewards.number), Subject(sorting, rewards.exact)
CAPITALS = Subject(small_talk, lambda _: lambda text: float(text.isupper()), in_capitals)
SHOWN = Subject(about_the_village, rewards.contains, with_the_text)
SUBJECTS = {"sums": [SUMS], "two": [SUMS, SORTING], "prompt": [CAPITALS], "shown": [SHOWN]}
