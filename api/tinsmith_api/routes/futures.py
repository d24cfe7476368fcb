"""Futures: the promise of every submitted call, fetched by long polling."""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith.wire import json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.bodies import Body, off_loop, parse, read_body, reply, takes
from tinsmith_api.journal import metrics
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation, Outcome
from tinsmith_api.owner import Gone, Mine, MineToChange, Owner

router = APIRouter(prefix="/api/v1")

_PROTOBUF = "application/x-protobuf"
# Of a larger result the size is told first to those who want it so: they may have to make room for it.
_METADATA_BYTES = 1 << 20
# A clone of a sampler numbers its calls from so many times its own number on.
_CLONE = 1_000_000_000
_COMPLETIONS = 1000


class RetrieveFuture(Body):
    request_id: str
    allow_metadata_only: bool = False


@router.post(
    "/retrieve_future",
    openapi_extra=takes(RetrieveFuture),
    responses={
        200: {"description": "The result, or why there is none", "content": {_PROTOBUF: {}}},
        408: {"description": "Not finished yet: ask again"},
    },
)
async def retrieve_future(mine: Mine, request: Request) -> Response:
    """The result, as soon as there is one; 408 to ask again, after having waited."""
    body = parse(RetrieveFuture, await read_body(request, mine.service.settings.max_body_bytes))
    at_most_bytes = _METADATA_BYTES if body.allow_metadata_only else ops.ANY_SIZE
    outcome = await outcome_of(mine, body.request_id, at_most_bytes)
    if outcome.state == ops.QUEUED:
        return reply(await _try_again(mine, body.request_id, outcome), 408)
    if outcome.error is None and (outcome.size_bytes or 0) > at_most_bytes:
        return reply({"status": "complete_metadata", "response_payload_size": outcome.size_bytes})
    mine.service.retrieved(body.request_id)
    if outcome.error is not None:
        return reply(outcome.error)
    wants_protobuf = _PROTOBUF in request.headers.get("accept", "")
    return await off_loop(outcome.size_bytes or 0, lambda: _result(outcome, wants_protobuf=wants_protobuf))


class SamplesOf(Body):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = Field(0, ge=0, lt=2**63 // _CLONE)


class RetrieveFutures(Body):
    target: SamplesOf
    prev_cursor: int = Field(0, ge=0, lt=2**63)
    timeout: float | None = Field(None, ge=0)
    retrieved_request_ids: list[str] = Field([], max_length=10_000)


@router.post("/retrieve_futures", openapi_extra=takes(RetrieveFutures))
async def retrieve_futures(mine: Mine, request: Request) -> Response:
    """Which samples of a sampler were finished since `prev_cursor`, as soon as there are any; none after
    `timeout` seconds, or when it is time to ask again. Results stay a day, retrieved or not."""
    body = parse(RetrieveFutures, await read_body(request, mine.service.settings.max_body_bytes))
    sampler = await mine.sampler(body.target.sampling_session_id)
    await _note_retrieved(mine, sampler.id, body.retrieved_request_ids)
    wait_seconds = mine.service.settings.poll_seconds
    if body.timeout is not None:
        wait_seconds = min(body.timeout, wait_seconds)
    first = body.target.cloned_sampler_id * _CLONE
    read = functools.partial(
        ops.completions,
        sampler_id=sampler.id,
        seq_ids=range(first, first + _CLONE),
        after=body.prev_cursor,
        at_most=_COMPLETIONS,
    )
    found: Sequence[Any] = await mine.service.read(read)
    deadline = asyncio.get_running_loop().time() + wait_seconds
    with mine.service.wakeups.expecting(sampler.id) as woken, metrics.PARKED_POLLS.track_inprogress():
        # Once more, now that what is finished from here on wakes.
        while not found and not (found := await mine.service.read(read)):
            try:
                await asyncio.wait_for(woken.wait(), deadline - asyncio.get_running_loop().time())
            except TimeoutError:
                break
            woken.clear()
    cursor = found[-1].completion if found else body.prev_cursor
    return reply({"completions": [_completion(row) for row in found], "cursor": cursor})


async def _note_retrieved(mine: Owner, sampler_id: str, request_ids: list[str]) -> None:
    if request_ids:
        known = await mine.service.read(lambda c: ops.known_of(c, sampler_id, request_ids))
        for request_id in known:
            mine.service.retrieved(request_id)


def _completion(row: Any) -> dict[str, Any]:
    if row.state == ops.FAILED:
        return {"state": "failed", "request_id": row.request_id}
    size = {} if row.size_bytes is None else {"response_payload_uncompressed_size": row.size_bytes}
    return {"state": "finished", "request_id": row.request_id, **size}


class CancelFuture(Body):
    request_id: str


@router.post("/cancel_future", status_code=204, openapi_extra=takes(CancelFuture))
async def cancel_future(mine: MineToChange, request: Request) -> Response:
    """Nobody waits for this sample any more: it is not begun, or not gone on with, and costs nothing. One
    that is finished stays so."""
    body = parse(CancelFuture, await read_body(request, mine.service.settings.max_body_bytes))
    operation = await mine.operation(body.request_id)
    if operation.kind != ops.SAMPLE:
        raise InvalidInput(
            f"{operation.kind} cannot be cancelled: only samples can, the calls of a run are its history"
        )
    await cancel(mine, operation)
    return Response(status_code=204)


async def cancel(mine: Owner, sample: Operation) -> None:
    if await mine.service.write(lambda c: ops.cancel(c, sample)):
        mine.service.cancelled(sample)


async def _try_again(mine: Owner, request_id: str, outcome: Outcome) -> dict[str, str]:
    answer = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    pool = (await mine.service.pools()).get(outcome.base_model)
    if pool is not None and pool.ready:
        return answer
    reason = f"no worker of {outcome.base_model} is ready; nothing is lost, it goes on when one is"
    return {**answer, "queue_state": "paused_capacity", "queue_state_reason": reason}


async def outcome_of(mine: Owner, request_id: str, at_most_bytes: int) -> Outcome:
    """The outcome, waited for at most `poll_seconds`."""
    wakeups = mine.service.wakeups
    loop = asyncio.get_running_loop()
    deadline = loop.time() + mine.service.settings.poll_seconds
    with wakeups.expecting(request_id) as woken, metrics.PARKED_POLLS.track_inprogress():
        # What this process submitted and was not woken for needs no look into the journal.
        outcome = None
        if not wakeups.is_unfinished(request_id, mine.tenant_id):
            outcome = await mine.outcome(request_id, at_most_bytes)
        while outcome is None or outcome.state == ops.QUEUED:
            try:
                await asyncio.wait_for(woken.wait(), max(0.0, deadline - loop.time()))
            except TimeoutError:
                wakeups.retract(request_id)  # that nobody was woken proves nothing any more
                return await mine.outcome(request_id, at_most_bytes)
            woken.clear()
            outcome = await mine.outcome(request_id, at_most_bytes)
    return outcome


def _result(outcome: Outcome, *, wants_protobuf: bool) -> Response:
    if outcome.body is None:
        raise Gone("this result was fetched too late: results are kept for a day")
    if outcome.kind not in (ops.FORWARD, ops.FORWARD_BACKWARD, ops.SAMPLE):
        return Response(outcome.body, media_type="application/json")
    if wants_protobuf:
        return Response(outcome.body, media_type=_PROTOBUF)
    if outcome.kind == ops.SAMPLE:
        return reply(json_form.write_sample(pb.SampleResponse.FromString(outcome.body)))
    return reply(json_form.write_output(pb.ForwardBackwardOutput.FromString(outcome.body)))
