"""Batches to train on, in protobuf or, from older clients, in JSON."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, loss_graph
from tinsmith_api import provenance, readings
from tinsmith_api.bodies import Readable, reply
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.owner import MineToChange, Owner
from tinsmith_api.routes import losses
from tinsmith_api.routes.calls import consume, refuse, submit
from tinsmith_api.uploads import READ_APART_BYTES

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]


def _batch_of(member: str, *media_types: str) -> Json:
    """For a route's `openapi_extra`: a batch in JSON, as older clients send it, and in other forms."""
    text: Json = {"type": "string"}
    numbers: Json = {"type": "array", "items": {"type": "number"}}
    tokens: Json = {"type": "array", "items": {"type": "integer"}}
    tensor = _object(
        "data", data=numbers, dtype={"enum": ["int64", "float32"]}, shape=tokens, sparse_crow_indices=tokens,
        sparse_col_indices=tokens,
    )  # fmt: skip
    chunk = _object("tokens", type={"enum": ["encoded_text"]}, tokens=tokens)
    datum = _object(
        *("model_input", "loss_fn_inputs"),
        model_input=_object("chunks", chunks={"type": "array", "items": chunk}),
        loss_fn_inputs={"type": "object", "additionalProperties": tensor},
    )
    batch = _object(
        *("data", "loss_fn"),
        data={"type": "array", "items": datum},
        loss_fn=text,
        loss_fn_config={"type": "object", "additionalProperties": {"type": ["number", "string"]}},
    )
    seq_id = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
    body = _object(*("model_id", "seq_id", member), model_id=text, seq_id=seq_id, **{member: batch})
    others = {name: {"schema": {"type": "string", "format": "binary"}} for name in media_types}
    return {"requestBody": {"required": True, "content": {**others, "application/json": {"schema": body}}}}


def _object(*required: str, **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties}


@router.post("/forward_backward", openapi_extra=_batch_of("forward_backward_input", "application/x-protobuf"))
async def forward_backward(mine: MineToChange, request: Request) -> Response:
    """A ForwardBackwardRequest of tinsmith.proto; or JSON, from older clients."""
    async with mine.receive(request, mine.service.settings.max_forward_backward_bytes) as body:
        if "protobuf" not in request.headers.get("content-type", ""):
            body = await _of_json(mine, body, "forward_backward_input")
        return reply(await _forward_backward(mine, body))


@router.post("/forward", openapi_extra=_batch_of("forward_input"))
async def forward(mine: MineToChange, request: Request) -> Response:
    """Older clients only; newer ones send forward_backward with forward_only."""
    async with mine.receive(request, mine.service.settings.max_forward_backward_bytes) as body:
        return reply(await _forward_backward(mine, await _of_json(mine, body, "forward_input")))


async def _of_json(mine: Owner, body: Readable, member: str) -> bytes:
    try:
        return await mine.read(body, readings.batch_of_json, member=member)
    except readings.InvalidCall as error:
        await consume(mine, error.model_id, error.seq_id, error)
        raise


async def _forward_backward(mine: Owner, body: Readable) -> Json:
    is_large = len(body) > READ_APART_BYTES
    message = datums.parse(await mine.read(body, readings.head) if is_large else body)
    run = await mine.run(message.model_id)
    await mine.open_session(run.session_id)
    if message.seq_id < 1:
        raise InvalidInput("seq_id must be 1 or more")
    facts = await mine.service.facts(run.base_model)
    limits = {"vocab_size": facts.vocab_size, "max_context_length": facts.max_context_length}
    try:
        if message.loss_fn in (provenance.LOSS, loss_graph.LOSS):
            if is_large:
                message = await asyncio.to_thread(datums.parse, body)
            if message.loss_fn == provenance.LOSS:
                await provenance.fill(mine, message)
            else:
                await losses.fill(mine, run, message)
            body = message.SerializeToString()
        if is_large:
            tokens = int(await mine.read(body, readings.tokens, **limits))
        else:
            tokens = datums.read(message, **limits).tokens
    except InvalidInput as error:
        return await refuse(mine, run, message.seq_id, ops.FORWARD_BACKWARD, error)
    return await submit(
        mine,
        Operation(
            run.id,
            message.seq_id,
            ops.FORWARD if message.forward_only else ops.FORWARD_BACKWARD,
            mine.tenant_id,
            run.base_model,
            tokens=tokens,
            payload=bytes(body),
        ),
    )
