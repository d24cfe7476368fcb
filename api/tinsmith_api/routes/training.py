"""Runs: creating them, training them, saving and loading their weights."""

import json
import re
import secrets
import time
import uuid
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput, NotFound
from tinsmith.wire import datums, json_form, loss_graph
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import optimizers, provenance
from tinsmith_api.bodies import (
    Body,
    Metadata,
    Model,
    Strict,
    parse,
    parse_any,
    read_body,
    reply,
    takes,
)
from tinsmith_api.journal import age, checkpoints
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation, insert_if_new
from tinsmith_api.journal.store import Statement
from tinsmith_api.journal.tables import operations, runs, sampling_sessions
from tinsmith_api.owner import Mine, MineToChange, Owner, check_usable
from tinsmith_api.routes import losses
from tinsmith_api.uploads import check_json, check_protobuf

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

# How far ahead of its run's highest number a call may be. Everything between is waited for, and entered
# as missing in the end.
_MAX_AHEAD = 10_000

# No name that anybody may choose.
_INFLIGHT = "~inflight"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@ -]{0,254}")

SeqId = Annotated[int, Field(ge=1, le=2**31 - 1)]
TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]


class LoraConfig(Strict):
    rank: int = 32
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body):
    session_id: str
    model_seq_id: int = Field(ge=0, le=2**31 - 1)
    base_model: str
    lora_config: LoraConfig = LoraConfig()
    user_metadata: Metadata | None = None
    optimizer_config: Json | None = None


