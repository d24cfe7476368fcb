"""Checkpoints: named, whole or not at all.

A name is reserved when its save is submitted. The row becomes visible (`ready_at`) in the transaction that
finishes the save, after every file and the manifest are in the object store; a failed save frees the name.
"""

import time
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.operations import insert_if_new
from tinsmith_api.journal.tables import checkpoints, garbage, sampling_sessions

Json = dict[str, Any]

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}

# Longer than a snapshot can lag behind the operation that read the objects.
GARBAGE_SECONDS = 3600.0


def path_of(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


def reserve(connection: sa.Connection, values: Json) -> bool:
    """Take the name; False if it is taken."""
    return insert_if_new(connection, checkpoints, {"created_at": time.time(), **values})


def find(connection: sa.Connection, path: str, tenant_id: str) -> sa.Row[Any] | None:
    """One of this tenant's checkpoints that is whole."""
    return connection.execute(
        sa.select(checkpoints).where(
            checkpoints.c.path == path,
            checkpoints.c.tenant_id == tenant_id,
            checkpoints.c.ready_at.is_not(None),
            _not_expired(),
        )
    ).one_or_none()


def publish(connection: sa.Connection, request_id: str, values: Json) -> None:
    """Make a written save visible; what an overwritten name referred to becomes garbage."""
    before = connection.execute(
        sa.select(checkpoints).where(checkpoints.c.path == values["path"])
    ).one_or_none()
    row = {**values, "request_id": request_id, "created_at": time.time(), "ready_at": time.time()}
    if before is None:
        connection.execute(sa.insert(checkpoints).values(row))
        return
    connection.execute(sa.update(checkpoints).where(checkpoints.c.path == values["path"]).values(row))
    if before.ready_at is not None and before.object_prefix != values["object_prefix"]:
        discard_objects(connection, before.object_prefix)


def free_name(connection: sa.Connection, request_id: str) -> None:
    """The save failed: nothing is left of its reservation."""
    connection.execute(
        sa.delete(checkpoints).where(checkpoints.c.request_id == request_id, checkpoints.c.ready_at.is_(None))
    )


def open_sampler(connection: sa.Connection, values: Json) -> bool:
    """Enter a sampling session (id, tenant_id, session_id, base_model, model_path, object_prefix)."""
    return insert_if_new(connection, sampling_sessions, {"created_at": time.time(), **values})


def delete(connection: sa.Connection, path: str) -> None:
    row = connection.execute(sa.delete(checkpoints).where(checkpoints.c.path == path).returning(checkpoints))
    for deleted in row:
        discard_objects(connection, deleted.object_prefix)


def listing(
    connection: sa.Connection, tenant_id: str, *, run_id: str | None = None, limit: int, offset: int = 0
) -> tuple[list[sa.Row[Any]], int]:
    """(one page, newest first; how many there are)."""
    where = [
        checkpoints.c.tenant_id == tenant_id,
        checkpoints.c.ready_at.is_not(None),
        checkpoints.c.listed,
        _not_expired(),
    ]
    if run_id is not None:
        where.append(checkpoints.c.run_id == run_id)
    total = connection.execute(sa.select(sa.func.count()).select_from(checkpoints).where(*where)).scalar_one()
    page = sa.select(checkpoints).where(*where).order_by(checkpoints.c.created_at.desc(), checkpoints.c.path)
    return list(connection.execute(page.limit(limit).offset(offset)).all()), total


def discard_objects(connection: sa.Connection, object_prefix: str) -> None:
    insert_if_new(
        connection,
        garbage,
        {"object_prefix": object_prefix, "delete_after": time.time() + GARBAGE_SECONDS},
    )


def expire(connection: sa.Connection) -> None:
    """Delete the checkpoints whose time has come."""
    due = sa.select(checkpoints.c.path).where(checkpoints.c.expires_at < time.time())
    for path in list(connection.execute(due).scalars()):
        delete(connection, path)


def due_garbage(connection: sa.Connection) -> list[str]:
    statement = sa.select(garbage.c.object_prefix).where(garbage.c.delete_after < time.time())
    return list(connection.execute(statement).scalars())


def forget_garbage(connection: sa.Connection, object_prefix: str) -> None:
    connection.execute(sa.delete(garbage).where(garbage.c.object_prefix == object_prefix))


def _not_expired() -> sa.ColumnElement[bool]:
    return sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > time.time())
