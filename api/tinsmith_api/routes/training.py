"""Runs: creating them, training them, saving and loading their weights."""

import json
import re
import time
import uuid
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput, NotFound
from tinsmith_api import kinds, optimizers
from tinsmith_api.bodies import (
    Body,
    Metadata,
    parse,
    read_body,
    reply,
    takes,
)
from tinsmith_api.journal import age, checkpoints, leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation, insert_if_new
from tinsmith_api.journal.tables import runs, sampling_sessions
from tinsmith_api.kinds import LoraConfig, TuningConfig
from tinsmith_api.limits import TooMany
from tinsmith_api.owner import Mine, MineToChange, Owner, check_usable
from tinsmith_api.routes.calls import SeqId, call, parse_call, refuse, submit
from tinsmith_api.service import Facts

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

# No name that anybody may choose.
_INFLIGHT = "~inflight"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@ -]{0,254}")

TtlSeconds = Annotated[int, Field(ge=3600, le=10 * 366 * 86400)]


class CreateModel(Body):
    session_id: str
    model_seq_id: int = Field(ge=0, le=2**31 - 1)
    base_model: str
    lora_config: LoraConfig | None = None
    tuning_config: TuningConfig | None = None
    user_metadata: Metadata | None = None
    optimizer_config: Json | None = None


@router.post("/create_model", openapi_extra=takes(CreateModel))
async def create_model(mine: MineToChange, request: Request) -> Response:
    body = parse(CreateModel, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    optimizer = optimizers.chosen(body.optimizer_config) or optimizers.NAMES[0]
    facts = await mine.service.facts(body.base_model)
    if body.tuning_config is None:
        lora = kinds.of_lora(body.lora_config or LoraConfig(), body.base_model, facts)
    elif body.lora_config is None:
        lora = kinds.of_method(body.tuning_config, body.base_model, facts)
    else:
        raise InvalidInput("a run is of one kind: give lora_config or tuning_config, not both")
    kinds.check_optimizer(lora, optimizer)
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    made = {"base_model": body.base_model, "lora": lora, "optimizer": optimizer}
    return reply(await _create(mine, run_id, body.session_id, made, body.user_metadata, {}, facts))


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
    body = await parse_call(mine, LoadWeights, raw)
    if body.session_id is None:
        if body.model_id is None or body.seq_id is None:
            raise InvalidInput("load_weights needs model_id and seq_id, or session_id and model_seq_id")
        run = await mine.run(body.model_id)
        try:
            checkpoint = await mine.readable_checkpoint(body.path, body.weights_access_token)
            payload = _load(checkpoint, run.base_model, run.optimizer, body.optimizer)
        except (InvalidInput, NotFound) as error:
            return reply(await refuse(mine, run, body.seq_id, ops.LOAD_WEIGHTS, error))
        return reply(await call(mine, run, body.seq_id, ops.LOAD_WEIGHTS, payload))
    if body.model_seq_id is None:
        raise InvalidInput("load_weights with a session_id needs model_seq_id")
    await mine.open_session(body.session_id)
    checkpoint = await mine.readable_checkpoint(body.path, body.weights_access_token)
    base_model = body.base_model or checkpoint.base_model
    # With its optimizer's state comes the optimizer itself; without, a new run is trained as any other.
    inherited = checkpoint.optimizer if body.optimizer else optimizers.NAMES[0]
    optimizer = optimizers.chosen(body.optimizer_config) or inherited
    payload = _load(checkpoint, base_model, optimizer, body.optimizer)
    facts = await mine.service.facts(base_model)
    kinds.check(checkpoint.lora, base_model, facts)
    kinds.check_optimizer(checkpoint.lora, optimizer)
    run_id = f"{body.session_id}:train:{body.model_seq_id}"
    made = {"base_model": base_model, "lora": checkpoint.lora, "optimizer": optimizer}
    return reply(await _create(mine, run_id, body.session_id, made, body.user_metadata, payload, facts))


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
            **kinds.told(run.lora),
            "optimizer_config": {"type": run.optimizer},
            "model_data": {
                "model_name": run.base_model,
                "arch": facts.architecture,
                "tokenizer_id": facts.tokenizer or run.base_model,
            },
        }
    )


