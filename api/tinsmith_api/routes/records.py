"""Looking things up: training runs and checkpoints."""

import datetime
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Response

from tinsmith_api.bodies import reply
from tinsmith_api.journal import checkpoints
from tinsmith_api.journal.tables import checkpoints as saved
from tinsmith_api.journal.tables import operations, runs, sessions
from tinsmith_api.owner import Mine

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]
Scope = Literal["owned", "accessible"]


@router.get("/training_runs")
async def list_training_runs(
    mine: Mine,
    limit: Limit = 20,
    offset: Offset = 0,
    project_id: str | None = None,
    access_scope: Scope = "owned",
) -> Response:
    """Newest first. Either scope is the key's tenant: runs are shared with nobody."""
    where = [runs.c.tenant_id == mine.tenant_id]
    if project_id is not None:
        in_project = sa.select(sessions.c.id).where(sessions.c.project_id == project_id)
        where.append(runs.c.session_id.in_(in_project))

    def page(connection: sa.Connection) -> tuple[list[Json], int]:
        total = connection.execute(sa.select(sa.func.count()).select_from(runs).where(*where)).scalar_one()
        newest = sa.select(runs).where(*where).order_by(runs.c.created_at.desc(), runs.c.id)
        rows = connection.execute(newest.limit(limit).offset(offset)).all()
        return _training_runs(connection, rows), total

    found, total = await mine.service.read(page)
    return reply({"training_runs": found, "cursor": {"offset": offset, "limit": limit, "total_count": total}})


@router.get("/training_runs/{run_id}")
async def get_training_run(mine: Mine, run_id: str, access_scope: Scope = "owned") -> Response:
    run = await mine.run(run_id)
    return reply((await mine.service.read(lambda c: _training_runs(c, [run])))[0])


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(mine: Mine, run_id: str) -> Response:
    run = await mine.run(run_id)
    rows, _ = await mine.service.read(
        lambda c: checkpoints.listing(c, mine.tenant_id, run_id=run.id, limit=10_000)
    )
    return reply({"checkpoints": [_checkpoint(row) for row in rows]})


@router.get("/checkpoints")
async def list_checkpoints(mine: Mine, limit: Limit = 100, offset: Offset = 0) -> Response:
    rows, total = await mine.service.read(
        lambda c: checkpoints.listing(c, mine.tenant_id, limit=limit, offset=offset)
    )
    return reply(
        {
            "checkpoints": [_checkpoint(row) for row in rows],
            "cursor": {"offset": offset, "limit": limit, "total_count": total},
        }
    )


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
async def delete_checkpoint(mine: Mine, run_id: str, kind: str, name: str) -> Response:
    checkpoint = await mine.checkpoint(checkpoints.path_of(run_id, kind, name))
    await mine.service.write(lambda c: checkpoints.delete(c, checkpoint.path))
    return Response(status_code=204)


def _training_runs(connection: sa.Connection, found: Sequence[Any]) -> list[Json]:
    ids = [run.id for run in found]
    last_request = dict(
        connection.execute(
            sa.select(operations.c.subject, sa.func.max(operations.c.submitted_at))
            .where(operations.c.subject.in_(ids))
            .group_by(operations.c.subject)
        )
        .tuples()
        .all()
    )
    # Oldest first, so that the newest of a run and kind stays.
    last = {(row.run_id, row.kind): row for row in connection.execute(_checkpoints_of(ids))}
    return [_training_run(run, last_request.get(run.id, run.created_at), last) for run in found]


def _checkpoints_of(run_ids: list[str]) -> sa.Select[Any]:
    columns = saved.c
    alive = sa.or_(columns.expires_at.is_(None), columns.expires_at > time.time())
    return (
        sa.select(saved)
        .where(columns.run_id.in_(run_ids), columns.ready_at.is_not(None), columns.listed, alive)
        .order_by(columns.created_at, columns.path.desc())
    )


def _training_run(run: Any, last_request_at: float, last: dict[tuple[str, str], Any]) -> Json:
    weights, sampler = last.get((run.id, "weights")), last.get((run.id, "sampler_weights"))
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.tenant_id,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora["rank"],
        "last_request_time": _time(last_request_at),
        "last_checkpoint": _checkpoint(weights) if weights else None,
        "last_sampler_checkpoint": _checkpoint(sampler) if sampler else None,
        "user_metadata": _texts(run.user_metadata),
    }


def _checkpoint(row: Any) -> Json:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": checkpoints.KINDS[row.kind],
        "time": _time(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": False,
        "user_metadata": _texts(row.user_metadata),
        "expires_at": None if row.expires_at is None else _time(row.expires_at),
    }


def _texts(metadata: Json) -> dict[str, str]:
    """Clients accept texts only; a run may have been created with anything."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
