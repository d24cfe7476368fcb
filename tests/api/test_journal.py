"""The journal on a real SQLite file and a real PostgreSQL: group commit, idempotent submission, leases, snapshots, names."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.chaos.proxy import Proxy
from tinsmith_api.journal import checkpoints, identities, leases, snapshots
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import LeaseLost, Operation, insert_if_new
from tinsmith_api.journal.store import Store, Unavailable
from tinsmith_api.journal.tables import garbage, metadata, payloads, results, runs, sessions, tenants, workers


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """Empty, in the database of either form."""
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("new_database")()
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def run(store: Store) -> str:
    """A run of tenant t, held by worker w1."""

    def fill(c: sa.Connection) -> str:
        key = identities.create_key(c, "somebody")
        tenant = identities.tenant_of_key(c, identities.sha256(key))
        assert tenant
        blank = {
            "tags": [],
            "user_metadata": {},
            "sdk_version": None,
            "project_id": None,
            "display_name": None,
        }
        session = identities.create_session(c, tenant, blank)
        row = {"id": "r", "tenant_id": tenant, "session_id": session, "base_model": "m", "lora": {}}
        c.execute(runs.insert().values(**row, user_metadata={}, created_at=0, epoch=0, snapshot_seq=-1))
        leases.register_worker(c, "w1", "m", {})
        assert leases.take(c, "r", "w1")
        return "r"

    return store.write(fill).result()


def submit(store: Store, seq: int, subject: str = "r", **more: object) -> str:
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    operation = Operation(subject, seq, ops.OPTIM_STEP, tenant, "m", payload=b"body", **more)  # type: ignore[arg-type]
    return store.write(lambda c: ops.submit(c, operation)).result()[0].request_id


def finish(store: Store, request_id: str, worker: str = "w1", epoch: int = 1, body: bytes = b"{}") -> bool:
    return store.write(
        lambda c: ops.finish(c, request_id, run_id="r", worker_id=worker, epoch=epoch, body=body)
    ).result()


def test_a_group_with_one_bad_write_commits_the_others(store: Store) -> None:
    def add(name: str) -> object:
        return store.write(
            lambda c: insert_if_new(c, tenants, {"id": name, "name": name, "created_at": 0}) or 1 / 0
        )

    futures = [add(name) for name in ("a", "b", "a", "c")]
    with pytest.raises(ZeroDivisionError):
        futures[2].result()  # type: ignore[attr-defined]
    assert [f.result() for i, f in enumerate(futures) if i != 2] == [True, True, True]  # type: ignore[attr-defined]
    found = store.read(lambda c: set(c.execute(sa.select(tenants.c.id)).scalars())).result()
    assert found == {"a", "b", "c"}


def test_an_error_does_not_say_what_was_to_be_written(store: Store) -> None:
    row = {"id": "a", "name": "a secret", "created_at": 0}
    write = [store.write(lambda c: c.execute(tenants.insert().values(row))) for _ in range(2)]
    assert write[0].result()
    assert "a secret" not in str(write[1].exception())


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_a_write_is_on_disk_when_its_future_is_done(store: Store) -> None:
    store.write(lambda c: c.execute(tenants.insert().values(id="a", name="a", created_at=0))).result()
    other = sqlite3.connect(str(store.url.database))
    assert other.execute("select id from tenants").fetchall() == [("a",)]
    assert other.execute("pragma journal_mode").fetchone() == ("wal",)


def test_two_processes_worth_of_writers_do_not_lose_or_block_each_other(store: Store) -> None:
    second = Store(str(store.url))

    def add(number: int) -> None:
        chosen = store if number % 2 else second
        name = str(number)
        chosen.write(lambda c: c.execute(tenants.insert().values(id=name, name=name, created_at=0))).result()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(add, range(200)))
    second.close()
    assert store.read(lambda c: len(c.execute(sa.select(tenants.c.id)).all())).result() == 200


_STANDS_STILL = """
import signal, sys
import sqlalchemy as sa
from tinsmith_api.journal.store import Store
store = Store(sys.argv[1])

