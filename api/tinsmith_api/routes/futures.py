"""Futures: the promise of every submitted call, fetched by long polling."""

import asyncio

from fastapi import APIRouter, Request, Response

from tinsmith.wire import json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.bodies import Body, parse, read_body, reply, takes
from tinsmith_api.journal import metrics
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Outcome
from tinsmith_api.owner import Gone, Mine, Owner

router = APIRouter(prefix="/api/v1")

_PROTOBUF = "application/x-protobuf"


class RetrieveFuture(Body):
    request_id: str
    allow_metadata_only: bool = False


@router.post("/retrieve_future", openapi_extra=takes(RetrieveFuture))
async def retrieve_future(mine: Mine, request: Request) -> Response:
    """The result, as soon as there is one; 408 to ask again, after having waited."""
    body = parse(RetrieveFuture, await read_body(request, mine.service.settings.max_body_bytes))
    outcome = await _outcome(mine, body.request_id)
    if outcome.state == ops.QUEUED:
        return reply(await _try_again(mine, body.request_id, outcome), 408)
    mine.service.retrieved(body.request_id)
    if outcome.error is not None:
        return reply(outcome.error)
    return _result(outcome, wants_protobuf=_PROTOBUF in request.headers.get("accept", ""))


async def _try_again(mine: Owner, request_id: str, outcome: Outcome) -> dict[str, str]:
    answer = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    pool = (await mine.service.pools()).get(outcome.base_model)
    if pool is not None and pool.ready:
        return answer
    reason = f"no worker of {outcome.base_model} is ready; nothing is lost, it goes on when one is"
    return {**answer, "queue_state": "paused_capacity", "queue_state_reason": reason}


async def _outcome(mine: Owner, request_id: str) -> Outcome:
    """The outcome, waited for at most `poll_seconds`."""
    wakeups = mine.service.wakeups
    loop = asyncio.get_running_loop()
    deadline = loop.time() + mine.service.settings.poll_seconds
    with wakeups.expecting(request_id) as woken, metrics.PARKED_POLLS.track_inprogress():
        # What this process submitted and was not woken for needs no look into the journal.
        outcome = None
        if not wakeups.is_unfinished(request_id, mine.tenant_id):
            outcome = await mine.outcome(request_id)
        while outcome is None or outcome.state == ops.QUEUED:
            try:
                await asyncio.wait_for(woken.wait(), max(0.0, deadline - loop.time()))
            except TimeoutError:
                wakeups.retract(request_id)  # that nobody was woken proves nothing any more
                return await mine.outcome(request_id)
            woken.clear()
            outcome = await mine.outcome(request_id)
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
