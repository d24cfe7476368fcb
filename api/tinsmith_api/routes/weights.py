"""Checkpoints as things: deleting, publishing, keeping, copying and downloading them."""

import asyncio
import datetime
import time
import uuid
from email.utils import format_datetime
from typing import Annotated, Any
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from tinsmith.errors import InvalidInput, NotFound
from tinsmith_api.bodies import Body, parse, read_body, reply, takes
from tinsmith_api.journal import artifacts, audit, checkpoints, identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import Damaged
from tinsmith_api.journal.operations import Operation, insert_if_new
from tinsmith_api.journal.tables import copies, runs
from tinsmith_api.owner import Forbidden, Mine, MineToChange, Owner, ServiceOf
from tinsmith_api.routes.training import TtlSeconds
from tinsmith_api.signer import DOWNLOAD, InvalidToken

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

_ONE = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
# How long an address that was given for a file is good: as long as files outlive their checkpoint.
_LINK_SECONDS = 3600
# How long a call waits for an archive that is being made, before it says "not yet".
_MAKING_SECONDS = 10.0


@router.delete(_ONE, status_code=204)
async def delete_checkpoint(mine: MineToChange, run_id: str, kind: str, name: str) -> Response:
    path = await _own(mine, run_id, kind, name)

    def statement(connection: sa.Connection) -> None:
        checkpoints.delete(connection, path)
        _record(connection, mine, "checkpoint_deleted", path)

    await mine.service.write(statement)
    return Response(status_code=204)


@router.post(_ONE + "/publish", status_code=204)
async def publish_checkpoint(mine: MineToChange, run_id: str, kind: str, name: str) -> Response:
    """Every tenant may read it from now on: load it, sample it, copy it, download it."""
    return await _publish(mine, await _own(mine, run_id, kind, name), is_public=True)


@router.delete(_ONE + "/publish", status_code=204)
async def unpublish_checkpoint(mine: MineToChange, run_id: str, kind: str, name: str) -> Response:
    return await _publish(mine, await _own(mine, run_id, kind, name), is_public=False)


class Ttl(Body):
    ttl_seconds: TtlSeconds | None


@router.put(_ONE + "/ttl", status_code=204, openapi_extra=takes(Ttl))
async def set_ttl(mine: MineToChange, run_id: str, kind: str, name: str, request: Request) -> Response:
    body = parse(Ttl, await read_body(request, mine.service.settings.max_body_bytes))
    path = await _own(mine, run_id, kind, name)

    def statement(connection: sa.Connection) -> None:
        checkpoints.set_ttl(connection, path, body.ttl_seconds)
        _record(connection, mine, "checkpoint_ttl_set", path, ttl_seconds=body.ttl_seconds)

    await mine.service.write(statement)
    return Response(status_code=204)


# -- downloads -------------------------------------------------------------------------------------------


@router.get(_ONE + "/external_weights_urls")
async def external_weights_urls(mine: Mine, run_id: str, kind: str, name: str, request: Request) -> Response:
    """An address for every file, good for an hour, which needs no key."""
    path = checkpoints.path_of(run_id, kind, name)
    checkpoint = await mine.readable_checkpoint(path)
    if checkpoint.kind != "external_weights":
        raise InvalidInput(f"{path} is no export: save_weights_external makes one of a run")
    urls, expires = await links(mine, request, checkpoint.object_prefix)
    await mine.service.write(lambda c: _record(c, mine, "checkpoint_read", path, purpose="download"))
    return reply({"urls": urls, "expires": expires.isoformat()})


@router.get(_ONE + "/archive", status_code=302, response_class=Response)
async def archive(mine: Mine, run_id: str, kind: str, name: str, request: Request) -> Response:
    """For older clients: a tar of the adapter. 302 to where it lies, 503 while it is being made."""
    path = checkpoints.path_of(run_id, kind, name)
    prefix = (await mine.readable_checkpoint(path)).object_prefix
    made = await made_artifact(mine, artifacts.ARCHIVE, prefix)
    if made.state == artifacts.FAILED:
        raise NotFound(f"{path}: {made.error}")
    if made.state != artifacts.READY:
        return reply({"detail": "the archive is being made: try again"}, 503)
    urls, expires = await links(mine, request, made.object_prefix)
    (url,) = urls.values()
    await mine.service.write(lambda c: _record(c, mine, "checkpoint_read", path, purpose="archive"))
    headers = {"location": url, "expires": format_datetime(expires, usegmt=True)}
    return Response(status_code=302, headers=headers)


