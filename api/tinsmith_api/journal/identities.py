"""Tenants: their members, keys, projects and sessions."""

import hashlib
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal import audit
from tinsmith_api.journal.operations import insert_if_new
from tinsmith_api.journal.tables import (
    checkpoints,
    custom_losses,
    keys,
    members,
    operations,
    projects,
    runs,
    sampling_sessions,
    sessions,
    tenants,
)

Json = dict[str, Any]

KEY_PREFIX = "tml-"
"""The official SDK refuses, before any request, a key that does not begin so."""


ADMIN, MEMBER, VIEWER = "admin", "member", "viewer"
ROLES = (VIEWER, MEMBER, ADMIN)
"""Each may do what the ones before it may, too. They read; train and sample; see bills and the audit log."""

CANCELLED = "cancelled"
"""How a session ended that its client did not finish."""

OWNER = "owner"
DEFAULT_PROJECT = "default"
"""Made with a tenant: the member that has its first key, the project of sessions that name none."""


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Whose key it is, and what may be done with it."""

    tenant_id: str
    key_id: int
    key_name: str
    member_id: str
    member: str
    role: str
    requests_per_minute: int | None
    concurrent_samples: int | None
    tokens_per_day: int | None


def create_key(
    connection: sa.Connection,
    tenant_name: str,
    *,
    name: str = "default",
    key: str = "",
    member: str = OWNER,
    role: str | None = None,
    limits: Json | None = None,
) -> str:
    """A key for this member of this tenant, both created if need be. It is returned here and stored only
    hashed. A new member is an admin if it is the owner, else a member, unless `role` says otherwise."""
    key = key or KEY_PREFIX + secrets.token_urlsafe(32)
    tenant_id = _tenant(connection, tenant_name)
    row = {
        "tenant_id": tenant_id,
        "name": name,
        "sha256": sha256(key),
        "created_at": time.time(),
        "member_id": set_member(connection, tenant_id, member, role),
        **(limits or {}),
    }
    if insert_if_new(connection, keys, row):
        audit.record(connection, tenant_id, "teams", "key_created", {"key": name, "member": member})
    return key


def _tenant(connection: sa.Connection, name: str) -> str:
    """Its id; a new one has a project, too."""
    new = {"id": uuid.uuid4().hex, "name": name, "created_at": time.time()}
    if insert_if_new(connection, tenants, new):
        create_project(connection, str(new["id"]), DEFAULT_PROJECT)
    found: str = connection.execute(sa.select(tenants.c.id).where(tenants.c.name == name)).scalar_one()
    return found


def set_member(connection: sa.Connection, tenant_id: str, name: str, role: str | None) -> str:
    """The id of this member, who has this role from now on (None: the one it has)."""
    row = {
        "id": uuid.uuid4().hex,
        "tenant_id": tenant_id,
        "name": name,
        "role": role or (ADMIN if name == OWNER else MEMBER),
        "created_at": time.time(),
    }
    where = (members.c.tenant_id == tenant_id, members.c.name == name)
    if not insert_if_new(connection, members, row):
        before = connection.execute(sa.select(members).where(*where)).one()
        row = {**row, "id": before.id, "role": role or before.role}
        if (before.role, before.removed_at) == (row["role"], None):
            return str(before.id)
        connection.execute(sa.update(members).where(*where).values(role=row["role"], removed_at=None))
    audit.record(connection, tenant_id, "teams", "member_set", {"member": name, "role": row["role"]})
    return str(row["id"])


def remove_member(connection: sa.Connection, tenant_name: str, name: str) -> bool:
    """Its keys open nothing any more; what it made stays the tenant's. False if there is no such member."""
    row = connection.execute(
        sa.select(members)
        .join(tenants)
        .where(tenants.c.name == tenant_name, members.c.name == name, members.c.removed_at.is_(None))
    ).one_or_none()
    if row is None:
        return False
    now = time.time()
    connection.execute(sa.update(members).where(members.c.id == row.id).values(removed_at=now))
    connection.execute(
        sa.update(keys).where(keys.c.member_id == row.id, keys.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    audit.record(connection, row.tenant_id, "teams", "member_removed", {"member": name})
    return True


def list_members(connection: sa.Connection) -> Sequence[Any]:
    statement = sa.select(tenants.c.name.label("tenant"), members.c.name, members.c.role).join_from(
        members, tenants
    )
    return connection.execute(
        statement.where(members.c.removed_at.is_(None)).order_by(tenants.c.name, members.c.name)
    ).all()


def revoke_key(connection: sa.Connection, key_id: int, by: str = "operator") -> bool:
    statement = sa.update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
    row = connection.execute(
        statement.values(revoked_at=time.time()).returning(keys.c.tenant_id, keys.c.name)
    ).one_or_none()
    if row is not None:
        details = {"key_id": key_id, "key": row.name, "by": by}
        audit.record(connection, row.tenant_id, "teams", "key_revoked", details)
    return row is not None


def change_key(connection: sa.Connection, key_id: int, changes: Json) -> bool:
    """Set some of requests_per_minute, concurrent_samples, tokens_per_day (0: no limit)."""
    changes = {name: value or None for name, value in changes.items()}
    known = sa.select(keys.c.tenant_id).where(keys.c.id == key_id)
    tenant_id = connection.execute(known).scalar_one_or_none()
    if tenant_id is None:
        return False
    if changes:
        connection.execute(sa.update(keys).where(keys.c.id == key_id).values(changes))
        audit.record(connection, tenant_id, "teams", "key_limits_set", {"key_id": key_id, **changes})
    return True


def list_keys(connection: sa.Connection) -> Sequence[Any]:
    statement = sa.select(
        keys,
        tenants.c.name.label("tenant"),
        members.c.name.label("member"),
        members.c.role,
    )
    joined = statement.join_from(keys, tenants).join(members, members.c.id == keys.c.member_id)
    return connection.execute(joined.order_by(keys.c.id)).all()


def create_project(connection: sa.Connection, tenant_id: str, name: str) -> str:
    """Its id, also if there is one of this name."""
    row = {"id": uuid.uuid4().hex, "tenant_id": tenant_id, "name": name, "created_at": time.time()}
    if insert_if_new(connection, projects, row):
        details = {"project_id": row["id"], "name": name}
        audit.record(connection, tenant_id, "projects", "project_created", details)
    found = project(connection, name, tenant_id)
    assert found is not None
    return str(found.id)


def project(connection: sa.Connection, id_or_name: str, tenant_id: str) -> sa.Row[Any] | None:
    """An id goes before a name."""
    either = sa.or_(projects.c.id == id_or_name, projects.c.name == id_or_name)
    statement = sa.select(projects).where(projects.c.tenant_id == tenant_id, either)
    return connection.execute(statement.order_by(projects.c.id != id_or_name).limit(1)).one_or_none()


def change_project(connection: sa.Connection, tenant_name: str, name: str, token_budget: int) -> bool:
    """0: no budget. False if there is no such project."""
    tenant_id = tenant(connection, tenant_name)
    found = None if tenant_id is None else project(connection, name, tenant_id)
    if tenant_id is None or found is None:
        return False
    budget = token_budget or None
    connection.execute(sa.update(projects).where(projects.c.id == found.id).values(token_budget=budget))
    details = {"project_id": found.id, "token_budget": budget}
    audit.record(connection, tenant_id, "projects", "project_budget_set", details)
    return True


def list_projects(connection: sa.Connection) -> Sequence[Any]:
    statement = sa.select(projects, tenants.c.name.label("tenant")).join_from(projects, tenants)
    return connection.execute(statement.order_by(tenants.c.name, projects.c.name)).all()


def tenant(connection: sa.Connection, name: str) -> str | None:
    return connection.execute(sa.select(tenants.c.id).where(tenants.c.name == name)).scalar_one_or_none()


def change_tenant(connection: sa.Connection, name: str, changes: Json) -> bool:
    """Set some of weight, priority and the limits (0: the default, or none). False if there is no such
    tenant."""
    tenant_id = tenant(connection, name)
    if tenant_id is None:
        return False
    if changes.get("token_budget") == 0:
        changes = {**changes, "token_budget": None}
    if changes:
        connection.execute(sa.update(tenants).where(tenants.c.name == name).values(changes))
        audit.record(connection, tenant_id, "organizations", "limits_set", changes)
    return True


def list_tenants(connection: sa.Connection) -> Sequence[Any]:
    return connection.execute(sa.select(tenants).order_by(tenants.c.name)).all()


def caller(
    connection: sa.Connection, *, hashed: str | None = None, key_id: int | None = None
) -> Caller | None:
    """By a key's hash, or its id; None for one that is unknown or revoked."""
    which = keys.c.id == key_id if hashed is None else keys.c.sha256 == hashed
    row = connection.execute(
        sa.select(keys, members.c.name.label("member"), members.c.role)
        .join_from(keys, members, members.c.id == keys.c.member_id)
        .where(which, keys.c.revoked_at.is_(None))
    ).one_or_none()
    if row is None:
        return None
    return Caller(
        row.tenant_id,
        row.id,
        row.name,
        row.member_id,
        row.member,
        row.role,
        row.requests_per_minute,
        row.concurrent_samples,
        row.tokens_per_day,
    )


def tenant_of_key(connection: sa.Connection, hashed: str) -> str | None:
    found = caller(connection, hashed=hashed)
    return found.tenant_id if found else None


def create_session(connection: sa.Connection, tenant_id: str, values: Json) -> str:
    """In the project of `values`, or in the tenant's first."""
    now = time.time()
    values = {"id": uuid.uuid4().hex, **values}
    if values.get("project_id") is None:
        first = project(connection, DEFAULT_PROJECT, tenant_id)
        values = {**values, "project_id": first.id if first else None}
    connection.execute(
        sa.insert(sessions).values(tenant_id=tenant_id, created_at=now, heartbeat_at=now, **values)
    )
    return str(values["id"])


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
        statement.values(finished_at=time.time(), finish_reason=CANCELLED, finish_detail=detail)
    ).rowcount


def run(connection: sa.Connection, run_id: str, tenant_id: str) -> sa.Row[Any] | None:
    return connection.execute(
        sa.select(runs).where(runs.c.id == run_id, runs.c.tenant_id == tenant_id)
    ).one_or_none()


def published_run(connection: sa.Connection, run_id: str) -> sa.Row[Any] | None:
    """A run of anybody's that has a published checkpoint."""
    now = time.time()
    goes_on = sa.or_(checkpoints.c.expires_at.is_(None), checkpoints.c.expires_at > now)
    shown = sa.exists().where(
        checkpoints.c.run_id == runs.c.id, checkpoints.c.published_at.is_not(None), goes_on
    )
    return connection.execute(sa.select(runs).where(runs.c.id == run_id, shown)).one_or_none()


def custom_loss(connection: sa.Connection, loss_id: str, tenant_id: str) -> sa.Row[Any] | None:
    its = (custom_losses.c.id == loss_id, custom_losses.c.tenant_id == tenant_id)
    return connection.execute(sa.select(custom_losses).where(*its)).one_or_none()


def forget_losses(connection: sa.Connection, *, finished_before: float, at_most: int) -> int:
    """Those of sessions that were finished then: calls that were made with them hold them. How many."""
    left = (
        sa.select(custom_losses.c.id)
        .join(sessions, sessions.c.id == custom_losses.c.session_id)
        .where(sessions.c.finished_at < finished_before)
        .limit(at_most)
    )
    return connection.execute(sa.delete(custom_losses).where(custom_losses.c.id.in_(left))).rowcount


def sampling_session(connection: sa.Connection, sampler_id: str, tenant_id: str) -> sa.Row[Any] | None:
    return connection.execute(
        sa.select(sampling_sessions).where(
            sampling_sessions.c.id == sampler_id, sampling_sessions.c.tenant_id == tenant_id
        )
    ).one_or_none()
