"""The PEFT library's methods in single-tenant runs, against the library's own training loop, float32."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from tests.worker import tiny
from tests.worker.test_tuning import (
    ADAM,
    assert_equal,
    engine_of,
    expected_logprobs,
    request,
    sampled,
    torch_step,
    trained,
)
from tinsmith.errors import InvalidInput
from tinsmith.wire.methods import METHODS, settings_of
from tinsmith_worker import checkpoints
from tinsmith_worker.contract import AdamParams, Failure, LoraSpec, Work
from tinsmith_worker.tuning.engine import FULL, TunedSampler

ALL = tiny.ATTENTION + tiny.MLP
SETTINGS: dict[str, dict[str, int]] = {
    "dora": {"rank": 8, "alpha": 16},
    "oft": {"block_size": 16},
    "hra": {"rank": 4},
    "vera": {"rank": 16},
    "loha": {"rank": 4, "alpha": 4},
    "lokr": {"rank": 4, "alpha": 4},
    "ia3": {},
    "ln_tuning": {},
}
SEED = 5


def configs() -> dict[str, peft.PeftConfig]:
    return {
        "dora": peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=ALL),
        "oft": peft.OFTConfig(r=0, oft_block_size=16, target_modules=ALL),
        "hra": peft.HRAConfig(r=4, target_modules=ALL),
        "vera": peft.VeraConfig(r=16, target_modules=ALL, projection_prng_key=SEED),
        "loha": peft.LoHaConfig(r=4, alpha=4, target_modules=ALL),
        "lokr": peft.LoKrConfig(r=4, alpha=4, target_modules=ALL),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "ln_tuning": peft.LNTuningConfig(target_modules=r".*norm$"),
    }


def spec_of(method: str, **changes: Any) -> LoraSpec:
    given = {"train_unembed": False, "method": method, "settings": SETTINGS.get(method, {}), **changes}
    return LoraSpec(0, SEED, **given)


def by_library(method: str, family: str = "qwen3") -> Any:
    model = tiny.model(family)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, configs()[method]).eval()


def test_every_method_is_tested_here() -> None:
    assert {"full", *SETTINGS} == set(METHODS)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_equals_the_librarys_own_loop(method: str, family: str) -> None:
    engine, torch_state = engine_of(family), torch.random.get_rng_state()
    engine.create("run", spec_of(method))
    assert torch.equal(torch_state, torch.random.get_rng_state()), "it drew from everybody's random numbers"
    model = by_library(method, family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    first = np.zeros(0)
    for number in range(3):
        given = tiny.batch("ppo" if number == 1 else "cross_entropy", seed=number)
        output = engine.forward_backward([Work("run", given)])[0]
        expected = tiny.reference(model, given)
        first = output.logprobs_TK if not number else first
        assert tiny.worst(output.logprobs_TK, expected.logprobs) <= 2e-5
        assert tiny.worst(output.losses_T, expected.losses) <= 2e-5
        metrics = tiny.step(engine, "run", ADAM)
        assert not isinstance(metrics, Failure)
        assert metrics["grad_norm"] == pytest.approx(torch_step(model, optimizer, ADAM), rel=1e-4)
    state = engine.state("run")
    weights = tiny.tensors(state, state.weights)
    expected_weights = peft.get_peft_model_state_dict(model)
    if method == "vera":  # what is drawn from the seed is not saved
        expected_weights = {n: w for n, w in expected_weights.items() if "lambda" in n}
    assert set(weights) == set(expected_weights)
    for name, found in weights.items():
        assert tiny.worst(found, expected_weights[name]) <= 2e-5, name
    again = engine.forward_backward([Work("run", tiny.batch(seed=0, forward_only=True))])[0]
    assert np.abs(again.logprobs_TK - first).max() > 1e-3, "it was not trained"


@pytest.mark.parametrize("method", SETTINGS)
def test_saved_weights_load_in_peft_and_give_equal_logprobs(method: str, tmp_path: Path) -> None:
    engine = engine_of()
    engine.create("run", spec_of(method))
    for name, content in checkpoints.write(trained(engine), "tiny").items():
        (tmp_path / name).write_bytes(content)
    given = tiny.batch(lengths=(60,), forward_only=True)
    found = engine.forward_backward([Work("run", given)])[0].logprobs_TK
    model = peft.PeftModel.from_pretrained(tiny.model(), tmp_path)
    assert tiny.worst(found, expected_logprobs(model, given)) <= 2e-5


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_restored_from_its_files_goes_on_with_the_same_bits(method: str) -> None:
    straight, first, second = (engine_of(deterministic=True) for _ in range(3))
    for engine in (straight, first):
        engine.create("run", spec_of(method))
    trained(straight, 3)
    trained(first, 2)
    first.forward_backward([Work("run", tiny.batch(seed=2))])
    second.restore("run", checkpoints.read(checkpoints.write(first.state("run"), "tiny")))
    tiny.step(second, "run", ADAM)
    assert_equal(second.state("run"), straight.state("run"))


def test_runs_of_different_methods_by_turns_change_no_bit_of_each_other() -> None:
    specs = {name: spec_of(name) for name in SETTINGS} | {"full": FULL}
    alone = {}
    for name, spec in specs.items():
        engine = engine_of(deterministic=True)
        engine.create("run", spec)
        alone[name] = trained(engine, 2)
    shared = engine_of(deterministic=True)
    for name, spec in specs.items():
        shared.create(name, spec)
    for number in range(2):
        for name in specs:
            shared.forward_backward([Work(name, tiny.batch(seed=number))])
            tiny.step(shared, name, ADAM)
    for name, expected in alone.items():
        assert_equal(shared.state(name), expected)


def test_a_sampler_of_a_method_is_frozen_and_says_what_training_says() -> None:
    engine = engine_of()
    sampler = TunedSampler(engine.base)
    greedy = {"temperature": 0.0, "num_samples": 1}
    base = sampled(sampler, request("base", "", **greedy))["base"]
    for name in SETTINGS:
        engine.create(name, spec_of(name))
        trained(engine, 2, run_id=name)
        sampler.hold(name, engine.frozen(name))
        sampler.hold(f"{name} read", checkpoints.read(checkpoints.write(engine.state(name), "tiny")))
        (tokens, logprobs) = sampled(sampler, request("one", name, **greedy))["one"][0]
        prompt = request("", "").prompt
        text = np.concatenate([prompt, np.array(tokens, np.int32)])
        given = tiny.batch(lengths=(len(text) - 1,), forward_only=True)
        given.tokens_T[:], given.targets_TK[:] = text[:-1], text[1:, None]
        said = engine.forward_backward([Work(name, given)])[0].logprobs_TK[len(prompt) - 1 :, 0]
        assert tiny.worst(np.array(logprobs, np.float32), said) <= 2e-5, name
        trained(engine, 1, run_id=name)
        for held in (name, f"{name} read"):
            assert sampled(sampler, request("one", held, **greedy))["one"][0] == (tokens, logprobs)
    assert sampled(sampler, request("base", "", **greedy))["base"] == base


def test_targets_are_those_that_are_named() -> None:
    engine = engine_of()
    for where, expected in (
        ({"train_mlp": False}, set(tiny.ATTENTION)),
        ({"train_attn": False}, set(tiny.MLP)),
    ):
        engine.create("run", spec_of("oft", **where))
        names = {name.split(".")[-3] for name, _, _ in engine.state("run").tensors}
        assert names == expected


def test_what_does_not_fit_the_model_is_refused_with_a_sentence() -> None:
    engine = engine_of()
    with pytest.raises(InvalidInput, match="block_size 24 does not divide 64"):
        engine.create("run", spec_of("oft", settings={"block_size": 24}))
    with pytest.raises(InvalidInput, match="ln_tuning trains all norms"):
        engine.create("run", spec_of("ln_tuning", train_mlp=False))
    assert engine.size_bytes(spec_of("oft", settings={"block_size": 24})) == 0
    assert not engine.holds("run")
    with pytest.raises(InvalidInput, match="it must be a whole number from 2 to 1024"):
        settings_of("oft", {"block_size": 1})
    with pytest.raises(InvalidInput, match="has no setting 'alpha'"):
        settings_of("oft", {"alpha": 1})
    assert settings_of("oft", {}) == {"block_size": 32}


def test_steps_of_another_seed_are_another_run() -> None:
    engine = engine_of()
    states = []
    for seed in (1, 2, 1):
        engine.create("run", LoraSpec(0, seed, train_unembed=False, method="dora", settings=SETTINGS["dora"]))
        engine.forward_backward([Work("run", tiny.batch())])
        tiny.step(engine, "run", AdamParams())
        states.append(engine.state("run").weights)
    assert np.array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])
