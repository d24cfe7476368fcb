"""Checkpoints: named, whole or not at all.

A name is reserved when its save is submitted. The row becomes visible (`ready_at`) in the transaction that
finishes the save, after every file and the manifest are in the object store; a failed save frees the name.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal import audit
from tinsmith_api.journal.operations import insert_if_new
from tinsmith_api.journal.tables import checkpoints, garbage, runs, sampling_sessions, sessions

Json = dict[str, Any]

KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}

# Longer than a snapshot can lag behind the operation that read the objects.
GARBAGE_SECONDS = 3600.0


def path_of(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


def prefix_of(tenant_id: str, run_id: str, request_id: str) -> str:
    """Its own folder for every save: what was saved under the name before stays until this one is whole."""
    return f"{tenant_id}/checkpoints/{run_id}/{request_id}"


def reserve(connection: sa.Connection, values: Json) -> bool:
    """Take the name; False if it is taken."""
    return insert_if_new(connection, checkpoints, {"created_at": time.time(), **values})


def find(connection: sa.Connection, path: str, tenant_id: str) -> sa.Row[Any] | None:
    """One of this tenant's checkpoints that is whole, with its `base_model` and `optimizer`."""
    return connection.execute(_found(path, checkpoints.c.tenant_id == tenant_id)).one_or_none()


def find_readable(connection: sa.Connection, path: str, tenant_id: str) -> sa.Row[Any] | None:
    """As `find`; also what anybody published."""
    its_own = checkpoints.c.tenant_id == tenant_id
    return connection.execute(_found(path, sa.or_(its_own, _IS_PUBLIC))).one_or_none()


_IS_PUBLIC = checkpoints.c.published_at.is_not(None)


def _found(path: str, whose: sa.ColumnElement[bool]) -> sa.Select[Any]:
    statement = sa.select(checkpoints, runs.c.base_model, runs.c.optimizer).join_from(checkpoints, runs)
    return statement.where(
        checkpoints.c.path == path, whose, checkpoints.c.ready_at.is_not(None), _not_expired()
    )


def publish(connection: sa.Connection, request_id: str, values: Json) -> None:
    """Make a written save visible; what an overwritten name referred to becomes garbage."""
    before = connection.execute(
        sa.select(checkpoints).where(checkpoints.c.path == values["path"])
    ).one_or_none()
    # What was published was what it held before.
    fresh = {
        "request_id": request_id,
        "created_at": time.time(),
        "ready_at": time.time(),
        "published_at": None,
    }
    row = {**values, **fresh}
    if before is None:
        connection.execute(sa.insert(checkpoints).values(row))
        return
    connection.execute(sa.update(checkpoints).where(checkpoints.c.path == values["path"]).values(row))
    if before.ready_at is not None and before.object_prefix != values["object_prefix"]:
        discard_objects(connection, before.object_prefix)


def free_name(connection: sa.Connection, request_id: str, written: str = "") -> None:
    """The save failed: nothing is left of its reservation, and what it wrote is collected. (One that was to
    overwrite another has no reservation, but may have `written`.)"""
    if written:
        discard_objects(connection, written)
    statement = sa.delete(checkpoints).where(
        checkpoints.c.request_id == request_id, checkpoints.c.ready_at.is_(None)
    )
    for prefix in list(connection.execute(statement.returning(checkpoints.c.object_prefix)).scalars()):
        discard_objects(connection, prefix)


def open_sampler(connection: sa.Connection, values: Json) -> bool:
    """Enter a sampling session (id, tenant_id, session_id, base_model, model_path, object_prefix)."""
    return insert_if_new(connection, sampling_sessions, {"created_at": time.time(), **values})


_JOIN = (
    sa.update(sampling_sessions)
    .where(sampling_sessions.c.id == sa.bindparam("of_sampler"))
    .values(clones=sampling_sessions.c.clones + 1)
    .returning(sampling_sessions.c.clones)
)


