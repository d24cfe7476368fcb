"""The secrets that tokens and download addresses are signed with. All API processes share them.

The newest signs for a week, then there is a new one; the one before stays for as long as what it signed may
be good.
"""

import secrets
import time
import uuid

import sqlalchemy as sa

from tinsmith_api.journal.tables import signing_keys

ROTATION_SECONDS = 7 * 86400.0
# Longer than anything signed is good for.
_AFTERLIFE_SECONDS = 86400.0


def current(connection: sa.Connection) -> tuple[str, bytes]:
    """(id, secret) of the key to sign with now; a new one if need be."""
    row = connection.execute(
        sa.select(signing_keys)
        .where(signing_keys.c.created_at > time.time() - ROTATION_SECONDS)
        .order_by(signing_keys.c.created_at.desc())
        .limit(1)
    ).one_or_none()
    if row is not None:
        return row.id, row.secret
    key_id, secret = uuid.uuid4().hex, secrets.token_bytes(32)
    connection.execute(sa.insert(signing_keys).values(id=key_id, secret=secret, created_at=time.time()))
    return key_id, secret


def find(connection: sa.Connection, key_id: str) -> bytes | None:
    statement = sa.select(signing_keys.c.secret).where(signing_keys.c.id == key_id)
    return connection.execute(statement).scalar_one_or_none()


def forget(connection: sa.Connection) -> int:
    """Delete keys that nothing good is signed with any more."""
    before = time.time() - ROTATION_SECONDS - _AFTERLIFE_SECONDS
    return connection.execute(sa.delete(signing_keys).where(signing_keys.c.created_at < before)).rowcount
