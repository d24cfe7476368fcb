"""Data that needs no download: rows made from a seed, in the forms that real files have."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinsmith_cookbook.data import Pair


def sums(count: int, seed: int, largest: int = 49) -> Iterator[tuple[int, int]]:
    """`count` different pairs of numbers."""
    every = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    yield from random.Random(seed).sample(every, count)


def json_reply(a: int, b: int) -> str:
    return json.dumps({"sum": f"{a} + {b}", "answer": a + b})


def json_alpaca(pairs: Iterable[tuple[int, int]]) -> list[dict[str, str]]:
    """Questions a small model can answer, answered in a form it has never seen; one for each of `sums`."""
    return [{"instruction": f"What is {a} + {b}?", "input": "", "output": json_reply(a, b)} for a, b in pairs]


def json_sharegpt(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """The same in conversations of two questions, so of every two pairs one."""
    return [
        {
            "conversations": [
                {"from": "human" if i % 2 == 0 else "gpt", "value": text}
                for a, b in pairs[2 * row : 2 * row + 2]
                for i, text in enumerate((f"What is {a} + {b}?", json_reply(a, b)))
            ]
        }
        for row in range(len(pairs) // 2)
    ]


_LONG = (
    "Good question! I am happy to help you with that. {a} + {b} makes {c}. So the answer is {c}.",
    "Let me see. {a} + {b} = {c}, so the answer is {c}.",
    "We want to know {a} + {b}. Working it out gives {c}. The answer is {c}.",
)


def brevity(count: int, seed: int) -> list[Pair]:
    """Right answers both, the short one preferred."""
    draw = random.Random(seed)
    return [
        Pair(
            [{"role": "user", "content": f"What is {a} + {b}?"}],
            f"The answer is {a + b}.",
            draw.choice(_LONG).format(a=a, b=b, c=a + b),
        )
        for a, b in sums(count, seed)
    ]


def write(file: Path, rows: list[Any]) -> Path:
    """As JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
