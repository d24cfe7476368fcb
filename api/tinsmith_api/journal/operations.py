"""Operations: submitted by the control plane, claimed and finished by the worker that holds the lease.

Every function takes a connection and runs inside `Store.write` or `Store.read`.
"""

import functools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith_api.journal.tables import (
    operations,
    payloads,
    results,
    runs,
    sampling_sessions,
    sessions,
    tenants,
)

Json = dict[str, Any]

QUEUED, DONE, FAILED = "queued", "done", "failed"

CREATE_MODEL = "create_model"
FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
OPTIM_STEP = "optim_step"
SAVE_WEIGHTS = "save_weights"
SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
LOAD_WEIGHTS = "load_weights"
SAMPLE = "sample"
CREATE_CUSTOM_LOSS = "create_custom_loss"

SAVES = frozenset({SAVE_WEIGHTS, SAVE_WEIGHTS_FOR_SAMPLER, SAVE_WEIGHTS_EXTERNAL})
# What an adapter is the result of; a replay executes these and steps over the others.
CHANGING = frozenset({CREATE_MODEL, FORWARD_BACKWARD, OPTIM_STEP, LOAD_WEIGHTS})


@dataclass(frozen=True)
class Operation:
    """One submitted call. `subject` is a run, or for `sample` a sampling session.

    `error` set at submission means the call was refused: its number is consumed and its future fails.
    """

    subject: str
    seq_id: int
    kind: str
    tenant_id: str
    base_model: str
    tokens: int = 0
    answer: Json | None = None
    error: Json | None = None
    request_id: str = ""
    state: str = QUEUED
    submitted_at: float = 0.0
    payload: bytes | None = None
    worker_id: str | None = None  # of an operation that belongs to no run
    key_id: int | None = None  # of who submitted it
    started_at: float | None = None
    deaths: int = 0  # of a sample: how many workers died that were to execute it


@dataclass(frozen=True)
class Outcome:
    """What retrieve_future needs of an operation: a body if it is done, an error if it failed. The body is
    left out if it is larger than was asked for; `size_bytes` is None if there is none (any more)."""

    kind: str
    state: str
    body: bytes | None
    error: Json | None
    base_model: str = ""
    size_bytes: int | None = None


@dataclass
class Usage:
    """What a tenant has at this moment, and the limits of its own (None: the service's)."""

    queued: int
    queued_bytes: int
    runs: int
    max_queued: int | None
    max_queued_bytes: int | None
    max_runs: int | None


class LeaseLost(Exception):  # noqa: N818 - the name says what happened
    """Another worker holds this run now; nothing was written."""


ANY_SIZE = 2**63 - 1

# Statements of the hot path are built once: building one costs several times what running it does.
_REQUEST_ID: sa.BindParameter[str] = sa.bindparam("of_request")