def touch(connection):
    connection.execute(sa.text("update tenants set name = 'stopped' where id = 'default'"))
    if not stopped:
        stopped.append(True)
        signal.raise_signal(signal.SIGSTOP)  # this thread, at once: before it commits

stopped = []
store.write(touch).result()
store.close()
"""


def test_a_process_that_stands_still_in_a_transaction_blocks_nobody_and_writes_when_it_wakes(
    store: Store,
) -> None:
    if store.url.get_backend_name() == "sqlite":
        pytest.skip("one file has one writer: embedded, a process that stands still is killed with it")
    url = store.url.render_as_string(hide_password=False)
    row = sa.text("insert into tenants (id, name, created_at) values ('default', '', 0)")
    store.write(lambda c: c.execute(row)).result()
    process = subprocess.Popen([sys.executable, "-c", _STANDS_STILL, url])
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        change = sa.text("update tenants set name = 'moved on' where id = 'default'")
        store.write(lambda c: c.execute(change)).result(timeout=10)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    (name,) = store.read(lambda c: c.execute(sa.text("select name from tenants")).one()).result()
    assert name == "stopped"


def test_who_stops_waiting_for_a_write_stops_nobody_else(store: Store) -> None:
    """The write happens all the same, and so do those behind it."""
    go_on = threading.Event()

    def add(name: str) -> asyncio.Future[int]:
        def statement(c: sa.Connection) -> int:
            go_on.wait()
            return int(insert_if_new(c, tenants, {"id": name, "name": name, "created_at": 0}))

        return asyncio.wrap_future(store.write(statement))

    async def give_up_one() -> None:
        given_up, behind = add("a"), add("b")
        await asyncio.sleep(0.05)
        given_up.cancel()
        go_on.set()
        assert await asyncio.wait_for(behind, 10) == 1
        assert await asyncio.wait_for(add("c"), 10) == 1

    asyncio.run(give_up_one())
    found = store.read(lambda c: set(c.execute(sa.select(tenants.c.id)).scalars())).result()
    assert found == {"a", "b", "c"}


def test_a_read_apart_leaves_its_caller_free(store: Store) -> None:
    assert store.read_apart(lambda _: threading.get_ident()).result() != threading.get_ident()
    assert store.read_apart(lambda c: c.execute(sa.select(tenants.c.id)).all()).result() == []


def test_the_migrations_make_the_tables_the_code_names(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with sa.create_engine(store.url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_number_submitted_twice_is_one_operation(store: Store, run: str) -> None:
    assert submit(store, 1) == submit(store, 1)
    assert submit(store, 1) != submit(store, 2)


def test_a_finished_result_never_changes(store: Store, run: str) -> None:
    request_id = submit(store, 1)
    assert finish(store, request_id, body=b"first")
    assert not finish(store, request_id, body=b"second")
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    outcome = store.read(lambda c: ops.outcome(c, request_id, tenant)).result()
    assert outcome is not None
    assert (outcome.state, outcome.body) == ("done", b"first")
    assert store.read(lambda c: ops.outcome(c, request_id, "another tenant")).result() is None


def test_a_worker_whose_lease_passed_on_can_write_nothing(store: Store, run: str) -> None:
    request_id = submit(store, 1)
    store.write(lambda c: leases.register_worker(c, "w2", "m", {})).result()
    assert store.write(lambda c: leases.take(c, "r", "w2")).result() is None, "w1 is alive"
    store.write(lambda c: leases.stop_worker(c, "w1")).result()
    lease = store.write(lambda c: leases.take(c, "r", "w2")).result()
    assert lease is not None
    assert lease.epoch == 2
    with pytest.raises(LeaseLost):
        finish(store, request_id, "w1", epoch=1)
    snapshot = {"seq_id": 1, "key": "k", "worker_id": "w1", "epoch": 1}
    with pytest.raises(LeaseLost):
        store.write(lambda c: snapshots.record(c, "r", **snapshot)).result()  # type: ignore[arg-type]
    assert finish(store, request_id, "w2", epoch=2)


def test_a_snapshot_purges_what_it_covers_and_nothing_else(store: Store, run: str) -> None:
    for seq in (1, 2, 3):
        finish(store, submit(store, seq))
    submit(store, 4)
    for key in ("k1", "k2"):
        store.write(lambda c, key=key: snapshots.announce(c, key)).result()  # type: ignore[misc]
    record = {"seq_id": 2, "key": "k1", "worker_id": "w1", "epoch": 1}
    assert store.write(lambda c: snapshots.record(c, "r", **record)).result() is None  # type: ignore[arg-type]
    behind = store.read(lambda c: ops.history(c, "r", 2)).result()
    assert [(o.seq_id, o.state) for o in behind] == [(3, "done"), (4, "queued")]
    kept = store.read(lambda c: ops.fetch(c, [o.request_id for o in behind])).result()
    assert [o.payload for o in kept] == [b"body", b"body"]
    assert (
        store.read(
            lambda c: c.execute(sa.select(sa.func.count()).select_from(payloads)).scalar_one()
        ).result()
        == 2
    )
    record = {**record, "seq_id": 3, "key": "k2"}
    assert store.write(lambda c: snapshots.record(c, "r", **record)).result() == "k1"  # type: ignore[arg-type]


def test_a_refused_submission_is_failed_from_the_start(store: Store, run: str) -> None:
    submit(store, 1, error={"error": "no", "category": "user"})
    (found,) = store.read(lambda c: ops.history(c, "r", -1)).result()
    assert (found.state, found.payload) == ("failed", None)
    assert store.read(lambda c: ops.backlog(c, "w", "m")).result() == {}


def _reservation(store: Store, request_id: str) -> dict[str, object]:
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    return {
        "path": "tinker://r/weights/a", "run_id": "r", "tenant_id": tenant, "kind": "weights", "name": "a",
        "request_id": request_id, "listed": True, "object_prefix": f"p/{request_id}", "lora": {}, "user_metadata": {},
    }  # fmt: skip


def test_a_name_is_taken_by_one_save_and_free_again_when_that_fails(store: Store, run: str) -> None:
    first, second = _reservation(store, "1"), _reservation(store, "2")
    tenant = str(first["tenant_id"])
    assert store.write(lambda c: checkpoints.reserve(c, first)).result()
    assert not store.write(lambda c: checkpoints.reserve(c, second)).result()
    assert store.read(lambda c: checkpoints.find(c, "tinker://r/weights/a", tenant)).result() is None, (
        "not written yet"
    )
    store.write(lambda c: checkpoints.free_name(c, "1")).result()
    assert store.write(lambda c: checkpoints.reserve(c, second)).result()
    store.write(lambda c: checkpoints.publish(c, "2", second)).result()
    store.write(lambda c: checkpoints.free_name(c, "2")).result()
    assert store.read(lambda c: checkpoints.find(c, "tinker://r/weights/a", tenant)).result() is not None


def test_an_overwritten_checkpoint_leaves_its_files_to_be_collected(store: Store, run: str) -> None:
    first, second = _reservation(store, "1"), _reservation(store, "2")
    store.write(lambda c: checkpoints.publish(c, "1", first)).result()
    store.write(lambda c: checkpoints.publish(c, "2", second)).result()
    found = store.read(lambda c: checkpoints.find(c, str(first["path"]), str(first["tenant_id"]))).result()
    assert found is not None
    assert found.object_prefix == "p/2"
    collected = store.read(lambda c: c.exec_driver_sql("select object_prefix from garbage").all()).result()
    assert collected == [("p/1",)]


def test_an_expired_checkpoint_is_gone(store: Store, run: str) -> None:
    row = {**_reservation(store, "1"), "expires_at": 1.0}
    store.write(lambda c: checkpoints.publish(c, "1", row)).result()
    assert store.read(lambda c: checkpoints.find(c, str(row["path"]), str(row["tenant_id"]))).result() is None
    assert store.write(lambda c: checkpoints.expire(c, at_most=10)).result() == 1
    assert store.write(lambda c: checkpoints.expire(c, at_most=10)).result() == 0
    assert store.read(lambda c: c.execute(sa.select(garbage.c.object_prefix)).scalars().all()).result() == [
        row["object_prefix"]
    ]
    assert (
        store.read(lambda c: c.exec_driver_sql("select count(*) from checkpoints").scalar_one()).result() == 0
    )


def _finish_session(store: Store, seconds_ago: float) -> None:
    now = time.time()
    store.write(lambda c: c.execute(sessions.update().values(finished_at=now - seconds_ago))).result()


def test_a_frozen_sampler_keeps_its_weights_until_its_session_is_over(store: Store, run: str) -> None:
    row = {**_reservation(store, "1"), "kind": "sampler_weights"}
    sampler = {"id": "s", "tenant_id": row["tenant_id"], "base_model": "m", "model_path": row["path"]}
    session_id = store.read(lambda c: c.execute(sa.select(sessions.c.id)).scalar_one()).result()
    sampler |= {"session_id": session_id, "object_prefix": row["object_prefix"]}
    store.write(lambda c: checkpoints.publish(c, "1", row)).result()
    store.write(lambda c: checkpoints.open_sampler(c, sampler)).result()
    store.write(lambda c: checkpoints.delete(c, str(row["path"]))).result()
    store.write(lambda c: checkpoints.discard_objects(c, "p/of-no-sampler")).result()
    store.write(lambda c: c.exec_driver_sql("update garbage set delete_after = 1")).result()
    assert store.read(checkpoints.due_garbage).result() == ["p/of-no-sampler"]
    _finish_session(store, seconds_ago=10)
    assert store.read(checkpoints.due_garbage).result() == ["p/of-no-sampler"]
    _finish_session(store, seconds_ago=2 * checkpoints.GARBAGE_SECONDS)
    assert sorted(store.read(checkpoints.due_garbage).result()) == ["p/1", "p/of-no-sampler"]


def test_unnamed_checkpoints_outlive_their_session_by_an_hour_and_named_ones_for_ever(
    store: Store, run: str
) -> None:
    named = _reservation(store, "1")
    unnamed = {**_reservation(store, "2"), "listed": False, "path": "tinker://r/sampler_weights/u"}
    for row in (named, unnamed):
        store.write(lambda c, row=row: checkpoints.publish(c, str(row["request_id"]), row)).result()

    def left() -> list[str]:
        return store.read(lambda c: checkpoints.unnamed_left(c, at_most=10)).result()

    assert left() == []
    _finish_session(store, seconds_ago=10)
    assert left() == []
    _finish_session(store, seconds_ago=2 * checkpoints.GARBAGE_SECONDS)
    assert left() == [unnamed["path"]]
    store.write(lambda c: checkpoints.delete_all(c, left())).result()
    assert left() == []
    collected = store.read(lambda c: c.exec_driver_sql("select object_prefix from garbage").all()).result()
    assert collected == [("p/2",)]


def test_old_results_are_forgotten_a_piece_at_a_time_and_young_ones_kept(store: Store, run: str) -> None:
    rows = [{"request_id": str(i), "body": b"", "finished_at": float(i)} for i in range(25)]
    store.write(lambda c: c.execute(results.insert(), rows).rowcount).result()

    def purge(before: float) -> int:
        return store.write(lambda c: ops.purge_results(c, finished_before=before, at_most=10)).result()

    assert [purge(15) for _ in range(3)] == [10, 5, 0]
    kept = store.read(lambda c: c.execute(sa.select(results.c.finished_at)).scalars().all()).result()
    assert sorted(kept) == [float(i) for i in range(15, 25)]


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_no_purge_reads_more_than_it_deletes(store: Store) -> None:
    """With a million operations a scan would hold up everybody's writes for seconds."""
    for statement in (
        "DELETE FROM results WHERE request_id IN (SELECT request_id FROM results WHERE finished_at < 1 "
        "ORDER BY finished_at LIMIT 9)",
        "SELECT path FROM checkpoints WHERE expires_at < 1 LIMIT 9",
    ):
        plan = store.read(lambda c, s=statement: c.exec_driver_sql(f"EXPLAIN QUERY PLAN {s}").all()).result()
        assert not [row for row in plan if row[3].startswith("SCAN")], plan


