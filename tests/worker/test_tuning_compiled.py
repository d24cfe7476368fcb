"""Single-tenant runs whose layers are compiled: the numbers are those of layers that are not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.worker import tiny
from tests.worker.one_call import as_on_a_gpu
from tests.worker.test_tuning import (
    ADAM,
    assert_equal,
    assert_gradients_equal,
    engine_of,
    plain,
    request,
    sampled,
    torch_step,
    trained,
)
from tests.worker.test_tuning_methods import spec_of
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import Failure, Work
from tinsmith_worker.tuning.engine import FULL, TunedEngine, TunedSampler


@pytest.fixture(scope="module")
def engine() -> Iterator[TunedEngine]:
    """Ready, as a worker's is on a GPU. What is compiled now is all that may be."""
    with as_on_a_gpu():
        engine = engine_of()
        engine.base.can_compile, engine.base.pass_tokens = True, 400
        engine.warm_up()
        assert engine.base.is_compiled
        programs = counters["stats"]["unique_graphs"]
        yield engine
        assert counters["stats"]["unique_graphs"] == programs


@pytest.mark.parametrize(
    "keeping", [Keeping(), Keeping(lean_layers=1), Keeping(recomputed_layers=1, lean_layers=1)], ids=str
)
def test_runs_that_take_turns_equal_a_plain_loop(engine: TunedEngine, keeping: Keeping) -> None:
    engine.base.keeping = keeping
    runs = ("one", "two")
    models = {run: plain() for run in runs}
    optimizers = {run: torch.optim.AdamW(model.parameters()) for run, model in models.items()}
    for run in runs:
        engine.create(run, FULL)
    for number in range(3):
        for run, loss, seed in (("one", "cross_entropy", 0), ("two", "ppo", 10)):
            given = tiny.batch(loss, (7, 30, 12, 51)[: 2 + number], seed=seed + number)
            output = engine.forward_backward([Work(run, given)])[0]
            assert engine.base.kept == keeping
            expected = tiny.reference(models[run], given)
            assert tiny.worst(output.logprobs_TK, expected.logprobs) <= 1e-5
            assert_gradients_equal(engine, expected.gradients, run)
            metrics = tiny.step(engine, run, ADAM)
            assert not isinstance(metrics, Failure)
            assert metrics["grad_norm"] == pytest.approx(
                torch_step(models[run], optimizers[run], ADAM), rel=1e-5
            )
    for run in runs:
        state, parameters = engine.state(run), dict(models[run].named_parameters())
        for name, found in tiny.tensors(state, state.weights).items():
            assert tiny.worst(found, parameters[name].detach()) <= 1e-5, name
        engine.drop(run)
    engine.base.keeping = None


def test_a_method_of_peft_has_the_bits_it_has_without_and_leaves_the_layers_compiled(
    engine: TunedEngine,
) -> None:
    other = engine_of()
    for one in (engine, other):
        one.create("dora", spec_of("dora"))
        assert one.base.is_compiled == (one is engine)
    assert_equal(trained(engine, run_id="dora"), trained(other, run_id="dora"))
    engine.create("run", FULL)
    trained(engine)
    assert engine.base.runs_compiled


def test_samples_are_those_of_layers_that_are_not_compiled(engine: TunedEngine) -> None:
    found = []
    for one in (engine, engine_of()):
        one.create("run", FULL)
        trained(one, 1)
        sampler = TunedSampler(one.base)
        sampler.hold("then", one.frozen("run"))
        trained(one, 1)
        asked = [request(f"r{held}", held, prompt_logprobs=True) for held in ("", "then")]
        found.append(sampled(sampler, *asked))
    for name, sequences in found[0].items():
        for (tokens, logprobs), (expected, theirs) in zip(sequences, found[1][name], strict=True):
            assert tokens == expected
            assert tiny.worst(torch.tensor(logprobs), torch.tensor(theirs)) <= 1e-5


def test_where_the_compiler_fails_layers_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **others: Any) -> Any:
        def run(*given: Any, **others: Any) -> Any:
            raise RuntimeError("no such kernel, say")

        return run

    states = []
    for fails in (False, True):
        engine = engine_of()
        if fails:
            monkeypatch.setattr(torch, "compile", broken)
            engine.base.can_compile = True
            engine.warm_up()
            assert not engine.base.is_compiled
        engine.create("run", FULL)
        states.append(trained(engine))
    assert_equal(*states)
