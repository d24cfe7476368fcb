"""Custom losses: what a client describes once and trains with by name."""

import json
import time
import uuid
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput, NotFound
from tinsmith.wire import loss_graph
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.bodies import Body, parse, read_body, reply, takes
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.tables import custom_losses
from tinsmith_api.owner import MineToChange, Owner

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

_MAX_LOSSES = 1000  # of a session
_MAX_GRAPH_BYTES = 256 << 10


class CreateCustomLoss(Body):
    session_id: str
    custom_loss_seq_id: int = Field(ge=0, lt=_MAX_LOSSES)
    name: str = Field(max_length=200)
    inputs: list[Json]
    graph: Json


@router.post("/create_custom_loss", openapi_extra=takes(CreateCustomLoss))
async def create_custom_loss(mine: MineToChange, request: Request) -> Response:
    """A loss that forward_backward calls of the same session may be computed with (docs/losses.md)."""
    body = parse(CreateCustomLoss, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    graph = loss_graph.write(body.name, body.inputs, body.graph)
    if len(graph) > _MAX_GRAPH_BYTES:
        raise InvalidInput(
            f"the loss has {len(graph)} bytes, the limit is {_MAX_GRAPH_BYTES}: make it smaller"
        )
    row = {
        "id": uuid.uuid4().hex,
        "tenant_id": mine.tenant_id,
        "session_id": body.session_id,
        "seq_id": body.custom_loss_seq_id,
        "name": body.name,
        "graph": graph,
        "created_at": time.time(),
    }
    return reply({"request_id": await mine.service.write(lambda c: _enter(c, row))})


def _enter(connection: sa.Connection, row: Json) -> str:
    """The future of this loss, which is there already; of the same one that was created before, if it was."""
    created = Operation(
        f"{row['session_id']}:loss:{row['seq_id']}", 0, ops.CREATE_CUSTOM_LOSS, row["tenant_id"], ""
    )
    entered, is_new = ops.submit(connection, created)
    if not is_new:
        its = (custom_losses.c.session_id == row["session_id"], custom_losses.c.seq_id == row["seq_id"])
        before = connection.execute(sa.select(custom_losses.c.graph).where(*its)).scalar_one_or_none()
        if before != row["graph"]:
            raise InvalidInput(
                f"custom loss {row['seq_id']} of this session is another one: use the next number"
            )
        return entered.request_id
    connection.execute(sa.insert(custom_losses).values(row))
    answer = json.dumps({"type": "create_custom_loss", "loss_id": row["id"]}).encode()
    ops.finish(
        connection, entered.request_id, run_id=None, worker_id="", epoch=-1, body=answer, is_replayed=False
    )
    return entered.request_id


async def fill(mine: Owner, run: Any, message: pb.ForwardBackwardRequest) -> None:
    """Put the loss that the call names into the call, so that whoever computes it needs nothing else, now or
    in a replay. InvalidInput if there is no such loss in the run's session."""
    named = dict(message.loss_fn_config_v2)
    if set(named) != {"loss_id"} or named["loss_id"].WhichOneof("value") != "text":
        raise InvalidInput(
            "loss_fn 'custom' needs loss_fn_config {'loss_id': …}, which create_custom_loss gives"
        )
    loss_id = named["loss_id"].text
    try:
        found = await mine.custom_loss(loss_id)
    except NotFound as error:
        raise InvalidInput(str(error)) from None
    if found.session_id != run.session_id:
        raise InvalidInput(f"custom loss {found.name} was created in another session: create it in this one")
    message.custom_loss = found.graph
