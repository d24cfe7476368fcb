"""Sessions: finding them, moving them between projects, and their traces."""

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import AwareDatetime, Field

from tinsmith.errors import InvalidInput, NotFound
from tinsmith_api.bodies import Strict, parse, read_body, reply, takes
from tinsmith_api.journal import artifacts, audit, identities
from tinsmith_api.journal.tables import checkpoints, runs, sampling_sessions, sessions
from tinsmith_api.owner import Mine, MineToChange, Owner, urn_of
from tinsmith_api.routes.records import Limit, Offset, Scope, texts, timestamp
from tinsmith_api.routes.weights import links, made_artifact

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]
Short = Annotated[str, Field(min_length=1, max_length=1000)]

# A trace that was made within this time is as good as a new one.
_TRACE_SECONDS = 60.0


@router.get("/sessions")
async def list_sessions(
    mine: Mine, limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned"
) -> Response:
    """Ids, newest first: the caller's own, or everybody's of its organization."""
    where = [sessions.c.tenant_id == mine.tenant_id]
    if access_scope == "owned":
        where.append(sessions.c.member_id == mine.caller.member_id)
    page = sa.select(sessions.c.id).where(*where).order_by(sessions.c.created_at.desc(), sessions.c.id)
    found = await mine.service.read_apart(
        lambda c: list(c.execute(page.limit(limit).offset(offset)).scalars())
    )
    return reply({"sessions": found})


@router.get("/sessions/{session_id}")
async def get_session(mine: Mine, session_id: str, access_scope: Scope = "owned") -> Response:
    session = await mine.session(session_id)
    if access_scope == "owned" and session.member_id != mine.caller.member_id:
        raise NotFound(
            f"no session {session_id!r} among yours: with access_scope=accessible your organization's"
        )

    def its(table: sa.Table) -> sa.Select[Any]:
        return sa.select(table.c.id).where(table.c.session_id == session.id).order_by(table.c.created_at)

    run_ids, sampler_ids = await mine.service.read_apart(
        lambda c: [list(c.execute(its(table)).scalars()) for table in (runs, sampling_sessions)]
    )
    return reply(
        {
            "training_run_ids": run_ids,
            "sampler_ids": sampler_ids,
            "user_metadata": texts(session.user_metadata),
            "display_name": session.display_name,
        }
    )


class AssignProject(Strict):
    project_id: Short


@router.put("/sessions/{session_id}/project", status_code=204, openapi_extra=takes(AssignProject))
async def assign_project(mine: MineToChange, session_id: str, request: Request) -> Response:
    """By id or name. What the session used before goes with it."""
    body = parse(AssignProject, await read_body(request, mine.service.settings.max_body_bytes))
    session = await mine.session(session_id)
    project = await mine.project(body.project_id)

    def statement(connection: sa.Connection) -> None:
        update = sa.update(sessions).where(sessions.c.id == session.id)
        connection.execute(update.values(project_id=project.id))
        details = mine.signed({"session_id": session.id, "project_id": project.id})
        audit.record(connection, mine.tenant_id, "projects", "session_assigned", details)

    await mine.service.write(statement)
    mine.forget_session(session_id)
    for project_id in (session.project_id, project.id):
        mine.service.limits.forget_totals(project_id)
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export")
async def trace_export(mine: Mine, session_id: str, request: Request) -> Response:
    """A trace of the session for Perfetto (https://ui.perfetto.dev), made when it is asked for."""
    session = await mine.session(session_id)
    made_since = time.time() - _TRACE_SECONDS
    if session.finished_at is not None:
        made_since = min(made_since, session.finished_at + _TRACE_SECONDS)
    made = await made_artifact(mine, artifacts.TRACE, session.id, made_since=made_since)
    if made.state == artifacts.FAILED:
        return reply({"status": "failed", "error": made.error})
    if made.state != artifacts.READY:
        return reply({"status": "pending"})
    urls, _ = await links(mine, request, made.object_prefix)
    (url,) = urls.values()
    return reply({"status": "ready", "url": url})


# -- search ----------------------------------------------------------------------------------------------


class Owners(Strict):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Short] | None = Field(None, min_length=1, max_length=10)


class Status(Strict):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = Field(None, min_length=1)


class Cursor(Strict):
    last_created_at: AwareDatetime
    last_session_id: Short


class Search(Strict):
    session_id: Short | None = None
    project_ids: list[Short] | None = Field(None, max_length=100)
    user_metadata: dict[Short, Annotated[str, Field(max_length=1000)]] = Field({}, max_length=20)
    display_name: Short | None = None
    owner: Owners = Owners()
    statuses: list[Status] | None = Field(None, min_length=1, max_length=20)
    limit: int = Field(50, ge=1, le=200)
    cursor: Cursor | None = None


