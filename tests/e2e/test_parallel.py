"""A service whose worker is a group of processes: `--parallel fsdp2 --nproc 2`, and killing one of them."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RunningService
from tests.e2e.wire import Wire, datum, logprobs

MODEL = "tinsmith/tiny"
CONFIG = "snapshot_seconds = 0.5\ndeterministic = true\n"


@pytest.fixture(scope="module", params=["none", "fsdp2", "deepspeed"])
def group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("group")
    running = RunningService(folder, "--parallel", request.param, "--nproc", "2", config=CONFIG)
    yield running
    assert running.stop() == 0, running.log_text()
    assert not ranks_of(running), "somebody was left behind"


@pytest.fixture(scope="module")
def drawn_by_one(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Not by the service that the session shares: for its sake pytest would start every group twice."""
    running = RunningService(tmp_path_factory.mktemp("one"), config=CONFIG)
    tokens = drawn(running)
    assert running.stop() == 0, running.log_text()
    return tokens


@pytest.fixture(scope="module")
def single_tenant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    options = ("--parallel", "fsdp2", "--nproc", "2", "--single-tenant")
    running = RunningService(tmp_path_factory.mktemp("single"), *options, config=CONFIG)
    yield running
    assert running.stop() == 0, running.log_text()
    assert not ranks_of(running), "somebody was left behind"


def ranks_of(service: RunningService) -> dict[int, int]:
    """rank -> pid of the worker's processes; the leader, which nobody told its rank, is 0."""
    pattern = f"tinsmith_worker.*--data-dir {service.folder}( |$)"
    found = {}
    for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        (rank,) = [int(word[5:]) for word in environment if word.startswith(b"RANK=")] or [0]
        found[rank] = int(pid)
    return found


def train(wire: Wire, service: RunningService, *, kills: tuple[int, ...] = ()) -> list[np.ndarray]:
    """The logprobs of eight steps that are all submitted at once; ranks are killed while they are executed."""
    return steps(wire, service, wire.run(MODEL, rank=8, seed=3), kills)


def steps(
    wire: Wire, service: RunningService, run: str, kills: tuple[int, ...], **adam: float
) -> list[np.ndarray]:
    calls = []
    for step in range(8):
        data = [
            datum(np.random.default_rng(10 * step + n).integers(0, 900, 20 + 9 * n).tolist())
            for n in range(4)
        ]
        calls.append(wire.submit(run, 2 * step + 1, *data))
        wire.optim(run, 2 * step + 2, **adam)
    for number, rank in enumerate(kills):
        wire.output(calls[2 * number + 1])
        os.kill(ranks_of(service)[rank], signal.SIGKILL)
        time.sleep(0.5)
    return [logprobs(wire.output(call)) for call in calls]


@pytest.mark.slow
def test_a_killed_rank_takes_its_group_down_and_nothing_is_lost(group: RunningService) -> None:
    wire = Wire(group.url, group.key)
    calm = train(wire, group)
    before = ranks_of(group)
    assert sorted(before) == [0, 1]
    shot_at = train(wire, group, kills=(1, 0))
    after = ranks_of(group)
    assert sorted(after) == [0, 1]
    assert not set(before.values()) & set(after.values()), "a rank outlived its group"
    for expected, found in zip(calm, shot_at, strict=True):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.slow
def test_a_group_samples_what_one_process_samples(group: RunningService, drawn_by_one: list[int]) -> None:
    assert drawn(group) == drawn_by_one


def drawn(service: RunningService) -> list[int]:
    wire = Wire(service.url, service.key)
    run = wire.run(MODEL, rank=8, seed=3)
    wire.output(wire.submit(run, 1, datum([1, 2, 3, 4, 5, 6, 7])))
    saved = wire.post("/save_weights_for_sampler", model_id=run, seq_id=2, sampling_session_seq_id=0)
    sampler = wire.result(saved)["sampling_session_id"]
    return list(wire.sampled(wire.sample(sampler, 0, [5, 6, 7, 8])).sequences[0].tokens)


@pytest.mark.slow
def test_a_killed_rank_changes_no_bit_of_full_fine_tuning_and_its_checkpoint(
    single_tenant: RunningService,
) -> None:
    found = []
    for kills in ((), (1, 0)):
        wire = Wire(single_tenant.url, single_tenant.key)
        session = wire.session()
        made = wire.post(
            "/create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config={"rank": 0}
        )
        run = str(wire.result(made)["model_id"])
        before = ranks_of(single_tenant)
        told = steps(wire, single_tenant, run, kills, learning_rate=1e-4, grad_clip_norm=1.0)
        assert (ranks_of(single_tenant) != before) == bool(kills)
        path = wire.result(wire.post("/save_weights", model_id=run, seq_id=17, path="last"))["path"]
        ((prefix,),) = single_tenant.sql("select object_prefix from checkpoints where path = ?", path)
        files = single_tenant.objects().get(prefix)
        wire.submit(run, 18, datum([1, 2, 3, 4, 5]))
        wire.optim(run, 19, learning_rate=1e-2)
        wire.result(wire.post("/load_weights", model_id=run, seq_id=20, path=path, optimizer=True))
        again = logprobs(wire.output(wire.submit(run, 21, datum([9, 8, 7, 6, 5, 4]))))
        saved = wire.post("/save_weights_for_sampler", model_id=run, seq_id=22, path="frozen")
        frozen = wire.result(saved)["path"]
        found.append((told, files, again, frozen, draw(wire, session, frozen)))
        wire.post(f"/sessions/{session}/finish", reason={"type": "success"})
    (calm, calm_files, calm_again, calm_frozen, calm_drawn), (told, files, again, _, drawn) = found
    for expected, of_shot_at in zip(calm, told, strict=True):
        np.testing.assert_array_equal(expected, of_shot_at)
    assert set(files) == {"config.json", "model.safetensors", "optimizer.safetensors", "tinsmith.json"}
    assert files == calm_files
    np.testing.assert_array_equal(again, calm_again)
    # The group that was there when it was saved is dead: this one reads it from its files.
    assert drawn == calm_drawn == draw(wire, wire.session(), calm_frozen)


def draw(wire: Wire, session: str, path: str) -> list[int]:
    made = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=9, model_path=path
    )
    sampler = made["sampling_session_id"]
    return list(wire.sampled(wire.sample(sampler, 0, [9, 8, 7, 6])).sequences[0].tokens)
