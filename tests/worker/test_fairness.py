"""Many tenants on one worker: shares by weight, and nobody waits for somebody else's long queue."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.worker.test_process import CountingEngine, House
from tinsmith.wire.batch import TrainOutput
from tinsmith_api.journal import operations as ops
from tinsmith_worker.contract import Failure, SampleOutput, Work
from tinsmith_worker.null_engine import NullSampler
from tinsmith_worker.schedule import FORWARD_BACKWARD, Item, Schedule

SECONDS_PER_TOKEN = 40e-6


class Paced(CountingEngine):
    """Takes its time over every token, as a real one."""

    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        time.sleep(SECONDS_PER_TOKEN * sum(w.given.tokens for w in work))
        return super().forward_backward(work)


def fill(schedule: Schedule, run_id: str, count: int, tokens: int) -> None:
    for seq_id in range(1, count + 1):
        schedule.add(Item(f"{run_id}{seq_id}", run_id, seq_id, FORWARD_BACKWARD, tokens), 0.0)


def test_tokens_are_shared_by_weight() -> None:
    schedule = Schedule(pass_tokens=100, gap_seconds=600)
    schedule.open_run("a", "heavy", 1, weight=3.0)
    schedule.open_run("b", "light", 1)
    fill(schedule, "a", 400, 100)
    fill(schedule, "b", 400, 100)
    served = [schedule.next_batch(0.0)[0].run_id for _ in range(400)]
    assert served.count("a") == pytest.approx(300, abs=3)
    assert served[:40].count("b") == pytest.approx(10, abs=1), "all along, not in the end"


def test_a_pass_is_filled_up_with_one_tenant_s_calls_only_while_nobody_else_is_about() -> None:
    schedule = Schedule(pass_tokens=80, gap_seconds=600)
    schedule.open_run("a", "flooding", 1)
    schedule.open_run("b", "other", 1)
    fill(schedule, "a", 100, 10)
    assert len(schedule.next_batch(0.0)) == 8
    fill(schedule, "b", 1, 10)
    assert sorted(item.run_id for item in schedule.next_batch(1.0)) == ["a", "b"]
    assert len(schedule.next_batch(2.0)) == 2, "it may come back at any moment"
    assert len(schedule.next_batch(20.0)) == 8, "it has not for long"


def test_many_tenants_still_share_a_full_pass() -> None:
    schedule = Schedule(pass_tokens=80, gap_seconds=600)
    for number in range(12):
        schedule.open_run(f"r{number}", f"t{number}", 1)
        fill(schedule, f"r{number}", 3, 10)
    assert len({item.run_id for item in schedule.next_batch(0.0)}) == 8


def test_a_pass_has_no_more_adapters_than_there_are_slots_for() -> None:
    schedule = Schedule(pass_tokens=1000, gap_seconds=600, slot_bytes=250)
    for number in range(5):
        schedule.open_run(f"r{number}", "t", 1, size_bytes=100 if number else 400)
        fill(schedule, f"r{number}", 1, 10)
    batches = [[item.run_id for item in schedule.next_batch(0.0)] for _ in range(3)]
    assert batches == [["r0"], ["r1", "r2"], ["r3", "r4"]], "one that is too large goes alone"


@pytest.mark.slow
def test_a_thousand_queued_calls_of_one_tenant_do_not_double_another_s_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.worker.test_process.CountingEngine", Paced)
    house = House(tmp_path)
    mine, flooding = house.tenant, house.another_tenant("flood")
    house.start("w1", pass_tokens=4096)
    house.run("mine")
    house.tenant = flooding
    house.run("theirs")
    theirs = 0

    def flood(count: int) -> list[str]:
        nonlocal theirs
        house.tenant = flooding
        sent = []
        for _ in range(count):
            theirs += 1
            sent.append(house.train("theirs", theirs, *[1] * 1024))
        house.tenant = mine
        return sent

    seq_id = 0

    def round_trip() -> float:
        nonlocal seq_id
        seq_id += 1
        started = time.perf_counter()
        request_id = house.train("mine", seq_id, *[1] * 1024)
        assert house.outcome(request_id, pause=0.001).error is None
        return time.perf_counter() - started

    shared = []
    for _ in range(25):
        flood(1)
        shared.append(round_trip())
    last = flood(1000)[-1]
    flooded = []
    for _ in range(25):
        flooded.append(round_trip())
    assert house.queued(last), "the flood was over before it was measured"
    ratio = statistics.median(flooded) / statistics.median(shared)
    assert ratio < 2.0, (ratio, statistics.median(shared), statistics.median(flooded))
    house.drain()


class Endless(NullSampler):
    """Always has something to sample, a step of which takes five milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_before: list[int] = []  # every pass
        self.steps = 0

    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        time.sleep(0.005)
        self.steps += 1
        return []

    @property
    def busy(self) -> bool:
        return True


def test_weights_saved_for_a_sampler_are_held_where_they_were_trained(tmp_path: Path) -> None:
    """Whoever samples them next need not wait until they are read back."""
    house = House(tmp_path)
    house.start("w1")
    run = house.run("mine")
    given = {
        "path": "tinker://mine/sampler_weights/a",
        "name": "a",
        "kind": "sampler_weights",
        "object_prefix": "p",
    }
    saved = house.submit(run, 1, ops.SAVE_WEIGHTS_FOR_SAMPLER, json.dumps(given).encode())
    assert house.outcome(saved).error is None
    assert house.worker.sampling._sampler.holds("p")
    house.drain()


def test_training_waits_for_sampling_no_longer_than_a_slice_and_neither_starves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Endless()

    class Watched(Paced):
        def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
            sampler.steps_before.append(sampler.steps)
            sampler.steps = 0
            return super().forward_backward(work)

    monkeypatch.setattr("tests.worker.test_process.CountingEngine", Watched)
    monkeypatch.setattr("tests.worker.test_process.NullSampler", lambda: sampler)
    house = House(tmp_path)
    house.start("w1", pass_tokens=2048, slice_seconds=0.05)
    house.run("mine")
    sent = [house.train("mine", seq_id, *[1] * 2048) for seq_id in range(1, 11)]
    for request_id in sent:
        assert house.outcome(request_id).error is None
    # The first of them found the worker sampling only; a pass takes 80 ms, more than a slice.
    between = sampler.steps_before[1:]
    assert len(between) >= 9
    assert min(between) >= 1
    assert max(between) <= 0.05 / 0.005 + 2, between
    house.drain()


def test_a_call_that_ends_its_worker_again_and_again_is_given_up_and_its_run_goes_on(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.start("w1")
    run = house.run("a")
    neighbour = house.run("b")
    house.outcome(house.train(run, 1, 1, 2, 3))
    house.drain()
    deadly = house.train(run, 2, 1, 2, ring=False)
    waits = house.train(neighbour, 1, 1, 2, ring=False)
    # Three workers died; from the second on, what they tried is on record.
    house.sql("update runs set deaths = 4, is_suspect = 1 where id = 'a'")
    house.sql("update runs set deaths = 2 where id = 'b'")
    house.start("w2")
    error = house.outcome(deadly).error
    assert error is not None
    assert "4 worker processes ended" in error["error"]
    assert house.outcome(waits).error is None
    body = house.outcome(house.step(run, 3)).body
    assert body is not None
    assert b'"grad_norm": 3.0' in body
    assert house.sql("select sum(deaths), sum(is_suspect) from runs") == [(0, 0)]
    house.drain()