# How long a body is both databases know without reading it.
_BODY_BYTES = sa.func.length(results.c.body)
_OUTCOME = (
    sa.select(
        operations.c.kind,
        operations.c.state,
        operations.c.error,
        sa.case((sa.bindparam("at_most", type_=sa.BigInteger) >= _BODY_BYTES, results.c.body)).label("body"),
        operations.c.base_model,
        _BODY_BYTES.label("size_bytes"),
    )
    .join_from(operations, results, operations.c.request_id == results.c.request_id, isouter=True)
    .where(operations.c.request_id == _REQUEST_ID, operations.c.tenant_id == sa.bindparam("of_tenant"))
)
_WITH_PAYLOADS = sa.select(operations, payloads.c.body).join_from(
    operations, payloads, operations.c.request_id == payloads.c.request_id, isouter=True
)
_FETCH = _WITH_PAYLOADS.where(operations.c.request_id.in_(sa.bindparam("of_requests", expanding=True)))
_LOOK_UP = sa.select(operations).where(
    operations.c.request_id.in_(sa.bindparam("of_requests", expanding=True))
)
_HISTORY = sa.select(operations).where(
    operations.c.subject == sa.bindparam("of_run"), operations.c.seq_id > sa.bindparam("after_seq")
)
# Locked, so that the run cannot change hands between this look and the write behind it.
_LEASE = (
    sa.select(runs.c.deaths)
    .where(
        runs.c.id == sa.bindparam("of_run"),
        runs.c.worker_id == sa.bindparam("of_worker"),
        runs.c.epoch == sa.bindparam("of_epoch"),
    )
    .with_for_update()
)
_FORGET_DEATHS = sa.update(runs).where(runs.c.id == sa.bindparam("of_run")).values(deaths=0, is_suspect=False)
_FINISH = (
    sa.update(operations)
    .where(operations.c.request_id == _REQUEST_ID, operations.c.state == QUEUED)
    .values(
        {
            name: sa.bindparam(f"new_{name}")
            for name in ("state", "finished_at", "error", "started_at", "metrics", "completion")
        }
    )
)
# Its row stays locked until this is committed: numbers become visible in their order.
_NEXT_COMPLETION = (
    sa.update(sampling_sessions)
    .where(sampling_sessions.c.id == sa.bindparam("of_sampler"))
    .values(completions=sampling_sessions.c.completions + 1)
    .returning(sampling_sessions.c.completions)
)
# The other columns are written when it was executed, and when its result was fetched.
_LATER = ("finished_at", "started_at", "retrieved_at", "metrics", "completion", "deaths", "is_suspect")
_SUBMITTED = [c.name for c in operations.c if c.name not in _LATER]
_NOTE_RETRIEVED = (
    sa.update(operations)
    .where(operations.c.request_id == _REQUEST_ID, operations.c.retrieved_at.is_(None))
    .values(retrieved_at=sa.bindparam("at"))
)
_ADD_PAYLOAD = sa.insert(payloads)
_ADD_RESULT = sa.insert(results)
_DROP_PAYLOAD = sa.delete(payloads).where(payloads.c.request_id == _REQUEST_ID)


@functools.cache
def _insert_if_new(dialect: str, table: sa.Table) -> sa.Insert:
    insert = sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)
    return insert.on_conflict_do_nothing().execution_options(preserve_rowcount=True)


def insert_if_new(connection: sa.Connection, table: sa.Table, values: Json) -> bool:
    """INSERT unless a row with one of its unique keys is there; True if it was inserted."""
    return connection.execute(_insert_if_new(connection.dialect.name, table), values).rowcount > 0


def submit(connection: sa.Connection, operation: Operation) -> tuple[Operation, bool]:
    """Enter `operation`; (it, True). If its (subject, seq_id) was submitted before: (that one, False)."""
    new = replace(
        operation,
        request_id=operation.request_id or uuid.uuid4().hex,
        state=FAILED if operation.error else QUEUED,
        submitted_at=time.time(),
    )
    row = {name: getattr(new, name) for name in _SUBMITTED}
    row["finished_at"] = new.submitted_at if new.error else None
    if not insert_if_new(connection, operations, row):
        return _one(connection, operations.c.subject == new.subject, operations.c.seq_id == new.seq_id), False
    if new.payload is not None and not new.error:
        connection.execute(_ADD_PAYLOAD, {"request_id": new.request_id, "body": new.payload})
    return new, True


def refuse(connection: sa.Connection, operation: Operation, error: Json) -> Operation:
    """Fail an operation in the transaction that entered it."""
    finish(connection, operation.request_id, run_id=None, worker_id="", epoch=-1, error=error)
    return replace(operation, state=FAILED, error=error)


def outcome(
    connection: sa.Connection, request_id: str, tenant_id: str, at_most_bytes: int = ANY_SIZE
) -> Outcome | None:
    """One of this tenant's futures without its body if that is larger; None if there is none."""
    given = {"of_request": request_id, "of_tenant": tenant_id, "at_most": at_most_bytes}
    row = connection.execute(_OUTCOME, given).one_or_none()
    return None if row is None else Outcome(**row._mapping)


def fetch(connection: sa.Connection, request_ids: Sequence[str]) -> list[Operation]:
    """These operations with their payloads, whatever their state."""
    rows = connection.execute(_FETCH, {"of_requests": list(request_ids)})
    return [replace(_operation(row), payload=row.body) for row in rows]


def payload(connection: sa.Connection, request_id: str) -> bytes | None:
    """None if there is none, or no more: a snapshot covers it."""
    statement = sa.select(payloads.c.body).where(payloads.c.request_id == request_id)
    body: bytes | None = connection.execute(statement).scalar_one_or_none()
    return body


