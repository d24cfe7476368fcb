"""A run's snapshot: the state after one of its operations, as objects. Whoever executes the run begins there.

The files of a snapshot are announced as garbage before they are written, and taken from it when the snapshot
is recorded. So whatever becomes of the process in between, somebody knows of them.
"""

import sqlalchemy as sa

from tinsmith_api.journal.checkpoints import discard_objects, keep_objects
from tinsmith_api.journal.operations import QUEUED, check_lease
from tinsmith_api.journal.tables import operations, payloads, runs

# Longer than any snapshot takes to write.
_WRITING_SECONDS = 6 * 3600.0

_QUEUED_BEHIND = (
    sa.select(sa.func.count())
    .select_from(operations)
    .where(
        operations.c.subject == sa.bindparam("of_run"),
        operations.c.seq_id > sa.bindparam("covered"),
        operations.c.seq_id <= sa.bindparam("up_to"),
        operations.c.state == QUEUED,
    )
)


class Unfinished(Exception):  # noqa: N818 - the name says what is wrong
    """A snapshot cannot be recorded: it would cover an operation that has no result yet, or its files may
    have been collected."""


def announce(connection: sa.Connection, key: str) -> None:
    """Files will be written at `key`. Unless they are recorded in time, they are garbage."""
    discard_objects(connection, key, after_seconds=_WRITING_SECONDS)


def record(
    connection: sa.Connection, run_id: str, *, seq_id: int, key: str, worker_id: str, epoch: int
) -> str | None:
    """Make `key`, announced before, the run's snapshot, covering operations up to `seq_id`; their payloads
    are purged.

    Returns the key of the snapshot it replaces, garbage from now on. LeaseLost as in `operations.finish`;
    Unfinished if one of those operations has no result (it would never be executed again), or if its files
    may be gone.
    """
    check_lease(connection, run_id, worker_id, epoch)
    before = connection.execute(
        sa.select(runs.c.snapshot_seq, runs.c.snapshot_key).where(runs.c.id == run_id)
    ).one()
    if before.snapshot_key == key:
        return None  # recorded already; the connection broke before that was known
    # Of a long run only what is new is looked at.
    between = {"of_run": run_id, "covered": before.snapshot_seq, "up_to": seq_id}
    if connection.execute(_QUEUED_BEHIND, between).scalar_one():
        raise Unfinished(f"{run_id}: a result is missing")
    assert before.snapshot_seq < seq_id, (
        f"{run_id}: a snapshot of {seq_id} behind one of {before.snapshot_seq}"
    )
    if not keep_objects(connection, key):
        raise Unfinished(f"{run_id}: its files took too long to write and may have been collected")
    connection.execute(
        sa.update(runs).where(runs.c.id == run_id).values(snapshot_seq=seq_id, snapshot_key=key)
    )
    if before.snapshot_key:
        discard_objects(connection, before.snapshot_key, after_seconds=0)
    covered = sa.select(operations.c.request_id).where(
        operations.c.subject == run_id,
        operations.c.seq_id > before.snapshot_seq,
        operations.c.seq_id <= seq_id,
    )
    connection.execute(sa.delete(payloads).where(payloads.c.request_id.in_(covered)))
    replaced: str | None = before.snapshot_key
    return replaced