def join_sampler(connection: sa.Connection, sampler_id: str) -> int:
    """The number of one more client of this sampler, from 1 on."""
    return int(connection.execute(_JOIN, {"of_sampler": sampler_id}).scalar_one())


def delete(connection: sa.Connection, path: str) -> None:
    delete_all(connection, [path])


def delete_all(connection: sa.Connection, paths: Sequence[str]) -> None:
    statement = sa.delete(checkpoints).where(checkpoints.c.path.in_(paths))
    for prefix in list(connection.execute(statement.returning(checkpoints.c.object_prefix)).scalars()):
        discard_objects(connection, prefix)


def publish_to_all(connection: sa.Connection, path: str, *, is_public: bool) -> None:
    """Let everybody read it, or nobody else any more. A sampler that was made meanwhile stays."""
    now = time.time() if is_public else None
    connection.execute(sa.update(checkpoints).where(checkpoints.c.path == path).values(published_at=now))


def set_ttl(connection: sa.Connection, path: str, ttl_seconds: int | None) -> None:
    """From now; None: it stays."""
    expires_at = None if ttl_seconds is None else time.time() + ttl_seconds
    connection.execute(sa.update(checkpoints).where(checkpoints.c.path == path).values(expires_at=expires_at))


def copy(
    connection: sa.Connection, source_path: str, *, run_id: str, tenant_id: str, ttl_seconds: int | None
) -> str | None:
    """A checkpoint of the same kind and name under another run, of another tenant perhaps; its path. The
    files are shared. None if the source is gone. It is listed also where its source is not: an unnamed
    sampler goes with its session, a copy was asked for."""
    # Locked, so that its files cannot become garbage between this look and the row that keeps them.
    statement = _found(source_path, sa.true()).with_for_update(of=checkpoints)
    source = connection.execute(statement).one_or_none()
    if source is None:
        return None
    now = time.time()
    path = path_of(run_id, source.kind, source.name)
    row = {
        "path": path,
        "run_id": run_id,
        "tenant_id": tenant_id,
        "request_id": uuid.uuid4().hex,
        "listed": True,
        "created_at": now,
        "ready_at": now,
        "expires_at": None if ttl_seconds is None else now + ttl_seconds,
    }
    same = ("kind", "name", "object_prefix", "lora", "user_metadata", "size_bytes")
    insert_if_new(connection, checkpoints, {**{name: getattr(source, name) for name in same}, **row})
    return path


def listing(
    connection: sa.Connection,
    tenant_id: str,
    *,
    run_id: str | None = None,
    member_id: str | None = None,
    only_published: bool = False,
    with_exports: bool = True,
    limit: int,
    offset: int = 0,
    behind: sa.Row[Any] | None = None,
) -> tuple[list[sa.Row[Any]], int]:
    """(one page, newest first; how many there are), of a run or of a member's runs; the page behind a
    checkpoint, if one is given."""
    where = [
        checkpoints.c.tenant_id == tenant_id,
        checkpoints.c.ready_at.is_not(None),
        checkpoints.c.listed,
        _not_expired(),
    ]
    if run_id is not None:
        where.append(checkpoints.c.run_id == run_id)
    if member_id is not None:
        its = sa.select(runs.c.id).join(sessions).where(sessions.c.member_id == member_id)
        where.append(checkpoints.c.run_id.in_(its))
    if only_published:
        where.append(_IS_PUBLIC)
    if not with_exports:
        where.append(checkpoints.c.kind != "external_weights")
    total = connection.execute(sa.select(sa.func.count()).select_from(checkpoints).where(*where)).scalar_one()
    if behind is not None:
        older = checkpoints.c.created_at < behind.created_at
        same = sa.and_(checkpoints.c.created_at == behind.created_at, checkpoints.c.path > behind.path)
        where.append(sa.or_(older, same))
    page = sa.select(checkpoints).where(*where).order_by(checkpoints.c.created_at.desc(), checkpoints.c.path)
    return list(connection.execute(page.limit(limit).offset(offset)).all()), total


