"""Who is calling, and the only way to what is theirs.

A route that wants a run, a session, a sampler, a checkpoint or a future asks its `Mine` for it. Mine reads
it and proves ownership in one query; what is not the caller's does not exist (NotFound, 404).
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from tinsmith.errors import AuthenticationError, NotFound
from tinsmith_api.journal import checkpoints, identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.store import Statement
from tinsmith_api.service import Service


class Gone(Exception):  # noqa: N818 - answered as 410
    """The session was finished."""


@dataclass(frozen=True)
class Owner:
    service: Service
    tenant_id: str

    async def session(self, session_id: str) -> Any:
        return await self._read(
            "session", session_id, lambda c: identities.session(c, session_id, self.tenant_id)
        )

    async def open_session(self, session_id: str) -> Any:
        """A session that was not finished; Gone if it was."""
        found = await self.session(session_id)
        if found.finished_at is not None:
            raise Gone(f"session {session_id} was finished: start a new one")
        return found

    async def run(self, run_id: str) -> Any:
        return await self._read("run", run_id, lambda c: identities.run(c, run_id, self.tenant_id))

    async def sampler(self, sampler_id: str) -> Any:
        return await self._read(
            "sampler", sampler_id, lambda c: identities.sampling_session(c, sampler_id, self.tenant_id)
        )

    async def checkpoint(self, path: str) -> Any:
        found = await self.service.read(lambda c: checkpoints.find(c, path, self.tenant_id))
        if found is None:
            raise NotFound(f"no checkpoint {path} among yours")
        return found

    async def outcome(self, request_id: str) -> ops.Outcome:
        found = await self.service.read(lambda c: ops.outcome(c, request_id, self.tenant_id))
        if found is None:
            raise NotFound(f"no future {request_id} among yours")
        return found

    def forget_session(self, session_id: str) -> None:
        self.service.owned.forget(f"{self.tenant_id} session {session_id}")

    async def _read(self, what: str, name: str, statement: Statement[Any]) -> Any:
        key = f"{self.tenant_id} {what} {name}"
        found = self.service.owned.get(key)
        if found is None:
            found = await self.service.read(statement)
            if found is None:
                raise NotFound(f"no {what} {name!r} among yours")
            self.service.owned.put(key, found)
        return found


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def owner_of(request: Request) -> Owner:
    service: Service = request.app.state.service
    key = request.headers.get("x-api-key", "")
    if not key:
        raise AuthenticationError("send your key in the header X-API-Key")
    hashed = identities.sha256(key)
    tenant_id = service.key_owners.get(hashed)
    if tenant_id is None:
        tenant_id = await service.read(lambda c: identities.tenant_of_key(c, hashed))
        if tenant_id is None:
            raise AuthenticationError("this key is unknown or revoked")
        service.key_owners.put(hashed, tenant_id)
    return Owner(service, tenant_id)


Mine = Annotated[Owner, Depends(owner_of)]
