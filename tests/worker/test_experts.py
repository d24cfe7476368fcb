"""Adapters on a mixture's experts, against the library's own model with the adapters multiplied out."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch._dynamo.utils import counters

from tests.worker import tiny
from tests.worker.one_call import as_on_a_gpu
from tinsmith.wire.batch import TrainInput
from tinsmith_worker import checkpoints
from tinsmith_worker.activations import Keeping
from tinsmith_worker.adapters import lay_out
from tinsmith_worker.contract import AdapterState, LoraSpec, SampleInput, SampleOutput, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import TorchSampler

# The first layer is dense. A rank of 8 makes 4 at an expert, 1 would make a half.
SHAPE = {
    "num_hidden_layers": 3, "mlp_only_layers": [0], "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
}  # fmt: skip
TENANTS = {
    "a": (LoraSpec(8, 1), tiny.batch(lengths=(20, 33), seed=1)),
    "b": (LoraSpec(3, 2, train_attn=False), tiny.batch("ppo", (47,), seed=2)),
    "attention": (LoraSpec(4, 3, train_mlp=False), tiny.batch(lengths=(9, 1), seed=3)),
    "c": (LoraSpec(16, 4, train_unembed=False), tiny.batch("gspo", (30, 5), seed=4)),
}


# Beside those that a token is sent to, these have an expert that all tokens meet.
WITH_SHARED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 40},
    "deepseek_v3": {
        "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


def model(family: str = "qwen3_moe") -> Any:
    return tiny.model(family, **SHAPE | WITH_SHARED.get(family, {}))


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(model())


def states(base: Base) -> dict[str, AdapterState]:
    return {run: tiny.trained(base, spec, seed=spec.seed) for run, (spec, _) in TENANTS.items()}


def trained(engine: TorchEngine, runs: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logprobs and gradient of each."""
    for run in runs:
        engine.restore(run, states(engine.base)[run])
    outputs = engine.forward_backward([Work(run, TENANTS[run][1]) for run in runs])
    found = {}
    for run, output in zip(runs, outputs, strict=True):
        gradient = engine.state(run).gradient
        assert gradient is not None
        found[run] = output.logprobs_TK, gradient
    return found