def test_a_pool_s_facts_come_from_its_newest_worker(store: Store) -> None:
    for worker_id, vocabulary in (("w1", 1), ("w2", 2)):
        store.write(lambda c, w=worker_id: leases.register_worker(c, w, "m", {})).result()
        store.write(
            lambda c, w=worker_id, v=vocabulary: leases.describe_worker(c, w, {"vocab_size": v})
        ).result()
    store.write(
        lambda c: c.execute(workers.update().where(workers.c.id == "w1").values(started_at=0))
    ).result()
    pools = store.read(lambda c: leases.pools(c, heard_within_seconds=None)).result()
    assert pools["m"].facts == {"vocab_size": 2}
    assert pools["m"].ready == ("w1", "w2")
    assert list(pools) == ["m"]


def test_while_the_database_is_gone_nobody_waits_longer_than_was_promised(
    store: Store,
) -> None:
    if store.url.get_backend_name() == "sqlite":
        pytest.skip("a file is there or is not")
    assert store.url.port is not None
    line = Proxy(store.url.port)
    through = Store(store.url.set(port=line.port).render_as_string(), patience_seconds=1.0)
    line.cut()
    time.sleep(0.2)  # it is cut on a thread of its own
    started = time.monotonic()
    asked = [through.write(lambda c: c.execute(sa.text("select 1")).one()) for _ in range(200)] + [
        through.read(lambda c: c.execute(sa.text("select 1")).one()) for _ in range(50)
    ]
    for future in asked:
        with pytest.raises(Unavailable):
            future.result(timeout=20)
    assert time.monotonic() - started < 4, "one after the other had its own patience"
    line.heal()
    through.write(lambda c: None).result(timeout=20)
    through.close()
    line.close()