@router.get(
    "/downloads/{name}",
    responses={200: {"content": {"application/octet-stream": {}}}},
    response_class=Response,
)
async def download(service: ServiceOf, name: str, token: Annotated[str, Query(max_length=4096)]) -> Response:
    """A file, for whoever has the address that was made for it."""
    try:
        claims = await service.signer.read(DOWNLOAD, token)
    except InvalidToken as error:
        raise Forbidden(f"this address is not good, or not any more ({error}): ask for a new one") from None
    if claims["name"] != name:
        raise NotFound("there is nothing at this address")
    try:
        size_bytes, pieces = await asyncio.to_thread(service.objects.stream, claims["prefix"], name)
    except Damaged:
        raise NotFound("this file was deleted since") from None
    headers = {
        "content-length": str(size_bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(name)}",
    }
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


async def links(mine: Owner, request: Request, prefix: str) -> tuple[dict[str, str], datetime.datetime]:
    """(an address for every file under `prefix`, until when they are good)."""
    service = mine.service
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=_LINK_SECONDS)
    try:
        urls = await asyncio.to_thread(service.objects.links, prefix, _LINK_SECONDS)
    except Damaged as error:
        raise NotFound(f"the files are gone or damaged: {error}") from None
    here = (service.settings.public_url or str(request.base_url)).rstrip("/")
    for name, url in urls.items():
        if not url:
            token = await service.signer.sign(DOWNLOAD, {"prefix": prefix, "name": name}, _LINK_SECONDS)
            urls[name] = f"{here}/api/v1/downloads/{name}?token={token}"
    return urls, expires


