"""A single-tenant pool (`tinsmith serve --single-tenant`): full fine-tuning through both clients, the official
SDK's rank 0 and our own, and with workers that are killed."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

import tinsmith
from tests.conftest import RunningFleet, RunningService
from tests.e2e.wire import Wire, datum, logprobs
from tinsmith_worker import tiny_base

MODEL = "tinsmith/tiny"
CONFIG = "snapshot_seconds = 1.0\ndeterministic = true\nsingle_tenant = true\nidle_seconds = 600\n"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("alone"), config=CONFIG)
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


def tokens(seed: int, length: int = 24) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


class Session:
    """One that is finished in the end, so that the next may begin."""

    def __init__(self, service: RunningService | RunningFleet, key: str = "") -> None:
        self.wire = Wire(service.url, key or service.key)
        self.id = self.wire.session()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        self.wire.post(f"/sessions/{self.id}/finish", reason={"type": "success"})
        assert self.wire.status < 300

    def create(self, **config: Any) -> dict[str, Any]:
        given = config or {"lora_config": {"rank": 0}}
        return self.wire.post("/create_model", session_id=self.id, model_seq_id=0, base_model=MODEL, **given)

    def run(self, **config: Any) -> str:
        made = self.create(**config)
        assert self.wire.status == 200, made
        return str(self.wire.result(made)["model_id"])


STEPS = 6


def train(
    service: RunningService, config: dict[str, Any], *, kills: int = 0
) -> tuple[list[np.ndarray], dict[str, bytes]]:
    """The logprobs of steps that are all submitted at once, and the files of what is saved in the end."""
    with Session(service) as session:
        wire, run, calls = session.wire, session.run(**config), []
        for step in range(STEPS):
            calls.append(wire.submit(run, 2 * step + 1, datum(tokens(step)), datum(tokens(50 + step, 60))))
            wire.optim(run, 2 * step + 2, learning_rate=1e-4, weight_decay=0.1, grad_clip_norm=1.0)
        last = wire.post("/save_weights", model_id=run, seq_id=2 * STEPS + 1, path="last")
        for number in range(kills):
            wire.output(calls[2 * number + 1])
            os.kill(service.worker_pid(), signal.SIGKILL)
            time.sleep(0.5)
            service.wait_ready()
        found = [logprobs(wire.output(call)) for call in calls]
        path = wire.result(last)["path"]
    ((prefix,),) = service.sql("select object_prefix from checkpoints where path = ?", path)
    return found, service.objects().get(prefix)


KINDS: dict[str, dict[str, Any]] = {
    "full": {"lora_config": {"rank": 0}},
    "dora": {"tuning_config": {"method": "dora", "seed": 3, "settings": {"rank": 8}}},
    "oft": {"tuning_config": {"method": "oft", "settings": {"block_size": 16}}},
    "vera": {"tuning_config": {"method": "vera", "seed": 4, "settings": {"rank": 32}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_changes_nothing(alone: RunningService, kind: str) -> None:
    calm, calm_files = train(alone, KINDS[kind])
    shot_at, files = train(alone, KINDS[kind], kills=2)
    for expected, found in zip(calm, shot_at, strict=True):
        np.testing.assert_array_equal(expected, found)
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    config = "config.json" if kind == "full" else "adapter_config.json"
    assert calm_files.keys() == files.keys() == {config, weights, "optimizer.safetensors", "tinsmith.json"}
    for name in (weights, "optimizer.safetensors"):
        assert calm_files[name] == files[name], name


@pytest.mark.slow
def test_the_official_sdk_trains_all_weights_with_rank_0(alone: RunningService) -> None:
    service = tinker.ServiceClient(base_url=alone.url, api_key=alone.key)
    training = service.create_lora_training_client(MODEL, rank=0)
    info = training.get_info()
    assert (info.is_lora, info.lora_rank) == (False, None)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens(1)[:-1]),
            loss_fn_inputs={"target_tokens": tokens(1)[1:], "weights": [1.0] * 23},
        )
    ]
    sums = []
    for _ in range(4):
        passed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
        sums.append(passed.result().metrics["loss:sum"])
        stepped.result()
    assert sums[-1] < 0.5 * sums[0]
    saved = training.save_state("kept").result().path
    sampler = training.save_weights_and_get_sampling_client()
    said = sampler.compute_logprobs(types.ModelInput.from_ints(tokens(1))).result()
    forward = training.forward(data, "cross_entropy").result()
    expected = forward.loss_fn_outputs[0]["logprobs"].to_numpy()
    np.testing.assert_allclose(np.array(said[1:], np.float32), expected, atol=1e-4)
    # Another run of the session that has the worker: they take turns.
    again = service.create_training_client_from_state_with_optimizer(saved)
    for run, step in ((again, 5), (training, 5), (again, 6)):
        assert run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["optimizer_step"] == step
    service.close("success").result()


@pytest.mark.slow
def test_our_client_trains_all_weights_and_takes_a_model_home(alone: RunningService, tmp_path: Path) -> None:
    given = tinsmith.Datum(
        tinsmith.ModelInput.from_ints(tokens(2)[:-1]),
        {"target_tokens": tokens(2)[1:], "weights": [1.0] * 23},
    )
    with tinsmith.ServiceClient(base_url=alone.url, api_key=alone.key) as service:
        training = service.create_full_training_client(MODEL)
        for _ in range(3):
            training.forward_backward([given], "cross_entropy")
            training.optim_step(tinsmith.AdamParams(learning_rate=1e-3)).result()
        found = training.forward([given], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
        folder = training.export(tmp_path / "model")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    np.testing.assert_allclose(found, by_transformers(model, tokens(2)), atol=1e-4)


@pytest.mark.slow
def test_our_client_trains_by_another_method_and_takes_it_home(alone: RunningService, tmp_path: Path) -> None:
    given = tinsmith.Datum(
        tinsmith.ModelInput.from_ints(tokens(2)[:-1]),
        {"target_tokens": tokens(2)[1:], "weights": [1.0] * 23},
    )
    with tinsmith.ServiceClient(base_url=alone.url, api_key=alone.key) as service:
        training = service.create_peft_training_client(MODEL, "oft", {"block_size": 16})
        info = training.get_info()
        assert (info.is_lora, info.lora_rank) == (False, None)
        assert info.tuning_config == {"method": "oft", "settings": {"block_size": 16}}
        for _ in range(3):
            training.forward_backward([given], "cross_entropy")
            training.optim_step(tinsmith.AdamParams(learning_rate=1e-2)).result()
        found = training.forward([given], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
        sampler = training.save_weights_and_get_sampling_client()
        said = sampler.compute_logprobs(tinsmith.ModelInput.from_ints(tokens(2))).result()
        np.testing.assert_allclose(np.array(said[1:], np.float32), found, atol=1e-4)
        again = training.fork()
        forked = again.forward([given], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
        np.testing.assert_array_equal(forked, found)
        run = service.create_rest_client().get_training_run(training.model_id).result()
        assert (run.is_lora, run.lora_rank) == (False, None)
        with pytest.raises(tinsmith.RequestFailed, match="block_size 24 does not divide"):
            service.create_peft_training_client(MODEL, "oft", {"block_size": 24}).result()
        folder = training.export(tmp_path / "adapter")
        merged = training.export(tmp_path / "merged", "merged", base=str(tiny_base.FOLDER), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_base.FOLDER, dtype=torch.float32)
    for model in (PeftModel.from_pretrained(base, folder), AutoModelForCausalLM.from_pretrained(merged)):
        np.testing.assert_allclose(found, by_transformers(model, tokens(2)), atol=1e-4)


def by_transformers(model: Any, text: list[int]) -> np.ndarray:
    """log p of every token but the first."""
    sequence = torch.tensor(text)
    with torch.no_grad():
        logits = model(sequence[None, :-1]).logits[0]
    found: np.ndarray = logits.log_softmax(1).gather(1, sequence[1:, None])[:, 0].numpy()
    return found


@pytest.mark.slow
def test_a_second_run_waits_until_the_first_ones_session_is_over(alone: RunningService) -> None:
    first, second = Session(alone), Session(alone, alone.new_key("second"))
    run = first.run()
    refused = second.create()
    assert second.wire.status == 429
    assert "one run each" in refused["detail"], refused
    first.wire.output(first.wire.submit(run, 1, datum(tokens(1))))
    first.finish()
    made = second.create()
    assert second.wire.status == 200, made
    second.wire.result(made)
    second.finish()


@pytest.mark.slow
def test_what_a_pool_does_not_train_is_refused_with_a_sentence(alone: RunningService) -> None:
    with Session(alone) as session:
        for config, said in (
            ({"lora_config": {"rank": 8}}, "LoRA is for pools that many tenants share"),
            ({"lora_config": {"rank": 0, "train_mlp": False}}, "trains everything"),
            ({"lora_config": {"rank": 0}, "optimizer_config": {"type": "muon"}}, "takes 'adamw'"),
            ({"tuning_config": {"method": "magic"}}, "there is no method 'magic'"),
            ({"tuning_config": {"method": "full", "settings": {"rank": 3}}}, "has no setting 'rank'"),
            ({"tuning_config": {"method": "full"}, "lora_config": {"rank": 0}}, "not both"),
        ):
            answer = session.create(**config)
            assert session.wire.status == 400, config
            assert said in answer["detail"], answer


@pytest.mark.slow
@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_a_shared_pool_refuses_full_fine_tuning_with_a_sentence(service: RunningService) -> None:
    with Session(service) as session:
        answer = session.create()
        assert session.wire.status == 400
        assert "single-tenant pool" in answer["detail"], answer


@pytest.mark.slow
def test_every_worker_of_a_fleet_takes_one_run_and_a_dead_ones_goes_on_elsewhere(tmp_path: Path) -> None:
    fleet = RunningFleet(
        tmp_path, workers=2, single_tenant="true", deterministic="true", snapshot_seconds=0.5
    )
    try:
        sessions = [Session(fleet) for _ in range(3)]
        runs = [session.run() for session in sessions[:2]]
        assert "one run each" in sessions[2].create()["detail"]
        holders = dict(fleet.sql("select id, worker_id from runs"))
        assert len(set(holders.values())) == 2, holders
        data = [datum(tokens(step)) for step in range(4)]
        seen: dict[str, list[np.ndarray]] = {run: [] for run in runs}
        for step, given in enumerate(data):
            if step == 2:
                fleet.kill_worker()
            for session, run in zip(sessions, runs, strict=False):
                passed = session.wire.submit(run, 2 * step + 1, given)
                session.wire.optim(run, 2 * step + 2, learning_rate=1e-4)
                seen[run].append(logprobs(session.wire.output(passed)))
        for one, other in zip(*seen.values(), strict=True):
            np.testing.assert_array_equal(one, other)
        assert not np.array_equal(seen[runs[0]][0], seen[runs[0]][1])
    finally:
        fleet.stop()
