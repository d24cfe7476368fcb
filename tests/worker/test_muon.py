"""Muon against its closed form, in double precision, and against torch's own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith_worker import checkpoints
from tinsmith_worker.contract import AdamParams, Failure, LoraSpec, MuonParams, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.muon import orthogonal


def closed_form(matrix: np.ndarray) -> np.ndarray:
    """U f(f(f(f(f(s / |s|))))) Vᵀ by the singular values: the iteration acts on them alone."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / max(np.sqrt((s**2).sum()), 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ vt


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (16, 16), (1, 5), (7, 1)])
def test_matrices_become_what_the_quintic_makes_of_their_singular_values(shape: tuple[int, int]) -> None:
    matrices = np.random.default_rng(3).normal(size=(4, *shape)).astype(np.float32)
    matrices[3] = 0
    found = orthogonal(torch.from_numpy(matrices)).numpy()
    for ours, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(ours, closed_form(matrix), atol=2e-6)
    assert not found[3].any()
    # Nearly orthogonal: every singular value is near 1.
    values = np.linalg.svd(found[0], compute_uv=False)
    assert 0.6 < values.min() <= values.max() < 1.3


CASES = {
    "defaults": MuonParams(learning_rate=1e-2),
    "without nesterov, with decay": MuonParams(1e-2, momentum=0.8, nesterov=False, weight_decay=0.3),
    "clipped": MuonParams(3e-3, momentum=0.9, grad_clip_norm=0.05),
}


@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_steps_equal_the_formula_in_double_precision(params: MuonParams) -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    before = engine.state("run")
    weights = {n: t.astype(np.float64) for n, t in tiny.tensors(before, before.weights).items()}
    momenta = {name: np.zeros_like(values) for name, values in weights.items()}
    for number in range(3):
        engine.forward_backward([Work("run", tiny.batch(seed=number))])
        state = engine.state("run")
        gradients = {n: g.astype(np.float64) for n, g in tiny.tensors(state, state.gradient).items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        scale = min(1.0, params.grad_clip_norm / (norm + 1e-6)) if params.grad_clip_norm else 1.0
        metrics = tiny.step(engine, "run", params)
        assert not isinstance(metrics, Failure)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["optimizer_step"] == number + 1
        for name, gradient in gradients.items():
            momenta[name] = params.momentum * momenta[name] + (1 - params.momentum) * gradient * scale
            update = momenta[name]
            if params.nesterov:
                update = params.momentum * update + (1 - params.momentum) * gradient * scale
            rows, columns = gradient.shape
            size = params.learning_rate * math.sqrt(max(1.0, rows / columns))
            decayed = weights[name] * (1 - params.learning_rate * params.weight_decay)
            weights[name] = decayed - size * closed_form(update)
    state = engine.state("run")
    assert state.moment2 is None
    assert state.gradient is None
    for name, found in tiny.tensors(state, state.weights).items():
        assert tiny.worst(found, weights[name]) <= 2e-6, name


def test_every_expert_s_matrix_is_made_orthogonal_by_itself() -> None:
    base = tiny.base("qwen3_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    engine.forward_backward([Work("run", tiny.batch(lengths=(30, 40)))])
    before = engine.state("run")
    assert isinstance(tiny.step(engine, "run", MuonParams(1e-2, momentum=0.0)), dict)
    gradients = tiny.tensors(before, before.gradient)
    old, new = (tiny.tensors(state, state.weights) for state in (before, engine.state("run")))
    stacks = [name for name, tensor in old.items() if tensor.ndim == 3 and len(tensor) == 6]
    assert len(stacks) == 6  # of either layer, the inner side of gate, up and down
    for name in stacks:
        rows, columns = old[name].shape[1:]
        size = 1e-2 * math.sqrt(max(1.0, rows / columns))
        for step, gradient in zip(old[name] - new[name], gradients[name], strict=True):
            np.testing.assert_allclose(step, size * closed_form(np.asarray(gradient)), atol=1e-6)


def test_it_is_torch_s_muon_up_to_the_rounding_of_bfloat16() -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(8, 0)))
    before = engine.state("run")
    theirs = [torch.tensor(t).requires_grad_() for t in tiny.tensors(before, before.weights).values()]
    optimizer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95)
    for number in range(2):
        engine.forward_backward([Work("run", tiny.batch(seed=number))])
        state = engine.state("run")
        for tensor, gradient in zip(theirs, tiny.tensors(state, state.gradient).values(), strict=True):
            tensor.grad = torch.tensor(gradient)
        optimizer.step()
        tiny.step(engine, "run", MuonParams(1e-2, weight_decay=0.1))
    state = engine.state("run")
    moved = 0.0
    for tensor, ours, old in zip(
        theirs,
        tiny.tensors(state, state.weights).values(),
        tiny.tensors(before, before.weights).values(),
        strict=True,
    ):
        step = tensor.detach().numpy() - old
        assert np.linalg.norm(ours - old - step) <= 0.02 * np.linalg.norm(step)
        moved += float(np.linalg.norm(step))
    assert moved > 0.1


