"""What a pass keeps of its activations, by the memory there is."""

import pytest

from tinsmith_worker.activations import Activations, Keeping

TOKENS = 1000


def known(*, always_lean: bool = False) -> Activations:
    """Ten layers of 150 bytes a token, 100 if lean."""
    activations = Activations(10, always_lean=always_lean)
    activations.learn(Keeping(), 10, 15_000)
    activations.learn(Keeping(lean_layers=10), 10, 10_000)
    return activations


def bytes_of(kept: Keeping) -> int:
    whole = 10 - kept.recomputed_layers - kept.lean_layers
    return TOKENS * (150 * whole + 100 * kept.lean_layers)


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (1500, Keeping()),
        (1499, Keeping(0, 1)),
        (1200, Keeping(0, 6)),
        (1000, Keeping(0, 10)),
        (999, Keeping(1, 9)),
        (250, Keeping(8, 2)),
        (0, Keeping(10, 0)),
        (-50, Keeping(10, 0)),
    ],
)
def test_no_more_is_made_anew_than_memory_asks_for(room: int, kept: Keeping) -> None:
    assert known().keeping(TOKENS, room * TOKENS) == kept
    assert bytes_of(kept) <= max(0, room) * TOKENS


def test_all_is_kept_while_nothing_is_known() -> None:
    assert Activations(10).keeping(TOKENS, 0) == Keeping()


def test_without_lean_layers_whole_ones_run_again() -> None:
    activations = Activations(10)
    activations.learn(Keeping(), 10, 15_000)
    assert activations.keeping(TOKENS, 1_500 * TOKENS) == Keeping()
    assert activations.keeping(TOKENS, 1_000 * TOKENS) == Keeping(4, 0)


@pytest.mark.parametrize("room", [10**9, 1200, 1000])
def test_in_deterministic_mode_layers_are_lean_whatever_memory_is_left(room: int) -> None:
    assert known(always_lean=True).keeping(TOKENS, room * TOKENS) == Keeping(0, 10)


def test_a_pass_of_mixed_layers_teaches_nothing() -> None:
    activations = known()
    activations.learn(Keeping(3, 2), 10, 1)
    assert activations == known()
