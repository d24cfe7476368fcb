"""The control plane as an ASGI application."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.errors import AuthenticationError, InvalidInput, NotFound
from tinsmith_api.bodies import TooLarge, UnsupportedEncoding, reply
from tinsmith_api.journal import metrics
from tinsmith_api.journal.store import Unavailable
from tinsmith_api.owner import Gone
from tinsmith_api.routes import futures, records, sampling, start, tokenizers, training
from tinsmith_api.service import Service, TooMany

log = logging.getLogger("tinsmith")

_STATUS: dict[type[Exception], int] = {
    InvalidInput: 400,
    AuthenticationError: 401,
    NotFound: 404,
    Gone: 410,
    TooLarge: 413,
    UnsupportedEncoding: 415,
    TooMany: 429,
    # The base model is still loading. Clients repeat the call.
    TimeoutError: 503,
    Unavailable: 503,
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
    for room in (futures, training, sampling, start, records, tokenizers):
        app.router.routes.extend(room.router.routes)
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _answer_with(status))
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


def _answer_with(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return reply({"detail": str(error) or "not ready yet: try again"}, status)

    return answer


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return reply({"detail": f"{where}: {first['msg']}"}, 422)


async def _cannot_be_stored(_: Request, error: Exception) -> Response:
    log.info("refused what the database cannot store: %s", error)
    return reply({"detail": "a text of this request cannot be stored: does it hold a NUL character?"}, 400)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return reply({"detail": "an error of the service, not of your request; it is in its log"}, 500)
