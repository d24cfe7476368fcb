"""A worker whose object store is slow or gone, and whose runs change hands at the worst moment."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.servers import wait_until
from tests.worker.test_process import POISON, House
from tinsmith_api.journal import checkpoints, leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import DirectoryStore
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import runs
from tinsmith_worker import answers
from tinsmith_worker.contract import AdapterState, ModelFacts
from tinsmith_worker.intake import Adopt, Event, Intake
from tinsmith_worker.outbox import Outbox


class Gated(DirectoryStore):
    """Writes nothing while `gate` is shut, and cannot read what begins with `unreadable`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.writing: list[str] = []
        self.unreadable = "nothing"

    def put(self, prefix: str, files: dict[str, bytes]) -> int:
        self.writing.append(prefix)
        assert self.gate.wait(60)
        return super().put(prefix, files)

    def get(self, prefix: str) -> dict[str, bytes]:
        if self.unreadable in prefix:
            raise OSError(f"{prefix}: not now")
        return super().get(prefix)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    made.objects = Gated(tmp_path / "objects")
    made.start("w1")
    yield made
    store_of(made).gate.set()
    if made.thread.is_alive():
        made.drain()
    made.journal.close()


def store_of(house: House) -> Gated:
    assert isinstance(house.objects, Gated)
    return house.objects


def save(house: House, run: str, seq_id: int, *, ring: bool = True) -> str:
    prefix = f"t/checkpoints/{run}/{seq_id}"
    payload = f'{{"path": "tinker://{run}/weights/{seq_id}", "kind": "weights", "name": "{seq_id}", '
    payload += f'"object_prefix": "{prefix}"}}'
    return house.submit(run, seq_id, ops.SAVE_WEIGHTS, payload.encode(), ring=ring)


def test_saves_that_wait_for_a_slow_store_do_not_fill_the_memory(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = 0
    state = house.engine.state

    def counted(run_id: str) -> AdapterState:
        nonlocal copies
        copies += 1
        return state(run_id)

    monkeypatch.setattr(house.engine, "state", counted)
    house.run("a")
    house.run("b")
    store_of(house).gate.clear()
    futures = [save(house, "a", seq_id) for seq_id in range(1, 61)]
    for seq_id in range(1, 6):
        assert house.gradient_of(house.train_and_step("b", seq_id)) == 2, "nobody else waits for it"
    assert copies <= 17, copies
    store_of(house).gate.set()
    for request_id in futures:
        assert house.outcome(request_id).error is None
    assert copies >= 60


def test_a_broken_pass_waits_for_the_store_alone(house: House) -> None:
    house.run("a")
    house.run("b")
    store_of(house).gate.clear()
    saved = save(house, "a", 1)
    wait_until(lambda: store_of(house).writing, 5, "the save")
    # By itself: of two in one pass it would be told which was to blame when they were computed again.
    assert house.outcome(house.train("a", 2, POISON)).error is not None
    follows = house.train("a", 3, 1, 2)
    assert house.gradient_of(house.train_and_step("b", 1)) == 2
    assert house.queued(saved)
    assert house.queued(follows)
    store_of(house).gate.set()
    assert house.outcome(saved).error is None
    assert house.gradient_of(house.step("a", 4)) == 2


def test_runs_whose_snapshots_cannot_be_read_now_keep_nobody_waiting(house: House) -> None:
    names = [f"a{number}" for number in range(12)]
    for name in names:
        house.run(name)
        house.outcome(house.train(name, 1, 1, 2, 3))
    house.drain()
    store_of(house).unreadable = "/snapshots/a"
    waiting = [house.step(name, 2, ring=False) for name in names]
    house.start("w2")
    house.run("b")
    assert house.gradient_of(house.train_and_step("b", 1)) == 2
    assert all(house.queued(request_id) for request_id in waiting)
    store_of(house).unreadable = "nothing"
    for request_id in waiting:
        assert house.gradient_of(request_id) == 3


def test_the_files_of_a_snapshot_are_known_of_before_there_are_any(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2, 3))
    store_of(house).gate.clear()
    house.line.sendall(b"drain\n")  # it takes a snapshot before it leaves
    wait_until(lambda: store_of(house).writing, 10, "a snapshot")
    (prefix,) = store_of(house).writing
    assert house.sql("select object_prefix from garbage") == [(prefix,)]
    store_of(house).gate.set()
    house.thread.join(20)
    assert house.sql("select object_prefix from garbage") == []
    assert house.sql("select snapshot_key from runs") == [(prefix,)]


def test_a_run_that_is_to_be_had_again_is_taken_again(house: House) -> None:
    house.run("a")
    house.outcome(house.train("a", 1, 1, 2, 3))
    # As if it had been given up, moved away and back: what is computed under the old lease is refused.
    house.sql("update runs set epoch = epoch + 1")
    assert house.gradient_of(house.step("a", 2)) == 3