@router.post("/create_model", openapi_extra=takes(CreateModel))
async def create_model(mine: MineToChange, request: Request) -> Response:
    body = parse(CreateModel, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    optimizer = optimizers.chosen(body.optimizer_config) or optimizers.NAMES[0]
    facts = await mine.service.facts(body.base_model)
    given = body.lora_config
    if not 1 <= given.rank <= facts.max_rank:
        raise InvalidInput(f"lora_config.rank is {given.rank}: it must be between 1 and {facts.max_rank}")
    if not (given.train_attn or given.train_mlp or given.train_unembed):
        raise InvalidInput("lora_config trains nothing: set train_attn, train_mlp or train_unembed")
    # A seed is fixed here, so that a replay makes the same adapter.
    lora = {**given.model_dump(), "seed": secrets.randbits(48) if given.seed is None else given.seed}
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    made = {"base_model": body.base_model, "lora": lora, "optimizer": optimizer}
    return reply(await _create(mine, run_id, body.session_id, made, body.user_metadata, {}))


class LoadWeights(Body):
    path: str
    optimizer: bool = False
    session_id: str | None = None
    model_seq_id: int | None = Field(None, ge=0, le=2**31 - 1)
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: Json | None = None
    model_id: str | None = None
    seq_id: SeqId | None = None
    weights_access_token: str | None = None


@router.post("/load_weights", openapi_extra=takes(LoadWeights))
async def load_weights(mine: MineToChange, request: Request) -> Response:
    """Into a run (model_id, seq_id), or as a new run (session_id, model_seq_id)."""
    raw = await read_body(request, mine.service.settings.max_body_bytes)
    body = await _parse_call(mine, LoadWeights, raw)
    if body.session_id is None:
        if body.model_id is None or body.seq_id is None:
            raise InvalidInput("load_weights needs model_id and seq_id, or session_id and model_seq_id")
        run = await mine.run(body.model_id)
        try:
            checkpoint = await mine.readable_checkpoint(body.path, body.weights_access_token)
            payload = _load(checkpoint, run.base_model, run.optimizer, body.optimizer)
        except (InvalidInput, NotFound) as error:
            return reply(await _refuse(mine, run, body.seq_id, ops.LOAD_WEIGHTS, error))
        return reply(await _call(mine, run, body.seq_id, ops.LOAD_WEIGHTS, payload))
    if body.model_seq_id is None:
        raise InvalidInput("load_weights with a session_id needs model_seq_id")
    await mine.open_session(body.session_id)
    checkpoint = await mine.readable_checkpoint(body.path, body.weights_access_token)
    base_model = body.base_model or checkpoint.base_model
    # With its optimizer's state comes the optimizer itself; without, a new run is trained as any other.
    inherited = checkpoint.optimizer if body.optimizer else optimizers.NAMES[0]
    optimizer = optimizers.chosen(body.optimizer_config) or inherited
    payload = _load(checkpoint, base_model, optimizer, body.optimizer)
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    made = {"base_model": base_model, "lora": checkpoint.lora, "optimizer": optimizer}
    return reply(await _create(mine, run_id, body.session_id, made, body.user_metadata, payload))


class GetInfo(Body):
    model_id: str


@router.post("/get_info", openapi_extra=takes(GetInfo))
async def get_info(mine: Mine, request: Request) -> Response:
    body = parse(GetInfo, await read_body(request, mine.service.settings.max_body_bytes))
    run = await mine.run(body.model_id)
    facts = await mine.service.facts(run.base_model)
    return reply(
        {
            "type": "get_info",
            "model_id": run.id,
            "model_name": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora["rank"],
            "optimizer_config": {"type": run.optimizer},
            "model_data": {
                "model_name": run.base_model,
                "arch": facts.architecture,
                "tokenizer_id": facts.tokenizer or run.base_model,
            },
        }
    )


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
            return reply(await _forward_backward_json(mine, body, "forward_backward_input"))
        message = await mine.in_turn(len(body), lambda: _parse_protobuf(body))
        return reply(await _forward_backward(mine, message, body))


@router.post("/forward", openapi_extra=_batch_of("forward_input"))
async def forward(mine: MineToChange, request: Request) -> Response:
    """Older clients only; newer ones send forward_backward with forward_only."""
    async with mine.receive(request, mine.service.settings.max_forward_backward_bytes) as body:
        return reply(await _forward_backward_json(mine, body, "forward_input"))


class OptimStep(Body):
    model_id: str
    seq_id: SeqId
    adam_params: optimizers.Adam | None = None
    optimizer_params: Json | None = None


@router.post("/optim_step", openapi_extra=takes(OptimStep))
async def optim_step(mine: MineToChange, request: Request) -> Response:
    body = await _parse_call(mine, OptimStep, await read_body(request, mine.service.settings.max_body_bytes))
    run = await mine.run(body.model_id)
    try:
        params = optimizers.step_params(run.optimizer, body.adam_params, body.optimizer_params)
    except InvalidInput as error:
        return reply(await _refuse(mine, run, body.seq_id, ops.OPTIM_STEP, error))
    return reply(await _call(mine, run, body.seq_id, ops.OPTIM_STEP, params))


class SaveWeights(Body):
    model_id: str
    seq_id: SeqId
    path: str | None = None
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


@router.post("/save_weights", openapi_extra=takes(SaveWeights))
async def save_weights(mine: MineToChange, request: Request) -> Response:
    body = await _parse_call(
        mine, SaveWeights, await read_body(request, mine.service.settings.max_body_bytes)
    )
    name = body.path if body.path is not None else f"checkpoint-{body.seq_id:06d}"
    return reply(await _save(mine, ops.SAVE_WEIGHTS, "weights", body, name))


class SaveWeightsForSampler(SaveWeights):
    kind: Literal["snapshot", "inflight"] = "snapshot"
    sampling_session_seq_id: int | None = Field(None, ge=0, le=2**31 - 1)


@router.post("/save_weights_for_sampler", openapi_extra=takes(SaveWeightsForSampler))
async def save_weights_for_sampler(mine: MineToChange, request: Request) -> Response:
    """Named: a checkpoint to sample from later. Unnamed: a sampling session on these weights, at once; of
    kind inflight, on these or what its run saves so later."""
    raw = await read_body(request, mine.service.settings.max_body_bytes)
    body = await _parse_call(mine, SaveWeightsForSampler, raw)
    run = await mine.run(body.model_id)
    kind = ops.SAVE_WEIGHTS_FOR_SAMPLER
    if body.path is not None:
        if body.kind == "inflight":
            error = InvalidInput("kind 'inflight' has no path: its weights are replaced by the next ones")
            return reply(await _refuse(mine, run, body.seq_id, kind, error))
        return reply(await _save(mine, kind, "sampler_weights", body, body.path))
    if body.sampling_session_seq_id is None:
        error = InvalidInput("save_weights_for_sampler needs a path or a sampling_session_seq_id")
        return reply(await _refuse(mine, run, body.seq_id, kind, error))
    extra: Json = {
        "sampling_session_id": f"{run.session_id}:sample:{body.sampling_session_seq_id}",
        "session_id": run.session_id,
    }
    name = f"unnamed-{body.seq_id:06d}"
    if body.kind == "inflight":
        # All such samplers of the run have what was saved last: one checkpoint, written over and over.
        name, extra["follows"], body.overwrite = _INFLIGHT, True, True
    return reply(await _save(mine, kind, "sampler_weights", body, name, extra))


class SaveWeightsExternal(SaveWeights):
    path: str
    age_encryption_recipients: list[Annotated[str, Field(max_length=10_000)]] | None = Field(
        None, max_length=10
    )


@router.post("/save_weights_external", openapi_extra=takes(SaveWeightsExternal))
async def save_weights_external(mine: MineToChange, request: Request) -> Response:
    """Weights in PEFT's form, to be downloaded; encrypted, if age recipients are given."""
    raw = await read_body(request, mine.service.settings.max_body_bytes)
    body = await _parse_call(mine, SaveWeightsExternal, raw)
    recipients = body.age_encryption_recipients or []
    kind = ops.SAVE_WEIGHTS_EXTERNAL
    try:
        age.read_recipients(recipients)
    except InvalidInput as error:
        return reply(await _refuse(mine, await mine.run(body.model_id), body.seq_id, kind, error))
    extra = {"age_encryption_recipients": recipients}
    return reply(await _save(mine, kind, "external_weights", body, body.path, extra))


class WeightsInfo(Body):
    tinker_path: str


@router.post("/weights_info", openapi_extra=takes(WeightsInfo))
async def weights_info(mine: Mine, request: Request) -> Response:
    body = parse(WeightsInfo, await read_body(request, mine.service.settings.max_body_bytes))
    checkpoint = await mine.readable_checkpoint(body.tinker_path)
    lora = checkpoint.lora
    return reply(
        {
            "base_model": checkpoint.base_model,
            "is_lora": True,
            "lora_rank": lora["rank"],
            "train_unembed": lora["train_unembed"],
            "train_mlp": lora["train_mlp"],
            "train_attn": lora["train_attn"],
            "optimizer_config": {"type": checkpoint.optimizer},
        }
    )


# -- submitting ------------------------------------------------------------------------------------------


async def _parse_call(mine: Owner, model: type[Model], raw: bytes) -> Model:
    """As `parse`; but a call of a run that is refused here still counts as that run's number, or every
    later call of the run would wait for it."""
    try:
        return parse(model, raw)
    except InvalidInput as error:
        given = parse_any(raw)
        if isinstance(given, dict):
            await _consume(mine, given.get("model_id"), given.get("seq_id"), error)
        raise


async def _consume(mine: Owner, run_id: object, seq_id: object, error: Exception) -> None:
    if isinstance(run_id, str) and isinstance(seq_id, int) and 1 <= seq_id < 2**31:
        await _refuse(mine, await mine.run(run_id), seq_id, "refused", error)


async def _refuse(mine: Owner, run: Any, seq_id: int, kind: str, error: Exception) -> Json:
    """Accept the call and fail it: its number is consumed, its future says what was wrong."""
    return await _submit(
        mine,
        Operation(
            run.id,
            seq_id,
            kind,
            mine.tenant_id,
            run.base_model,
            error={"error": str(error), "category": "user"},
        ),
    )


async def _call(mine: Owner, run: Any, seq_id: int, kind: str, payload: Json) -> Json:
    await mine.open_session(run.session_id)
    operation = Operation(
        run.id, seq_id, kind, mine.tenant_id, run.base_model, payload=json.dumps(payload).encode()
    )
    return await _submit(mine, operation)


async def _submit(mine: Owner, operation: Operation, also: Statement[Json | None] = lambda _: None) -> Json:
    """Submit a call of a run; InvalidInput, and nothing is consumed, if its number is far from the others."""
    if operation.seq_id > _MAX_AHEAD:  # rare, and else not worth a look into the journal
        highest = await mine.service.read(lambda c: _highest(c, operation.subject))
        if operation.seq_id > highest + _MAX_AHEAD:
            raise InvalidInput(
                f"seq_id {operation.seq_id} is more than {_MAX_AHEAD} above this run's highest, {highest}: "
                "number the calls of a run one by one"
            )
    return await mine.submit(operation, also)


def _highest(connection: sa.Connection, run_id: str) -> int:
    statement = sa.select(sa.func.max(operations.c.seq_id)).where(operations.c.subject == run_id)
    highest: int | None = connection.execute(statement).scalar_one()
    return highest or 0


async def _create(
    mine: Owner, run_id: str, session_id: str, made: Json, user_metadata: Json | None, payload: Json
) -> Json:
    """A run and its operation number 0. `made`: of which base_model, lora and optimizer."""

    def insert_run(connection: sa.Connection) -> None:
        row = {
            "id": run_id,
            "tenant_id": mine.tenant_id,
            "session_id": session_id,
            **made,
            "user_metadata": user_metadata or {},
            "created_at": time.time(),
            "epoch": 0,
            "snapshot_seq": -1,
        }
        insert_if_new(connection, runs, row)

    operation = Operation(
        run_id,
        0,
        ops.CREATE_MODEL,
        mine.tenant_id,
        made["base_model"],
        answer={"model_id": run_id},
        payload=json.dumps(payload).encode(),
    )
    return await mine.submit(operation, insert_run)


def _parse_protobuf(body: bytes) -> pb.ForwardBackwardRequest:
    check_protobuf(body, pb.ForwardBackwardRequest)
    return datums.parse(body)


async def _forward_backward_json(mine: Owner, body: bytes, member: str) -> Json:
    check_json(body)
    given = await mine.in_turn(len(body), lambda: parse_any(body))
    try:
        message = await mine.in_turn(len(body), lambda: json_form.read_request(given, member))
    except InvalidInput as error:
        if isinstance(given, dict):
            await _consume(mine, given.get("model_id"), given.get("seq_id"), error)
        raise
    return await _forward_backward(mine, message, message.SerializeToString())


async def _forward_backward(mine: Owner, message: pb.ForwardBackwardRequest, body: bytes) -> Json:
    run = await mine.run(message.model_id)
    await mine.open_session(run.session_id)
    if message.seq_id < 1:
        raise InvalidInput("seq_id must be 1 or more")
    facts = await mine.service.facts(run.base_model)

    def count_tokens() -> int:
        return datums.read(
            message, vocab_size=facts.vocab_size, max_context_length=facts.max_context_length
        ).tokens

    try:
        if message.loss_fn == provenance.LOSS:
            await provenance.fill(mine, message)
            body = message.SerializeToString()
        if message.loss_fn == loss_graph.LOSS:
            await losses.fill(mine, run, message)
            body = message.SerializeToString()
        tokens = await mine.in_turn(len(body), count_tokens)
    except InvalidInput as error:
        return await _refuse(mine, run, message.seq_id, ops.FORWARD_BACKWARD, error)
    return await _submit(
        mine,
        Operation(
            run.id,
            message.seq_id,
            ops.FORWARD if message.forward_only else ops.FORWARD_BACKWARD,
            mine.tenant_id,
            run.base_model,
            tokens=tokens,
            payload=body,
        ),
    )


def _load(checkpoint: Any, base_model: str, optimizer: str, with_optimizer: bool) -> Json:
    """The payload that loads a checkpoint into a run of `base_model` that is trained with `optimizer`."""
    path = checkpoint.path
    check_usable(checkpoint)
    if checkpoint.base_model != base_model:
        raise InvalidInput(f"{path} was trained on {checkpoint.base_model}, not on {base_model}")
    if with_optimizer and checkpoint.kind != "weights":
        raise InvalidInput(
            f"{path} holds no optimizer state: load it with optimizer=false, or save with save_state"
        )
    if with_optimizer and checkpoint.optimizer != optimizer:
        raise InvalidInput(
            f"{path} was trained with {checkpoint.optimizer}, this run with {optimizer}: load it with "
            "optimizer=false"
        )
    return {"path": path, "optimizer": with_optimizer, "object_prefix": checkpoint.object_prefix}


async def _save(
    mine: Owner,
    operation_kind: str,
    kind: str,
    body: SaveWeights,
    name: str,
    extra: Json | None = None,
) -> Json:
    run = await mine.run(body.model_id)
    if not _NAME.fullmatch(name) and not (extra or {}).get("follows"):
        error = InvalidInput(
            f"{name!r} cannot name a checkpoint: use at most 255 letters, digits and "
            ". _ - = + @, a letter or digit first, no slash"
        )
        return await _refuse(mine, run, body.seq_id, operation_kind, error)
    path = checkpoints.path_of(run.id, kind, name)
    sampler_id = (extra or {}).get("sampling_session_id")
    request_id = uuid.uuid4().hex
    payload = {
        "path": path,
        "kind": kind,
        "name": name,
        "object_prefix": checkpoints.prefix_of(mine.tenant_id, run.id, request_id),
        "ttl_seconds": body.ttl_seconds,
        "user_metadata": body.user_metadata,
        **(extra or {}),
    }
    reservation = {
        "path": path,
        "run_id": run.id,
        "tenant_id": mine.tenant_id,
        "kind": kind,
        "name": name,
        "request_id": request_id,
        "listed": sampler_id is None,
        "object_prefix": payload["object_prefix"],
        "lora": run.lora,
        "user_metadata": body.user_metadata or {},
    }
    taken = {
        "error": f"{path} exists: choose another name, or save with overwrite=true",
        "category": "user",
    }

    def reserve(connection: sa.Connection) -> Json | None:
        if sampler_id and _is_sampler(connection, sampler_id):
            return {
                "error": f"sampling session {sampler_id} exists: use the next number",
                "category": "user",
            }
        return None if checkpoints.reserve(connection, reservation) or body.overwrite else taken

    await mine.open_session(run.session_id)
    operation = Operation(
        run.id,
        body.seq_id,
        operation_kind,
        mine.tenant_id,
        run.base_model,
        request_id=request_id,
        payload=json.dumps(payload).encode(),
    )
    return await _submit(mine, operation, reserve)


def _is_sampler(connection: sa.Connection, sampler_id: str) -> bool:
    statement = sa.select(sampling_sessions.c.id).where(sampling_sessions.c.id == sampler_id)
    return connection.execute(statement).one_or_none() is not None
