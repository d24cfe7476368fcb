"""optim_step against torch.optim.AdamW on PEFT's parameters, and what it does with gradients it cannot use."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith_worker.contract import AdamParams, Failure, LoraSpec, Work
from tinsmith_worker.engine import TorchEngine

PLAIN = AdamParams(learning_rate=1e-2)
CASES = {
    "defaults": [PLAIN] * 3,
    # eps well above the rounding of the gradients: else elements near 0 take a step of either sign.
    "every field, another one each step": [
        AdamParams(1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.5),
        AdamParams(3e-3, beta1=0.95, beta2=0.999, eps=1e-2, weight_decay=0.3, grad_clip_norm=0.1),
        AdamParams(1e-3, beta1=0.0, beta2=0.5, eps=1e-1, weight_decay=0.0, grad_clip_norm=0.0),
    ],
    "a clip that does not bind": [replace(PLAIN, grad_clip_norm=1e6)],
}


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_steps_equal_torch_adamw_on_peft(steps: list[AdamParams]) -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    model = tiny.peft(tiny.model(), engine.state("run"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for number, params in enumerate(steps):
        given = tiny.batch(seed=number)
        engine.forward_backward([Work("run", given)])
        metrics = tiny.step(engine, "run", params)
        tiny.reference(model, given)
        norm = torch.nn.utils.clip_grad_norm_(trained, params.grad_clip_norm or float("inf"))
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        optimizer.step()
        assert not isinstance(metrics, Failure)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["optimizer_step"] == number + 1
        assert metrics["learning_rate"] == params.learning_rate
    state = engine.state("run")
    parameters = dict(model.named_parameters())
    for name, found in tiny.tensors(state, state.weights).items():
        assert tiny.worst(found, parameters[tiny.peft_name(name)].detach()) <= 1e-5, name


def test_a_step_has_torch_adamws_bits() -> None:
    """With the gradients given, no tolerance."""
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    before = engine.state("run")
    tensors = [torch.tensor(t).requires_grad_() for t in tiny.tensors(before, before.weights).values()]
    optimizer = torch.optim.AdamW(
        tensors, lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1, fused=True
    )
    for number in range(2):
        engine.forward_backward([Work("run", tiny.batch(seed=number))])
        state = engine.state("run")
        for tensor, gradient in zip(tensors, tiny.tensors(state, state.gradient).values(), strict=True):
            tensor.grad = torch.tensor(gradient)
        optimizer.step()
        tiny.step(engine, "run", AdamParams(1e-2, weight_decay=0.1))
    after = engine.state("run")
    for tensor, found in zip(tensors, tiny.tensors(after, after.weights).values(), strict=True):
        assert np.array_equal(tensor.detach().numpy(), found)


def test_the_gradient_is_gone_after_a_step() -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    engine.forward_backward([Work("run", tiny.batch())])
    assert engine.state("run").gradient is not None
    tiny.step(engine, "run", PLAIN)
    assert engine.state("run").gradient is None
    metrics = tiny.step(engine, "run", PLAIN)
    assert isinstance(metrics, dict)
    assert metrics["grad_norm"] == 0


def test_a_step_without_a_gradient_is_a_step_on_zeros() -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    engine.forward_backward([Work("run", tiny.batch())])
    tiny.step(engine, "run", PLAIN)
    before = engine.state("run")
    tiny.step(engine, "run", PLAIN)
    after = engine.state("run")
    assert after.step == 2
    assert before.moment1 is not None
    assert np.allclose(after.moment1, 0.9 * before.moment1, rtol=1e-6)
    assert not np.array_equal(before.weights, after.weights)  # the momentum still moves them


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_fails_the_step_and_changes_nothing(value: float) -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    engine.forward_backward([Work("run", tiny.batch())])
    tiny.step(engine, "run", PLAIN)
    before = engine.state("run")
    bad = tiny.batch()
    bad.columns["weights"][5] = value
    engine.forward_backward([Work("run", bad)])
    answer = tiny.step(engine, "run", PLAIN)
    assert isinstance(answer, Failure)
    assert answer.category == "user"
    assert "not finite" in answer.message
    after = engine.state("run")
    assert after.step == before.step
    assert after.gradient is None
    assert np.array_equal(after.weights, before.weights)
    assert np.array_equal(after.moment1, before.moment1)
    assert np.array_equal(after.moment2, before.moment2)
    engine.forward_backward([Work("run", tiny.batch())])
    assert isinstance(tiny.step(engine, "run", PLAIN), dict)


def test_runs_that_step_together_equal_each_by_itself_and_a_bad_gradient_fails_alone() -> None:
    bad = tiny.batch()
    bad.columns["weights"][5] = np.nan
    given = {"one": tiny.batch(seed=1), "bad": bad, "two": tiny.batch("dro", seed=2)}
    params = {"one": PLAIN, "bad": PLAIN, "two": AdamParams(3e-3, beta1=0.5, weight_decay=0.2)}
    found = []
    for together in (True, False):
        engine = TorchEngine(tiny.base())
        for number, (run, batch) in enumerate(given.items()):
            engine.create(run, LoraSpec(8, number))
            engine.forward_backward([Work(run, batch)])
        if together:
            answers = engine.optim_steps(list(params.items()))
        else:
            answers = [tiny.step(engine, run, of_run) for run, of_run in params.items()]
        assert [isinstance(answer, Failure) for answer in answers] == [False, True, False]
        found.append([answers[0], answers[2], *(engine.state(run).weights for run in given)])
    for a, b in zip(*found, strict=True):
        assert a == b if isinstance(a, dict) else np.array_equal(a, b)


def test_an_eps_of_zero_is_refused_with_a_sentence() -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    answer = tiny.step(engine, "run", replace(PLAIN, eps=0.0))
    assert isinstance(answer, Failure)
    assert "eps" in answer.message


@pytest.mark.parametrize(
    "params, named",
    [
        (replace(PLAIN, eps=1e-46), "eps"),
        (replace(PLAIN, eps=float("nan")), "eps"),
        (replace(PLAIN, eps=1e39), "eps"),
        (AdamParams(3.5e37), "learning_rate"),
        (AdamParams(float("nan")), "learning_rate"),
        (AdamParams(1e30, weight_decay=1e30), "weight_decay"),
        (AdamParams(1e-4, weight_decay=float("inf")), "weight_decay"),
        (replace(PLAIN, beta1=1.0), "beta1"),
        (replace(PLAIN, beta2=1.5), "beta2"),
    ],
    ids=str,
)
def test_parameters_that_float32_cannot_compute_with_fail_the_step_and_leave_even_the_gradient(
    params: AdamParams, named: str
) -> None:
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    engine.forward_backward([Work("run", tiny.batch())])
    before = engine.state("run")
    answer = tiny.step(engine, "run", params)
    assert isinstance(answer, Failure)
    assert (answer.category, named in answer.message) == ("user", True)
    after = engine.state("run")
    assert (after.step, after.moment1, after.moment2) == (0, None, None)
    assert np.array_equal(after.weights, before.weights)
    assert before.gradient is not None
    assert np.array_equal(after.gradient, before.gradient)
    assert isinstance(tiny.step(engine, "run", PLAIN), dict)


def test_steps_far_below_a_bfloat16_weights_resolution_add_up_in_the_masters() -> None:
    """The same training with the weights rounded after every step hardly gets anywhere."""
    given = tiny.batch(lengths=(30, 30))
    given.columns["weights"][:] = 1
    fall = {}
    for rounded in (False, True):
        engine = TorchEngine(tiny.base(dtype=torch.bfloat16))
        engine.restore("run", tiny.trained(engine.base, LoraSpec(8, 0)))
        weights = engine._adapters["run"].weights
        sums = []
        for _ in range(25):
            if rounded:
                weights.copy_(weights.bfloat16())
            sums.append(float(engine.forward_backward([Work("run", given)])[0].losses_T.sum()))
            tiny.step(engine, "run", AdamParams(5e-5))
        fall[rounded] = sums[0] - sums[-1]
    assert fall[False] > 1
    assert fall[False] > 2 * fall[True]


def test_who_has_left_leaves_no_memory_behind() -> None:
    """Between steps of others too: its slot may have been given away."""
    engine = TorchEngine(tiny.base())
    engine.create("run", LoraSpec(8, 0))
    engine.forward_backward([Work("run", tiny.batch())])
    tiny.step(engine, "run", PLAIN)
    adapter = weakref.ref(engine._adapters["run"])
    engine.drop("run")
    assert adapter() is None
