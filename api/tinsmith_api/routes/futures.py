"""Futures: the promise of every submitted call, fetched by long polling."""

import asyncio
import contextlib

from fastapi import APIRouter, Request, Response

from tinsmith.wire import json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.bodies import Body, parse, read_body, reply
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Outcome
from tinsmith_api.owner import Gone, Mine

router = APIRouter()

_PROTOBUF = "application/x-protobuf"


class RetrieveFuture(Body):
    request_id: str
    allow_metadata_only: bool = False


@router.post("/retrieve_future")
async def retrieve_future(mine: Mine, request: Request) -> Response:
    """The result, as soon as there is one; 408 to ask again, after having waited."""
    body = parse(RetrieveFuture, await read_body(request, mine.service.settings.max_body_bytes))
    with mine.service.wakeups.expecting(body.request_id) as woken:
        outcome = await mine.outcome(body.request_id)
        if outcome.state == ops.QUEUED:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(woken.wait(), mine.service.settings.poll_seconds)
            outcome = await mine.outcome(body.request_id)
    if outcome.state == ops.QUEUED:
        again = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return reply(again, 408)
    if outcome.state == ops.FAILED:
        return reply(outcome.error)
    return _result(outcome, wants_protobuf=_PROTOBUF in request.headers.get("accept", ""))


def _result(outcome: Outcome, *, wants_protobuf: bool) -> Response:
    if outcome.body is None:
        raise Gone("this result was fetched too late: results are kept for a day")
    if outcome.kind not in (ops.FORWARD_BACKWARD, ops.SAMPLE):
        return Response(outcome.body, media_type="application/json")
    if wants_protobuf:
        return Response(outcome.body, media_type=_PROTOBUF)
    if outcome.kind == ops.SAMPLE:
        return reply(json_form.write_sample(pb.SampleResponse.FromString(outcome.body)))
    return reply(json_form.write_output(pb.ForwardBackwardOutput.FromString(outcome.body)))
