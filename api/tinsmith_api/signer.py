"""What this service signs and later recognizes: tokens that stand for a key, and addresses of downloads."""

import asyncio
import time
from typing import Any

import jwt

from tinsmith.errors import AuthenticationError
from tinsmith_api.journal import signing
from tinsmith_api.journal.store import Store
from tinsmith_api.memory import Memory

Json = dict[str, Any]

ACCOUNT, DOWNLOAD = "tinsmith:account", "tinsmith:download"
"""What a signature is for. One is never good for the other."""

_ALGORITHM = "HS256"


class InvalidToken(AuthenticationError):  # noqa: N818 - the name says what is wrong
    """Clients exchange their key anew when they are told so."""

    headers = {"www-authenticate": 'Bearer error="invalid_token"'}  # noqa: RUF012


class Signer:
    def __init__(self, journal: Store) -> None:
        self._journal = journal
        # Shorter than a new key waits for its first use in another process would be remembered.
        self._current: Memory[tuple[str, bytes]] = Memory(seconds=60)
        self._known: Memory[bytes] = Memory(seconds=60, size=64)

    async def sign(self, audience: str, claims: Json, seconds: int) -> str:
        current = self._current.get("")
        if current is None:
            current = self._current.put("", await asyncio.wrap_future(self._journal.write(signing.current)))
        key_id, secret = current
        now = int(time.time())
        return jwt.encode(
            {**claims, "aud": audience, "iat": now, "exp": now + seconds},
            secret,
            algorithm=_ALGORITHM,
            headers={"kid": key_id},
        )

    async def read(self, audience: str, token: str) -> Json:
        """The claims; InvalidToken if they were not signed here for this, or are no longer good."""
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            secret = await self._secret(key_id) if isinstance(key_id, str) else None
            if secret is None:
                raise InvalidToken("this token was not signed here, or too long ago")
            claims: Json = jwt.decode(
                token,
                secret,
                algorithms=[_ALGORITHM],
                audience=audience,
                # Not when it was signed: another process' clock may be ahead of this one's.
                options={"require": ["exp", "iat", "aud"], "verify_iat": False},
            )
        except jwt.ExpiredSignatureError:
            raise InvalidToken("this token has expired") from None
        except jwt.InvalidTokenError as error:
            raise InvalidToken(f"this is no token of this service: {error}") from None
        return claims

    async def _secret(self, key_id: str) -> bytes | None:
        known = self._known.get(key_id)
        if known is None and len(key_id) == 32:
            known = await asyncio.wrap_future(self._journal.read(lambda c: signing.find(c, key_id)))
            if known is not None:
                self._known.put(key_id, known)
        return known