def look_up(connection: sa.Connection, request_ids: Sequence[str]) -> list[Operation]:
    """As `fetch`, without payloads."""
    rows = connection.execute(_LOOK_UP, {"of_requests": list(request_ids)})
    return [_operation(row) for row in rows]


def backlog(
    connection: sa.Connection, worker_id: str, base_model: str, at_most: int = 5000
) -> dict[str, int]:
    """What waits to be executed by this worker, oldest first: request id -> its run's epoch (samples: 0)."""
    statement = (
        sa.select(operations.c.request_id, sa.func.coalesce(runs.c.epoch, 0))
        .join_from(operations, runs, operations.c.subject == runs.c.id, isouter=True)
        .where(
            operations.c.base_model == base_model,
            operations.c.state == QUEUED,
            sa.func.coalesce(runs.c.worker_id, operations.c.worker_id) == worker_id,
        )
        # Everybody's oldest before anybody's next: a flood keeps nobody else from being heard of.
        .order_by(
            sa.func.row_number().over(
                partition_by=operations.c.tenant_id, order_by=operations.c.submitted_at
            ),
            operations.c.submitted_at,
        )
        .limit(at_most)
    )
    return {row[0]: row[1] for row in connection.execute(statement)}


def usage(connection: sa.Connection, tenant_id: str) -> Usage:
    waits = (operations.c.tenant_id == tenant_id, operations.c.state == QUEUED)
    queued = sa.select(sa.func.count()).where(*waits)
    # Neither database reads a body to say how long it is.
    queued_bytes = (
        sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(payloads.c.body)), 0))
        .join_from(operations, payloads, operations.c.request_id == payloads.c.request_id)
        .where(*waits)
    )
    is_open = sa.exists().where(sessions.c.id == runs.c.session_id, sessions.c.finished_at.is_(None))
    open_runs = sa.select(sa.func.count()).where(runs.c.tenant_id == tenant_id, is_open)
    row = connection.execute(
        sa.select(
            queued.scalar_subquery().label("queued"),
            queued_bytes.scalar_subquery().label("queued_bytes"),
            open_runs.scalar_subquery().label("runs"),
            tenants.c.max_queued,
            tenants.c.max_queued_bytes,
            tenants.c.max_runs,
        ).where(tenants.c.id == tenant_id)
    ).one()
    return Usage(
        row.queued, int(row.queued_bytes), row.runs, row.max_queued, row.max_queued_bytes, row.max_runs
    )


def is_known(connection: sa.Connection, subject: str, seq_id: int) -> bool:
    """Whether this number was submitted before."""
    statement = sa.select(operations.c.request_id)
    row = connection.execute(statement.where(operations.c.subject == subject, operations.c.seq_id == seq_id))
    return row.one_or_none() is not None


def queued_counts(connection: sa.Connection) -> dict[str, int]:
    """How many operations wait, by base model."""
    statement = (
        sa.select(operations.c.base_model, sa.func.count())
        .where(operations.c.state == QUEUED)
        .group_by(operations.c.base_model)
    )
    return {row[0]: row[1] for row in connection.execute(statement)}


def history(connection: sa.Connection, run_id: str, after_seq: int) -> list[Operation]:
    """All operations of a run behind its snapshot, in order, without payloads."""
    rows = connection.execute(_HISTORY, {"of_run": run_id, "after_seq": after_seq})
    return sorted(map(_operation, rows), key=lambda o: o.seq_id)