def test_a_snapshot_is_garbage_until_it_is_recorded_and_never_both(store: Store, run: str) -> None:
    def garbage_is() -> dict[str, float]:
        rows = store.read(lambda c: c.execute(sa.select(garbage)).all()).result()
        return {row.object_prefix: row.delete_after for row in rows}

    def record(key: str, seq_id: int) -> None:
        given = {"seq_id": seq_id, "key": key, "worker_id": "w1", "epoch": 1}
        store.write(lambda c: snapshots.record(c, "r", **given)).result()  # type: ignore[arg-type]

    finish(store, submit(store, 1))
    finish(store, submit(store, 2))
    for key in ("k1", "k2", "late"):
        store.write(lambda c, key=key: snapshots.announce(c, key)).result()  # type: ignore[misc]
    assert min(garbage_is().values()) > time.time() + 3600
    record("k1", 1)
    assert garbage_is().keys() == {"k2", "late"}
    assert store.read(checkpoints.due_garbage).result() == []
    record("k2", 2)
    assert store.read(checkpoints.due_garbage).result() == ["k1"], "the one it replaced"
    # Whoever slept while it wrote may find that somebody tidied up.
    store.write(lambda c: c.execute(garbage.update().values(delete_after=1.0))).result()
    finish(store, submit(store, 3))
    with pytest.raises(snapshots.Unfinished, match="too long"):
        record("late", 3)
    assert "k2" not in store.read(checkpoints.due_garbage).result(), "it is in use"