def test_a_result_is_written_under_the_lease_it_was_computed_under(house: House) -> None:
    house.run("a")
    waiting = house.submit("a", 1, ops.OPTIM_STEP, b"{}", ring=False)
    (operation,) = house.journal.read(lambda c: ops.fetch(c, [waiting])).result()
    ((epoch,),) = house.sql("select epoch from runs")
    assert isinstance(epoch, int)
    epochs, gate, lost = {"a": epoch}, threading.Event(), queue.SimpleQueue[tuple[str, int]]()
    outbox = Outbox(
        house.journal,
        "w1",
        epochs,
        announce=lambda _: None,
        on_lost=lambda *run: lost.put(run),
        on_broken=lambda: None,
    )

    def slowly() -> bytes:
        gate.wait(10)
        return b"late"

    outbox.result(operation, slowly)
    # The run goes to another worker and comes back meanwhile.
    house.sql(f"update runs set epoch = {epoch + 2}")
    epochs["a"] = epoch + 2
    gate.set()
    assert lost.get(timeout=10) == ("a", epoch)
    assert house.queued(waiting)
    outbox.close()


class Acting(queue.SimpleQueue[Event]):
    """The engine's side of an intake: does something when an event arrives, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Event] = []
        self.then: list[Callable[[], None]] = []

    def put(self, event: Event, block: bool = True, timeout: float | None = None) -> None:
        self.seen.append(event)
        if self.then:
            self.then.pop(0)()

    def adoptions(self) -> list[int]:
        return [event.lease.epoch for event in self.seen if isinstance(event, Adopt)]


FACTS = ModelFacts(vocab_size=100, max_context_length=100, architecture="x")


def intake_of(house: House, journal: Store, inbox: Acting) -> Intake:
    house.drain()
    house.journal.write(lambda c: leases.register_worker(c, "w2", "m", {})).result()
    return Intake(journal, house.objects, FACTS, "m", "w2", inbox)


def test_a_run_dropped_while_it_is_being_adopted_is_adopted_again(house: House) -> None:
    house.run("a")
    inbox = Acting()
    intake = intake_of(house, house.journal, inbox)

    def drop() -> None:
        intake.forget("a")
        intake.adopt("a")

    inbox.then = [drop]
    late = house.step("a", 1, ring=False)
    intake.ring([late])
    wait_until(lambda: len(inbox.adoptions()) == 2, 5, "its second adoption")
    wait_until(lambda: "a" in intake.known and not intake._adopting, 5, "its end")


def test_a_call_rung_for_while_the_run_was_still_another_s_is_not_lost(house: House) -> None:
    house.run("a")
    inbox = Acting()

    class Moving(Store):
        """The run comes to w2 right after w2 was told that it is not to be had."""

        moves = 1

        def write(self, statement: Callable[[sa.Connection], Any]) -> "Future[Any]":
            done = super().write(statement)
            if self.moves and done.result() is None:
                self.moves = 0
                move = runs.update().values(worker_id="w2", epoch=runs.c.epoch + 1)
                super().write(lambda c: c.execute(move)).result()
                intake.ring([late])
            return done

    journal = Moving(str(house.journal.url))
    intake = intake_of(house, journal, inbox)
    house.journal.write(lambda c: leases.register_worker(c, "w3", "m", {})).result()
    house.sql("update runs set worker_id = 'w3'")
    late = house.step("a", 1, ring=False)
    intake.ring([late])
    wait_until(lambda: inbox.adoptions(), 5, "its adoption")
    journal.close()


def test_an_adoption_under_a_lease_that_is_lost_already_is_ignored(house: House) -> None:
    house.run("a")
    worker = house.worker
    assert worker is not None
    ((epoch,),) = house.sql("select epoch from runs")
    assert isinstance(epoch, int)
    old = Adopt(worker.held["a"].lease, None, [])
    house.sql("update runs set epoch = epoch + 1")
    assert house.gradient_of(house.step("a", 1)) == 0
    worker.inbox.put(old)
    house.outcome(house.train("a", 2, 1, 2))
    assert worker.held["a"].lease.epoch == epoch + 1
    assert house.gradient_of(house.step("a", 3)) == 2


def test_a_save_that_came_too_late_leaves_its_name_free(house: House) -> None:
    run = house.run("a")
    late = save(house, run, 1, ring=False)
    reservation = {
        "path": checkpoints.path_of(run, "weights", "1"),
        "run_id": run,
        "tenant_id": house.tenant,
        "kind": "weights",
        "name": "1",
        "listed": True,
        "object_prefix": checkpoints.prefix_of(house.tenant, run, late),
        "lora": {},
        "user_metadata": {},
    }
    assert house.journal.write(lambda c: checkpoints.reserve(c, {**reservation, "request_id": late})).result()
    [(epoch,)] = house.sql("select epoch from runs where id = 'a'")
    lease = {"tenant_id": house.tenant, "base_model": "m", "worker_id": "w1", "epoch": epoch}
    assert house.journal.write(lambda c: answers.give_up(c, run, [1], **lease)).result() == [late]
    assert house.outcome(late).error is not None
    again = {**reservation, "request_id": "another"}
    assert house.journal.write(lambda c: checkpoints.reserve(c, again)).result(), "the name is taken for ever"