def finish(
    connection: sa.Connection,
    request_id: str,
    *,
    run_id: str | None,
    worker_id: str,
    epoch: int,
    body: bytes | None = None,
    error: Json | None = None,
    has_effect: bool = False,
    is_replayed: bool = True,
    started_at: float | None = None,
    metrics: Json | None = None,
    sampler_id: str | None = None,
) -> bool:
    """Record the outcome of a queued operation. False if it had one already (the first stands).

    has_effect: it failed, but a replay must execute it all the same (its state is DONE, with an error).
    is_replayed: whether a replay executes it if it is DONE; if not, its payload is of no more use.
    metrics: what is to be remembered of its result when the body is forgotten.
    sampler_id: the sampling session of a sample, which counts it.
    For an operation of a run (`run_id`), LeaseLost unless this worker holds it under this epoch.
    """
    if run_id is not None and check_lease(connection, run_id, worker_id, epoch):
        connection.execute(_FORGET_DEATHS, {"of_run": run_id})
    state = FAILED if error and not has_effect else DONE
    outcome = {
        "new_state": state,
        "new_finished_at": time.time(),
        "new_error": error,
        "new_started_at": started_at,
        "new_metrics": metrics,
        "new_completion": None,
    }
    if sampler_id is not None:
        counted = connection.execute(_NEXT_COMPLETION, {"of_sampler": sampler_id})
        outcome["new_completion"] = counted.scalar_one_or_none()
    updated = connection.execute(_FINISH, {"of_request": request_id, **outcome})
    if not updated.rowcount:
        return False
    if body is not None:
        row = {"request_id": request_id, "body": body, "finished_at": outcome["new_finished_at"]}
        connection.execute(_ADD_RESULT, row)
    if state == FAILED or not is_replayed:
        connection.execute(_DROP_PAYLOAD, {"of_request": request_id})
    return True


def give_up(
    connection: sa.Connection,
    run_id: str,
    seq_ids: Sequence[int],
    *,
    tenant_id: str,
    base_model: str,
    worker_id: str,
    epoch: int,
) -> list[Operation]:
    """Enter numbers that did not come in time as failed, so that nothing waits for them again.

    Returns those that came in the last moment, failed now too. LeaseLost as in `finish`.
    """
    check_lease(connection, run_id, worker_id, epoch)
    error = {"error": "this call did not arrive in time and was given up", "category": "user"}
    late = []
    for seq_id in seq_ids:
        missing = Operation(run_id, seq_id, "missing", tenant_id, base_model, error=error)
        entered, is_new = submit(connection, missing)
        if not is_new and entered.state == QUEUED:
            late.append(refuse(connection, entered, error))
    return late


def check_lease(connection: sa.Connection, run_id: str, worker_id: str, epoch: int) -> int:
    """LeaseLost unless this worker holds the run under this epoch. Returns the run's `deaths`."""
    lease = {"of_run": run_id, "of_worker": worker_id, "of_epoch": epoch}
    deaths: int | None = connection.execute(_LEASE, lease).scalar_one_or_none()
    if deaths is None:
        raise LeaseLost(run_id)
    return deaths


def note_retrieved(connection: sa.Connection, times: dict[str, float]) -> None:
    """When results were fetched first, by request id."""
    rows = [{"of_request": request_id, "at": at} for request_id, at in sorted(times.items())]
    connection.execute(_NOTE_RETRIEVED, rows)


def find(connection: sa.Connection, request_id: str, tenant_id: str) -> Operation | None:
    """One of this tenant's operations, without its payload."""
    its = (operations.c.request_id == request_id, operations.c.tenant_id == tenant_id)
    row = connection.execute(sa.select(operations).where(*its)).one_or_none()
    return None if row is None else _operation(row)


def suspect_sample(connection: sa.Connection, sample: Operation) -> bool:
    """It is executed now, alone: if the worker dies, it is to blame. False if it is not this worker's to
    execute any more."""
    statement = sa.update(operations).where(
        operations.c.request_id == sample.request_id,
        operations.c.worker_id == sample.worker_id,
        operations.c.state == QUEUED,
    )
    return connection.execute(statement.values(is_suspect=True)).rowcount > 0


def cancel(connection: sa.Connection, sample: Operation) -> bool:
    """Fail a sample that nobody waits for any more; False if it had its outcome before."""
    return finish(
        connection,
        sample.request_id,
        run_id=None,
        worker_id="",
        epoch=-1,
        error={"error": "cancelled by its client", "category": "user"},
        sampler_id=sample.subject,
    )


