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
from tinsmith.wire.datums import array
from tinsmith_api.bodies import Body, parse, read_body, reply
from tinsmith_api.journal import checkpoints
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.owner import Mine
from tinsmith_api.service import Facts

router = APIRouter(prefix="/api/v1")

_MAX_SAMPLES = 1024
_MAX_TOPK = 128


class CreateSamplingSession(Body):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, le=2**31 - 1)
    base_model: str | None = None
    model_path: str | None = None


@router.post("/create_sampling_session")
async def create_sampling_session(mine: Mine, request: Request) -> Response:
    """A frozen sampler: the base model, or weights saved before."""
    body = parse(CreateSamplingSession, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    base_model, prefix = body.base_model, None
    if body.model_path is not None:
        checkpoint = await mine.checkpoint(body.model_path)
        run = await mine.run(checkpoint.run_id)
        if base_model not in (None, run.base_model):
            raise InvalidInput(f"{body.model_path} was trained on {run.base_model}, not on {base_model}")
        base_model, prefix = run.base_model, checkpoint.object_prefix
    if base_model is None:
        raise InvalidInput("create_sampling_session needs base_model or model_path")
    mine.service.check_model(base_model)
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


@router.get("/samplers/{sampler_id}")
async def get_sampler(mine: Mine, sampler_id: str) -> Response:
    sampler = await mine.sampler(sampler_id)
    found = {"sampler_id": sampler.id, "base_model": sampler.base_model}
    return reply(found if sampler.model_path is None else {**found, "model_path": sampler.model_path})


class SamplingParams(Body):
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(-1, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)


class Prompt(Body):
    chunks: list[Any]


class Sample(Body):
    sampling_session_id: str
    seq_id: int = Field(ge=0, le=2**63 - 1)
    prompt: Prompt
    num_samples: int = Field(1, ge=1, le=_MAX_SAMPLES)
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    prompt_logprobs_last_n: int | None = Field(None, ge=0)
    record_stability_info: bool = False


@router.post("/asample")
async def asample(mine: Mine, request: Request) -> Response:
    body = parse(Sample, await read_body(request, mine.service.settings.max_sample_bytes))
    sampler = await mine.sampler(body.sampling_session_id)
    await mine.open_session(sampler.session_id)
    facts = await mine.service.facts(sampler.base_model)
    request_id = uuid.uuid4().hex
    sequence_ids = [f"{request_id}-{i}" for i in range(body.num_samples)]
    task = _task(body, facts)
    task.object_prefix = sampler.object_prefix or ""
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
    return reply(await mine.service.submit(operation))


def _task(body: Sample, facts: Facts) -> pb.SampleTask:
    prompt = json_form.read_tokens(body.prompt.chunks)
    _check_prompt(prompt, facts)
    params = body.sampling_params
    room = facts.max_context_length - len(prompt)
    task = pb.SampleTask(
        prompt=prompt.astype("<i4").tobytes(),
        num_samples=body.num_samples,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        # Fixed here, so that a sample that is computed again after a crash is the same one.
        seed=secrets.randbits(63) if params.seed is None else params.seed % 2**64,
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
    for stop in [params.stop] if isinstance(params.stop, str) else params.stop or []:
        if isinstance(stop, str):
            if not stop:
                raise InvalidInput("sampling_params.stop holds an empty string")
            task.stop_strings.append(stop)
        elif not 0 <= stop < facts.vocab_size:
            raise InvalidInput(f"sampling_params.stop holds {stop}, outside the vocabulary")
        else:
            task.stop_tokens.append(stop)
    if body.target_prompt_logprobs is not None:
        task.target_prompt_logprobs.CopyFrom(_targets(body.target_prompt_logprobs, len(prompt), facts))
    return task


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


def _targets(given: dict[str, Any], prompt_tokens: int, facts: Facts) -> pb.Tensor:
    tensor = json_form.read_tensor({"dtype": "int64", **given}, "target_prompt_logprobs")
    targets = np.asarray(array(tensor), np.int64)
    if tensor.dtype != pb.DTYPE_INT64 or targets.ndim != 2 or len(targets) != prompt_tokens - 1:
        raise InvalidInput(f"target_prompt_logprobs must be int64 of shape [{prompt_tokens - 1}, K]")
    if ((targets < -1) | (targets >= facts.vocab_size)).any():
        raise InvalidInput(
            "target_prompt_logprobs holds tokens outside the vocabulary; -1 marks an empty cell"
        )
    return tensor