class OptimStep(Body):
    model_id: str
    seq_id: SeqId
    adam_params: optimizers.Adam | None = None
    optimizer_params: Json | None = None


@router.post("/optim_step", openapi_extra=takes(OptimStep))
async def optim_step(mine: MineToChange, request: Request) -> Response:
    body = await parse_call(mine, OptimStep, await read_body(request, mine.service.settings.max_body_bytes))
    run = await mine.run(body.model_id)
    try:
        params = optimizers.step_params(run.optimizer, body.adam_params, body.optimizer_params)
    except InvalidInput as error:
        return reply(await refuse(mine, run, body.seq_id, ops.OPTIM_STEP, error))
    return reply(await call(mine, run, body.seq_id, ops.OPTIM_STEP, params))


class SaveWeights(Body):
    model_id: str
    seq_id: SeqId
    path: str | None = None
    ttl_seconds: TtlSeconds | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


@router.post("/save_weights", openapi_extra=takes(SaveWeights))
async def save_weights(mine: MineToChange, request: Request) -> Response:
    body = await parse_call(mine, SaveWeights, await read_body(request, mine.service.settings.max_body_bytes))
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
    body = await parse_call(mine, SaveWeightsForSampler, raw)
    run = await mine.run(body.model_id)
    kind = ops.SAVE_WEIGHTS_FOR_SAMPLER
    if body.path is not None:
        if body.kind == "inflight":
            error = InvalidInput("kind 'inflight' has no path: its weights are replaced by the next ones")
            return reply(await refuse(mine, run, body.seq_id, kind, error))
        return reply(await _save(mine, kind, "sampler_weights", body, body.path))
    if body.sampling_session_seq_id is None:
        error = InvalidInput("save_weights_for_sampler needs a path or a sampling_session_seq_id")
        return reply(await refuse(mine, run, body.seq_id, kind, error))
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
    body = await parse_call(mine, SaveWeightsExternal, raw)
    recipients = body.age_encryption_recipients or []
    kind = ops.SAVE_WEIGHTS_EXTERNAL
    try:
        age.read_recipients(recipients)
    except InvalidInput as error:
        return reply(await refuse(mine, await mine.run(body.model_id), body.seq_id, kind, error))
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
            **kinds.told(lora),
            "train_unembed": lora["train_unembed"],
            "train_mlp": lora["train_mlp"],
            "train_attn": lora["train_attn"],
            "optimizer_config": {"type": checkpoint.optimizer},
        }
    )


# -- submitting ------------------------------------------------------------------------------------------


async def _create(
    mine: Owner,
    run_id: str,
    session_id: str,
    made: Json,
    user_metadata: Json | None,
    payload: Json,
    facts: Facts,
) -> Json:
    """A run and its operation number 0. `made`: of which base_model, lora and optimizer."""

    def insert_run(connection: sa.Connection) -> None:
        if facts.single_tenant and leases.is_taken(connection, made["base_model"], session_id):
            raise TooMany(
                f"{made['base_model']} is served by single-tenant workers, one run each, and each has one: "
                "another begins when a session that has one is finished, or nobody called its run for "
                f"{mine.service.settings.idle_seconds:g} s"
            )
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
        return await refuse(mine, run, body.seq_id, operation_kind, error)
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
    return await submit(mine, operation, reserve)


def _is_sampler(connection: sa.Connection, sampler_id: str) -> bool:
    statement = sa.select(sampling_sessions.c.id).where(sampling_sessions.c.id == sampler_id)
    return connection.execute(statement).one_or_none() is not None
