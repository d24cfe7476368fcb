"""Tenants, their keys and their sessions."""

import hashlib
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.operations import insert_if_new
from tinsmith_api.journal.tables import keys, operations, runs, sampling_sessions, sessions, tenants

Json = dict[str, Any]

KEY_PREFIX = "tml-"
"""The official SDK refuses, before any request, a key that does not begin so."""


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(connection: sa.Connection, tenant_name: str, *, name: str = "default", key: str = "") -> str:
    """A key for this tenant, which is created if need be. It is returned here and stored only hashed."""
    key = key or KEY_PREFIX + secrets.token_urlsafe(32)
    insert_if_new(
        connection, tenants, {"id": uuid.uuid4().hex, "name": tenant_name, "created_at": time.time()}
    )
    tenant_id = connection.execute(sa.select(tenants.c.id).where(tenants.c.name == tenant_name)).scalar_one()
    insert_if_new(
        connection,
        keys,
        {"tenant_id": tenant_id, "name": name, "sha256": sha256(key), "created_at": time.time()},
    )
    return key


def revoke_key(connection: sa.Connection, key_id: int) -> bool:
    statement = sa.update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
    return connection.execute(statement.values(revoked_at=time.time())).rowcount > 0


def list_keys(connection: sa.Connection) -> Sequence[Any]:
    statement = sa.select(
        keys.c.id, tenants.c.name.label("tenant"), keys.c.name, keys.c.created_at, keys.c.revoked_at
    )
    return connection.execute(statement.join(tenants).order_by(keys.c.id)).all()


def change_tenant(connection: sa.Connection, name: str, changes: Json) -> bool:
    """Set some of weight, priority and the limits (0: the default). False if there is no such tenant."""
    known = sa.select(tenants.c.id).where(tenants.c.name == name)
    if connection.execute(known).one_or_none() is None:
        return False
    if changes:
        connection.execute(sa.update(tenants).where(tenants.c.name == name).values(changes))
    return True


def list_tenants(connection: sa.Connection) -> Sequence[Any]:
    return connection.execute(sa.select(tenants).order_by(tenants.c.name)).all()


def tenant_of_key(connection: sa.Connection, hashed: str) -> str | None:
    statement = sa.select(keys.c.tenant_id).where(keys.c.sha256 == hashed, keys.c.revoked_at.is_(None))
    return connection.execute(statement).scalar_one_or_none()


def create_session(connection: sa.Connection, tenant_id: str, values: Json) -> str:
    now = time.time()
    session_id = uuid.uuid4().hex
    connection.execute(
        sa.insert(sessions).values(
            id=session_id, tenant_id=tenant_id, created_at=now, heartbeat_at=now, **values
        )
    )
    return session_id


def session(connection: sa.Connection, session_id: str, tenant_id: str) -> sa.Row[Any] | None:
    return connection.execute(
        sa.select(sessions).where(sessions.c.id == session_id, sessions.c.tenant_id == tenant_id)
    ).one_or_none()


def heartbeat(connection: sa.Connection, session_id: str) -> None:
    connection.execute(
        sa.update(sessions).where(sessions.c.id == session_id).values(heartbeat_at=time.time())
    )


def finish_session(connection: sa.Connection, session_id: str, reason: str, detail: str | None) -> None:
    """The first reason stands."""
    connection.execute(
        sa.update(sessions)
        .where(sessions.c.id == session_id, sessions.c.finished_at.is_(None))
        .values(finished_at=time.time(), finish_reason=reason, finish_detail=detail)
    )


def reap_sessions(connection: sa.Connection, *, silent_since: float, at_most: int) -> int:
    """Finish sessions without heartbeat or call since then; how many. (Some clients never beat.)"""
    calls = [
        sa.exists().where(
            table.c.session_id == sessions.c.id,
            operations.c.subject == table.c.id,
            operations.c.submitted_at > silent_since,
        )
        for table in (runs, sampling_sessions)
    ]
    silent = (
        sa.select(sessions.c.id)
        .where(sessions.c.finished_at.is_(None), sessions.c.heartbeat_at < silent_since, ~sa.or_(*calls))
        .limit(at_most)
    )
    statement = sa.update(sessions).where(sessions.c.id.in_(silent), sessions.c.finished_at.is_(None))
    detail = "nothing was heard of the client any more"
    return connection.execute(
        statement.values(finished_at=time.time(), finish_reason="interrupted", finish_detail=detail)
    ).rowcount


def run(connection: sa.Connection, run_id: str, tenant_id: str) -> sa.Row[Any] | None:
    return connection.execute(
        sa.select(runs).where(runs.c.id == run_id, runs.c.tenant_id == tenant_id)
    ).one_or_none()


def sampling_session(connection: sa.Connection, sampler_id: str, tenant_id: str) -> sa.Row[Any] | None:
    return connection.execute(
        sa.select(sampling_sessions).where(
            sampling_sessions.c.id == sampler_id, sampling_sessions.c.tenant_id == tenant_id
        )
    ).one_or_none()
