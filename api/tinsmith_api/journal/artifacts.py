"""Files that are made when somebody asks for them: archives of checkpoints, traces of sessions.

Whoever asks leaves word here; whoever keeps house makes them, writes them under a prefix of their own, and
says here that they are ready.
"""

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.checkpoints import discard_objects, keep_objects
from tinsmith_api.journal.operations import insert_if_new
from tinsmith_api.journal.tables import artifacts

ARCHIVE, TRACE = "archive", "trace"

WANTED, READY, FAILED = "wanted", "ready", "failed"


def want(
    connection: sa.Connection, kind: str, subject: str, tenant_id: str, *, made_since: float = 0.0
) -> sa.Row[Any]:
    """The artifact: to be made, or made anew if it could not be or was made before `made_since`."""
    found = find(connection, kind, subject)
    if found is not None and (
        found.state == FAILED or (found.state == READY and found.changed_at < made_since)
    ):
        drop(connection, kind, subject)
    row = {"kind": kind, "subject": subject, "tenant_id": tenant_id, "state": WANTED}
    insert_if_new(connection, artifacts, {**row, "changed_at": time.time()})
    found = find(connection, kind, subject)
    assert found is not None
    return found


def find(connection: sa.Connection, kind: str, subject: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(artifacts).where(_is(kind, subject))).one_or_none()


def wanted(connection: sa.Connection) -> Sequence[Any]:
    statement = sa.select(artifacts).where(artifacts.c.state == WANTED)
    return connection.execute(statement.order_by(artifacts.c.changed_at).limit(20)).all()


def finish(
    connection: sa.Connection, kind: str, subject: str, *, object_prefix: str = "", error: str = ""
) -> None:
    """It lies there now, announced as garbage before, or cannot be made. If another process was faster, what
    this one made stays garbage; so it does if it took so long that it may be gone."""
    outcome = {
        "state": FAILED if error else READY,
        "object_prefix": object_prefix or None,
        "error": error or None,
        "changed_at": time.time(),
    }
    statement = sa.update(artifacts).where(_is(kind, subject), artifacts.c.state == WANTED)
    if object_prefix and not keep_objects(connection, object_prefix):
        return
    if not connection.execute(statement.values(outcome)).rowcount:
        _discard(connection, object_prefix)


def drop(connection: sa.Connection, kind: str, subject: str) -> None:
    statement = sa.delete(artifacts).where(_is(kind, subject)).returning(artifacts.c.object_prefix)
    for object_prefix in list(connection.execute(statement).scalars()):
        _discard(connection, object_prefix)


def expire(connection: sa.Connection, *, made_before: float, at_most: int) -> int:
    old = (
        sa.select(artifacts.c.kind, artifacts.c.subject)
        .where(artifacts.c.state != WANTED, artifacts.c.changed_at < made_before)
        .limit(at_most)
    )
    rows = connection.execute(old).all()
    for row in rows:
        drop(connection, row.kind, row.subject)
    return len(rows)


def _is(kind: str, subject: str) -> sa.ColumnElement[bool]:
    return sa.and_(artifacts.c.kind == kind, artifacts.c.subject == subject)


def _discard(connection: sa.Connection, object_prefix: str | None) -> None:
    if object_prefix:
        discard_objects(connection, object_prefix)