def test_a_run_saved_and_restored_goes_on_bit_for_bit() -> None:
    base = tiny.base()
    engine = TorchEngine(base, EngineSettings(deterministic=True))
    engine.restore("straight", tiny.trained(base, LoraSpec(4, 1)))
    params = MuonParams(1e-2)

    def train(run_id: str, seeds: range) -> None:
        for seed in seeds:
            engine.forward_backward([Work(run_id, tiny.batch(seed=seed))])
            tiny.step(engine, run_id, params)

    train("straight", range(2))
    engine.forward_backward([Work("straight", tiny.batch(seed=9))])  # a gradient is carried over too
    engine.restore("resumed", checkpoints.read(checkpoints.write(engine.state("straight"), "base")))
    for run_id in ("straight", "resumed"):
        tiny.step(engine, run_id, params)
        train(run_id, range(2, 4))
    ours, theirs = engine.state("resumed"), engine.state("straight")
    np.testing.assert_array_equal(ours.weights, theirs.weights)
    np.testing.assert_array_equal(ours.moment1, theirs.moment1)
    assert ours.step == theirs.step == 5


def test_steps_of_several_optimizers_at_once_are_those_of_each_alone() -> None:
    base = tiny.base()
    engine = TorchEngine(base, EngineSettings(deterministic=True))
    steps = [("a", MuonParams(1e-2)), ("b", AdamParams(1e-2)), ("c", MuonParams(3e-3, momentum=0.5))]

    def begin(run_id: str) -> None:
        engine.restore(run_id, tiny.trained(base, LoraSpec(4, 1), seed=ord(run_id)))
        engine.forward_backward([Work(run_id, tiny.batch(seed=ord(run_id)))])

    for run_id, _ in steps:
        begin(run_id)
    engine.optim_steps(steps)
    together = {run_id: engine.state(run_id).weights for run_id, _ in steps}
    for run_id, params in steps:
        begin(run_id)
        engine.optim_steps([(run_id, params)])
        np.testing.assert_array_equal(engine.state(run_id).weights, together[run_id])


@pytest.mark.parametrize(
    "bad",
    [{"learning_rate": 1e38}, {"learning_rate": float("nan")}, {"momentum": 1.0}, {"weight_decay": 1e39}],
)
def test_parameters_that_float32_cannot_compute_with_fail_the_step_alone(bad: dict[str, float]) -> None:
    base = tiny.base()
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, LoraSpec(4, 1)))
    engine.forward_backward([Work("run", tiny.batch())])
    before = engine.state("run")
    assert isinstance(tiny.step(engine, "run", replace(MuonParams(1e-2), **bad)), Failure)
    after = engine.state("run")
    np.testing.assert_array_equal(before.weights, after.weights)
    np.testing.assert_array_equal(before.gradient, after.gradient)
