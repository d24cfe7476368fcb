"""What was used, by hour: counted where operations are finished, read for bills, budgets and limits."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation, insert_if_new
from tinsmith_api.journal.tables import (
    checkpoints,
    operations,
    projects,
    runs,
    sampling_sessions,
    sessions,
    tenants,
    usage,
)

TRAINING, FORWARD = "forward_backward", "forward"
PREFILL, PREFILL_CACHED, SAMPLED = "prefill", "prefill_cached", "sample"
CHECKPOINT, STORAGE = "checkpoint", "storage"

TOKENS = (TRAINING, FORWARD, PREFILL, PREFILL_CACHED, SAMPLED)

_HOUR = 3600.0
_HOURS_OF_A_DAY = 24


def session_of(subject: str) -> str:
    """Runs and sampling sessions are numbered within their session: its id comes first in theirs."""
    return subject.split(":", 1)[0]


def count(
    connection: sa.Connection, operation: Operation, worker_id: str, amounts: Mapping[str, int]
) -> None:
    """Add what `operation` used, by kind, in the transaction that finishes it."""
    for kind, amount in amounts.items():
        if amount:
            row = {
                "hour": int(time.time() // _HOUR),
                "subject": operation.subject,
                "kind": kind,
                "key_id": operation.key_id or 0,
                "worker_id": worker_id,
                "tenant_id": operation.tenant_id,
                "session_id": session_of(operation.subject),
                "base_model": operation.base_model,
                "amount": amount,
            }
            connection.execute(_ADD[connection.dialect.name], row)


def _add(insert: Any) -> Any:
    return insert.on_conflict_do_update(
        index_elements=["hour", "subject", "kind", "key_id", "worker_id"],
        set_={"amount": usage.c.amount + insert.excluded.amount},
    )


# Built once: every finished operation runs one of them.
_ADD = {"sqlite": _add(sqlite.insert(usage)), "postgresql": _add(postgresql.insert(usage))}


def measure_storage(connection: sa.Connection) -> None:
    """What every project stores in this hour; the first measurement of an hour stands."""
    hour = int(time.time() // _HOUR)
    for row in stored(connection):
        insert_if_new(
            connection,
            usage,
            {
                "hour": hour,
                "subject": row.project_id or "",
                "kind": STORAGE,
                "key_id": 0,
                "worker_id": "",
                "tenant_id": row.tenant_id,
                "amount": row.size_bytes,
            },
        )


def stored(
    connection: sa.Connection, tenant_id: str | None = None, project_id: str | None = None
) -> Sequence[Any]:
    """(tenant_id, project_id, member_id, checkpoint_count, size_bytes) of what is kept now."""
    size = sa.func.coalesce(sa.func.sum(checkpoints.c.size_bytes), 0)
    by = (checkpoints.c.tenant_id, sessions.c.project_id)
    if tenant_id is not None:
        by = (*by, sessions.c.member_id)  # type: ignore[assignment]
    statement = (
        sa.select(
            *by, sa.func.count().label("checkpoint_count"), sa.cast(size, sa.BigInteger).label("size_bytes")
        )
        .join_from(checkpoints, runs, runs.c.id == checkpoints.c.run_id)
        .join(sessions, sessions.c.id == runs.c.session_id)
        .where(checkpoints.c.ready_at.is_not(None))
        .group_by(*by)
        .order_by(*by)
    )
    if tenant_id is not None:
        statement = statement.where(checkpoints.c.tenant_id == tenant_id)
    if project_id is not None:
        statement = statement.where(sessions.c.project_id == project_id)
    return connection.execute(statement).all()


def by_hour(
    connection: sa.Connection, tenant_id: str, first: int, end: int, *, at_most: int = 2**31 - 1
) -> Sequence[Any]:
    """(hour, kind, base_model, session_id, project_id, member_id, user_metadata, amount), oldest hour first,
    the largest amount first within it."""
    amount = sa.cast(sa.func.sum(usage.c.amount), sa.BigInteger).label("amount")
    project_id = sa.case((usage.c.kind == STORAGE, usage.c.subject), else_=sessions.c.project_id)
    kind = sa.case((usage.c.kind == FORWARD, TRAINING), else_=usage.c.kind)
    grouped = (
        sa.select(
            usage.c.hour,
            kind.label("kind"),
            usage.c.base_model,
            usage.c.session_id,
            project_id.label("project_id"),
            amount,
        )
        .join_from(usage, sessions, sessions.c.id == usage.c.session_id, isouter=True)
        .where(usage.c.tenant_id == tenant_id, usage.c.hour >= first, usage.c.hour < end)
        .group_by(usage.c.hour, kind, usage.c.base_model, usage.c.session_id, project_id)
        .subquery()
    )
    statement = sa.select(grouped, sessions.c.member_id, sessions.c.user_metadata).join_from(
        grouped, sessions, sessions.c.id == grouped.c.session_id, isouter=True
    )
    statement = statement.order_by(grouped.c.hour, grouped.c.amount.desc())
    return connection.execute(statement.limit(at_most)).all()


def of_run(connection: sa.Connection, run_id: str) -> dict[str, int]:
    """By kind, what the run used, and what was sampled from its weights."""
    its_samplers = sa.select(sampling_sessions.c.id).where(
        sampling_sessions.c.session_id == session_of(run_id),
        sampling_sessions.c.model_path.like(f"tinker://{run_id}/%"),
    )
    statement = (
        sa.select(usage.c.kind, sa.cast(sa.func.sum(usage.c.amount), sa.BigInteger))
        .where(usage.c.subject.in_(sa.union_all(sa.select(sa.literal(run_id)), its_samplers)))
        .group_by(usage.c.kind)
    )
    return {row[0]: row[1] for row in connection.execute(statement)}


# -- limits ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Of a tenant, or of one of its projects."""

    of: str
    tokens: int
    tenant_id: str
    project_id: str = ""


