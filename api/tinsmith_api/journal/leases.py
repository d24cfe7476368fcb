"""Workers and their leases: which process may write for which run.

A lease carries an epoch that grows with every change of hands. What a worker writes under an old epoch
is refused, so a process that was given up for dead can do no harm when it is not.
"""

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.tables import runs, workers

Json = dict[str, Any]


@dataclass(frozen=True)
class Lease:
    """A run as its holder sees it."""

    run_id: str
    tenant_id: str
    worker_id: str
    epoch: int
    lora: Json
    snapshot_seq: int
    snapshot_key: str | None


def register_worker(connection: sa.Connection, worker_id: str, base_model: str, facts: Json) -> None:
    """Enter a worker before it is started. One that was stopped since can take nothing any more, even if
    its process has not noticed."""
    now = time.time()
    connection.execute(
        sa.insert(workers).values(
            id=worker_id, base_model=base_model, facts=facts, started_at=now, heartbeat_at=now
        )
    )


def describe_worker(connection: sa.Connection, worker_id: str, facts: Json) -> None:
    """What the worker found out about its base model, once it is loaded."""
    connection.execute(sa.update(workers).where(workers.c.id == worker_id).values(facts=facts))


def stop_worker(connection: sa.Connection, worker_id: str) -> None:
    """Its process is gone: whoever is asked next may take its runs."""
    connection.execute(
        sa.update(workers)
        .where(workers.c.id == worker_id, workers.c.stopped_at.is_(None))
        .values(stopped_at=time.time())
    )


def stop_all_workers(connection: sa.Connection) -> None:
    connection.execute(
        sa.update(workers).where(workers.c.stopped_at.is_(None)).values(stopped_at=time.time())
    )


def facts_of(connection: sa.Connection, base_model: str) -> Json | None:
    """What the newest worker of this base model that loaded it said of it."""
    statement = (
        sa.select(workers.c.facts)
        .where(workers.c.base_model == base_model)
        .order_by(workers.c.started_at.desc())
    )
    return next((facts for facts in connection.execute(statement).scalars() if facts), None)


def take(connection: sa.Connection, run_id: str, worker_id: str) -> Lease | None:
    """The run's lease if this worker holds it or its holder is gone; None if another live worker has it, or
    if this one was given up for dead itself."""
    live = sa.select(workers.c.id).where(workers.c.stopped_at.is_(None))
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
        sa.select(runs).where(
            runs.c.id == run_id, runs.c.worker_id == worker_id, sa.literal(worker_id).in_(live)
        )
    ).one_or_none()
    if row is None:
        return None
    return Lease(row.id, row.tenant_id, worker_id, row.epoch, row.lora, row.snapshot_seq, row.snapshot_key)
