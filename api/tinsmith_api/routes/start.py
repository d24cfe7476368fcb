"""Start-up, sessions, heartbeats and telemetry: what a client calls around its work."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from tinsmith_api.bodies import Body, Metadata, parse, read_body, reply, takes
from tinsmith_api.journal import identities
from tinsmith_api.owner import Gone, Mine, MineToChange, service_of
from tinsmith_api.service import Service

router = APIRouter(prefix="/api/v1")


@router.get("/healthz")
async def healthz(service: Annotated[Service, Depends(service_of)]) -> Response:
    """200 once every base model is loaded, 503 before."""
    return reply({"status": "ok"}) if service.doorbell.ready else reply({"status": "starting"}, 503)


@router.get("/get_server_capabilities")
async def get_server_capabilities(mine: Mine) -> Response:
    models = []
    for name in sorted(await mine.service.pools()):
        facts = await mine.service.facts(name)
        models.append(
            {
                "model_name": name,
                "max_context_length": facts.max_context_length,
                "trainable": True,
                "sampleable": True,
            }
        )
    return reply({"supported_models": models})


@router.post("/client/config")
async def client_config(mine: Mine) -> Response:
    # What a client does not find here stays at its default, which suits us. These switch older clients to
    # the paths that newer ones take always; newer ones no longer know them. Our own client asks how long a
    # session may be silent: it has no thread for heartbeats unless it needs one.
    return reply(
        {
            "proto_write_fwdbwd": True,
            "fwd_via_fwdbwd": True,
            "create_model_via_load_weights": True,
            "pjwt_auth_enabled": mine.service.settings.jwt_auth,
            "sample_join_sampling_session": True,
            "custom_loss_server_side": True,
            "sample_use_retrieve_futures": mine.service.settings.poll_by_sampler,
            "session_seconds": mine.service.settings.session_seconds,
        }
    )


@router.post("/client/dynamic_config")
async def client_dynamic_config(mine: Mine) -> Response:
    return reply({"sample_cancel_enabled": True})


class CreateSession(Body):
    tags: list[str] = Field(default_factory=list)
    user_metadata: Metadata = Field(default_factory=dict)
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


@router.post("/create_session", openapi_extra=takes(CreateSession))
async def create_session(mine: MineToChange, request: Request) -> Response:
    body = parse(CreateSession, await read_body(request, mine.service.settings.max_body_bytes))
    values = body.model_dump() | {"member_id": mine.caller.member_id}
    if body.project_id is not None:
        values["project_id"] = (await mine.project(body.project_id)).id
    session_id = await mine.service.write(lambda c: identities.create_session(c, mine.tenant_id, values))
    return reply({"session_id": session_id})


class SessionHeartbeat(Body):
    session_id: str


@router.post("/session_heartbeat", openapi_extra=takes(SessionHeartbeat))
async def session_heartbeat(mine: MineToChange, request: Request) -> Response:
    body = parse(SessionHeartbeat, await read_body(request, mine.service.settings.max_body_bytes))
    await mine.open_session(body.session_id)
    await mine.service.write(lambda c: identities.heartbeat(c, body.session_id))
    return reply({})


class Reason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Body):
    reason: Reason
    detail: str | None = None


@router.post("/sessions/{session_id}/finish", openapi_extra=takes(FinishSession))
async def finish_session(mine: MineToChange, session_id: str, request: Request) -> Response:
    body = parse(FinishSession, await read_body(request, mine.service.settings.max_body_bytes))
    session = await mine.session(session_id)
    if session.finished_at is not None and session.finish_reason != body.reason.type:
        raise Gone(f"session {session_id} was finished as {session.finish_reason} already")
    await mine.service.write(
        lambda c: identities.finish_session(c, session_id, body.reason.type, body.detail)
    )
    mine.forget_session(session_id)
    return reply({})


@router.post("/telemetry")
async def telemetry(mine: Mine, request: Request) -> Response:
    # Read and dropped: a batch may hold request headers, the key among them.
    await read_body(request, mine.service.settings.max_body_bytes)
    return reply({"status": "accepted"})
