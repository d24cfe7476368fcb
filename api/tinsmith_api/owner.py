"""Who is calling, what they may do, and the only way to what is theirs.

A route says in its signature what it takes: `Mine` lets every member of a tenant in, `MineToChange` those
who may train and spend, `MineToAdminister` admins. It asks its `Mine` for a run, a session, a sampler, a
checkpoint or a future. Mine reads it and proves ownership in one query; what is not the caller's does not
exist (NotFound, 404).
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from tinsmith.errors import AuthenticationError, InvalidInput, NotFound
from tinsmith_api.bodies import Readable
from tinsmith_api.journal import checkpoints, identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.identities import ADMIN, MEMBER, ROLES, Caller
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Statement
from tinsmith_api.service import Service
from tinsmith_api.signer import ACCOUNT, InvalidToken

Found = TypeVar("Found")

# Every JSON Web Token begins so, and no key does.
_JWT = "eyJ"


def urn_of(member_id: str) -> str:
    return f"tml:user:{member_id}"


class Gone(Exception):  # noqa: N818 - answered as 410
    """The session was finished."""


class Forbidden(Exception):  # noqa: N818 - answered as 403
    """The caller's role does not go so far."""


@dataclass(frozen=True)
class Owner:
    service: Service
    caller: Caller
    credential: str

    @property
    def tenant_id(self) -> str:
        return self.caller.tenant_id

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

    async def readable_run(self, run_id: str) -> Any:
        """One of the caller's, or one with a checkpoint that was published."""
        try:
            return await self.run(run_id)
        except NotFound:
            found = await self.service.read(lambda c: identities.published_run(c, run_id))
            if found is None:
                raise
            return found

    async def sampler(self, sampler_id: str) -> Any:
        return await self._read(
            "sampler", sampler_id, lambda c: identities.sampling_session(c, sampler_id, self.tenant_id)
        )

    async def custom_loss(self, loss_id: str) -> Any:
        return await self._read(
            "custom loss", loss_id, lambda c: identities.custom_loss(c, loss_id, self.tenant_id)
        )

    async def project(self, id_or_name: str) -> Any:
        return await self._read(
            "project", id_or_name, lambda c: identities.project(c, id_or_name, self.tenant_id)
        )

    async def checkpoint(self, path: str) -> Any:
        found = await self.service.read(lambda c: checkpoints.find(c, path, self.tenant_id))
        if found is None:
            raise NotFound(f"no checkpoint {path} among yours")
        return found

    async def readable_checkpoint(self, path: str, access_token: str | None = None) -> Any:
        """One of the caller's, or one that was published. `access_token` is another account's credential:
        then one of that account's."""
        tenant_id = self.tenant_id
        if access_token is not None:
            try:
                tenant_id = (await _caller_of(self.service, access_token)).tenant_id
            except AuthenticationError as error:
                raise InvalidInput(f"weights_access_token: {error}") from None
        found = await self.service.read(lambda c: checkpoints.find_readable(c, path, tenant_id))
        if found is None:
            raise NotFound(f"no checkpoint {path} among yours or the published ones")
        return found

    async def outcome(self, request_id: str, at_most_bytes: int) -> ops.Outcome:
        """Without its body if that is larger."""
        return self._future(
            request_id,
            await self.service.read(lambda c: ops.outcome(c, request_id, self.tenant_id, at_most_bytes)),
        )

    async def operation(self, request_id: str) -> Operation:
        """That a future is the promise of."""
        return self._future(
            request_id, await self.service.read(lambda c: ops.find(c, request_id, self.tenant_id))
        )

    def _future(self, request_id: str, found: Found | None) -> Found:
        if found is None:
            raise NotFound(f"no future {request_id} among yours")
        return found

    async def submit(self, operation: Operation, also: Statement[Any] = lambda _: None) -> dict[str, Any]:
        return await self.service.submit(operation, self.caller, also)

    def receive(self, request: Request, limit: int) -> AbstractAsyncContextManager[Readable]:
        """A body that may be large, at most `limit` bytes; see `Uploads`."""
        return self.service.uploads.receive(self.tenant_id, request, limit)

    async def read(self, body: Readable, reading: Callable[..., bytes], **given: Any) -> bytes:
        """`reading(body, **given)`, while nobody else waits for it; see `Uploads`."""
        return await self.service.uploads.read(self.tenant_id, body, reading, **given)

    def signed(self, details: dict[str, Any]) -> dict[str, Any]:
        """Details of an event, with who did it."""
        return {**details, "by": self.caller.member, "key_id": self.caller.key_id}

    @property
    def by_token(self) -> bool:
        """Whether a token stood for the key."""
        return self.credential.startswith(_JWT)

    def forget_caller(self) -> None:
        self.service.callers.forget(identities.sha256(self.credential))
        self.service.callers.forget(f"id {self.caller.key_id}")

    def forget_session(self, session_id: str) -> None:
        self.service.owned.forget(f"{self.tenant_id} session {session_id}")

    def at_least(self, role: str) -> "Owner":
        """Itself, if its caller may do what this role may; else Forbidden."""
        if ROLES.index(self.caller.role) < ROLES.index(role):
            raise Forbidden(
                f"{self.caller.member} is a {self.caller.role}, this needs a {role}: ask an admin of your "
                "organization"
            )
        return self

    async def _read(self, what: str, name: str, statement: Statement[Any]) -> Any:
        key = f"{self.tenant_id} {what} {name}"
        found = self.service.owned.get(key)
        if found is None:
            found = await self.service.read(statement)
            if found is None:
                raise NotFound(f"no {what} {name!r} among yours")
            self.service.owned.put(key, found)
        return found


