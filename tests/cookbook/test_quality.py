"""Checks of generated data."""

import random
from collections import Counter

import pytest

from tinsmith_cookbook import quality

WORDS = [
    "lamp",
    "river",
    "moon",
    "house",
    "tree",
    "road",
    "stone",
    "garden",
    "window",
    "letter",
    "sea",
    "snow",
    "train",
    "clock",
    "bread",
    "king",
]


def sentence(draw: random.Random, length: int = 20) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def test_duplicates_are_found_whatever_their_dress() -> None:
    draw = random.Random(0)
    texts = [sentence(draw) for _ in range(200)]
    changed = [texts[3].upper(), f"  {texts[7]}!! ", texts[11].replace("lamp", "lamps", 1)]
    assert quality.duplicates(texts) == set()
    assert quality.duplicates([*texts, *changed]) == {200, 201, 202}


def test_minhash_finds_what_comparing_all_pairs_finds() -> None:
    draw = random.Random(1)
    texts = [sentence(draw, 30) for _ in range(60)]
    for at in range(0, 60, 2):  # half of them anew with a word or three changed
        words = texts[at].split()
        for _ in range(draw.randrange(1, 4)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(" ".join(words))
    sets = [quality.shingles(text) for text in texts]
    kept: list[int] = []
    for at, own in enumerate(sets):
        if not any(quality.similarity(own, sets[other]) >= 0.8 for other in kept):
            kept.append(at)
    expected = set(range(len(texts))) - set(kept)
    assert len(expected) >= 5
    assert quality.duplicates(texts) == expected


def test_very_short_texts_have_a_shingle_too() -> None:
    assert quality.duplicates(["a", "b", "a!", ""]) == {2}


@pytest.mark.parametrize(
    "text, kind",
    [
        ("write to jo.doe+x@mail.example.org now", "e-mail"),
        ("at 192.168.0.255, they say", "IP address"),
        ("version 1.2.3.4.5", None),
        ("300.1.2.3", None),
        ("DE89 3704 0044 0532 0130 00", "IBAN"),
        ("DE89 3704 0044 0532 0130 02", None),
        ("4111 1111 1111 1111", "card number"),
        ("4111 1111 1111 1112", None),
        ("call +49 30 1234567", "phone number"),
        ("call 030-1234-567", "phone number"),
        ("0301234567", "phone number"),
        ("there are 1234567890 stars", None),
        ("It is 12 + 34 = 46 and 1 2 3 4", None),
        ("on 2024-05-17", None),
        ("a plain text", None),
    ],
)
def test_personal_data(text: str, kind: str | None) -> None:
    assert quality.personal(text) == kind


def test_balance_holds_for_what_is_left() -> None:
    rows = ["a"] * 80 + ["b"] * 15 + ["c"] * 5
    kept = Counter(quality.balanced(rows, str, most=0.5))
    assert kept == {"a": 20, "b": 15, "c": 5}
    assert quality.balanced(rows, str, most=1.0) == rows
    with pytest.raises(ValueError, match="3 kinds cannot"):
        quality.balanced(rows, str, most=0.3)


def test_each_row_falls_to_the_first_check_it_fails() -> None:
    rows = ["ok", "", "x@y.org", "too long by far"]
    kept, fallen = quality.sift(
        rows,
        [lambda r: None if r else "empty", quality.personal, lambda r: "long" if len(r) > 10 else None],
    )
    assert kept == ["ok"]
    assert fallen == {"empty": 1, "e-mail": 1, "long": 1}
