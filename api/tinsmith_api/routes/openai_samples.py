"""The samples that a request of OpenAI's clients becomes: submitted together, awaited, or given up."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from fastapi import Request

from tinsmith.errors import InvalidInput
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import chat
from tinsmith_api.journal import checkpoints, identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.usage import session_of
from tinsmith_api.owner import Owner
from tinsmith_api.routes.futures import cancel, outcome_of
from tinsmith_api.routes.openai_requests import Asked
from tinsmith_api.samples import Sample, task_of
from tinsmith_api.streams import Pieces

Json = dict[str, Any]
Answers = Sequence[pb.SampleResponse]

# In one answer, each with every alternative to it: in JSON a hundred bytes or more.
_MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class Weights:
    """What a request's `model` names: a base model, or weights at `path` that lie under `object_prefix`."""

    base_model: str
    path: str | None = None
    object_prefix: str | None = None


class SampleFailed(Exception):  # noqa: N818 - answered as 500
    """By no fault of whoever asked; it may be asked again."""


@dataclass
class Samples:
    """Submitted for one request, one for each prompt."""

    mine: Owner
    model: str
    request_ids: list[str]
    prompt_tokens: int
    pieces: Pieces | None = None  # if they are streamed
    are_finished: bool = False
    created_at: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> Json:
        return {"id": self.request_ids[0], "object": kind, "created": self.created_at, "model": self.model}

    def usage(self, answers: Answers) -> Json:
        sampled = sum(len(s.tokens) // 4 for answer in answers for s in answer.sequences)
        cached = sum(answer.prompt_cache_hit_tokens for answer in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sampled,
            "total_tokens": self.prompt_tokens + sampled,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def answers(self) -> list[pb.SampleResponse]:
        found = await asyncio.gather(*map(self._answer, self.request_ids))
        self.are_finished = True
        return found

    async def _answer(self, request_id: str) -> pb.SampleResponse:
        while (outcome := await outcome_of(self.mine, request_id, ops.ANY_SIZE)).state == ops.QUEUED:
            pass  # it waits for news
        self.mine.service.retrieved(request_id)
        if outcome.error is None:
            return pb.SampleResponse.FromString(outcome.body or b"")
        said = str(outcome.error["error"])
        raise InvalidInput(said) if outcome.error.get("category") == "user" else SampleFailed(said)

    def close(self) -> None:
        """Their tokens are not read any more as they come."""
        self.mine.service.streams.close(self.request_ids)

    async def let_go(self) -> None:
        """Nobody is there any more to hear of them."""
        self.close()
        if not self.are_finished:
            for request_id in self.request_ids:
                await cancel(self.mine, await self.mine.operation(request_id))


async def submit(
    mine: Owner,
    request: Request,
    body: Asked,
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    asked: Json,
    *,
    are_streamed: bool,
) -> Samples:
    """All of them, or none. `are_streamed`: their tokens are to be read as they come."""
    facts = await mine.service.facts(weights.base_model)
    room = facts.max_context_length
    params = {
        "max_tokens": max_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": body.top_k or -1,
        "seed": body.seed,
        "stop": body.stops or None,
    }

    def tasks_of() -> list[pb.SampleTask]:
        tasks = []
        for prompt in prompts:
            if len(prompt) + (max_tokens or 1) > room:
                what = f"{len(prompt)} tokens are given and up to {max_tokens or 1} asked for"
                raise chat.too_long(what, room, body.prompt_param)
            chunks = {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]}
            sample = Sample.model_validate(
                {
                    "seq_id": 0,
                    "prompt": chunks,
                    "num_samples": body.n or 1,
                    "sampling_params": params,
                    **asked,
                }
            )
            task = task_of(sample, facts)
            task.object_prefix = weights.object_prefix or ""
            task.default_stop = True  # a stop of the caller's is one more, and not the only one
            task.stream_to = mine.service.streams.name if are_streamed else ""
            tasks.append(task)
        most = sum(map(_tokens_at_most, tasks))
        if most > _MAX_TOKENS:
            raise chat.Refused(
                f"{most} tokens may be sampled or scored, the limit is {_MAX_TOKENS} a request: set a "
                "smaller max_tokens, or ask for fewer at a time",
                "max_tokens",
            )
        return tasks

    tasks = await asyncio.to_thread(tasks_of)
    subject = await _sampler(mine, weights, request.headers.get("openai-project"))
    operations = [
        Operation(
            subject,
            secrets.randbits(62),  # samples have no order, and everybody's calls share this sampler
            ops.SAMPLE,
            mine.tenant_id,
            weights.base_model,
            tokens=len(prompt) + task.num_samples * task.max_tokens,
            request_id=uuid.uuid4().hex,
            payload=task.SerializeToString(),
        )
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    streams, request_ids = mine.service.streams, [operation.request_id for operation in operations]
    pieces = streams.open(request_ids) if are_streamed else None
    outcomes = await asyncio.gather(*map(mine.submit, operations), return_exceptions=True)
    entered = [outcome["request_id"] for outcome in outcomes if not isinstance(outcome, BaseException)]
    samples = Samples(mine, body.model, entered, sum(map(len, prompts)), pieces)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            streams.close(request_ids)
            await samples.let_go()
            raise outcome
    return samples


def _tokens_at_most(task: pb.SampleTask) -> int:
    scored = len(task.prompt) // 4 * (1 + task.topk_prompt_logprobs) if task.prompt_logprobs else 0
    return scored + task.num_samples * task.max_tokens * (1 + task.topk_sample_logprobs)


async def _sampler(mine: Owner, weights: Weights, project: str | None) -> str:
    """The id of a sampling session of these weights, of the caller's key, in a session of its own that is in
    this project. It goes on until nobody has called for so long that it is over."""
    service = mine.service
    project_id = None if project is None else (await mine.project(project)).id
    name = f"{mine.caller.key_id} {project_id} {weights.object_prefix or weights.base_model}"
    async with service.opening_sampler:
        known = service.samplers.get(name)
        if known is not None and (await mine.session(session_of(known))).finished_at is None:
            return service.samplers.put(name, known)
        session: Json = {
            "tags": ["openai"],
            "user_metadata": {},
            "member_id": mine.caller.member_id,
            "display_name": f"OpenAI's API: {weights.path or weights.base_model}",
            "project_id": project_id,
        }

        def open_sampler(connection: sa.Connection) -> str:
            session_id = identities.create_session(connection, mine.tenant_id, session)
            sampler = {
                "id": f"{session_id}:sample:0",
                "tenant_id": mine.tenant_id,
                "session_id": session_id,
                "base_model": weights.base_model,
                "model_path": weights.path,
                "object_prefix": weights.object_prefix,
            }
            checkpoints.open_sampler(connection, sampler)
            return f"{session_id}:sample:0"

        return service.samplers.put(name, await service.write(open_sampler))