@router.post("/sessions/search", openapi_extra=takes(Search))
async def search_sessions(mine: Mine, request: Request) -> Response:
    """Newest first. Whatever is given must hold; of session_id and display_name either."""
    body = parse(Search, await read_body(request, mine.service.settings.max_body_bytes))
    where = [sessions.c.tenant_id == mine.tenant_id, *_whose(mine, body.owner)]
    if body.project_ids is not None:
        ids = [(await mine.project(project_id)).id for project_id in body.project_ids]
        where.append(sessions.c.project_id.in_(ids))
    if named := _named(body):
        where.append(sa.or_(*named))
    where += [_has(key, value) for key, value in body.user_metadata.items()]
    if body.statuses is not None:
        where.append(sa.or_(*map(_in_status, body.statuses)))
    if body.cursor is not None:
        # By the session, not by its time: that was rounded on its way.
        last = await mine.session(body.cursor.last_session_id)
        older = sessions.c.created_at < last.created_at
        where.append(
            sa.or_(older, sa.and_(sessions.c.created_at == last.created_at, sessions.c.id > last.id))
        )
    found = await mine.service.read_apart(lambda c: _page(c, where, body.limit + 1))
    page = found[: body.limit]
    answer: Json = {"sessions": [_summary(row) for row in page]}
    if len(found) > body.limit:
        answer["next_cursor"] = {
            "last_created_at": timestamp(page[-1].created_at),
            "last_session_id": page[-1].id,
        }
    return reply(answer)


def _whose(mine: Owner, owner: Owners) -> list[sa.ColumnElement[bool]]:
    if owner.type == "accessible":
        return []
    if owner.type == "own":
        return [sessions.c.member_id == mine.caller.member_id]
    if owner.owner_urns is None:
        raise InvalidInput("owner of type user needs owner_urns")
    prefix = urn_of("")
    return [sessions.c.member_id.in_([urn.removeprefix(prefix) for urn in owner.owner_urns])]


def _named(body: Search) -> list[sa.ColumnElement[bool]]:
    named = []
    if body.session_id is not None:
        named.append(sessions.c.id == body.session_id)
    if body.display_name is not None:
        words = body.display_name.split()
        named.append(
            sa.and_(sa.true(), *(sessions.c.display_name.icontains(word, autoescape=True) for word in words))
        )
    return named


def _has(key: str, value: str) -> sa.ColumnElement[bool]:
    if '"' in key or "\\" in key:
        raise InvalidInput(f"user_metadata: a key with quotes or backslashes cannot be searched for: {key!r}")
    # SQLite looks for a key as it is written in JSON, PostgreSQL as it is read. One keeps a number a number.
    names = {key, json.dumps(key)[1:-1]}
    found = [sa.cast(sessions.c.user_metadata[name].as_string(), sa.String) == value for name in names]
    return sa.or_(*found)


def _in_status(status: Status) -> sa.ColumnElement[bool]:
    reason = sessions.c.finish_reason
    if status.type == "active":
        return sessions.c.finished_at.is_(None)
    if status.type == "cancelled":
        return reason == identities.CANCELLED
    if status.type == "client_finished":
        return reason.in_(status.reasons or ["success", "errored", "interrupted"])
    return sa.false()  # a failing call does not end its session here


def _page(connection: sa.Connection, where: list[sa.ColumnElement[bool]], limit: int) -> Sequence[Any]:
    kept = (
        sa.select(
            runs.c.session_id,
            sa.func.count().label("checkpoints_count"),
            sa.func.sum(checkpoints.c.size_bytes).label("storage_bytes"),
        )
        .join_from(checkpoints, runs, runs.c.id == checkpoints.c.run_id)
        .where(checkpoints.c.ready_at.is_not(None), checkpoints.c.listed)
        .group_by(runs.c.session_id)
    )
    page = (
        sa.select(sessions).where(*where).order_by(sessions.c.created_at.desc(), sessions.c.id).limit(limit)
    ).subquery()
    counts = kept.where(runs.c.session_id.in_(sa.select(page.c.id))).subquery()
    statement = sa.select(page, counts.c.checkpoints_count, counts.c.storage_bytes).join_from(
        page, counts, counts.c.session_id == page.c.id, isouter=True
    )
    return connection.execute(statement.order_by(page.c.created_at.desc(), page.c.id)).all()


def _summary(row: Any) -> Json:
    return {
        "session_id": row.id,
        "created_at": timestamp(row.created_at),
        "owner": urn_of(row.member_id or ""),
        "project_id": row.project_id or "",
        "status": _status(row),
        "checkpoints_count": row.checkpoints_count or 0,
        "checkpoint_storage_bytes": int(row.storage_bytes or 0),
        "display_name": row.display_name,
        "user_metadata": texts(row.user_metadata),
    }


def _status(row: Any) -> Json:
    if row.finished_at is None:
        return {"type": "active"}
    if row.finish_reason == identities.CANCELLED:
        return {"type": "cancelled", "detail": row.finish_detail}
    return {
        "type": "client_finished",
        "reason": {"type": row.finish_reason},
        "detail": row.finish_detail,
    }
