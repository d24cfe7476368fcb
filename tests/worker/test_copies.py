"""States on their way to host memory while the engine goes on. (On a GPU: gpu_check.py, part "copies".)"""

import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.servers import wait_until
from tests.worker import tiny
from tests.worker.test_process import CountingEngine, House
from tinsmith_api.journal.tables import runs
from tinsmith_worker import checkpoints, copies
from tinsmith_worker.contract import AdamParams, AdapterState, LoraSpec, StateOnTheWay, Work
from tinsmith_worker.copies import HostCopier
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.slots import Slots

CPU = torch.device("cpu")


class HeldUp:
    """A copier that fetches nothing before `go` is set, as behind a device that is busy."""

    def __init__(self, room_bytes: int) -> None:
        self.go = threading.Event()
        self.copier = HostCopier(CPU, room_bytes=room_bytes)
        self.copier._thread.submit(self.go.wait)


def engine_with(copier: HostCopier, *run_ids: str) -> TorchEngine:
    engine = TorchEngine(tiny.base())
    engine._copier = copier
    for number, run_id in enumerate(run_ids):
        engine.create(run_id, LoraSpec(rank=4, seed=number))
    return engine


def train(engine: TorchEngine, run_id: str, steps: int) -> None:
    for number in range(steps):
        engine.forward_backward([Work(run_id, tiny.batch(seed=number))])
        tiny.step(engine, run_id, AdamParams(learning_rate=1e-2))


def assert_equal(found: AdapterState, expected: AdapterState) -> None:
    assert found.step == expected.step
    for name in ("weights", "moment1", "moment2", "gradient"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_a_state_is_of_the_moment_it_was_asked_for_whatever_is_trained_before_it_arrives() -> None:
    held_up = HeldUp(room_bytes=1 << 30)
    engine = engine_with(held_up.copier, "run")
    train(engine, "run", 2)
    engine.forward_backward([Work("run", tiny.batch(seed=7))])  # accumulated, and not stepped with
    expected = engine._adapters["run"].state()
    asked = engine.begin_state("run")
    weights = engine.begin_state("run", only_weights=True)
    train(engine, "run", 3)
    later = engine._adapters["run"].state()
    assert not asked.arrival.done()
    held_up.go.set()
    assert asked.nbytes == expected.nbytes
    assert_equal(asked.arrival.result(), expected)
    np.testing.assert_array_equal(weights.arrival.result().weights, expected.weights)
    assert weights.arrival.result().moment1 is None
    assert weights.arrival.result().step == 0
    assert not np.array_equal(later.weights, expected.weights)
    assert later.step == expected.step + 3
    engine.close()


def test_what_has_no_room_is_waited_for_and_clones_never_take_more_than_it() -> None:
    size = 4 * 1000
    copier = HostCopier(CPU, room_bytes=2 * size)
    gate = threading.Event()
    copier._thread.submit(gate.wait)
    flat = torch.zeros(1000)
    first, second = (copier.begin({"x": flat}, dict) for _ in range(2))
    assert copier._cloned_bytes == 2 * size
    returned = threading.Event()

    def ask() -> None:
        assert copier.begin({"x": flat}, dict).done()
        returned.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert not returned.wait(0.2), "it came back although nothing has room or was fetched"
    gate.set()
    asking.join(20)
    assert returned.is_set()
    assert first.done()
    assert second.done()
    assert copier._cloned_bytes == 0
    copier.close()


@pytest.mark.parametrize("elements", [0, 1, 16, 17, 100])
def test_a_copy_of_any_length_is_whole(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_PART_BYTES", 4 * 16)
    copier = HostCopier(CPU, room_bytes=1 << 20)
    flats = {"a": torch.arange(elements, dtype=torch.float32), "b": torch.rand(elements)}
    found = copier.begin(flats, dict).result()
    for name, flat in flats.items():
        np.testing.assert_array_equal(found[name], flat.numpy())
    copier.close()


def test_a_copy_that_fails_says_so_and_gives_its_room_back() -> None:
    copier = HostCopier(CPU, room_bytes=1 << 20)

    def make(x: object) -> None:
        raise MemoryError("no memory, say")

    with pytest.raises(MemoryError):
        copier.begin({"x": torch.zeros(8)}, make).result()
    assert copier._cloned_bytes == 0
    assert copier.begin({"x": torch.zeros(8)}, dict).result()["x"].shape == (8,)
    copier.close()


def test_an_adapter_that_left_the_device_comes_back_as_it_was_though_it_is_still_being_fetched() -> None:
    held_up = HeldUp(room_bytes=1 << 30)
    engine = engine_with(held_up.copier)
    slots = Slots(engine, slot_bytes=engine.size_bytes(LoraSpec(rank=4, seed=0)), host_bytes=1 << 40)
    slots.create("one", LoraSpec(rank=4, seed=0), "t")
    train(engine, "one", 2)
    expected = engine._adapters["one"].state()
    slots.create("two", LoraSpec(rank=4, seed=1), "t")
    assert not engine.holds("one")
    assert slots.holds("one")
    threading.Timer(0.1, held_up.go.set).start()
    slots.bring(["one"])
    assert_equal(engine._adapters["one"].state(), expected)
    engine.close()


class Slow(CountingEngine):
    """Its states, of three gigabytes as far as it says, do not arrive before `go`."""

    go: threading.Event

    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        state, arrival = self.state(run_id), Future[AdapterState]()

        def arrive() -> None:
            self.go.wait(20)
            arrival.set_result(state)

        threading.Thread(target=arrive, daemon=True).start()
        return StateOnTheWay(state.spec, 3 << 30, arrival)


def test_while_a_snapshot_is_on_its_way_results_come_and_no_second_one_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.worker.test_process.CountingEngine", Slow)
    Slow.go = threading.Event()
    house = House(tmp_path)
    house.start("w1", snapshot_seconds=0.0)
    for name in ("a", "b"):
        house.run(name)
    for turn in (1, 2, 3):
        for name in ("a", "b"):
            assert house.outcome(house.train_and_step(name, turn)).error is None
    assert house.worker is not None
    points = [held.point for held in house.worker.held.values()]
    assert [point.writing for point in points].count(True) == 1, points
    Slow.go.set()
    wait_until(lambda: not any(point.writing for point in points), 20, "writing the first snapshot")

    def snapshots_of() -> dict[str, tuple[int, str]]:
        rows = house.journal.read(lambda c: c.execute(runs.select()).all()).result()
        return {row.id: (row.snapshot_seq, row.snapshot_key) for row in rows}

    for name in ("a", "b"):
        assert house.outcome(house.train_and_step(name, 4)).error is None
    wait_until(lambda: all(seq >= 1 for seq, _ in snapshots_of().values()), 20, "snapshots of both")
    house.drain()
    for seq, key in snapshots_of().values():
        state = checkpoints.read(house.objects.get(key))
        assert state.step == seq // 2, "the state that was recorded is of another operation"
