"""Looking things up: training runs and checkpoints."""

import datetime
import functools
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from tinsmith.errors import NotFound
from tinsmith_api import kinds
from tinsmith_api.bodies import reply
from tinsmith_api.journal import checkpoints, usage
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.tables import checkpoints as saved
from tinsmith_api.journal.tables import operations, runs, sessions
from tinsmith_api.owner import Mine
from tinsmith_api.settings import Settings

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**63 - 1)]  # what databases count to
Scope = Literal["owned", "accessible"]

_PAGE = 1000


@router.get("/training_runs")
async def list_training_runs(
    mine: Mine,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: str | None = None,
    access_scope: Scope = "owned",
) -> Response:
    """Newest first: the caller's own, or everybody's of its organization."""
    where = [runs.c.tenant_id == mine.tenant_id]
    if access_scope == "owned":
        its = sa.select(sessions.c.id).where(sessions.c.member_id == mine.caller.member_id)
        where.append(runs.c.session_id.in_(its))
    if project_id is not None:
        project = await mine.project(project_id)
        in_project = sa.select(sessions.c.id).where(sessions.c.project_id == project.id)
        where.append(runs.c.session_id.in_(in_project))

    def page(connection: sa.Connection) -> tuple[list[Json], int]:
        total = connection.execute(sa.select(sa.func.count()).select_from(runs).where(*where)).scalar_one()
        newest = sa.select(runs).where(*where).order_by(runs.c.created_at.desc(), runs.c.id)
        rows = connection.execute(newest.limit(limit).offset(offset)).all()
        return _training_runs(connection, rows, mine.tenant_id), total

    found, total = await mine.service.read_apart(page)
    return reply({"training_runs": found, "cursor": {"offset": offset, "limit": limit, "total_count": total}})