def check_usable(checkpoint: Any) -> None:
    """InvalidInput for one that nothing can be made of here."""
    if checkpoint.kind == "external_weights":
        raise InvalidInput(
            f"{checkpoint.path} was saved to be downloaded: load or sample what save_state or "
            "save_weights_for_sampler made"
        )


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def owner_of(request: Request) -> Owner:
    service: Service = request.app.state.service
    credential = request.headers.get("x-api-key", "") or _bearer(request)
    if not credential:
        raise AuthenticationError("send your key in the header X-API-Key, or as Authorization: Bearer KEY")
    caller = await _caller_of(service, credential)
    # The route, not the path: that ends as its caller likes.
    await service.check_rate(caller, request.scope["route"].path)
    return Owner(service, caller, credential)


def _bearer(request: Request) -> str:
    """How OpenAI's clients send a key."""
    scheme, _, credential = request.headers.get("authorization", "").partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


async def changing_owner_of(request: Request) -> Owner:
    return (await owner_of(request)).at_least(MEMBER)


async def administering_owner_of(request: Request) -> Owner:
    return (await owner_of(request)).at_least(ADMIN)


async def _caller_of(service: Service, credential: str) -> Caller:
    """Of a key, or of a token that was given for one; AuthenticationError if it is neither."""
    if credential.startswith(_JWT):
        return await _caller_of_token(service, credential)
    hashed = identities.sha256(credential)
    known = service.callers.get(hashed)
    if known is None:
        known = await service.read(lambda c: identities.caller(c, hashed=hashed))
        if known is None:
            raise AuthenticationError("this key is unknown or revoked")
        service.callers.put(hashed, known)
    return known


async def _caller_of_token(service: Service, token: str) -> Caller:
    if not service.settings.jwt_auth:
        raise InvalidToken("this service takes keys, no tokens: send your key in the header X-API-Key")
    key_id = int((await service.signer.read(ACCOUNT, token))["key"])
    known = service.callers.get(f"id {key_id}")
    if known is None:
        known = await service.read(lambda c: identities.caller(c, key_id=key_id))
        if known is None:
            raise InvalidToken("the key of this token was revoked")
        service.callers.put(f"id {key_id}", known)
    return known


ServiceOf = Annotated[Service, Depends(service_of)]
Mine = Annotated[Owner, Depends(owner_of)]
MineToChange = Annotated[Owner, Depends(changing_owner_of)]
MineToAdminister = Annotated[Owner, Depends(administering_owner_of)]
