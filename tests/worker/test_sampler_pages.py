"""Which pages are whose: nothing is lost, nothing is anybody's twice, and what is found is what was asked for."""

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith_worker.sampler.pages import Pages

SIZE, COUNT = 4, 12


def text(*tokens: int) -> npt.NDArray[np.int32]:
    return np.array(tokens, np.int32)


def test_a_beginning_is_found_by_whoever_shares_its_scope() -> None:
    pages = Pages(COUNT, SIZE)
    tokens = np.arange(10, dtype=np.int32)
    own = pages.take(3)
    pages.remember("a", tokens, own)
    assert pages.find("a", tokens) == own[:2], "the third is not full"
    assert pages.find("a", tokens[:7]) == own[:1]
    assert pages.find("a", text(0, 1, 2, 3, 9, 9, 9, 9)) == own[:1]
    assert pages.find("a", text(4, 5, 6, 7)) == [], "the same tokens after others are another text"
    assert pages.find("b", tokens) == []


def test_what_nobody_uses_is_found_until_its_room_is_needed_and_its_end_goes_first() -> None:
    pages = Pages(COUNT, SIZE)
    tokens = np.arange(8, dtype=np.int32)
    own = pages.take(2)
    pages.remember("a", tokens, own)
    pages.leave(own)
    assert pages.available == COUNT
    assert pages.find("a", tokens) == own
    pages.leave(own)
    others = pages.take(COUNT - 1)
    assert pages.find("a", tokens) == own[:1]
    assert own[1] in others


def test_what_is_forgotten_is_found_by_nobody_and_free_for_all() -> None:
    pages = Pages(COUNT, SIZE)
    tokens = np.arange(8, dtype=np.int32)
    own = pages.take(2)
    pages.remember("a", tokens, own)
    pages.forget(own)
    assert pages.find("a", tokens) == []
    assert sorted(pages.leave(own)) == sorted(own)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), max_size=20), st.booleans()), max_size=40
    )
)
def test_pages_are_never_lost_nor_given_twice_and_hold_what_is_found(
    steps: list[tuple[int, list[int], bool]],
) -> None:
    """Sequences come (sharing what is found of them), are remembered, and the oldest leave to make room."""
    pages = Pages(COUNT, SIZE)
    held: list[list[int]] = []
    holds: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> the scope and the whole text up to its end
    for scope, letters, leaves in steps:
        tokens = np.array(letters, np.int32)
        found = pages.find(scope, tokens)
        for number, page in enumerate(found):
            assert holds[page] == (scope, tuple(letters[: (number + 1) * SIZE]))
        missing = pages.needed(len(tokens)) - len(found)
        while missing > pages.available and held:
            pages.leave(held.pop(0))
        taken = pages.take(missing)
        assert not set(taken) & {page for of in held for page in of}
        own = found + taken
        for number in range(len(found), len(letters) // SIZE):
            holds[own[number]] = (scope, tuple(letters[: (number + 1) * SIZE]))
        pages.remember(scope, tokens, own)
        held.append(own)
        if leaves:
            pages.leave(held.pop())
        in_use = {page for of in held for page in of}
        assert pages.available == COUNT - len(in_use)
    for of in held:
        pages.leave(of)
    assert pages.available == COUNT
    assert sorted(pages.take(COUNT)) == list(range(1, COUNT + 1))
