"""Sampling sessions and samples."""

import secrets
import uuid
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith.wire import json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.datums import array, shape_of
from tinsmith_api.bodies import Body, Strict, parse, read_body, reply, takes
from tinsmith_api.journal import checkpoints
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.owner import Mine, MineToChange, Owner, check_usable
from tinsmith_api.service import Facts
from tinsmith_api.uploads import check_json

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

_MAX_SAMPLES = 1024
_MAX_TOPK = 128
_MAX_STOPS = 256
_MAX_RESULT_BYTES = 64 << 20
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


class SamplingParams(Strict):
    max_tokens: int | None = Field(None, ge=0, le=_INT32)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(-1, ge=-1, le=_INT32)
    top_p: float = Field(1.0, gt=0, le=1)


class Prompt(Body):
    chunks: list[Any]


class Sample(Body):
    sampling_session_id: str | None = None
    base_model: str | None = None
    model_path: str | None = None
    seq_id: int = Field(ge=0, le=2**63 - 1)
    prompt: Prompt
    num_samples: int = Field(1, ge=1, le=_MAX_SAMPLES)
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    prompt_logprobs_last_n: int | None = Field(None, ge=0, le=_INT32)
    record_stability_info: bool = False


@router.post("/asample", openapi_extra=takes(Sample))
async def asample(mine: MineToChange, request: Request) -> Response:
    async with mine.receive(request, mine.service.settings.max_sample_bytes) as raw:
        check_json(raw)
        body = await mine.in_turn(len(raw), lambda: parse(Sample, raw))
        return reply(await _sample(mine, body, len(raw)))


async def _sample(mine: Owner, body: Sample, size: int) -> Json:
    if body.sampling_session_id is None:
        raise InvalidInput("asample needs sampling_session_id: create_sampling_session makes one of a model")
    sampler = await mine.sampler(body.sampling_session_id)
    for name in ("base_model", "model_path"):
        given, own = getattr(body, name), getattr(sampler, name)
        if given not in (None, own):
            raise InvalidInput(f"sampling session {sampler.id} has {name} {own!r}, not {given!r}")
    await mine.open_session(sampler.session_id)
    facts = await mine.service.facts(sampler.base_model)
    request_id = uuid.uuid4().hex
    sequence_ids = [f"{request_id}-{i}" for i in range(body.num_samples)]
    task = await mine.in_turn(size, lambda: task_of(body, facts))
    task.object_prefix = await _weights(mine, sampler)
    task.sequence_ids.extend(sequence_ids)
    operation = Operation(
        sampler.id,
        body.seq_id,
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


def task_of(body: Sample, facts: Facts) -> pb.SampleTask:
    prompt = json_form.read_tokens(body.prompt.chunks)
    _check_prompt(prompt, facts)
    params = body.sampling_params
    room = facts.max_context_length - len(prompt)
    task = pb.SampleTask(
        prompt=prompt.astype("<i4").tobytes(),
        num_samples=body.num_samples,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        # Fixed here, so that a sample that is computed again after a crash is the same one.
        seed=secrets.randbits(63) if params.seed is None else params.seed % 2**64,  # -1 is one, too
        temperature=params.temperature,
        top_k=params.top_k or -1,
        top_p=params.top_p,
        default_stop=params.stop is None,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        record_stability_info=body.record_stability_info,
    )
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    if len(stops) > _MAX_STOPS:
        raise InvalidInput(
            f"sampling_params.stop holds {len(stops)} entries, the limit is {_MAX_STOPS}: each token is "
            "compared with all of them"
        )
    for stop in stops:
        if isinstance(stop, str):
            if not stop:
                raise InvalidInput("sampling_params.stop holds an empty string")
            task.stop_strings.append(stop)
        elif not 0 <= stop < facts.vocab_size:
            raise InvalidInput(f"sampling_params.stop holds {stop}, outside the vocabulary")
        else:
            task.stop_tokens.append(stop)
    if body.target_prompt_logprobs is not None:
        task.target_prompt_logprobs.CopyFrom(_targets(body.target_prompt_logprobs, len(prompt)))
    _check_result_size(task, len(prompt))
    # After the size: these are made dense here.
    if task.HasField("target_prompt_logprobs"):
        _check_targets(array(task.target_prompt_logprobs), facts)
    return task


def _check_result_size(task: pb.SampleTask, prompt_tokens: int) -> None:
    """A token and its logprob are 8 bytes each, wherever they are asked for."""
    sampled = task.num_samples * task.max_tokens * 8 * (1 + task.topk_sample_logprobs)
    if sampled > _MAX_RESULT_BYTES:
        raise InvalidInput(
            f"{task.num_samples} samples of up to {task.max_tokens} tokens with topk_sample_logprobs "
            f"{task.topk_sample_logprobs} can be {sampled} bytes, the limit is {_MAX_RESULT_BYTES}: "
            "set a smaller max_tokens, or ask for fewer at a time"
        )
    targets = task.target_prompt_logprobs.shape[1] if task.HasField("target_prompt_logprobs") else 0
    per_token = 1 + task.topk_prompt_logprobs + task.prompt_alt_tokens_k + targets
    if prompt_tokens * 8 * per_token > _MAX_RESULT_BYTES - sampled:
        raise InvalidInput(
            f"{per_token} logprobs for each of {prompt_tokens} prompt tokens make a result of more than "
            f"{_MAX_RESULT_BYTES} bytes: ask for fewer, or for a shorter prompt"
        )


def _check_prompt(prompt: "np.ndarray[Any, np.dtype[np.int32]]", facts: Facts) -> None:
    if not len(prompt):
        raise InvalidInput("the prompt is empty: give at least one token")
    if len(prompt) >= facts.max_context_length:
        raise InvalidInput(
            f"the prompt has {len(prompt)} tokens, the model takes {facts.max_context_length} "
            "with the answer: shorten it"
        )
    bad = (prompt < 0) | (prompt >= facts.vocab_size)
    if bad.any():
        raise InvalidInput(
            f"the prompt holds token {prompt[bad][0]}, outside the vocabulary 0..{facts.vocab_size - 1}"
        )


def _targets(given: dict[str, Any], prompt_tokens: int) -> pb.Tensor:
    tensor = json_form.read_tensor({"dtype": "int64", **given}, "target_prompt_logprobs")
    shape = shape_of(tensor)
    if tensor.dtype != pb.DTYPE_INT64 or len(shape) != 2 or shape[0] != prompt_tokens - 1:
        raise InvalidInput(f"target_prompt_logprobs must be int64 of shape [{prompt_tokens - 1}, K]")
    return tensor


def _check_targets(targets: "np.ndarray[Any, np.dtype[Any]]", facts: Facts) -> None:
    if ((targets < -1) | (targets >= facts.vocab_size)).any():
        raise InvalidInput(
            "target_prompt_logprobs holds tokens outside the vocabulary; -1 marks an empty cell"
        )
