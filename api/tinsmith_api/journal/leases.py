"""Workers and their leases: which process may write for which run.

A run is placed on a worker when one of its operations is submitted, and stays there as long as that worker
lives and has no more runs than others of its pool. A lease carries an epoch that grows with every change of
hands. What a worker writes under an old epoch is refused, so a process that was given up for dead can do no
harm when it is not.
"""

import hashlib
import heapq
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.operations import FAILED, QUEUED, backlog, check_lease
from tinsmith_api.journal.tables import operations, runs, sessions, tenants, workers

Json = dict[str, Any]

SUSPECT_DEATHS = 2
"""So many deaths in a row, and the run's operations, or the sample, are executed one by one, alone."""

LAST_DEATHS = 4
"""So many, and the call that was tried alone is given up."""

# Loading a large base may hold a process up for longer than a lease; it has no runs to lose by then.
_LOADING_LEASES = 20.0


@dataclass(frozen=True)
class Lease:
    """A run as its holder sees it. deaths: how many workers in a row died holding it."""

    run_id: str
    tenant_id: str
    worker_id: str
    epoch: int
    lora: Json
    snapshot_seq: int
    snapshot_key: str | None
    weight: float = 1.0
    deaths: int = 0
    priority: int = 0
    max_page_bytes: int | None = None


@dataclass(frozen=True)
class Beat:
    """What a worker hears when it says that it lives. queued: request id -> epoch of its run. gave_up: others
    of its pool were taken for dead. has_surplus: one of its runs would be better off with another worker."""

    is_alive: bool
    is_draining: bool
    queued: dict[str, int]
    gave_up: bool = False
    has_surplus: bool = False


@dataclass(frozen=True)
class Pool:
    """The workers of one base model. facts: what one of them found out about it, None before the first."""

    base_model: str
    facts: Json | None
    ready: tuple[str, ...]
    starting: int = 0
    draining: int = 0
    train_only: frozenset[str] = frozenset()

    def sampling_worker(self, sampler_id: str) -> str | None:
        """Always the same one for a sampler, as long as it lives: it holds the weights (rendezvous hashing,
        Thaler and Ravishankar 1998). None if none is ready."""
        sampling = [worker for worker in self.ready if worker not in self.train_only]
        return max(
            sampling, key=lambda w: hashlib.sha256(f"{w} {sampler_id}".encode()).digest(), default=None
        )


def clock(connection: sa.Connection) -> sa.ColumnElement[float]:
    """Now, by the one clock that all workers share: the database's."""
    if connection.dialect.name == "sqlite":
        return sa.literal(time.time())
    return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float)


_IS_LIVE = workers.c.stopped_at.is_(None)
_TAKES_MORE = sa.and_(_IS_LIVE, workers.c.ready_at.is_not(None), workers.c.draining_at.is_(None))
# A worker says with its facts if it does one thing only: "train" or "sample".
_ROLE = workers.c.facts["role"].as_string()
_TAKES_RUNS = sa.and_(_TAKES_MORE, _ROLE.is_distinct_from("sample"))
_TAKES_SAMPLES = sa.and_(_TAKES_MORE, _ROLE.is_distinct_from("train"))


def register_worker(connection: sa.Connection, worker_id: str, base_model: str, facts: Json) -> None:
    """Enter a worker before it is started. One that was stopped since can take nothing any more, even if
    its process has not noticed."""
    now = clock(connection)
    connection.execute(
        sa.insert(workers).values(
            id=worker_id, base_model=base_model, facts=facts, started_at=now, heartbeat_at=now
        )
    )


def describe_worker(connection: sa.Connection, worker_id: str, facts: Json) -> None:
    """The base model is loaded: what the worker found out about it. From now on it is given runs."""
    connection.execute(
        sa.update(workers)
        .where(workers.c.id == worker_id)
        .values(facts=facts, ready_at=clock(connection), heartbeat_at=clock(connection))
    )


def beat(
    connection: sa.Connection, worker_id: str, base_model: str, *, dead_after_seconds: float | None
) -> Beat:
    """Say that this worker lives; see to those of its pool that do not (`sweep`); hear what there is to do.

    dead_after_seconds None: not to judge others now, because this worker was cut off itself until lately.
    """
    connection.execute(
        sa.update(workers).where(workers.c.id == worker_id, _IS_LIVE).values(heartbeat_at=clock(connection))
    )
    me = connection.execute(sa.select(workers).where(workers.c.id == worker_id, _IS_LIVE)).one_or_none()
    if me is None:
        return Beat(is_alive=False, is_draining=False, queued={})
    gave_up = sweep(connection, base_model, dead_after_seconds=dead_after_seconds)
    has_surplus = _with_less(connection, base_model, worker_id) is not None
    queued = backlog(connection, worker_id, base_model)
    return Beat(True, me.draining_at is not None, queued, gave_up, has_surplus)


