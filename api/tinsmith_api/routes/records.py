"""Looking things up: training runs and checkpoints."""

import datetime
import json
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Response

from tinsmith_api.bodies import reply
from tinsmith_api.journal import checkpoints
from tinsmith_api.journal.tables import operations, runs
from tinsmith_api.owner import Mine

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]
Scope = Literal["owned", "accessible"]


@router.get("/training_runs")
async def list_training_runs(
    mine: Mine, limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned"
) -> Response:
    def page(connection: sa.Connection) -> tuple[list[Json], int]:
        mine_only = runs.c.tenant_id == mine.tenant_id
        total = connection.execute(sa.select(sa.func.count()).select_from(runs).where(mine_only)).scalar_one()
        rows = connection.execute(
            sa.select(runs).where(mine_only).order_by(runs.c.created_at.desc()).limit(limit).offset(offset)
        ).all()
        return [_training_run(connection, row) for row in rows], total

    found, total = await mine.service.read(page)
    return reply({"training_runs": found, "cursor": {"offset": offset, "limit": limit, "total_count": total}})


@router.get("/training_runs/{run_id}")
async def get_training_run(mine: Mine, run_id: str, access_scope: Scope = "owned") -> Response:
    run = await mine.run(run_id)
    return reply(await mine.service.read(lambda c: _training_run(c, run)))


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


def _training_run(connection: sa.Connection, run: Any) -> Json:
    last_request = connection.execute(
        sa.select(sa.func.max(operations.c.submitted_at)).where(operations.c.subject == run.id)
    ).scalar_one()
    saved, _ = checkpoints.listing(connection, run.tenant_id, run_id=run.id, limit=10_000)
    last = {kind: next((row for row in saved if row.kind == kind), None) for kind in checkpoints.KINDS}
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.tenant_id,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora["rank"],
        "last_request_time": _time(last_request or run.created_at),
        "last_checkpoint": _checkpoint(last["weights"]) if last["weights"] else None,
        "last_sampler_checkpoint": (
            _checkpoint(last["sampler_weights"]) if last["sampler_weights"] else None
        ),
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
