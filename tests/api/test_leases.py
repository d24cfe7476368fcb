"""Which worker has a run: placement, heartbeats, changes of hands. On both databases."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests import servers
from tests.api.test_journal import run, store, submit  # noqa: F401 - fixtures
from tinsmith_api.journal import identities, leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import LeaseLost, Operation
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import runs, tenants, workers

LEASE_SECONDS = 5.0


def ready_worker(
    store: Store,  # noqa: F811
    worker_id: str,
    *,
    silent_seconds: float = 0.0,
    **facts: str,
) -> None:
    def enter(c: sa.Connection) -> None:
        leases.register_worker(c, worker_id, "m", {})
        leases.describe_worker(c, worker_id, {"vocab_size": 7, **facts})
        c.execute(
            workers.update()
            .where(workers.c.id == worker_id)
            .values(heartbeat_at=workers.c.heartbeat_at - silent_seconds)
        )

    store.write(enter).result()


def new_run(store: Store, run_id: str) -> None:  # noqa: F811
    def enter(c: sa.Connection) -> None:
        row = dict(c.execute(sa.select(runs).where(runs.c.id == "r")).one()._mapping)
        c.execute(runs.insert().values({**row, "id": run_id, "worker_id": None, "epoch": 0}))

    store.write(enter).result()


def beat(store: Store, worker_id: str, judges: bool = True) -> leases.Beat:  # noqa: F811
    patience = LEASE_SECONDS if judges else None
    return store.write(lambda c: leases.beat(c, worker_id, "m", dead_after_seconds=patience)).result()


def holder(store: Store, run_id: str = "r") -> tuple[str | None, int, int]:  # noqa: F811
    query = sa.select(runs.c.worker_id, runs.c.epoch, runs.c.deaths).where(runs.c.id == run_id)
    return tuple(store.read(lambda c: c.execute(query).one()).result())  # type: ignore[return-value]


def place(store: Store, run_id: str) -> str | None:  # noqa: F811
    return store.write(lambda c: leases.place(c, run_id, "m")).result()


def take(store: Store, run_id: str, worker_id: str) -> leases.Lease:  # noqa: F811
    lease = store.write(lambda c: leases.take(c, run_id, worker_id)).result()
    assert lease is not None
    return lease


def hand_over(store: Store, lease: leases.Lease) -> None:  # noqa: F811
    store.write(lambda c: leases.hand_over(c, lease, "m")).result()


def test_runs_go_to_the_least_loaded_worker_and_stay_there(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2")
    ready_worker(store, "w3")
    names = [f"r{i}" for i in range(4)]
    for name in names:
        new_run(store, name)
    assert [place(store, name) for name in names] == ["w2", "w3", "w2", "w3"]
    assert [place(store, name) for name in names] == ["w2", "w3", "w2", "w3"]
    assert holder(store, "r0") == ("w2", 1, 0)


def test_a_worker_that_joins_is_given_what_others_have_too_many_of(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2")
    for number in range(5):
        new_run(store, f"r{number}")
        place(store, f"r{number}")
    assert not beat(store, "w2").has_surplus, "it is alone"
    for name, role in (("w3", "train"), ("w4", "sample")):
        ready_worker(store, name, role=role)
    for number in range(5):
        if not beat(store, "w2").has_surplus:
            break
        assert not beat(store, "w3").has_surplus
        lease = take(store, f"r{number}", "w2")
        submit(store, 1, subject=f"r{number}")
        hand_over(store, lease)
        assert holder(store, f"r{number}") == ("w3", lease.epoch + 1, 0)
        with pytest.raises(LeaseLost):
            hand_over(store, lease)
    assert [holder(store, f"r{number}")[0] for number in range(5)] == ["w3", "w3", "w2", "w2", "w2"]
    submit(store, 1, subject="r4")
    hand_over(store, take(store, "r4", "w2"))
    assert holder(store, "r4")[0] == "w2", "nobody has so much less"
    store.write(lambda c: leases.drain_worker(c, "w2")).result()
    assert not beat(store, "w2").has_surplus


def test_a_run_for_which_nothing_waits_is_not_handed_over(store: Store, run: str) -> None:  # noqa: F811
    """Who is given it would never hear of it, never let go of it, and be given no others."""
    ready_worker(store, "w2")
    for number in range(3):
        new_run(store, f"r{number}")
        place(store, f"r{number}")
    ready_worker(store, "w3")
    lease = take(store, "r0", "w2")
    hand_over(store, lease)
    assert holder(store, "r0") == ("w2", lease.epoch, 0)
    submit(store, 1, subject="r0")
    hand_over(store, lease)
    assert holder(store, "r0") == ("w3", lease.epoch + 1, 0)


def test_a_worker_of_one_role_is_given_nothing_else(store: Store, run: str) -> None:  # noqa: F811
    for name, role in (("w2", "train"), ("w3", "sample")):
        ready_worker(store, name, role=role)
    names = [f"r{i}" for i in range(3)]
    for name in names:
        new_run(store, name)
    assert [place(store, name) for name in names] == ["w2"] * 3
    pool = store.read(lambda c: leases.pools(c, heard_within_seconds=None)).result()["m"]
    assert {pool.sampling_worker(f"s{n}") for n in range(20)} == {"w3"}
    assert leases.Pool("m", {}, ("a",), train_only=frozenset("a")).sampling_worker("s") is None
    # A sample whose worker is gone goes to one that samples, however many runs the others have.
    tenant = store.read(lambda c: c.scalar(sa.select(tenants.c.id))).result()
    sample = Operation("s", 1, ops.SAMPLE, tenant, "m", request_id="lost", worker_id="w3", payload=b"")
    store.write(lambda c: ops.submit(c, sample)).result()
    ready_worker(store, "w4", role="sample")
    store.write(lambda c: leases.stop_worker(c, "w3")).result()
    store.write(lambda c: leases.sweep(c, "m", dead_after_seconds=None)).result()
    assert "lost" in beat(store, "w4").queued


def test_nobody_is_given_runs_before_it_is_ready_or_while_it_drains(store: Store, run: str) -> None:  # noqa: F811
    new_run(store, "r0")
    assert place(store, "r0") is None, "w1 has not loaded its base"
    ready_worker(store, "w2")
    assert store.write(lambda c: leases.drain_worker(c, "w2")).result()
    assert place(store, "r0") is None
    assert beat(store, "w2").is_draining
    ready_worker(store, "w3")
    assert place(store, "r0") == "w3"


def test_a_silent_worker_s_waiting_runs_move_and_its_late_results_are_refused(
    store: Store,  # noqa: F811
    run: str,  # noqa: F811
) -> None:
    ready_worker(store, "w2", silent_seconds=60)
    ready_worker(store, "w3")
    store.write(lambda c: c.execute(runs.update().values(worker_id="w2", epoch=4))).result()
    request_id = submit(store, 1)
    heard = beat(store, "w3")
    assert heard == leases.Beat(True, False, {request_id: 5}, gave_up=True)
    assert holder(store) == ("w3", 5, 1)
    late = {"run_id": "r", "worker_id": "w2", "epoch": 4, "body": b"late"}
    with pytest.raises(LeaseLost):
        store.write(lambda c: ops.finish(c, request_id, **late)).result()  # type: ignore[arg-type]
    assert not beat(store, "w2").is_alive, "it must begin anew"
    assert store.write(lambda c: leases.take(c, "r", "w2")).result() is None
    in_time = {"run_id": "r", "worker_id": "w3", "epoch": 5, "body": b"x"}
    assert store.write(lambda c: ops.finish(c, request_id, **in_time)).result()  # type: ignore[arg-type]
    assert holder(store) == ("w3", 5, 0), "something was finished: no more talk of deaths"


def test_who_was_cut_off_itself_judges_nobody(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2", silent_seconds=60)
    ready_worker(store, "w3", silent_seconds=60)
    assert beat(store, "w3", judges=False).is_alive
    assert beat(store, "w2").is_alive


def test_a_worker_that_loads_its_base_may_be_silent_for_longer(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2")
    silent = workers.update().where(workers.c.id == "w1")
    store.write(lambda c: c.execute(silent.values(heartbeat_at=workers.c.heartbeat_at - 30))).result()
    beat(store, "w2")
    assert beat(store, "w1").is_alive
    store.write(lambda c: c.execute(silent.values(heartbeat_at=workers.c.heartbeat_at - 300))).result()
    beat(store, "w2")
    assert not beat(store, "w1").is_alive


def test_after_two_deaths_only_the_run_that_was_tried_is_counted(store: Store, run: str) -> None:  # noqa: F811
    new_run(store, "s")
    store.write(lambda c: c.execute(runs.update().values(deaths=2, worker_id="gone", epoch=1))).result()
    ready_worker(store, "gone")
    for subject in ("r", "s"):
        tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
        operation = Operation(subject, 1, ops.OPTIM_STEP, tenant, "m", payload=b"{}")
        store.write(lambda c, o=operation: ops.submit(c, o)).result()
    store.write(lambda c: leases.suspect(c, "s", "gone", 1)).result()
    store.write(lambda c: leases.stop_worker(c, "gone", died=True)).result()
    ready_worker(store, "w2")
    beat(store, "w2")
    assert (holder(store, "r")[2], holder(store, "s")[2]) == (2, 3)


def test_samples_of_a_dead_worker_go_to_a_living_one(store: Store, run: str) -> None:  # noqa: F811
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    sample = Operation("x:sample:0", 0, ops.SAMPLE, tenant, "m", payload=b"", worker_id="gone")
    entered = store.write(lambda c: ops.submit(c, sample)).result()[0]
    ready_worker(store, "w2")
    assert beat(store, "w2").queued == {entered.request_id: 0}


def test_after_two_deaths_only_the_sample_that_was_tried_is_counted(store: Store, run: str) -> None:  # noqa: F811
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    entered = []
    ready_worker(store, "w2")
    for number in range(2):
        sample = Operation("x:sample:0", number, ops.SAMPLE, tenant, "m", payload=b"", worker_id="w2")
        entered.append(store.write(lambda c, s=sample: ops.submit(c, s)).result()[0])
    names = [sample.request_id for sample in entered]

    def deaths() -> list[int]:
        found = {s.request_id: s for s in store.read(lambda c: ops.look_up(c, names)).result()}
        return [found[name].deaths for name in names]

    def tried(worker: str) -> bool:
        sample = replace(entered[0], worker_id=worker)
        return store.write(lambda c: ops.suspect_sample(c, sample)).result()

    for number, expected in ((2, [1, 1]), (3, [2, 2]), (4, [3, 2])):
        if number == 4:
            assert tried("w4")
            assert not tried("w2"), "it is not there any more"
        store.write(lambda c, n=number: leases.stop_worker(c, f"w{n}", died=True)).result()
        ready_worker(store, f"w{number + 1}")
        beat(store, f"w{number + 1}")
        assert deaths() == expected
    store.write(lambda c: leases.stop_worker(c, "w5")).result()
    ready_worker(store, "w6")
    beat(store, "w6")
    assert deaths() == [3, 2], "it left in peace"


def test_a_released_run_is_placed_anew_unless_something_waits(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2")
    place(store, "r")
    worker, epoch, _ = holder(store)
    assert worker == "w1"
    first = submit(store, 1)
    assert not store.write(lambda c: leases.release(c, "r", "w1", epoch)).result()
    done: dict[str, Any] = {"run_id": "r", "worker_id": "w1", "epoch": epoch, "body": b""}
    store.write(lambda c: ops.finish(c, first, **done)).result()
    assert store.write(lambda c: leases.release(c, "r", "w1", epoch)).result()
    assert holder(store)[:2] == (None, epoch + 1)
    assert place(store, "r") == "w2"


def test_placements_at_the_same_time_agree(store: Store, run: str) -> None:  # noqa: F811
    for number in range(4):
        ready_worker(store, f"x{number}")
    others = [Store(store.url.render_as_string(hide_password=False)) for _ in range(3)]
    for number in range(20):
        new_run(store, f"r{number}")
        with ThreadPoolExecutor(3) as threads:
            found = set(threads.map(lambda s, n=number: place(s, f"r{n}"), others))
        assert found == {holder(store, f"r{number}")[0]}
    for other in others:
        other.close()


def test_pools_say_who_is_there(store: Store, run: str) -> None:  # noqa: F811
    ready_worker(store, "w2")
    ready_worker(store, "w3", silent_seconds=60)
    store.write(lambda c: leases.drain_worker(c, "w2")).result()
    ready_worker(store, "w4")
    (pool,) = store.read(lambda c: leases.pools(c, heard_within_seconds=9)).result().values()
    assert pool == leases.Pool("m", {"vocab_size": 7}, ("w4",), starting=1, draining=1)
    assert pool.sampling_worker("s") == "w4"
    assert leases.Pool("m", {}, ()).sampling_worker("s") is None


def test_a_sampler_stays_with_its_worker_while_others_come_and_go() -> None:
    all_of_them = leases.Pool("m", {}, ("a", "b", "c", "d"))
    fewer = leases.Pool("m", {}, ("a", "b", "c"))
    moved = 0
    for number in range(200):
        before, after = all_of_them.sampling_worker(str(number)), fewer.sampling_worker(str(number))
        assert before == "d" or before == after
        moved += before != after
    assert 20 < moved < 90


def test_a_database_that_is_killed_in_the_middle_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    server = servers.Postgres(tmp_path / "postgres")
    journal = Store(
        server.url, patience_seconds=120
    )  # it recovers in a second or two, on a busy machine in more
    key = journal.write(lambda c: identities.create_key(c, "somebody")).result()
    tenant = journal.read(lambda c: identities.tenant_of_key(c, identities.sha256(key))).result()
    assert tenant
    stop = threading.Event()
    submitted: list[str] = []

    def keep_submitting() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            operation = Operation("x", number, ops.OPTIM_STEP, tenant, "m", payload=b"{}")
            entered, _ = journal.write(lambda c, o=operation: ops.submit(c, o)).result()
            submitted.append(entered.request_id)

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(keep_submitting)
        for _ in range(3):
            time.sleep(0.4)
            server.kill()
            server.start()
        time.sleep(0.4)
        stop.set()
        writing.result()
    count = sa.text("select count(*), count(distinct seq_id) from operations")
    assert len(submitted) > 30
    assert tuple(journal.read(lambda c: c.execute(count).one()).result()) == (len(submitted),) * 2
    journal.close()
    server.stop()


def test_processes_that_start_together_migrate_once(new_database: Any) -> None:
    url = new_database(empty=True)
    with ThreadPoolExecutor(6) as threads:
        stores = list(threads.map(lambda _: Store(url), range(6)))
    for opened in stores:
        opened.close()
