"""Adapters as files: the same bits back, the same training after, and PEFT reads them."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel

from tests.worker import tiny
from tinsmith.errors import InvalidInput
from tinsmith_worker import checkpoints
from tinsmith_worker.contract import AdamParams, AdapterState, LoraSpec, Work
from tinsmith_worker.engine import TorchEngine

PARAMS = AdamParams(1e-2, weight_decay=0.01, grad_clip_norm=1.0)


def trained_engine(spec: LoraSpec, steps: int = 2) -> TorchEngine:
    engine = TorchEngine(tiny.base())
    engine.create("run", spec)
    for number in range(steps):
        engine.forward_backward([Work("run", tiny.batch(seed=number))])
        tiny.step(engine, "run", PARAMS)
    return engine


def assert_equal_states(found: AdapterState, expected: AdapterState) -> None:
    assert (found.spec, found.tensors, found.step) == (expected.spec, expected.tensors, expected.step)
    for name in ("weights", "moment1", "moment2", "gradient"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None and b is None) or np.array_equal(a, b), name


def test_a_state_written_and_read_is_the_same_bit_for_bit() -> None:
    engine = trained_engine(LoraSpec(5, 3, train_mlp=False))
    assert_equal_states(checkpoints.read(checkpoints.write(engine.state("run"), "tiny")), engine.state("run"))
    engine.forward_backward([Work("run", tiny.batch(seed=9))])
    with_gradient = engine.state("run")
    assert with_gradient.gradient is not None
    assert_equal_states(checkpoints.read(checkpoints.write(with_gradient, "tiny")), with_gradient)


def test_a_fresh_adapter_is_saved_without_an_optimizer() -> None:
    engine = trained_engine(LoraSpec(8, 0), steps=0)
    files = checkpoints.write(engine.state("run"), "tiny")
    assert checkpoints.OPTIMIZER not in files
    assert_equal_states(checkpoints.read(files), engine.state("run"))


@pytest.mark.parametrize("in_the_middle", [False, True], ids=["after a step", "with a gradient accumulated"])
def test_training_resumed_from_files_equals_training_uninterrupted_bit_for_bit(in_the_middle: bool) -> None:
    uninterrupted = trained_engine(LoraSpec(8, 1))
    if in_the_middle:
        uninterrupted.forward_backward([Work("run", tiny.batch(seed=8))])
    files = checkpoints.write(uninterrupted.state("run"), "tiny")
    resumed = TorchEngine(tiny.base())
    resumed.restore("run", checkpoints.read(files))
    for engine in (uninterrupted, resumed):
        for number in (11, 12):
            engine.forward_backward([Work("run", tiny.batch(seed=number))])
            tiny.step(engine, "run", PARAMS)
    assert_equal_states(resumed.state("run"), uninterrupted.state("run"))


def test_load_with_optimizer_continues_and_without_it_starts_anew() -> None:
    saved = trained_engine(LoraSpec(8, 1)).state("run")
    engine = trained_engine(LoraSpec(8, 2), steps=1)
    engine.forward_backward([Work("run", tiny.batch())])
    engine.load("run", saved, optimizer=True)
    found = engine.state("run")
    assert (found.step, found.gradient) == (2, None)
    assert np.array_equal(found.weights, saved.weights)
    assert np.array_equal(found.moment2, saved.moment2)
    engine.load("run", saved, optimizer=False)
    found = engine.state("run")
    assert (found.step, found.gradient, found.moment1, found.moment2) == (0, None, None, None)
    assert np.array_equal(found.weights, saved.weights)


def test_a_gradient_in_a_checkpoint_is_not_loaded_into_a_run() -> None:
    other = trained_engine(LoraSpec(8, 1))
    other.forward_backward([Work("run", tiny.batch())])
    engine = trained_engine(LoraSpec(8, 2))
    engine.load("run", other.state("run"), optimizer=True)
    assert engine.state("run").gradient is None


@pytest.mark.parametrize("spec", [LoraSpec(4, 0), LoraSpec(8, 0, train_mlp=False)], ids=["rank", "targets"])
def test_loading_an_adapter_of_other_rank_or_targets_is_refused_and_changes_nothing(spec: LoraSpec) -> None:
    engine = trained_engine(LoraSpec(8, 0))
    before = engine.state("run")
    with pytest.raises(InvalidInput, match=r"rank 8 with train_attn, train_mlp, train_unembed"):
        engine.load("run", trained_engine(spec).state("run"), optimizer=True)
    assert_equal_states(engine.state("run"), before)


def test_an_adapter_of_another_base_is_refused() -> None:
    other = TorchEngine(tiny.base(num_hidden_layers=1))
    other.create("run", LoraSpec(8, 0))
    engine = trained_engine(LoraSpec(8, 0))
    with pytest.raises(InvalidInput, match="tensors"):
        engine.load("run", other.state("run"), optimizer=False)
    with pytest.raises(InvalidInput, match="tensors"):
        engine.restore("run", other.state("run"))


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("llama", False)])
@pytest.mark.parametrize(
    "spec",
    [LoraSpec(8, 0), LoraSpec(4, 0, train_mlp=False, train_unembed=False), LoraSpec(6, 0, train_attn=False)],
    ids=str,
)
def test_saved_adapters_load_in_peft_and_give_equal_logits(
    family: str, tied: bool, spec: LoraSpec, tmp_path: Path
) -> None:
    base = tiny.base(family, tied=tied)
    engine = TorchEngine(base)
    engine.restore("run", tiny.trained(base, spec))
    for name, content in checkpoints.write(engine.state("run"), "tiny").items():
        (tmp_path / name).write_bytes(content)
    model = PeftModel.from_pretrained(tiny.model(family, tied=tied), tmp_path)
    targeted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert targeted == {name.rsplit(".lora_", 1)[0] for name, _, _ in engine.state("run").tensors}
    given = tiny.batch(lengths=(60,), forward_only=True)
    given.targets_TK[:] = np.arange(60)[:, None]
    found = engine.forward_backward([Work("run", given)])[0].logprobs_TK
    with torch.no_grad():
        logits = model(torch.from_numpy(given.tokens_T.astype(np.int64))[None]).logits[0]
    expected = logits.log_softmax(1).gather(1, torch.from_numpy(given.targets_TK))
    assert tiny.worst(found, expected) <= 1e-5


def test_peft_reads_the_rank_and_the_exact_targets() -> None:
    config = json.loads(
        checkpoints.write(trained_engine(LoraSpec(6, 0, train_mlp=False)).state("run"), "tiny")[
            checkpoints.CONFIG
        ]
    )
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 32, "tiny")
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]


def test_files_that_are_no_checkpoint_are_refused_with_a_sentence() -> None:
    files = checkpoints.write(trained_engine(LoraSpec(8, 0)).state("run"), "tiny")
    about = json.loads(files[checkpoints.SPEC])
    spoiled = {
        "weights missing": {name: files[name] for name in files if name != checkpoints.WEIGHTS},
        "description missing": {name: files[name] for name in files if name != checkpoints.SPEC},
        "weights cut": files | {checkpoints.WEIGHTS: files[checkpoints.WEIGHTS][:-8]},
        "no safetensors": files | {checkpoints.OPTIMIZER: b"\x80\x04pickle"},
        "no json": files | {checkpoints.SPEC: b"{"},
        "json of another kind": files | {checkpoints.SPEC: b"[1]"},
        "of the future": files | {checkpoints.SPEC: json.dumps(about | {"format": 99}).encode()},
        "another spec": files | {checkpoints.SPEC: json.dumps(about | {"spec": {"size": 3}}).encode()},
        "terabytes": files | {checkpoints.SPEC: json.dumps(about | {"size": 1 << 50}).encode()},
        "overlapping": files
        | {
            checkpoints.SPEC: json.dumps(
                about | {"tensors": [[n, 0, s] for n, _, s in about["tensors"]]}
            ).encode()
        },
        "fewer moments": files | {checkpoints.OPTIMIZER: files[checkpoints.WEIGHTS]},
    }
    for what, given in spoiled.items():
        with pytest.raises(InvalidInput, match="no adapter checkpoint") as raised:
            checkpoints.read(given)
        assert len(str(raised.value)) < 300, what


def test_a_description_that_no_writer_made_is_refused_with_a_sentence() -> None:
    files = checkpoints.write(trained_engine(LoraSpec(8, 0)).state("run"), "tiny")
    about = json.loads(files[checkpoints.SPEC])
    (name, offset, shape), *others = about["tensors"]
    far = [[n, o + (1 << 40), s] for n, o, s in about["tensors"]]
    spoiled: list[dict[str, object]] = [
        {"spec": about["spec"] | {"rank": rank}} for rank in (0, -1, "8", 1.5, True, None)
    ]
    spoiled += [{"spec": about["spec"] | {"train_mlp": 1}}, {"spec": about["spec"] | {"seed": "x"}}]
    spoiled += [{"size": str(about["size"])}, {"size": 1e400}, {"size": -1}]
    spoiled += [{"tensors": [[name, offset, [1 << 40, 1 << 40]], *others], "size": 1 << 80}]
    spoiled += [{"tensors": [[name, offset, [1 << 30, *shape]], *others]}, {"tensors": others}]
    spoiled += [{"tensors": far, "size": about["size"] + (1 << 40)}, {"tensors": [[name, 1e400, shape]]}]
    for change in spoiled:
        with pytest.raises(InvalidInput, match="no adapter checkpoint") as raised:
            checkpoints.read(files | {checkpoints.SPEC: json.dumps(about | change).encode()})
        assert len(str(raised.value)) < 300, change
    deep = b"[" * 100_000
    with pytest.raises(InvalidInput, match="no adapter checkpoint"):
        checkpoints.read(files | {checkpoints.SPEC: deep})


def test_a_negative_step_is_refused() -> None:
    state = trained_engine(LoraSpec(8, 0)).state("run")
    with pytest.raises(InvalidInput, match="its step is -3"):
        checkpoints.read(checkpoints.write(replace(state, step=-3), "tiny"))


def test_initial_weights_follow_from_the_seed_as_peft_draws_them() -> None:
    base = tiny.base()
    one, same, other = (base.new_adapter(LoraSpec(8, seed)).state() for seed in (5, 5, 6))
    assert np.array_equal(one.weights, same.weights)
    assert not np.array_equal(one.weights, other.weights)
    for name, values in tiny.tensors(one, one.weights).items():
        if ".lora_B." in name:
            assert not values.any()
        else:
            bound = values.shape[1] ** -0.5
            assert np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_seeds_of_any_sign_and_64_bits_are_taken() -> None:
    base = tiny.base()
    drawn = [base.new_adapter(LoraSpec(2, seed)).state().weights.tobytes() for seed in (0, -1, 2**63, 2**32)]
    assert len(set(drawn)) == 4


def test_others_run_while_the_files_of_a_large_adapter_are_made() -> None:
    """The thread that feeds the device is one of them."""
    shape = (32, 1 << 20)
    state = AdapterState(LoraSpec(32, 0), (("a.lora_A.weight", 0, shape),), np.ones(32 << 20, np.float32))

    def waited(work: Callable[[], object]) -> float:
        return min(_longest_wait(work) for _ in range(5))  # a busy machine makes anybody wait

    assert waited(lambda: checkpoints.write(state, "tiny")) < waited(
        lambda: safetensors.numpy.save({"a": state.weights})
    )


def _longest_wait(work: Callable[[], object]) -> float:
    done, waits = threading.Event(), [0.0]

    def beat() -> None:
        while not done.is_set():
            start = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - start)

    thread = threading.Thread(target=beat)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(waits)