async def made_artifact(mine: Owner, kind: str, subject: str, *, made_since: float = 0.0) -> Any:
    """The artifact, waited for a while if it is being made."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _MAKING_SECONDS
    found: Any = await mine.service.write(
        lambda c: artifacts.want(c, kind, subject, mine.tenant_id, made_since=made_since)
    )
    while found.state == artifacts.WANTED and loop.time() < deadline:
        await asyncio.sleep(0.25)
        found = await mine.service.read(lambda c: artifacts.find(c, kind, subject)) or found
    return found


# -- copies ----------------------------------------------------------------------------------------------


class CopyWeights(Body):
    source_path: str
    destination_project_id: str | None = None
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0, le=2**31 - 1)
    ttl_seconds: TtlSeconds | None = None
    weights_access_token: str | None = None


@router.post("/copy_weights", openapi_extra=takes(CopyWeights))
async def copy_weights(mine: MineToChange, request: Request) -> Response:
    """A checkpoint that one may read becomes one's own, under a run that cannot be trained. Files are
    shared: nothing is copied but their name."""
    body = parse(CopyWeights, await read_body(request, mine.service.settings.max_body_bytes))
    once = request.headers.get("x-idempotency-key", "")
    if len(once) > 200:
        raise InvalidInput("X-Idempotency-Key is longer than 200 characters")
    token = request.headers.get("x-tinker-weights-access-token") or body.weights_access_token
    asked = body.model_dump(exclude={"weights_access_token"})
    if once and (path := await _copied_before(mine, once, asked)):
        return reply({"tinker_path": path})
    source = await mine.readable_checkpoint(body.source_path, token)
    session_id, project_id = await _destination(mine, body)
    run_id = f"{session_id or uuid.uuid4().hex}:train:{body.model_seq_id or 0}"

    def statement(connection: sa.Connection) -> str:
        # First, so that of two that come at once the second waits here for what the first made.
        path = checkpoints.path_of(run_id, source.kind, source.name)
        row = {"tenant_id": mine.tenant_id, "idempotency_key": once or run_id}
        if not insert_if_new(
            connection, copies, {**row, "asked": asked, "path": path, "created_at": time.time()}
        ):
            before = connection.execute(sa.select(copies).filter_by(**row)).one()
            if before.asked == asked:
                return str(before.path)
            raise InvalidInput(f"run {run_id} exists: use the next model_seq_id")
        if session_id is None:
            _finished_session(connection, mine, run_id, project_id)
        if not _run_of_copies(connection, mine, run_id, source):
            raise InvalidInput(f"run {run_id} exists: use the next model_seq_id")
        copied = checkpoints.copy(
            connection, source.path, run_id=run_id, tenant_id=mine.tenant_id, ttl_seconds=body.ttl_seconds
        )
        if copied is None:
            raise NotFound(f"no checkpoint {source.path} any more")
        _record(connection, mine, "checkpoint_copied", path, source_path=source.path)
        return path

    return reply({"tinker_path": await mine.service.write(statement)})


async def _copied_before(mine: Owner, once: str, asked: Json) -> str | None:
    statement = sa.select(copies).where(
        copies.c.tenant_id == mine.tenant_id, copies.c.idempotency_key == once
    )
    before = await mine.service.read(lambda c: c.execute(statement).one_or_none())
    if before is not None and before.asked != asked:
        raise InvalidInput("this X-Idempotency-Key was sent with another copy: make a new one for each")
    return None if before is None else str(before.path)


async def _destination(mine: Owner, body: CopyWeights) -> tuple[str | None, str | None]:
    """(the session that was named, or the project)."""
    if body.session_id is not None:
        if body.model_seq_id is None:
            raise InvalidInput("copy_weights with a session_id needs model_seq_id")
        return (await mine.open_session(body.session_id)).id, None
    if body.destination_project_id is None:
        raise InvalidInput("copy_weights needs destination_project_id, or session_id and model_seq_id")
    return None, (await mine.project(body.destination_project_id)).id


def _finished_session(connection: sa.Connection, mine: Owner, run_id: str, project_id: str | None) -> None:
    values: Json = {
        "tags": [],
        "user_metadata": {},
        "project_id": project_id,
        "member_id": mine.caller.member_id,
    }
    session_id = run_id.split(":")[0]
    identities.create_session(connection, mine.tenant_id, {**values, "id": session_id})
    identities.finish_session(connection, session_id, "success", "made to hold a copy")


def _run_of_copies(connection: sa.Connection, mine: Owner, run_id: str, source: Any) -> bool:
    """False if there is a run of this id."""
    row = {
        "id": run_id,
        "tenant_id": mine.tenant_id,
        "session_id": run_id.split(":")[0],
        "base_model": source.base_model,
        "lora": source.lora,
        "optimizer": source.optimizer,
        "user_metadata": {},
        "created_at": time.time(),
        "epoch": 0,
        "snapshot_seq": -1,
    }
    if not insert_if_new(connection, runs, row):
        return False
    # What is called later fails by it at once, and does not wait for a run that never was.
    error = {
        "error": "this run holds copied weights: create a run from one of them to train it",
        "category": "user",
    }
    created = Operation(run_id, 0, ops.CREATE_MODEL, mine.tenant_id, source.base_model, error=error)
    ops.submit(connection, created)
    return True


async def _own(mine: Owner, run_id: str, kind: str, name: str) -> str:
    return str((await mine.checkpoint(checkpoints.path_of(run_id, kind, name))).path)


async def _publish(mine: Owner, path: str, *, is_public: bool) -> Response:
    def statement(connection: sa.Connection) -> None:
        checkpoints.publish_to_all(connection, path, is_public=is_public)
        _record(connection, mine, "checkpoint_published" if is_public else "checkpoint_unpublished", path)

    await mine.service.write(statement)
    return Response(status_code=204)


def _record(connection: sa.Connection, mine: Owner, event: str, path: str, **details: Any) -> None:
    audit.record(
        connection, mine.tenant_id, "checkpoints", event, mine.signed({"tinker_path": path, **details})
    )