def discard_objects(
    connection: sa.Connection, object_prefix: str, *, after_seconds: float = GARBAGE_SECONDS
) -> None:
    """These are garbage by then, unless `keep_objects` says otherwise before. Of objects that copies share
    every copy that goes says so anew."""
    delete_after = time.time() + after_seconds
    if not insert_if_new(connection, garbage, {"object_prefix": object_prefix, "delete_after": delete_after}):
        sooner = sa.and_(garbage.c.object_prefix == object_prefix, garbage.c.delete_after < delete_after)
        connection.execute(sa.update(garbage).where(sooner).values(delete_after=delete_after))


def size_of(connection: sa.Connection, run_id: str) -> int:
    """Bytes of what is kept of a run."""
    size = sa.func.coalesce(sa.func.sum(checkpoints.c.size_bytes), 0)
    statement = sa.select(size).where(checkpoints.c.run_id == run_id, checkpoints.c.ready_at.is_not(None))
    return int(connection.execute(statement).scalar_one())


def keep_objects(connection: sa.Connection, object_prefix: str) -> bool:
    """What was announced as garbage is needed. False if it may be gone by now."""
    statement = sa.delete(garbage).where(
        garbage.c.object_prefix == object_prefix, garbage.c.delete_after > time.time()
    )
    return connection.execute(statement).rowcount > 0


def expire(connection: sa.Connection, *, at_most: int) -> int:
    """Delete checkpoints whose time has come; how many."""
    is_due = checkpoints.c.expires_at < time.time()
    due = sa.select(checkpoints.c.path).where(is_due).limit(at_most)
    # Its time is looked at once more: it may be given another, or be saved anew, in between.
    statement = sa.delete(checkpoints).where(checkpoints.c.path.in_(due), is_due)
    columns = (checkpoints.c.path, checkpoints.c.tenant_id, checkpoints.c.object_prefix)
    rows = connection.execute(statement.returning(*columns)).all()
    for row in rows:
        discard_objects(connection, row.object_prefix)
        details = {"tinker_path": row.path, "by": "its ttl"}
        audit.record(connection, row.tenant_id, "checkpoints", "checkpoint_expired", details)
    return len(rows)


def unnamed_left(connection: sa.Connection, *, at_most: int) -> list[str]:
    """Paths of unnamed checkpoints whose session was finished a while ago: nobody can ask for them."""
    statement = (
        sa.select(checkpoints.c.path)
        .join(runs, runs.c.id == checkpoints.c.run_id)
        .join(sessions, sessions.c.id == runs.c.session_id)
        .where(
            sessions.c.finished_at < time.time() - GARBAGE_SECONDS,
            checkpoints.c.listed.is_(False),
            checkpoints.c.ready_at.is_not(None),
        )
        .limit(at_most)
    )
    return list(connection.execute(statement).scalars())


def due_garbage(connection: sa.Connection) -> list[str]:
    """Prefixes of objects to be deleted now. A frozen sampler keeps its own until its session is over, a
    copy of a checkpoint as long as it is there."""
    now = time.time()
    session_goes_on = sa.or_(sessions.c.finished_at.is_(None), sessions.c.finished_at > now - GARBAGE_SECONDS)
    sampled = (
        sa.exists()
        .where(sampling_sessions.c.object_prefix == garbage.c.object_prefix)
        .where(sampling_sessions.c.session_id == sessions.c.id, session_goes_on)
    )
    copied = sa.exists().where(checkpoints.c.object_prefix == garbage.c.object_prefix)
    statement = sa.select(garbage.c.object_prefix).where(garbage.c.delete_after < now, ~sampled, ~copied)
    return list(connection.execute(statement).scalars())


def forget_garbage(connection: sa.Connection, object_prefix: str) -> None:
    connection.execute(sa.delete(garbage).where(garbage.c.object_prefix == object_prefix))


def _not_expired() -> sa.ColumnElement[bool]:
    return sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > time.time())