@router.get("/training_runs/{run_id}")
async def get_training_run(mine: Mine, run_id: str, access_scope: Scope = "owned") -> Response:
    """Of another organization if one of its checkpoints was published; of the run no more than that shows."""
    run = await mine.readable_run(run_id)
    if access_scope == "owned" and run.tenant_id == mine.tenant_id:
        session = await mine.session(run.session_id)
        if session.member_id != mine.caller.member_id:
            raise NotFound(
                f"no run {run_id!r} among yours: with access_scope=accessible your organization's are, too"
            )
    return reply((await mine.service.read_apart(lambda c: _training_runs(c, [run], mine.tenant_id)))[0])


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(
    mine: Mine,
    run_id: str,
    request: Request,
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    offset: Offset = 0,
) -> Response:
    """Newest first; all of them, if no limit is given."""
    run = await mine.readable_run(run_id)
    is_own = run.tenant_id == mine.tenant_id
    find = functools.partial(
        checkpoints.listing,
        tenant_id=run.tenant_id,
        run_id=run.id,
        only_published=not is_own,
        with_exports=_knows_exports(request),
        limit=limit or _PAGE,
    )
    rows, total = await mine.service.read_apart(functools.partial(find, offset=offset))
    cursor = {"offset": offset, "limit": limit or max(total, 1), "total_count": total}
    if limit is not None or offset + len(rows) >= total:
        return reply({"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor})

    async def pieces() -> AsyncIterator[bytes]:
        """Page by page: a run may have more checkpoints than should be in memory at once."""
        page, comma = rows, b""
        yield b'{"cursor":' + to_json(cursor) + b',"checkpoints":['
        while page:
            yield comma + to_json([_checkpoint(row) for row in page])[1:-1]
            comma = b","
            page, _ = await mine.service.read_apart(functools.partial(find, behind=page[-1]))
        yield b"]}"

    return StreamingResponse(pieces(), media_type="application/json")


@router.get("/training_runs/{run_id}/metrics")
async def list_metrics(mine: Mine, run_id: str, after: Offset = 0, limit: Limit = 1000) -> Response:
    """The run's curve: what every pass and step that is done said, in the order of their numbers. `next` is
    the next page's `after`."""
    run = await mine.run(run_id)
    rows = await mine.service.read_apart(lambda c: ops.curve(c, run.id, after_seq=after, limit=limit + 1))
    page = rows[:limit]
    return reply(
        {"rows": [_metrics(row) for row in page], "next": page[-1].seq_id if len(rows) > limit else None}
    )


@router.get("/training_runs/{run_id}/cost")
async def get_cost(mine: Mine, run_id: str) -> Response:
    """What the run used until now. Tokens and dollars include what was sampled from its weights."""
    run = await mine.run(run_id)
    totals, used, stored = await mine.service.read_apart(
        lambda c: (ops.totals(c, run.id), usage.of_run(c, run.id), checkpoints.size_of(c, run.id))
    )
    passes = [row for row in totals if row.kind in (ops.FORWARD, ops.FORWARD_BACKWARD)]
    timed = [row for row in totals if row.compute_seconds is not None]
    return reply(
        {
            "tokens": int(sum(row.tokens for row in passes)),
            "calls": sum(row.calls for row in passes),
            "steps": sum(row.calls for row in totals if row.kind == ops.OPTIM_STEP),
            "queue_seconds": sum(row.queue_seconds for row in timed) if timed else None,
            "compute_seconds": sum(row.compute_seconds for row in timed) if timed else None,
            "storage_bytes": stored,
            "usage": {kind: amount for kind, amount in used.items() if kind in usage.TOKENS},
            "estimated_cost_usd": cost_of(mine.service.settings, run.base_model, used),
        }
    )


@router.get("/checkpoints")
async def list_checkpoints(mine: Mine, request: Request, limit: Limit = 100, offset: Offset = 0) -> Response:
    rows, total = await mine.service.read_apart(
        lambda c: checkpoints.listing(
            c,
            mine.tenant_id,
            member_id=mine.caller.member_id,
            with_exports=_knows_exports(request),
            limit=limit,
            offset=offset,
        )
    )
    return reply(
        {
            "checkpoints": [_checkpoint(row) for row in rows],
            "cursor": {"offset": offset, "limit": limit, "total_count": total},
        }
    )


def _knows_exports(request: Request) -> bool:
    """Official clients before 0.28 refuse a whole page for one checkpoint of a kind that came later."""
    version = re.match(r"0\.(\d{1,3})\.", request.headers.get("x-stainless-package-version", ""))
    return version is None or int(version[1]) >= 28


def _training_runs(connection: sa.Connection, found: Sequence[Any], tenant_id: str) -> list[Json]:
    """As this tenant may see them."""
    ids = [run.id for run in found]
    last_request = {row.id: row.submitted_at for row in connection.execute(_last_requests_of(ids))}
    last = {(row.run_id, row.kind): row for row in connection.execute(_last_checkpoints_of(ids, tenant_id))}
    return [
        _training_run(run, last_request.get(run.id, run.created_at), last, is_own=run.tenant_id == tenant_id)
        for run in found
    ]


def _last_requests_of(run_ids: list[str]) -> sa.Select[Any]:
    """By the highest number: a run has many calls, and an index knows which that is."""
    numbers = sa.select(operations.c.seq_id).where(operations.c.subject == runs.c.id)
    highest = numbers.order_by(operations.c.seq_id.desc()).limit(1).correlate(runs).scalar_subquery()
    of_it = sa.and_(operations.c.subject == runs.c.id, operations.c.seq_id == highest)
    return (
        sa.select(runs.c.id, operations.c.submitted_at).join(operations, of_it).where(runs.c.id.in_(run_ids))
    )


def _last_checkpoints_of(run_ids: list[str], tenant_id: str) -> sa.Select[Any]:
    """The newest of every run and kind that this tenant may see."""
    columns = saved.c
    is_seen = sa.or_(columns.tenant_id == tenant_id, columns.published_at.is_not(None))
    alive = sa.or_(columns.expires_at.is_(None), columns.expires_at > time.time())
    order = sa.func.row_number().over(
        partition_by=(columns.run_id, columns.kind), order_by=(columns.created_at.desc(), columns.path)
    )
    numbered = (
        sa.select(saved, order.label("number"))
        .where(columns.run_id.in_(run_ids), columns.ready_at.is_not(None), columns.listed, is_seen, alive)
        .subquery()
    )
    return sa.select(numbered).where(numbered.c.number == 1)


def _training_run(
    run: Any, last_request_at: float, last: dict[tuple[str, str], Any], *, is_own: bool
) -> Json:
    weights, sampler = last.get((run.id, "weights")), last.get((run.id, "sampler_weights"))
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.tenant_id,
        "corrupted": False,
        **kinds.told(run.lora),
        "last_request_time": timestamp(last_request_at),
        "last_checkpoint": _checkpoint(weights) if weights else None,
        "last_sampler_checkpoint": _checkpoint(sampler) if sampler else None,
        "user_metadata": texts(run.user_metadata) if is_own else {},
    }


def _checkpoint(row: Any) -> Json:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": checkpoints.KINDS[row.kind],
        "time": timestamp(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": row.published_at is not None,
        "user_metadata": texts(row.user_metadata),
        "expires_at": None if row.expires_at is None else timestamp(row.expires_at),
    }


def _metrics(row: Any) -> Json:
    queue = compute = None
    if row.started_at is not None:
        queue, compute = row.started_at - row.submitted_at, row.finished_at - row.started_at
    return {
        "seq_id": row.seq_id,
        "kind": row.kind,
        "time": timestamp(row.finished_at),
        "tokens": row.tokens,
        "queue_seconds": queue,
        "compute_seconds": compute,
        **(row.metrics or {}),
    }


def cost_of(settings: Settings, base_model: str, used: dict[str, int]) -> float | None:
    """US dollars; None if there are no prices for this base model."""
    if base_model not in settings.prices:
        return None
    rates = {kind: settings.price(base_model, kind) for kind in usage.TOKENS}
    return sum((rate or 0.0) * used.get(kind, 0) for kind, rate in rates.items()) / 1e6


def texts(metadata: Json) -> dict[str, str]:
    """Clients accept texts only; a run may have been created with anything."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def timestamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