def budgets(connection: sa.Connection, session_id: str) -> list[Budget]:
    """Those that a call of this session counts to: its tenant's and its project's, where they have one."""
    row = connection.execute(
        sa.select(
            tenants.c.id,
            tenants.c.name,
            tenants.c.token_budget,
            projects.c.id.label("project_id"),
            projects.c.name.label("project"),
            projects.c.token_budget.label("project_budget"),
        )
        .join_from(sessions, tenants)
        .join(projects, projects.c.id == sessions.c.project_id, isouter=True)
        .where(sessions.c.id == session_id)
    ).one_or_none()
    found = []
    if row is not None and row.token_budget is not None:
        found.append(Budget(f"the organization {row.name}", row.token_budget, row.id))
    if row is not None and row.project_budget is not None:
        found.append(Budget(f"the project {row.project}", row.project_budget, row.id, row.project_id))
    return found


@dataclass(frozen=True)
class Spent:
    """Tokens used of a budget: `settled` before `hour`, when nobody writes any more, `recent` since then and
    by what is under way."""

    hour: int = 0
    settled: int = 0
    recent: int = 0


def spent(connection: sa.Connection, budget: Budget, before: Spent) -> Spent:
    """Now. What was settled `before` is not read again: a year of usage is summed once, then hour by hour."""
    # The last hour may still be written to by a worker that was just finishing something.
    hour = int(time.time() // _HOUR) - 1
    settled = before.settled
    if hour > before.hour:
        settled += _used(connection, budget, usage.c.hour >= before.hour, usage.c.hour < hour)
    recent = _used(connection, budget, usage.c.hour >= hour)
    its = operations.c.subject.in_(ops.subjects_of(_inside(budget))) if budget.project_id else sa.true()
    return Spent(hour, settled, recent + _queued(connection, budget.tenant_id, its))


def _used(connection: sa.Connection, budget: Budget, *when: sa.ColumnElement[bool]) -> int:
    whose = usage.c.session_id.in_(_inside(budget)) if budget.project_id else sa.true()
    its = (usage.c.tenant_id == budget.tenant_id, whose, usage.c.kind.in_(TOKENS))
    return _sum(connection, usage.c.amount, *its, *when)


def _inside(budget: Budget) -> sa.Select[tuple[str]]:
    return sa.select(sessions.c.id).where(sessions.c.project_id == budget.project_id)


def of_key(connection: sa.Connection, tenant_id: str, key_id: int) -> tuple[int, int]:
    """(samples of this key that are under way, tokens it used in 24 hours and has under way)."""
    its = operations.c.key_id == key_id
    samples = connection.execute(
        sa.select(sa.func.count())
        .select_from(operations)
        .where(
            operations.c.tenant_id == tenant_id,
            operations.c.state == ops.QUEUED,
            operations.c.kind == ops.SAMPLE,
            its,
        )
    ).scalar_one()
    since = int(time.time() // _HOUR) - _HOURS_OF_A_DAY
    spent = _sum(
        connection, usage.c.amount, usage.c.key_id == key_id, usage.c.hour > since, usage.c.kind.in_(TOKENS)
    )
    return samples, spent + _queued(connection, tenant_id, its)


def _queued(connection: sa.Connection, tenant_id: str, *where: sa.ColumnElement[bool]) -> int:
    is_queued = (operations.c.tenant_id == tenant_id, operations.c.state == ops.QUEUED)
    return _sum(connection, operations.c.tokens, *is_queued, *where)


def _sum(connection: sa.Connection, column: sa.ColumnElement[int], *where: sa.ColumnElement[bool]) -> int:
    total = connection.execute(sa.select(sa.func.coalesce(sa.func.sum(column), 0)).where(*where)).scalar_one()
    return int(total)