def test_what_a_failed_save_wrote_is_collected(store: Store, run: str) -> None:
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    row = {"path": "p", "run_id": "r", "tenant_id": tenant, "kind": "weights", "name": "n", "listed": True}
    more = {"request_id": "q", "object_prefix": "half/written", "lora": {}, "user_metadata": {}}
    store.write(lambda c: checkpoints.reserve(c, {**row, **more})).result()
    store.write(lambda c: checkpoints.free_name(c, "q")).result()
    found = store.read(lambda c: c.execute(sa.select(garbage.c.object_prefix)).scalars().all()).result()
    assert found == ["half/written"]


def test_what_a_failed_save_wrote_over_another_s_name_is_collected(store: Store, run: str) -> None:
    from tinsmith_worker import answers

    row = _reservation(store, "1")
    store.write(lambda c: checkpoints.publish(c, "1", row)).result()
    tenant_id, path = str(row["tenant_id"]), str(row["path"])
    overwriting = Operation("r", 2, ops.SAVE_WEIGHTS, tenant_id, "m", request_id="2")
    store.write(lambda c: answers.free_name(c, overwriting)).result()
    found = store.read(lambda c: c.execute(sa.select(garbage.c.object_prefix)).scalars().all()).result()
    assert found == [checkpoints.prefix_of(tenant_id, "r", "2")]
    kept = store.read(lambda c: checkpoints.find(c, path, tenant_id)).result()
    assert kept is not None
    assert kept.object_prefix == row["object_prefix"]


