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
    run = wire.run(MODEL, rank=8, seed=3)
    calls = []
    for step in range(8):
        data = [
            datum(np.random.default_rng(10 * step + n).integers(0, 900, 20 + 9 * n).tolist())
            for n in range(4)
        ]
        calls.append(wire.submit(run, 2 * step + 1, *data))
        wire.optim(run, 2 * step + 2)
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
@pytest.mark.parametrize("service", ["embedded"], indirect=True)
def test_a_group_samples_what_one_process_samples(group: RunningService, service: RunningService) -> None:
    drawn = []
    for one in (group, service):
        wire = Wire(one.url, one.key)
        run = wire.run(MODEL, rank=8, seed=3)
        wire.output(wire.submit(run, 1, datum([1, 2, 3, 4, 5, 6, 7])))
        saved = wire.post("/save_weights_for_sampler", model_id=run, seq_id=2, sampling_session_seq_id=0)
        sampler = wire.result(saved)["sampling_session_id"]
        drawn.append(wire.sampled(wire.sample(sampler, 0, [5, 6, 7, 8])).sequences[0])
    assert drawn[0].tokens == drawn[1].tokens