def reference(
    state: AdapterState, given: TrainInput, family: str = "qwen3_moe"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logprobs, and the gradient of every tensor of the adapter, by autograd through weights that hold it."""
    of = model(family).requires_grad_(False)
    of.set_experts_implementation("eager")
    leaves = {
        name: torch.from_numpy(values.copy()).requires_grad_()
        for name, values in tiny.tensors(state, state.weights).items()
    }
    weights = dict(of.named_parameters(remove_duplicate=False))
    for name in [name for name in leaves if ".lora_A." in name]:
        A, B = leaves[name], leaves[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").split(".lora_A")[0]
        module, _, projection = path.rpartition(".")
        delta = 32 / A.shape[-2] * (B @ A)  # a matrix shared by the experts spreads over them
        if not module.endswith(".experts"):
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
        elif projection == "down_proj":
            weights[f"{module}.down_proj"] = weights[f"{module}.down_proj"] + delta
        else:
            gate, up = weights[f"{module}.gate_up_proj"].chunk(2, 1)
            both = (gate + delta, up) if projection == "gate_proj" else (gate, up + delta)
            weights[f"{module}.gate_up_proj"] = torch.cat(both, 1)
    logprobs, start = [], 0
    for length in given.lengths_S.tolist():
        rows = slice(start, start + length)
        tokens = torch.from_numpy(given.tokens_T[rows].astype(np.int64))[None]
        kwargs = {"input_ids": tokens, "use_cache": False}
        logits = torch.func.functional_call(of, weights, kwargs=kwargs, tie_weights=False).logits[0]
        lp = logits.log_softmax(1).gather(1, torch.from_numpy(given.targets_TK[rows]))
        columns = {name: torch.from_numpy(column[rows]) for name, column in given.columns.items()}
        tiny.loss_by_autograd(given.loss, lp, columns).sum().backward(retain_graph=True)
        logprobs.append(lp.detach())
        start += length
    return torch.cat(logprobs), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("run", TENANTS)
def test_logprobs_and_gradients_are_those_of_weights_that_hold_the_adapter(base: Base, run: str) -> None:
    equals_reference(base, run, "qwen3_moe")


@pytest.mark.parametrize("family", WITH_SHARED)
def test_an_expert_that_all_tokens_meet_is_trained_and_sampled_like_any_linear_map(family: str) -> None:
    shared = Base(model(family))
    names = [site.name for site in shared.sites]
    assert any("layers.1.mlp.shared_expert" in name and name.endswith(".up_proj") for name in names)
    assert not any("shared_expert_gate" in name for name in names)
    for run in ("a", "b"):
        equals_reference(shared, run, family)
    says_what_a_forward_says(shared)


def equals_reference(of: Base, run: str, family: str) -> None:
    logprobs, gradient = trained(TorchEngine(of), list(TENANTS))[run]
    state = states(of)[run]
    expected, gradients = reference(state, TENANTS[run][1], family)
    assert tiny.worst(logprobs, expected) < 2e-5
    found = tiny.tensors(state, gradient)
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert tiny.worst(found[name], wanted) < 5e-5, name


def test_an_experts_rank_is_the_runs_over_the_experts_a_token_meets_and_the_outer_side_is_shared(
    base: Base,
) -> None:
    shapes = {
        name.split(".mlp.")[1].removesuffix(".weight"): shape
        for name, _, shape in lay_out(LoraSpec(8, 0), base.sites)
        if "layers.2.mlp" in name
    }
    assert shapes == {
        "experts.gate_proj.lora_A": (1, 4, 64),
        "experts.up_proj.lora_A": (1, 4, 64),
        "experts.down_proj.lora_A": (6, 4, 24),
        "experts.gate_proj.lora_B": (6, 24, 4),
        "experts.up_proj.lora_B": (6, 24, 4),
        "experts.down_proj.lora_B": (1, 64, 4),
    }


def test_a_checkpoint_gives_the_same_adapter_back(base: Base) -> None:
    state = states(base)["c"]
    again = checkpoints.read(checkpoints.write(state, "base"))
    assert again.tensors == state.tensors
    assert np.array_equal(again.weights, state.weights)


def test_exported_every_expert_has_matrices_and_a_rank_of_its_own(base: Base) -> None:
    state = states(base)["a"]
    files = checkpoints.export(state, "base")
    weights, config = (
        safetensors.numpy.load(bytes(files[checkpoints.WEIGHTS])),
        json.loads(bytes(files[checkpoints.CONFIG])),
    )
    assert config["rank_pattern"][r"experts\.\d+\.gate_proj"] == 4
    held = tiny.tensors(state, state.weights)
    for matrix, shared in (
        ("gate_proj.lora_A", True),
        ("gate_proj.lora_B", False),
        ("down_proj.lora_B", True),
    ):
        stacked = held[f"base_model.model.model.layers.1.mlp.experts.{matrix}.weight"]
        for number in range(6):
            of_one = weights[f"base_model.model.model.layers.1.mlp.experts.{number}.{matrix}.weight"]
            assert np.array_equal(of_one, stacked[0 if shared else number])
    assert sum(".experts." in name for name in weights) == 2 * 6 * 3 * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_in_deterministic_mode_bits_do_not_depend_on_who_shares_the_pass(family: str) -> None:
    threads = torch.get_num_threads()
    try:
        engine = TorchEngine(Base(model(family)), EngineSettings(deterministic=True))
        equals_reference(engine.base, "a", family)
        alone = {run: trained(engine, [run])[run] for run in TENANTS}
        for order in (list(TENANTS), list(TENANTS)[::-1]):
            for run, found in trained(engine, order).items():
                assert all(np.array_equal(x, y) for x, y in zip(found, alone[run], strict=True)), run
    finally:
        torch.set_num_threads(threads)


def test_what_is_sampled_has_the_logprobs_of_a_forward(base: Base) -> None:
    says_what_a_forward_says(base)


def says_what_a_forward_says(base: Base) -> None:
    engine = TorchEngine(base)
    sampler = TorchSampler(base)
    state = states(base)["a"]
    engine.restore("a", state)
    sampler.hold("a", state)
    prompt = np.arange(5, 25, dtype=np.int32)
    sampler.add(SampleInput("r", "a", prompt, 3, 8, seed=1, stop_tokens=()))
    (output,) = [answer for _ in range(9) for answer in sampler.step()]
    assert isinstance(output, SampleOutput), output
    for sequence in output.sequences:
        whole = np.concatenate([prompt, sequence.tokens])
        given = replace(
            tiny.batch(lengths=(len(whole) - 1,), forward_only=True),
            tokens_T=whole[:-1],
            targets_TK=whole[1:, None].astype(np.int64),
        )
        forward = engine.forward_backward([Work("a", given)])[0]
        assert tiny.worst(sequence.logprobs, forward.logprobs_TK[len(prompt) - 1 :, 0]) < 5e-5


@as_on_a_gpu()
def test_compiled_mixtures_compute_what_they_compute_uncompiled_by_one_program_for_each_kind_of_layer() -> (
    None
):
    base = Base(tiny.model("qwen3_moe", **SHAPE | {"num_hidden_layers": 5, "mlp_only_layers": [0]}))
    engine = TorchEngine(base)
    orders = [list(TENANTS), ["c", "b"]]
    expected = [trained(engine, order) for order in orders]
    base.keeping, base.can_compile = Keeping(recomputed_layers=2, lean_layers=1), True
    base.compile()
    counters.clear()
    found = [trained(engine, order) for order in orders]
    # A dense layer; of one with a mixture what is before and behind it; two more within it. Those once more
    # for a layer that is lean.
    assert 5 <= counters["stats"]["unique_graphs"] <= 8, counters["stats"]
    for ours, theirs in zip(found, expected, strict=True):
        for run in ours:
            for a, b in zip(ours[run], theirs[run], strict=True):
                assert tiny.worst(a, b) <= 1e-5
    base.run_eagerly()
    for run, values in trained(engine, orders[0]).items():
        for a, b in zip(values, expected[0][run], strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_mixture_whose_layers_do_not_compile_is_trained_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **others: Any) -> Any:
        def run(*given: Any, **others: Any) -> Any:
            raise RuntimeError("no such kernel, say")

        return run

    expected = trained(TorchEngine(Base(model())), ["a"])["a"]
    base = Base(model())
    base.can_compile = True
    monkeypatch.setattr(torch, "compile", broken)
    engine = TorchEngine(base)
    engine.warm_up()
    assert not base.is_compiled
    for ours, theirs in zip(trained(engine, ["a"])["a"], expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
