"""What a pass keeps of its activations, by the memory there is."""

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith_worker.activations import Activations, Keeping
from tinsmith_worker.contract import LoraSpec, Work
from tinsmith_worker.engine import TorchEngine

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


def test_after_a_pass_without_room_the_next_ones_keep_little_and_compute_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(4, 0))
    backward = engine.base.backward

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.base, "backward", no_room)
    with pytest.raises(MemoryError, match="no room"):
        engine.forward_backward([Work("run", tiny.batch())])
    monkeypatch.setattr(engine.base, "backward", backward)
    engine.create("run", LoraSpec(4, 0))
    engine.forward_backward([Work("run", tiny.batch())])
    assert engine.base.kept == Keeping(engine.base.activations.layers)
    found = engine.state("run").gradient
    fresh = TorchEngine(tiny.base())
    fresh.create("run", LoraSpec(4, 0))
    fresh.forward_backward([Work("run", tiny.batch())])
    expected = fresh.state("run").gradient
    assert found is not None
    assert expected is not None
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
