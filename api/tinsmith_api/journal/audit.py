"""Who did what to checkpoints, projects, teams and organizations. Written with the deed, never changed."""

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from tinsmith_api.journal.tables import audit, keys, members

Json = dict[str, Any]

CATEGORIES = ("checkpoints", "projects", "teams", "organizations")


def record(connection: sa.Connection, tenant_id: str, category: str, event: str, details: Json) -> None:
    """In the transaction of the deed. A detail `by` names who did it; without it the operator did."""
    assert category in CATEGORIES, category
    row = {"tenant_id": tenant_id, "at": time.time(), "category": category, "event": event}
    connection.execute(sa.insert(audit).values(**row, details={"by": "operator", **details}))


def record_by_key(
    connection: sa.Connection, tenant_id: str, category: str, event: str, details: Json, key_id: int | None
) -> None:
    """As `record`, by whose key it is."""
    its_member = sa.select(members.c.name).join(keys, keys.c.member_id == members.c.id)
    name = connection.execute(its_member.where(keys.c.id == key_id)).scalar_one_or_none()
    record(connection, tenant_id, category, event, {**details, "by": name, "key_id": key_id})


def entries(
    connection: sa.Connection,
    tenant_id: str,
    *,
    category: str | None,
    since: float,
    before: float,
    limit: int,
) -> Sequence[Any]:
    """Oldest first."""
    statement = sa.select(audit).where(
        audit.c.tenant_id == tenant_id, audit.c.at >= since, audit.c.at < before
    )
    if category is not None:
        statement = statement.where(audit.c.category == category)
    return connection.execute(statement.order_by(audit.c.at, audit.c.id).limit(limit)).all()