def test_a_flood_keeps_nobody_else_s_call_from_being_heard_of(store: Store, run: str) -> None:
    for seq in range(1, 31):
        submit(store, seq)
    other = store.write(lambda c: identities.create_key(c, "other")).result()
    tenant = store.read(lambda c: identities.tenant_of_key(c, identities.sha256(other))).result()
    assert tenant
    sample = Operation("s", 0, ops.SAMPLE, tenant, "m", payload=b"", worker_id="w1")
    late = store.write(lambda c: ops.submit(c, sample)).result()[0].request_id
    assert late in store.read(lambda c: ops.backlog(c, "w1", "m", at_most=10)).result()


def test_what_waits_is_counted_in_calls_and_bytes(store: Store, run: str) -> None:
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    first = submit(store, 1)
    submit(store, 2)
    used = store.read(lambda c: ops.usage(c, tenant)).result()
    assert (used.queued, used.queued_bytes) == (2, 2 * len(b"body"))
    finish(store, first)
    used = store.read(lambda c: ops.usage(c, tenant)).result()
    assert (used.queued, used.queued_bytes) == (1, len(b"body"))
    assert store.read(lambda c: ops.is_known(c, "r", 2)).result()
    assert not store.read(lambda c: ops.is_known(c, "r", 3)).result()