def completions(
    connection: sa.Connection, sampler_id: str, *, seq_ids: range, after: int, at_most: int
) -> Sequence[Any]:
    """(request_id, state, completion, size_bytes) of the samples with these numbers that were finished after
    the sampler's `after`-th, in the order in which they were."""
    statement = (
        sa.select(
            operations.c.request_id,
            operations.c.state,
            operations.c.completion,
            _BODY_BYTES.label("size_bytes"),
        )
        .join_from(operations, results, operations.c.request_id == results.c.request_id, isouter=True)
        .where(
            operations.c.subject == sampler_id,
            operations.c.completion > after,
            operations.c.seq_id >= seq_ids.start,
            operations.c.seq_id < seq_ids.stop,
        )
        .order_by(operations.c.completion)
    )
    return connection.execute(statement.limit(at_most)).all()


def known_of(connection: sa.Connection, sampler_id: str, request_ids: Sequence[str]) -> list[str]:
    """Which of these are samples of this sampler."""
    its = (operations.c.subject == sampler_id, operations.c.request_id.in_(request_ids))
    return list(connection.execute(sa.select(operations.c.request_id).where(*its)).scalars())


def of_session(connection: sa.Connection, session_id: str, *, at_most: int) -> Sequence[Any]:
    """The newest operations of the session's runs and samplers, in the order of submission."""
    newest = (
        sa.select(operations)
        .where(operations.c.subject.in_(subjects_of([session_id])))
        .order_by(operations.c.submitted_at.desc())
    )
    return connection.execute(newest.limit(at_most)).all()[::-1]


def subjects_of(session_ids: Sequence[str] | sa.Select[tuple[str]]) -> sa.CompoundSelect[tuple[str]]:
    """The runs and samplers of these sessions. One list, not two: a database looks each up by the index of
    operations, where it would read all of them for two lists with OR between."""
    its = [
        sa.select(table.c.id).where(table.c.session_id.in_(session_ids))
        for table in (runs, sampling_sessions)
    ]
    return sa.union_all(*its)


def curve(connection: sa.Connection, run_id: str, *, after_seq: int, limit: int) -> Sequence[Any]:
    """The run's passes and steps that are done, in order."""
    shown = (FORWARD, FORWARD_BACKWARD, OPTIM_STEP)
    statement = sa.select(operations).where(
        operations.c.subject == run_id,
        operations.c.seq_id > after_seq,
        operations.c.state == DONE,
        operations.c.kind.in_(shown),
    )
    return connection.execute(statement.order_by(operations.c.seq_id).limit(limit)).all()


def totals(connection: sa.Connection, run_id: str) -> Sequence[Any]:
    """(kind, calls, tokens, queue_seconds, compute_seconds) of what of the run is done. Seconds are NULL of
    what was executed before they were noted; passes shared with other runs count in full."""
    columns = operations.c
    statement = (
        sa.select(
            columns.kind,
            sa.func.count().label("calls"),
            sa.func.sum(columns.tokens).label("tokens"),
            sa.func.sum(columns.started_at - columns.submitted_at).label("queue_seconds"),
            sa.func.sum(columns.finished_at - columns.started_at).label("compute_seconds"),
        )
        .where(columns.subject == run_id, columns.state == DONE)
        .group_by(columns.kind)
    )
    return connection.execute(statement).all()


def purge_results(connection: sa.Connection, *, finished_before: float, at_most: int) -> int:
    """Delete the bodies of results nobody will fetch any more, oldest first; their operations stay.

    Returns how many it deleted: after `at_most` there may be more.
    """
    old = (
        sa.select(results.c.request_id)
        .where(results.c.finished_at < finished_before)
        .order_by(results.c.finished_at)
        .limit(at_most)
    )
    return connection.execute(sa.delete(results).where(results.c.request_id.in_(old))).rowcount


def _one(connection: sa.Connection, *where: sa.ColumnElement[bool]) -> Operation:
    return _operation(connection.execute(sa.select(operations).where(*where)).one())


def _operation(row: sa.Row[Any]) -> Operation:
    return Operation(
        subject=row.subject,
        seq_id=row.seq_id,
        kind=row.kind,
        tenant_id=row.tenant_id,
        base_model=row.base_model,
        tokens=row.tokens,
        answer=row.answer,
        error=row.error,
        request_id=row.request_id,
        state=row.state,
        submitted_at=row.submitted_at,
        worker_id=row.worker_id,
        key_id=row.key_id,
        deaths=row.deaths or 0,
    )
