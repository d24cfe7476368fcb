"""Single-tenant runs: full fine-tuning against a plain loop with transformers and torch, float32."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.worker import tiny
from tests.worker.test_engine_numbers import SETTINGS
from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import TrainInput
from tinsmith.wire.losses import LOSSES
from tinsmith_worker import checkpoints
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, AdapterState, Failure, LoraSpec, SampleInput, Work
from tinsmith_worker.engine import EngineSettings
from tinsmith_worker.open_engine import Holding, open_engine
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.engine import FULL, TunedEngine, TunedSampler

ADAM = AdamParams(1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.5)


def engine_of(family: str = "qwen3", *, deterministic: bool = False, **options: Any) -> TunedEngine:
    base = TunedBase(tiny.model(family, **options))
    return TunedEngine(base, EngineSettings(deterministic=deterministic))


def plain(family: str = "qwen3", **options: Any) -> Any:
    return tiny.model(family, **options).eval().requires_grad_(True)


def torch_step(model: Any, optimizer: torch.optim.Optimizer, params: AdamParams) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_clip_norm or float("inf"))
    optimizer.param_groups[0].update(
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    optimizer.step()
    return float(norm)


def assert_gradients_equal(
    engine: TunedEngine, expected: dict[str, torch.Tensor], run_id: str = "run"
) -> None:
    state = engine.state(run_id)
    gradients = tiny.tensors(state, state.gradient)
    assert set(gradients) == set(expected)
    for name, found in gradients.items():
        assert tiny.worst(found, expected[name]) <= 1e-5, name
        assert np.abs(found).max() > 1e-5, f"{name}: too small to compare"


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen3", False), ("llama", True)])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_full_fine_tuning_equals_a_plain_loop_with_every_loss(loss: str, family: str, tied: bool) -> None:
    engine, model = engine_of(family, tied=tied), plain(family, tied=tied)
    engine.create("run", FULL)
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(3):
        given = tiny.batch(loss, seed=number, **SETTINGS.get(loss, {}))
        output = engine.forward_backward([Work("run", given)])[0]
        expected = tiny.reference(model, given)
        assert tiny.worst(output.logprobs_TK, expected.logprobs) <= 1e-5
        assert tiny.worst(output.losses_T, expected.losses) <= 1e-5
        assert_gradients_equal(engine, expected.gradients)
        metrics = tiny.step(engine, "run", ADAM)
        assert not isinstance(metrics, Failure)
        assert metrics["grad_norm"] == pytest.approx(torch_step(model, optimizer, ADAM), rel=1e-5)
        assert metrics["optimizer_step"] == number + 1
    state = engine.state("run")
    parameters = dict(model.named_parameters())
    for name, found in tiny.tensors(state, state.weights).items():
        assert tiny.worst(found, parameters[name].detach()) <= 1e-5, name


def test_gradients_accumulate_over_calls_and_over_the_pieces_of_a_long_one() -> None:
    engine = TunedEngine(TunedBase(tiny.model()), EngineSettings(max_tokens_per_pass=40))
    engine.base.head.chunk_rows = 7
    engine.create("run", FULL)
    batches = [
        tiny.batch(seed=1),
        tiny.batch("gspo", (20, 9, 31, 50, 3, 22), seed=2),
        tiny.batch(width=3, seed=3),
    ]
    engine.forward_backward([Work("run", given) for given in batches])
    model = plain()
    expected: dict[str, torch.Tensor] = {}
    for given in batches:
        for name, gradient in tiny.reference(model, given).gradients.items():
            expected[name] = expected.get(name, 0) + gradient
    assert_gradients_equal(engine, expected)


@pytest.mark.parametrize("method", ["full", "dora"])
def test_layers_that_are_computed_anew_give_the_same_gradients(method: str) -> None:
    settings = {"rank": 8, "alpha": 16} if method == "dora" else {}
    spec = LoraSpec(0, 0, train_unembed=method == "full", method=method, settings=settings)
    gradients = []
    for keeping in (Keeping(), Keeping(recomputed_layers=1), Keeping(recomputed_layers=2)):
        engine = engine_of()
        engine.create("run", spec)
        trained(engine, 1)
        engine.base.keeping = keeping
        engine.forward_backward([Work("run", tiny.batch(seed=1))])
        assert engine.base.kept == keeping
        gradients.append(engine.state("run").gradient)
    for other in gradients[1:]:
        np.testing.assert_array_equal(gradients[0], other)


def test_a_step_with_moments_in_parts_equals_one_with_all_of_them() -> None:
    whole, in_parts = engine_of(), engine_of()
    for engine, part_elements in ((whole, 0), (in_parts, 1000)):
        engine.create("run", FULL)
        engine._adapters["run"].part_elements = part_elements
        trained(engine, 3)
    expected, found = whole.state("run"), in_parts.state("run")
    for name in ("weights", "moment1", "moment2"):
        assert tiny.worst(getattr(found, name), getattr(expected, name)) <= 1e-7, name


def test_a_forward_leaves_the_gradient_alone() -> None:
    engine = engine_of()
    engine.create("run", FULL)
    engine.forward_backward([Work("run", tiny.batch(seed=1))])
    before = engine.state("run").gradient
    engine.forward_backward([Work("run", tiny.batch(seed=2, forward_only=True))])
    np.testing.assert_array_equal(before, engine.state("run").gradient)


def trained(engine: TunedEngine, steps: int = 2, *, run_id: str = "run") -> AdapterState:
    for number in range(steps):
        engine.forward_backward([Work(run_id, tiny.batch(seed=number))])
        tiny.step(engine, run_id, ADAM)
    return engine.state(run_id)


def assert_equal(found: AdapterState, expected: AdapterState) -> None:
    assert (found.tensors, found.step) == (expected.tensors, expected.step)
    for name in ("weights", "moment1", "moment2", "gradient"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_run_restored_from_its_files_goes_on_with_the_same_bits() -> None:
    straight, first, second = (engine_of(deterministic=True) for _ in range(3))
    straight.create("run", FULL)
    first.create("run", FULL)
    trained(straight, 3)
    trained(first, 2)
    first.forward_backward([Work("run", tiny.batch(seed=2))])
    second.restore("run", checkpoints.read(checkpoints.write(first.state("run"), "tiny", file_bytes=30_000)))
    tiny.step(second, "run", ADAM)
    assert_equal(second.state("run"), straight.state("run"))


def test_what_shares_the_worker_changes_no_bit() -> None:
    """Two runs by turns, and calls that are given together or one by one."""
    alone, shared = engine_of(deterministic=True), engine_of(deterministic=True)
    alone.create("run", FULL)
    expected = trained(alone, 2)
    for run_id in ("other", "run"):
        shared.create(run_id, FULL)
    for number in range(2):
        batches = [("other", tiny.batch("ppo", seed=9 + number)), ("run", tiny.batch(seed=number))]
        shared.forward_backward([Work(run_id, given) for run_id, given in batches])
        shared.optim_steps([("run", ADAM), ("other", ADAM)])
    assert_equal(shared.state("run"), expected)
    assert not np.array_equal(shared.state("other").weights, expected.weights)


def test_a_dropped_run_leaves_the_base_as_it_came() -> None:
    engine = engine_of()
    engine.create("run", FULL)
    trained(engine)
    engine.drop("run")
    engine.create("run", FULL)
    model = plain()
    fresh = engine.state("run")
    for name, found in tiny.tensors(fresh, fresh.weights).items():
        np.testing.assert_array_equal(found, dict(model.named_parameters())[name].detach())


def test_a_checkpoint_of_another_kind_of_run_is_refused() -> None:
    engine = engine_of()
    engine.create("run", FULL)
    lora = tiny.trained(tiny.base(), LoraSpec(8, 0))
    with pytest.raises(InvalidInput, match=r"rank 8 with .*, this run's is of full"):
        engine.load("run", lora, optimizer=False)
    with pytest.raises(InvalidInput, match="LoRA is for workers that many tenants share"):
        engine.create("lora", LoraSpec(8, 0))
    with pytest.raises(InvalidInput, match="a single-tenant worker"):
        tiny.base().adapter_of(engine.state("run"))


@pytest.mark.parametrize("file_bytes", [checkpoints.FILE_BYTES, 30_000])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_weights_load_in_transformers_and_give_equal_logprobs(
    tied: bool, file_bytes: int, tmp_path: Path
) -> None:
    engine = engine_of(tied=tied)
    engine.create("run", FULL)
    files = checkpoints.write(trained(engine), "tiny", file_bytes=file_bytes)
    assert (checkpoints.INDEX in files) == (file_bytes == 30_000)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    given = tiny.batch(lengths=(60,), forward_only=True)
    found = engine.forward_backward([Work("run", given)])[0].logprobs_TK
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tiny.worst(found, expected_logprobs(model, given)) <= 1e-5


def expected_logprobs(model: Any, given: TrainInput) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(given.tokens_T.astype(np.int64))[None]).logits[0]
    return logits.log_softmax(1).gather(1, torch.from_numpy(given.targets_TK))


@pytest.mark.parametrize(
    "options",
    [
        {"holding": Holding(parallel="deepspeed")},
        {"holding": Holding(parallel="fsdp2", offload=True)},
        {"holding": Holding(quantize="nf4")},
        {"exact_logprobs": True},
    ],
    ids=str,
)
def test_a_single_tenant_worker_in_four_bits_or_that_offloads_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="a single-tenant worker holds its base whole or cut by fsdp2"):
        open_engine("tiny", deterministic=False, pass_tokens=64, single_tenant=True, **options)


def test_a_mixture_of_experts_is_refused() -> None:
    shape = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    with pytest.raises(InvalidInput, match="it is a mixture of experts"):
        TunedBase(tiny.model("qwen3_moe", **shape))


# -- sampling --------------------------------------------------------------------------------------------


def request(name: str, sampler_id: str, **fields: Any) -> SampleInput:
    prompt = np.array([5, 6, 7, 8, 9], np.int32)
    given: dict[str, Any] = {"num_samples": 2, "max_tokens": 6, "seed": 3, "stop_tokens": ()}
    return SampleInput(name, sampler_id, prompt, **(given | fields))


def sampled(sampler: TunedSampler, *requests: SampleInput) -> dict[str, list[tuple[list[int], list[float]]]]:
    for given in requests:
        sampler.add(given)
    return dict(outputs(sampler))


def outputs(sampler: TunedSampler) -> Iterator[tuple[str, list[tuple[list[int], list[float]]]]]:
    while sampler.busy:
        for output in sampler.step():
            assert not isinstance(output, tuple), output
            yield output.request_id, [(s.tokens.tolist(), s.logprobs.tolist()) for s in output.sequences]


def test_a_sampler_of_full_weights_is_frozen_and_says_what_transformers_says() -> None:
    engine = engine_of()
    engine.create("run", FULL)
    sampler = TunedSampler(engine.base)
    saved = trained(engine)
    sampler.hold("then", engine.frozen("run"))
    sampler.hold("read", replace(saved, moment1=None, moment2=None, step=0))
    greedy = request("greedy", "then", temperature=0.0, num_samples=1)
    before = sampled(sampler, greedy)["greedy"]
    trained(engine)
    assert sampled(sampler, greedy)["greedy"] == before
    assert sampled(sampler, replace(greedy, sampler_id="read"))["greedy"] == before
    model = plain()
    assert sampled(sampler, replace(greedy, sampler_id=""))["greedy"] != before
    with torch.no_grad():
        for name, values in tiny.tensors(saved, saved.weights).items():
            dict(model.named_parameters())[name].copy_(torch.from_numpy(values))
        prompt = torch.from_numpy(greedy.prompt.astype(np.int64))[None]
        drawn = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(drawn).logits[0, len(greedy.prompt) - 1 : -1]
    tokens, logprobs = before[0]
    assert tokens == drawn[0, len(greedy.prompt) :].tolist()
    expected = logits.log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert tiny.worst(torch.tensor(logprobs), expected) <= 1e-5


def test_requests_for_several_weights_are_served_and_none_gets_anothers() -> None:
    engine = engine_of()
    sampler = TunedSampler(engine.base)
    for number, name in enumerate(("a", "b")):
        engine.create(name, FULL)
        trained(engine, 1 + number, run_id=name)
        sampler.hold(name, engine.frozen(name))
    names = ("a", "b", "", "a", "", "b")
    given = [request(f"{n}{name}", name) for n, name in enumerate(names)]
    together = sampled(sampler, *given)
    assert len(together) == len(given)
    for name in ("a", "b", ""):
        alone = sampled(sampler, request("alone", name))["alone"]
        for n, of in enumerate(names):
            assert (together[f"{n}{of}"] == alone) == (of == name)