@pytest.mark.parametrize("form", ["sqlite", "postgresql"])
def test_whoever_had_a_key_before_there_were_members_can_do_what_they_could(
    form: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from alembic import command
    from alembic.config import Config

    import tinsmith_api.journal.store as module

    url = f"sqlite:///{tmp_path / 'journal.db'}"
    if form == "postgresql":
        url = request.getfixturevalue("new_database")(empty=True)
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        for statement in (
            "insert into tenants (id, name, created_at) values ('t', 'lab', 1), ('u', 'other', 1)",
            f"insert into keys (tenant_id, name, sha256, created_at) values ('t', 'old', '{identities.sha256('k')}', 1)",
            "insert into sessions (id, tenant_id, project_id, tags, user_metadata, created_at, heartbeat_at) "
            "values ('s1', 't', null, '[]', '{}', 1, 1), ('s2', 't', 'theirs', '[]', '{}', 1, 1)",
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()
    opened = Store(url)
    try:
        caller = opened.read(lambda c: identities.caller(c, hashed=identities.sha256("k"))).result()
        assert caller is not None
        assert (caller.tenant_id, caller.member, caller.role) == ("t", "owner", "admin")
        rows = opened.read(
            lambda c: c.execute(sa.select(sessions.c.id, sessions.c.member_id, sessions.c.project_id)).all()
        ).result()
        default = opened.read(lambda c: identities.project(c, "default", "t")).result()
        assert default is not None
        assert sorted(rows) == [("s1", caller.member_id, default.id), ("s2", caller.member_id, "theirs")]
        engine = sa.create_engine(url)
        with engine.begin() as connection:  # and back
            config.attributes["connection"] = connection
            command.downgrade(config, "0003")
            command.upgrade(config, "head")
        engine.dispose()
    finally:
        opened.close()


def test_files_go_with_the_last_that_shares_them(store: Store, run: str) -> None:
    row = {**_reservation(store, "1"), "lora": {}, "size_bytes": 3}
    store.write(lambda c: checkpoints.publish(c, "1", row)).result()
    tenant_id = str(row["tenant_id"])

    def copy() -> str | None:
        given = {"run_id": "r", "tenant_id": tenant_id, "ttl_seconds": None}
        return store.write(lambda c: checkpoints.copy(c, str(row["path"]), **given)).result()  # type: ignore[arg-type]

    def other_run(c: sa.Connection) -> None:
        columns = [column.name for column in runs.c if column.name != "id"]
        c.execute(
            runs.insert().from_select(
                ["id", *columns], sa.select(sa.literal("q"), *(runs.c[n] for n in columns))
            )
        )

    store.write(other_run).result()
    given = {"run_id": "q", "tenant_id": tenant_id, "ttl_seconds": None}
    path = store.write(lambda c: checkpoints.copy(c, str(row["path"]), **given)).result()  # type: ignore[arg-type]
    assert path == str(row["path"]).replace("//r/", "//q/")

    def due() -> list[str]:
        store.write(lambda c: c.exec_driver_sql("update garbage set delete_after = 1")).result()
        return store.read(checkpoints.due_garbage).result()

    store.write(lambda c: checkpoints.delete(c, str(row["path"]))).result()
    assert due() == []
    store.write(lambda c: checkpoints.delete(c, str(path))).result()
    assert store.read(checkpoints.due_garbage).result() == [], "an hour anew"
    assert due() == [row["object_prefix"]]
    assert copy() is None


def test_a_copy_of_an_unnamed_sampler_does_not_go_with_its_session(store: Store, run: str) -> None:
    row = {**_reservation(store, "1"), "listed": False}
    store.write(lambda c: checkpoints.publish(c, "1", row)).result()
    tenant_id, path = str(row["tenant_id"]), str(row["path"])

    def copy(c: sa.Connection) -> str | None:
        values = dict(c.execute(sa.select(runs)).one()._mapping)
        c.execute(runs.insert().values({**values, "id": "q"}))
        return checkpoints.copy(c, path, run_id="q", tenant_id=tenant_id, ttl_seconds=None)

    copied = store.write(copy).result()
    _finish_session(store, seconds_ago=2 * checkpoints.GARBAGE_SECONDS)
    assert store.read(lambda c: checkpoints.unnamed_left(c, at_most=10)).result() == [path]
    rows, _ = store.read(lambda c: checkpoints.listing(c, tenant_id, limit=10)).result()
    assert [r.path for r in rows] == [copied]


def test_usage_is_added_up_by_hour_and_counted_once(store: Store, run: str) -> None:
    from tinsmith_api.journal import usage

    operations = [ops.Operation("s:train:0", seq, ops.FORWARD_BACKWARD, "", "m", tokens=5) for seq in (1, 2)]
    tenant = store.read(lambda c: c.execute(sa.select(tenants.c.id)).scalar_one()).result()
    for operation in operations:
        mine = ops.Operation(**{**vars(operation), "tenant_id": tenant})
        for worker in ("w1", "w2"):
            store.write(
                lambda c, o=mine, w=worker: usage.count(c, o, w, {usage.TRAINING: 5, usage.SAMPLED: 0})
            ).result()
    (row,) = store.read(lambda c: usage.by_hour(c, tenant, 0, 2**31 - 1)).result()
    assert (row.kind, row.amount, row.session_id, row.base_model) == ("forward_backward", 20, "s", "m")