def sweep(connection: sa.Connection, base_model: str, *, dead_after_seconds: float | None) -> bool:
    """Give up the workers that were silent for too long (True if there were any), and place what waits for
    workers that are gone."""
    gave_up = False
    if dead_after_seconds is not None:
        silent = _is_silent(connection, dead_after_seconds)
        gave_up = _stop(connection, workers.c.base_model == base_model, silent, died=True) > 0
    _place_runs(connection, base_model)
    _place_samples(connection, base_model)
    return gave_up


def somebody_is_silent(connection: sa.Connection, *, dead_after_seconds: float) -> bool:
    """Whether a sweep with this patience would give up a worker of any pool."""
    statement = sa.select(workers.c.id).where(_IS_LIVE, _is_silent(connection, dead_after_seconds))
    return connection.execute(statement.limit(1)).one_or_none() is not None


def _is_silent(connection: sa.Connection, dead_after_seconds: float) -> sa.ColumnElement[bool]:
    limit = sa.case(
        (workers.c.ready_at.is_(None), dead_after_seconds * _LOADING_LEASES), else_=dead_after_seconds
    )
    return clock(connection) - workers.c.heartbeat_at > limit


def stop_worker(connection: sa.Connection, worker_id: str, *, died: bool = False) -> None:
    """It left, or its process is gone: what waits for it goes to others with the next sweep."""
    _stop(connection, workers.c.id == worker_id, died=died)


def stop_all_workers(connection: sa.Connection) -> None:
    _stop(connection, died=False)


def drain_worker(connection: sa.Connection, worker_id: str) -> bool:
    """Ask it to hand over and leave, with its next beat. False if there is none that lives."""
    statement = sa.update(workers).where(workers.c.id == worker_id, _IS_LIVE)
    return connection.execute(statement.values(draining_at=clock(connection))).rowcount > 0


def _stop(connection: sa.Connection, *where: sa.ColumnElement[bool], died: bool) -> int:
    statement = sa.update(workers).where(_IS_LIVE, *where)
    return connection.execute(statement.values(stopped_at=clock(connection), died=died)).rowcount


# -- placement -------------------------------------------------------------------------------------------

_PLACED = (
    sa.select(runs.c.worker_id, workers.c.stopped_at, workers.c.id)
    .join_from(runs, workers, runs.c.worker_id == workers.c.id, isouter=True)
    .where(runs.c.id == sa.bindparam("of_run"))
)


def place(connection: sa.Connection, run_id: str, base_model: str) -> str | None:
    """The live worker that has the run: the one it is placed on, else the least loaded; None if none is
    ready, and then whichever becomes ready first takes it."""
    row = connection.execute(_PLACED, {"of_run": run_id}).one()
    if row.id is not None and row.stopped_at is None:
        return str(row.worker_id)
    loads = _loads(connection, base_model, _TAKES_RUNS)
    if not loads:
        return None
    _move(connection, run_id, row.worker_id, loads[0][1], died=False)
    chosen: str | None = connection.execute(_PLACED, {"of_run": run_id}).one().worker_id
    return chosen


def _loads(
    connection: sa.Connection, base_model: str, takes: sa.ColumnElement[bool]
) -> list[tuple[int, str]]:
    """(how many runs it has, worker) of those that take more, least loaded first."""
    count = sa.func.count(runs.c.id)
    statement = (
        sa.select(count, workers.c.id)
        .join_from(workers, runs, runs.c.worker_id == workers.c.id, isouter=True)
        .where(workers.c.base_model == base_model, takes)
        .group_by(workers.c.id)
        .order_by(count, workers.c.id)
    )
    return [(row[0], row[1]) for row in connection.execute(statement)]


def is_taken(connection: sa.Connection, base_model: str, session_id: str) -> bool:
    """Whether the live workers of a base model have a run each, of others than this session, that may go on:
    it was made, its session is not finished, and the worker did not let go of it. False for a session that
    has a run there already, and without workers: a run waits for one then."""
    was_made = sa.exists().where(
        operations.c.subject == runs.c.id, operations.c.seq_id == 0, operations.c.state != FAILED
    )
    going_on = (
        sa.select(runs.c.session_id)
        .join_from(runs, workers, runs.c.worker_id == workers.c.id)
        .join(sessions, runs.c.session_id == sessions.c.id)
        .where(runs.c.base_model == base_model, _IS_LIVE, sessions.c.finished_at.is_(None), was_made)
    )
    holders = connection.execute(going_on).scalars().all()
    takes_runs = sa.select(sa.func.count(workers.c.id)).where(workers.c.base_model == base_model, _TAKES_RUNS)
    count: int = connection.execute(takes_runs).scalar_one()
    return session_id not in holders and 0 < count <= len(holders)


