"""Sampling sessions and samples."""

import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import readings
from tinsmith_api.bodies import Body, Readable, parse, read_body, reply, takes
from tinsmith_api.journal import checkpoints
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.owner import Mine, MineToChange, Owner, check_usable
from tinsmith_api.samples import Sample, task_of
from tinsmith_api.uploads import READ_APART_BYTES

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

_INT32 = 2**31 - 1


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, le=_INT32)
    base_model: str | None = None
    model_path: str | None = None


@router.post("/create_sampling_session", openapi_extra=takes(CreateSamplingSession))
async def create_sampling_session(mine: MineToChange, request: Request) -> Response:
    """A frozen sampler: the base model, or weights saved before."""
    body = parse(CreateSamplingSession, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    base_model, prefix = body.base_model, None
    if body.model_path is not None:
        checkpoint = await mine.readable_checkpoint(body.model_path)
        check_usable(checkpoint)
        if base_model not in (None, checkpoint.base_model):
            raise InvalidInput(
                f"{body.model_path} was trained on {checkpoint.base_model}, not on {base_model}"
            )
        base_model, prefix = checkpoint.base_model, checkpoint.object_prefix
    if base_model is None:
        raise InvalidInput("create_sampling_session needs base_model or model_path")
    await mine.service.pool(base_model)
    sampler_id = f"{body.session_id}:sample:{body.sampling_session_seq_id}"
    row = {
        "id": sampler_id,
        "tenant_id": mine.tenant_id,
        "session_id": body.session_id,
        "base_model": base_model,
        "model_path": body.model_path,
        "object_prefix": prefix,
    }
    if not await mine.service.write(lambda c: checkpoints.open_sampler(c, row)):
        before = await mine.sampler(sampler_id)
        if (before.base_model, before.model_path) != (base_model, body.model_path):
            raise InvalidInput(
                f"sampling session {sampler_id} exists with other weights: use the next number"
            )
    return reply({"sampling_session_id": sampler_id})


class JoinSamplingSession(Body):
    sampling_session_id: str


@router.post("/join_sampling_session", openapi_extra=takes(JoinSamplingSession))
async def join_sampling_session(mine: MineToChange, request: Request) -> Response:
    """A number for one more client of this sampler, which numbers its calls from a billion times that on."""
    body = parse(JoinSamplingSession, await read_body(request, mine.service.settings.max_body_bytes))
    sampler = await mine.sampler(body.sampling_session_id)
    await mine.open_session(sampler.session_id)
    return reply(
        {"client_counter": await mine.service.write(lambda c: checkpoints.join_sampler(c, sampler.id))}
    )


@router.get("/samplers/{sampler_id}")
async def get_sampler(mine: Mine, sampler_id: str) -> Response:
    sampler = await mine.sampler(sampler_id)
    found = {"sampler_id": sampler.id, "base_model": sampler.base_model}
    return reply(found if sampler.model_path is None else {**found, "model_path": sampler.model_path})


@router.post("/asample", openapi_extra=takes(Sample))
async def asample(mine: MineToChange, request: Request) -> Response:
    async with mine.receive(request, mine.service.settings.max_sample_bytes) as body:
        return reply(await _sample(mine, body))


async def _sample(mine: Owner, body: Readable) -> Json:
    is_large = len(body) > READ_APART_BYTES
    sample = parse(Sample, await mine.read(body, readings.sample_head) if is_large else body)
    if sample.sampling_session_id is None:
        raise InvalidInput("asample needs sampling_session_id: create_sampling_session makes one of a model")
    sampler = await mine.sampler(sample.sampling_session_id)
    for name in ("base_model", "model_path"):
        given, own = getattr(sample, name), getattr(sampler, name)
        if given not in (None, own):
            raise InvalidInput(f"sampling session {sampler.id} has {name} {own!r}, not {given!r}")
    await mine.open_session(sampler.session_id)
    facts = await mine.service.facts(sampler.base_model)
    request_id = uuid.uuid4().hex
    sequence_ids = [f"{request_id}-{i}" for i in range(sample.num_samples)]
    if is_large:
        limits = {"vocab_size": facts.vocab_size, "max_context_length": facts.max_context_length}
        task = pb.SampleTask.FromString(await mine.read(body, readings.sample_task, **limits))
    else:
        task = task_of(sample, facts)
    task.object_prefix = await _weights(mine, sampler)
    task.sequence_ids.extend(sequence_ids)
    operation = Operation(
        sampler.id,
        sample.seq_id,
        ops.SAMPLE,
        mine.tenant_id,
        sampler.base_model,
        tokens=len(task.prompt) // 4 + task.num_samples * task.max_tokens,
        answer={"sample_sequence_ids": sequence_ids},
        request_id=request_id,
        payload=task.SerializeToString(),
    )
    return await mine.submit(operation)


async def _weights(mine: Owner, sampler: Any) -> str:
    """Where the weights lie that are sampled now; "" for the base model."""
    if sampler.object_prefix is not None or sampler.model_path is None:
        return sampler.object_prefix or ""
    return str((await mine.checkpoint(sampler.model_path)).object_prefix)
