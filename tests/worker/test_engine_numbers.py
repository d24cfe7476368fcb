"""The engine's logprobs, losses and gradients against transformers + PEFT and autograd, float32."""

from typing import Any

import numpy as np
import pytest

from tests.worker import tiny
from tinsmith.wire.batch import TrainInput
from tinsmith.wire.losses import LOSSES
from tinsmith_worker.contract import LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base

TOLERANCE = 1e-5
# Wide clips for some losses, so that rows fall on either side.
SETTINGS = {
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "stable_reinforce": {"kl_coeff": 0.3},
}


def assert_equals_peft(
    model: Any, base: Base, spec: LoraSpec, given: TrainInput, **engine_settings: int
) -> None:
    engine = TorchEngine(base, EngineSettings(**engine_settings))
    engine.restore("run", tiny.trained(base, spec))
    output = engine.forward_backward([Work("run", given)])[0]
    state = engine.state("run")
    assert state.gradient is not None
    expected = tiny.reference(tiny.peft(model, state), given)
    assert tiny.worst(output.logprobs_TK, expected.logprobs) <= TOLERANCE
    assert tiny.worst(output.losses_T, expected.losses) <= TOLERANCE
    gradients = tiny.tensors(state, state.gradient)
    assert {tiny.peft_name(name) for name in gradients} == set(expected.gradients)
    for name, found in gradients.items():
        assert tiny.worst(found, expected.gradients[tiny.peft_name(name)]) <= TOLERANCE, name
        assert np.abs(found).max() > 1e-4, f"{name}: too small to compare"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_losses_and_gradients_equal_transformers_with_peft(family: str, tied: bool) -> None:
    base = tiny.base(family, tied=tied)
    assert_equals_peft(tiny.model(family, tied=tied), base, LoraSpec(8, 0), tiny.batch())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_equals_autograd_through_peft(loss: str) -> None:
    given = tiny.batch(loss, **SETTINGS.get(loss, {}))
    assert_equals_peft(tiny.model(), tiny.base(), LoraSpec(4, 0), given)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(1, 0),
        LoraSpec(24, 0, train_unembed=False),
        LoraSpec(8, 0, train_mlp=False, train_unembed=False),
        LoraSpec(8, 0, train_attn=False),
        LoraSpec(8, 0, train_attn=False, train_mlp=False),
    ],
    ids=str,
)
def test_any_rank_and_any_targets_equal_peft(spec: LoraSpec) -> None:
    assert_equals_peft(tiny.model(), tiny.base(), spec, tiny.batch("ppo"))


def test_two_dimensional_targets_each_count_with_their_own_weight() -> None:
    given = tiny.batch(width=5)
    given.targets_TK[3] = 11  # one word named five times in a row
    assert_equals_peft(tiny.model(), tiny.base(), LoraSpec(8, 0), given)


def test_targets_of_weight_zero_change_nothing_but_their_own_logprob() -> None:
    wide, narrow = tiny.batch(width=3, seed=5), tiny.batch(width=0, seed=5)
    wide.targets_TK[:, :1], wide.columns["weights"][:, :1] = narrow.targets_TK, narrow.columns["weights"]
    wide.columns["weights"][:, 1:] = 0
    wide.tokens_T[:] = narrow.tokens_T
    engine = TorchEngine(tiny.base())
    results = []
    for run, given in (("wide", wide), ("narrow", narrow)):
        engine.create(run, LoraSpec(8, 1))
        output = engine.forward_backward([Work(run, given)])[0]
        results.append((output.losses_T, output.logprobs_TK[:, 0], engine.state(run).gradient))
    for found, expected in zip(*results, strict=True):
        assert tiny.worst(found, expected) <= 1e-6


def test_an_operation_in_pieces_and_chunks_equals_peft() -> None:
    base = tiny.base()
    base.head.chunk_rows = 7
    given = tiny.batch("gspo", lengths=(20, 9, 31, 50, 3, 22), **SETTINGS["gspo"])
    assert_equals_peft(tiny.model(), base, LoraSpec(8, 0), given, max_tokens_per_pass=33)


def test_negative_and_zero_sum_weights_are_not_normalised() -> None:
    """A server that divides by the sum of the weights breaks client-side losses, whose weights are -dC/dlogprob."""
    given = tiny.batch(lengths=(10,))
    given.columns["weights"][:] = -1
    assert_equals_peft(tiny.model(), tiny.base(), LoraSpec(8, 0), given)


def test_gradients_accumulate_over_operations() -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    batches = [tiny.batch(seed=1), tiny.batch("dro", seed=2)]
    for run in ("one", "two", "both"):
        engine.restore(run, tiny.trained(base, LoraSpec(8, 0)))
    engine.forward_backward([Work("one", batches[0])])
    engine.forward_backward([Work("two", batches[1])])
    engine.forward_backward([Work("both", batches[0])])
    engine.forward_backward([Work("both", batches[1])])
    one, two, both = (engine.state(run).gradient for run in ("one", "two", "both"))
    assert one is not None
    assert two is not None
    assert tiny.worst(both, one + two) <= 1e-6