# Whoever held a run when its worker died is counted; from the second death on only the one that was tried.
_COUNTS = sa.case((sa.or_(runs.c.deaths < SUSPECT_DEATHS, runs.c.is_suspect), 1), else_=0)

_DEATHS = sa.func.coalesce(operations.c.deaths, 0)
_SAMPLE_COUNTS = sa.case((sa.or_(_DEATHS < SUSPECT_DEATHS, operations.c.is_suspect), 1), else_=0)


def _move(connection: sa.Connection, run_id: str, from_worker: str | None, to: str, *, died: bool) -> None:
    """Unless somebody else moved it since it was read."""
    connection.execute(
        sa.update(runs)
        .where(runs.c.id == run_id, runs.c.worker_id.is_not_distinct_from(from_worker))
        .values(worker_id=to, epoch=runs.c.epoch + 1, deaths=runs.c.deaths + (_COUNTS if died else 0))
    )


_HAS_QUEUED = sa.exists().where(operations.c.subject == runs.c.id, operations.c.state == QUEUED)
_GONE = sa.or_(workers.c.id.is_(None), workers.c.stopped_at.is_not(None))


def _place_runs(connection: sa.Connection, base_model: str) -> None:
    """Runs with something to execute whose worker is gone. In one order, so that two sweeps at once wait
    for each other instead of both for ever."""
    orphans = connection.execute(
        sa.select(runs.c.id, runs.c.worker_id, workers.c.died)
        .join_from(runs, workers, runs.c.worker_id == workers.c.id, isouter=True)
        .where(runs.c.base_model == base_model, _HAS_QUEUED, _GONE)
        .order_by(runs.c.id)
    ).all()
    if not orphans or not (loads := _loads(connection, base_model, _TAKES_RUNS)):
        return
    for row in orphans:
        load, worker_id = loads[0]
        _move(connection, row.id, row.worker_id, worker_id, died=bool(row.died))
        heapq.heapreplace(loads, (load + 1, worker_id))


def _place_samples(connection: sa.Connection, base_model: str) -> None:
    orphans = connection.execute(
        sa.select(operations.c.request_id, operations.c.worker_id, workers.c.died)
        .join_from(operations, workers, operations.c.worker_id == workers.c.id, isouter=True)
        .where(
            operations.c.base_model == base_model,
            operations.c.state == QUEUED,
            operations.c.kind == "sample",
            _GONE,
        )
        .order_by(operations.c.request_id)
    ).all()
    if not orphans or not (loads := _loads(connection, base_model, _TAKES_SAMPLES)):
        return
    for number, row in enumerate(orphans):
        counts = _SAMPLE_COUNTS if row.died else 0
        connection.execute(
            sa.update(operations)
            # Unless somebody else moved it since it was read.
            .where(
                operations.c.request_id == row.request_id,
                operations.c.worker_id.is_not_distinct_from(row.worker_id),
            )
            .values(worker_id=loads[number % len(loads)][1], deaths=_DEATHS + counts)
        )


def take(connection: sa.Connection, run_id: str, worker_id: str) -> Lease | None:
    """The run's lease if it is placed on this worker, or its worker is gone; None if another live worker
    has it, or if this one was given up for dead itself."""
    live = sa.select(workers.c.id).where(_IS_LIVE)
    connection.execute(
        sa.update(runs)
        .where(
            runs.c.id == run_id,
            sa.literal(worker_id).in_(live),
            sa.or_(runs.c.worker_id.is_(None), runs.c.worker_id.not_in(live)),
        )
        .values(worker_id=worker_id, epoch=runs.c.epoch + 1)
    )
    row = connection.execute(
        sa.select(runs, tenants.c.weight, tenants.c.priority, tenants.c.max_page_bytes)
        .join_from(runs, tenants)
        .where(runs.c.id == run_id, runs.c.worker_id == worker_id, sa.literal(worker_id).in_(live))
    ).one_or_none()
    if row is None:
        return None
    return Lease(
        row.id,
        row.tenant_id,
        worker_id,
        row.epoch,
        row.lora,
        row.snapshot_seq,
        row.snapshot_key,
        row.weight,
        row.deaths,
        row.priority,
        row.max_page_bytes,
    )


