"""The control plane as an ASGI application."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.errors import AuthenticationError, InvalidInput, NotFound
from tinsmith_api.bodies import TooLarge, UnsupportedEncoding, reply
from tinsmith_api.journal import metrics, objects
from tinsmith_api.journal.store import Unavailable
from tinsmith_api.limits import BudgetSpent, TooMany
from tinsmith_api.owner import Forbidden, Gone, administering_owner_of, changing_owner_of, owner_of
from tinsmith_api.routes import (
    accounts,
    batches,
    futures,
    losses,
    openai,
    openai_requests,
    records,
    sampling,
    sessions,
    start,
    tokenizers,
    training,
    weights,
)
from tinsmith_api.routes.openai_samples import SampleFailed
from tinsmith_api.service import Service

log = logging.getLogger("tinsmith")

_STATUS: dict[type[Exception], int] = {
    InvalidInput: 400,
    AuthenticationError: 401,
    BudgetSpent: 402,
    Forbidden: 403,
    NotFound: 404,
    Gone: 410,
    TooLarge: 413,
    UnsupportedEncoding: 415,
    TooMany: 429,
    SampleFailed: 500,
    # The base model is still loading. Clients repeat the call.
    TimeoutError: 503,
    Unavailable: 503,
    objects.Unavailable: 503,
}


def make_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="Tinsmith", lifespan=lifespan)
    app.state.service = service
    # In the order they are looked through, the busiest first; include_router would look twice.
    for room in (
        futures,
        batches,
        training,
        sampling,
        losses,
        start,
        records,
        weights,
        tokenizers,
        sessions,
        accounts,
        openai,
    ):
        app.router.routes.extend(room.router.routes)
    for route in app.routes:
        if isinstance(route, APIRoute):
            _describe(route)
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _answer_with(status))
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(sa.exc.DataError, _cannot_be_stored)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Measured)
    return app


class Measured:
    """Counts and times every request, by its route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            # Not the path itself: it holds names, and those are without number.
            route = getattr(scope.get("route"), "path", "other")
            metrics.HTTP_SECONDS.labels(route, status).observe(time.perf_counter() - started)


class NoRoute(NotFound):
    code = "unknown_url"


_ERROR = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"detail": {"type": "string"}},
                "required": ["detail"],
            }
        }
    }
}
_SENTENCES = {
    400: "The request cannot be meant as it is; the sentence says what to change",
    401: "No key, or one that is unknown, revoked or expired",
    402: "A budget is spent",
    403: "The caller's role does not go so far, or an address is not good any more",
    404: "There is none, or it is another's",
    410: "The session was finished, or the result was fetched too late",
    413: "The body is too large",
    415: "The body is encoded",
    422: "A parameter of the address or the query is not what it must be",
    429: "More than the caller may have at once or ask for in a minute",
    503: "Not now: a base model is still loading, or the database or the object store does not answer",
}


def _describe(route: APIRoute) -> None:
    """What the route may answer beside 200, by what it takes. Every error is one sentence."""
    statuses = {503}
    asked = {dependency.call for dependency in route.dependant.dependencies}
    if asked & {owner_of, changing_owner_of, administering_owner_of}:
        statuses |= {400, 401, 429}
    if asked & {changing_owner_of, administering_owner_of}:
        statuses |= {403}
    if (route.methods or set()) & {"POST", "PUT"}:
        statuses |= {402, 404, 410, 413, 415}
    if route.dependant.path_params:
        statuses |= {403, 404}
    if route.dependant.query_params:
        statuses |= {404, 422}
    error = openai.ERROR if route in openai.router.routes else _ERROR
    for status in sorted(statuses):
        route.responses.setdefault(status, {"description": _SENTENCES[status], **error})


def _answer_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        answer = _say(str(error) or "not ready yet: try again", status, request, error)
        answer.headers.update(getattr(error, "headers", {}))
        return answer

    return answer


def _say(said: str, status: int, request: Request, error: Exception) -> Response:
    if f"{request.url.path}/".startswith(f"{openai.router.prefix}/"):
        return reply(openai_requests.error_body(error, status, said), status)
    return reply({"detail": said}, status)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}; /openapi.json lists what there is"
    answer = _say(said, error.status_code, request, NoRoute(said))
    answer.headers.update(error.headers or {})
    return answer


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _say(f"{where}: {first['msg']}", 422, request, error)


async def _cannot_be_stored(request: Request, error: Exception) -> Response:
    log.info("refused what the database cannot store: %s", error)
    said = "a text of this request cannot be stored: does it hold a NUL character?"
    return _say(said, 400, request, error)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _say("an error of the service, not of your request; it is in its log", 500, request, error)
