"""Adapters that come and go: between the device, host memory and the object store. No bit may change."""

import random
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from tests.e2e.wire import datum
from tests.servers import wait_until
from tests.worker import tiny
from tests.worker.test_process import CountingEngine, House
from tinsmith.wire import datums
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.journal import leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.tables import runs
from tinsmith_worker.contract import AdamParams, AdapterState, LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.slots import Slots


class Watched(CountingEngine):
    """Notes how many adapters it ever held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def create(self, run_id: str, spec: LoraSpec) -> None:
        super().create(run_id, spec)
        self.most = max(self.most, len(self._runs))

    def restore(self, run_id: str, state: AdapterState) -> None:
        super().restore(run_id, state)
        self.most = max(self.most, len(self._runs))


def test_a_thousand_open_runs_on_a_worker_with_room_for_sixteen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.worker.test_process.CountingEngine", Watched)
    house = House(tmp_path)
    # An adapter of this engine takes 16 bytes on the device, and as many in host memory.
    house.start("w1", slot_bytes=16 * 16, host_bytes=32 * 16)
    names = [f"r{number}" for number in range(1000)]
    lora = {"rank": 1, "seed": 1, "train_attn": True, "train_mlp": True, "train_unembed": True}
    row = {"tenant_id": house.tenant, "session_id": house.session, "base_model": "m", "lora": lora}
    more = {"user_metadata": {}, "created_at": 0, "epoch": 0, "snapshot_seq": -1}
    house.journal.write(
        lambda c: c.execute(runs.insert(), [{"id": n, **row, **more} for n in names])
    ).result()
    last = [house.submit(name, 0, ops.CREATE_MODEL, b"{}") for name in names]
    for request_id in last:
        assert house.outcome(request_id).error is None
    calls = random.Random(5)
    done = dict.fromkeys(names, 0)
    expected: dict[str, float] = {}
    for name in calls.choices(names, k=600):
        seq, tokens = done[name], calls.randrange(1, 5)
        house.train(name, seq + 1, *range(tokens))
        expected[house.step(name, seq + 2)] = tokens
        done[name] += 2
    for request_id, tokens in expected.items():
        found = house.outcome(request_id)
        assert found.body is not None
        assert f'"grad_norm": {float(tokens)}'.encode() in found.body
    engine, worker = house.engine, house.worker
    assert isinstance(engine, Watched)
    assert worker is not None
    assert 10 <= engine.most <= 16, engine.most
    wait_until(lambda: len(worker.held) <= 16 + 32, 60, "snapshotting and forgetting the others")
    house.drain()
    # Another worker finds every one of them as it was.
    house.start("w2", slot_bytes=16 * 16, host_bytes=32 * 16)
    for name in [n for n in names if done[n]][:50]:
        house.train(name, done[name] + 1, 1, 2, 3)
        body = house.outcome(house.step(name, done[name] + 2)).body
        assert body is not None
        assert b'"grad_norm": 3.0' in body
    house.drain()


def test_a_gradient_is_not_lost_when_its_run_leaves_before_the_step(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.start("w1", slot_bytes=16, host_bytes=0)
    first, second = house.run("a"), house.run("b")
    for number in range(1, 4):  # each call of one run makes the other leave the device, and then the host
        house.outcome(house.train(first, number, 1, 2, 3))
        house.outcome(house.train(second, number, 1, 2, 3, 4))
    for run, tokens in ((first, 9.0), (second, 12.0)):
        body = house.outcome(house.step(run, 4)).body
        assert body is not None
        assert f'"grad_norm": {tokens}'.encode() in body
    house.drain()


def test_an_idle_run_is_given_back_and_its_next_call_finds_it(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.start("w1", idle_seconds=0.3)
    run = house.run("a")
    house.outcome(house.train(run, 1, 1, 2, 3))

    def row() -> tuple[object, int]:
        found = house.journal.read(lambda c: c.execute(runs.select()).one()).result()
        return found.worker_id, found.snapshot_seq

    wait_until(lambda: row() == (None, 1), 10, "giving the run back")
    assert house.worker is not None
    assert house.worker.held == {}
    request_id = house.step(run, 2, ring=False)
    assert house.journal.write(lambda c: leases.place(c, run, "m")).result() == "w1"
    house.line.sendall(f"ring {request_id}\n".encode())
    body = house.outcome(request_id).body
    assert body is not None
    assert b'"grad_norm": 3.0' in body
    house.drain()


def test_a_worker_that_has_more_than_others_hands_a_run_over_with_all_that_waits_for_it(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.start("w1")
    names = [house.run(name) for name in "abc"]
    for run in names:
        house.outcome(house.train(run, 1, 1, 2, 3))
    behind, waiting, _ = [house.step(run, 3) for run in names]  # for the calls before them

    def holders() -> list[str | None]:
        columns = sa.select(runs.c.worker_id).order_by(runs.c.id)
        return [*house.journal.read(lambda c: c.execute(columns).scalars().all()).result()]

    house.line.sendall(b"share\n")
    house.outcome(house.train(names[0], 2, 1, 2))
    assert b'"grad_norm": 5.0' in (house.outcome(behind).body or b""), "there is nobody else: read back"
    assert holders() == ["w1"] * 3

    def enter(c: sa.Connection) -> None:
        leases.register_worker(c, "w2", "m", {})
        leases.describe_worker(c, "w2", {"vocab_size": 7})

    house.journal.write(enter).result()
    house.step(names[0], 5)
    house.line.sendall(b"share\n")
    wait_until(lambda: holders() == ["w1", "w2", "w1"], 10, "handing one over")
    for _ in range(3):
        house.line.sendall(b"share\n")
    assert b'"grad_norm": 3.0' in (house.outcome(house.step(names[2], 2)).body or b"")
    assert holders() == ["w1", "w2", "w1"], "it has only one more"
    house.drain()
    house.train(names[1], 2, 1, 2, ring=False)
    house.journal.write(lambda c: leases.stop_worker(c, "w2")).result()
    house.start("w3")
    assert b'"grad_norm": 5.0' in (house.outcome(waiting).body or b"")
    house.drain()


def test_a_worker_that_has_more_than_others_gives_runs_back_that_nobody_calls(tmp_path: Path) -> None:
    """To whoever has least when they are called, and not to one that would hear nothing of them."""
    house = House(tmp_path)
    house.start("w1")
    names = [house.run(name) for name in "abcd"]
    for run in names:
        house.outcome(house.train(run, 1, 1, 2, 3))

    def enter(c: sa.Connection) -> None:
        leases.register_worker(c, "w2", "m", {})
        leases.describe_worker(c, "w2", {"vocab_size": 7})

    def holders() -> list[str | None]:
        columns = sa.select(runs.c.worker_id).order_by(runs.c.id)
        return [*house.journal.read(lambda c: c.execute(columns).scalars().all()).result()]

    house.journal.write(enter).result()
    for given_back in (1, 2):
        house.line.sendall(b"share\n")
        expected = [None] * given_back + ["w1"] * (4 - given_back)
        wait_until(lambda expected=expected: holders() == expected, 10, "giving it back")
    assert house.worker is not None
    assert len(house.worker.held) == 2
    assert house.journal.write(lambda c: leases.place(c, names[0], "m")).result() == "w2"
    house.drain()
    house.journal.write(lambda c: leases.stop_worker(c, "w2")).result()
    house.start("w3")
    assert house.gradient_of(house.step(names[0], 2)) == 3
    house.drain()


def test_a_thousand_calls_of_a_run_are_executed_in_order_whatever_is_unpacked_when(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.start("w1")
    run = house.run("a")
    numbers = list(range(1, 601))
    random.Random(1).shuffle(numbers)
    futures = {
        number: house.submit(run, number, ops.OPTIM_STEP, b'{"adam_params": {}}') for number in numbers
    }
    for number in (1, 300, 600):
        assert house.outcome(futures[number]).error is None
    assert house.worker is not None
    assert house.engine.state(run).step == 600
    held = house.worker.held[run]
    assert (held.prepared, held.waiting, held.requested) == ({}, {}, set())
    house.drain()


def _trained(
    engine: TorchEngine, slots: Slots, run_ids: list[str], *, spread: bool
) -> dict[str, AdapterState]:
    """Three steps of each run, one after the other (spread: everybody's turn comes before anybody's next)."""

    def passed(run_id: str, step: int) -> None:
        seed = 100 * run_ids.index(run_id) + step
        tokens = np.random.default_rng(seed).integers(0, engine.facts.vocab_size, 12).tolist()
        message = pb.ForwardBackwardRequest(data=[datum(tokens)], loss_fn="cross_entropy")
        given = datums.read(message, vocab_size=engine.facts.vocab_size, max_context_length=64)
        slots.bring([run_id])
        engine.forward_backward([Work(run_id, given)])

    def stepped(run_id: str) -> None:
        slots.bring([run_id])
        tiny.step(engine, run_id, AdamParams(learning_rate=1e-2))

    for number, run_id in enumerate(run_ids):
        slots.create(run_id, LoraSpec(rank=1 + number % 3, seed=number), "t")
    if spread:
        for step in range(3):
            for run_id in run_ids:
                passed(run_id, step)
            for run_id in run_ids:
                stepped(run_id)
    else:
        for run_id in run_ids:
            for step in range(3):
                passed(run_id, step)
                stepped(run_id)
    return {run_id: slots.begin_state(run_id).arrival.result() for run_id in run_ids}


def test_runs_that_left_the_device_at_every_turn_have_the_bits_of_those_that_stayed() -> None:
    engine = TorchEngine(tiny.base(), EngineSettings(deterministic=True))
    run_ids = [f"r{number}" for number in range(12)]
    largest = engine.size_bytes(LoraSpec(rank=3, seed=0))
    roomy = Slots(engine, slot_bytes=1 << 40, host_bytes=1 << 40)
    stayed = _trained(engine, roomy, run_ids, spread=False)
    for run_id in run_ids:
        roomy.drop(run_id)
    narrow = Slots(engine, slot_bytes=2 * largest, host_bytes=1 << 40)
    moved = _trained(engine, narrow, run_ids, spread=True)
    for run_id in run_ids:
        before, after = stayed[run_id], moved[run_id]
        assert before.step == after.step == 3
        for name in ("weights", "moment1", "moment2"):
            np.testing.assert_array_equal(
                getattr(before, name), getattr(after, name), err_msg=f"{run_id} {name}"
            )


def test_an_adapter_larger_than_all_slots_has_the_device_to_itself() -> None:
    engine = Watched()
    slots = Slots(engine, slot_bytes=1, host_bytes=0)
    for name in ("a", "b"):
        slots.create(name, LoraSpec(rank=1, seed=1), "t")
    assert (engine.holds("a"), engine.holds("b"), slots.holds("a")) == (False, True, True)
    slots.bring(["a"])
    assert (engine.holds("a"), engine.holds("b")) == (True, False)
    assert slots.surplus({}, is_idle=lambda _: True) == ["b"]
    assert slots.surplus({}, is_idle=lambda _: False) == []
    slots.drop("b")
    assert not slots.holds("b")


def test_nobody_is_pushed_out_by_somebody_else_s_many_runs() -> None:
    engine = Watched()
    slots = Slots(engine, slot_bytes=4 * 16, host_bytes=1 << 20)
    spec = LoraSpec(rank=1, seed=1)
    slots.create("mine", spec, "few")
    for number in range(20):
        slots.create(f"r{number}", spec, "many")
    assert engine.holds("mine"), "used least recently, and yet the only one of its tenant"
    assert [r for r in engine._runs if r != "mine"] == ["r17", "r18", "r19"]
    slots.host_bytes = 5 * 12
    for number in range(4):
        slots.create(f"m{number}", spec, "few")
    leaving = slots.surplus({}, is_idle=lambda _: True)
    assert leaving
    assert {slots._tenants[r] for r in leaving} == {"many"}


def test_a_tenant_beyond_its_limit_makes_room_and_nobody_else() -> None:
    slots = Slots(Watched(), slot_bytes=1 << 20, host_bytes=1 << 20)
    spec = LoraSpec(rank=1, seed=1)
    for number in range(6):
        slots.create(f"a{number}", spec, "limited")
        slots.create(f"b{number}", spec, "free")
    slots.bring(["a0"])
    assert slots.surplus({"limited": 3 * 16}, is_idle=lambda _: True) == ["a1", "a2", "a3"]
    assert slots.surplus({"limited": 3 * 16}, is_idle=lambda r: r != "a2") == ["a1", "a3", "a4"]
    assert slots.surplus({}, is_idle=lambda _: True) == []
    for number in range(6):
        slots.drop(f"a{number}")
        slots.drop(f"b{number}")
    assert not any(slots._held.values())


def test_a_tenant_s_limit_on_memory_is_kept_and_its_runs_go_on(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.sql("update tenants set max_page_bytes = 32")
    house.start("w1", slot_bytes=1 << 20, host_bytes=1 << 20)
    worker = house.worker
    assert worker is not None
    for name in "abcdef":
        house.run(name)
        house.outcome(house.train(name, 1, 1, 2, 3))
    wait_until(lambda: len(worker.held) <= 2, 10, "leaving memory")
    placed = sa.select(sa.func.count(runs.c.worker_id))
    wait_until(
        lambda: house.journal.read(lambda c: c.execute(placed).scalar_one()).result() <= 2, 10, "giving back"
    )
    for name in "abcdef":
        assert house.gradient_of(house.step(name, 2)) == 3
    house.drain()