def suspect(connection: sa.Connection, run_id: str, worker_id: str, epoch: int) -> None:
    """An operation of this run is executed now, alone: if the worker dies, it is to blame."""
    check_lease(connection, run_id, worker_id, epoch)
    connection.execute(sa.update(runs).where(runs.c.id == run_id).values(is_suspect=True))


def release(connection: sa.Connection, run_id: str, worker_id: str, epoch: int) -> bool:
    """Give a snapshotted run back: its next operation places it anew. False if one is queued already, and
    the run is kept. LeaseLost as in `operations.finish`."""
    check_lease(connection, run_id, worker_id, epoch)
    statement = sa.update(runs).where(runs.c.id == run_id, ~_HAS_QUEUED)
    return connection.execute(statement.values(worker_id=None, epoch=runs.c.epoch + 1)).rowcount > 0


def hand_over(connection: sa.Connection, lease: Lease, base_model: str) -> None:
    """Give a run, with what waits for it, to the worker of the pool that has least. It stays if nobody has so
    much less any more, or if nothing waits: a worker that never hears of a run would count it for ever.
    LeaseLost as in `operations.finish`."""
    check_lease(connection, lease.run_id, lease.worker_id, lease.epoch)
    waits = sa.select(runs.c.id).where(runs.c.id == lease.run_id, _HAS_QUEUED)
    taker = _with_less(connection, base_model, lease.worker_id)
    if taker and connection.execute(waits).one_or_none():
        _move(connection, lease.run_id, lease.worker_id, taker, died=False)


def _with_less(connection: sa.Connection, base_model: str, worker_id: str) -> str | None:
    """Who of the pool would still have no more than this worker after a run went from here to there."""
    loads = _loads(connection, base_model, _TAKES_RUNS)
    mine = next((load for load, worker in loads if worker == worker_id), 0)
    return loads[0][1] if loads and loads[0][0] + 2 <= mine else None


# -- what others ask -------------------------------------------------------------------------------------


def pools(connection: sa.Connection, *, heard_within_seconds: float | None) -> dict[str, Pool]:
    """Every base model that a worker ever loaded, or is loading now. A worker that was silent for longer
    than `heard_within_seconds` counts as gone (None: silence says nothing)."""
    silent = (
        sa.false()
        if heard_within_seconds is None
        else sa.and_(
            workers.c.ready_at.is_not(None),
            clock(connection) - workers.c.heartbeat_at > heard_within_seconds,
        )
    )
    rows = connection.execute(
        sa.select(workers, silent.label("is_silent")).order_by(workers.c.started_at)
    ).all()
    found: dict[str, Pool] = {}
    for name in dict.fromkeys(row.base_model for row in rows):
        its = [row for row in rows if row.base_model == name]
        here = [row for row in its if row.stopped_at is None and not row.is_silent]
        staying = [row for row in here if row.draining_at is None]
        found[name] = Pool(
            name,
            next((row.facts for row in reversed(its) if row.facts), None),
            tuple(row.id for row in staying if row.ready_at is not None),
            starting=sum(row.ready_at is None for row in staying),
            draining=len(here) - len(staying),
            train_only=frozenset(row.id for row in staying if (row.facts or {}).get("role") == "train"),
        )
    return {name: pool for name, pool in found.items() if pool.facts or pool.starting}


def list_workers(connection: sa.Connection) -> list[sa.Row[Any]]:
    """Those that live: every column, `runs` it holds and how long it has been `silent_seconds`."""
    count = sa.select(sa.func.count()).where(runs.c.worker_id == workers.c.id).scalar_subquery()
    silent = clock(connection) - workers.c.heartbeat_at
    statement = sa.select(workers, count.label("runs"), silent.label("silent_seconds"))
    return list(connection.execute(statement.where(_IS_LIVE).order_by(workers.c.started_at)).all())


def gone_workers(connection: sa.Connection) -> list[str]:
    """Those that are still in the table."""
    return list(connection.execute(sa.select(workers.c.id).where(~_IS_LIVE)).scalars())


def forget_workers(connection: sa.Connection, *, stopped_before: float) -> int:
    """Delete the rows of workers long gone that no run names; the newest that knew its base model stays."""
    newest = sa.select(sa.func.max(workers.c.started_at)).where(workers.c.ready_at.is_not(None))
    keep = connection.execute(newest.group_by(workers.c.base_model)).scalars().all()
    named = sa.select(runs.c.worker_id).where(runs.c.worker_id.is_not(None))
    return connection.execute(
        sa.delete(workers).where(
            workers.c.stopped_at < stopped_before,
            workers.c.id.not_in(named),
            workers.c.started_at.not_in(keep),
        )
    ).rowcount
