"""One service, one key, one session: every byte between a client and the service passes here."""

import asyncio
import contextlib
import itertools
import os
import random
import threading
import time
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import httpx

from tinsmith.errors import (
    AuthenticationError,
    InvalidInput,
    NotFound,
    RequestFailed,
    ServiceUnavailable,
    TinsmithError,
)
from tinsmith.future import Future

T = TypeVar("T")

GIVE_UP_SECONDS = 300.0
"""A service that answered before may be away this long, e.g. to restart; one that never did, ten."""
_FIRST_CONTACT_SECONDS = 10.0
_HEARTBEAT_SECONDS = 10.0
# The service holds a long poll for up to 30 s.
_POLL_TIMEOUT = httpx.Timeout(60, read=45, pool=None)
# More sockets than this would run into the usual limit of 1024 open files.
_SAMPLES_POLLED_AT_ONCE = 400

_PROTOBUF = "application/x-protobuf"


class Connection:
    """Owns a daemon thread with an event loop, the HTTP connections and the session's heartbeat.

    Coroutines below run on that loop; `start` is how other threads get one to run.
    """

    def __init__(
        self, base_url: str | None, api_key: str | None, session: Mapping[str, Any], give_up_seconds: float
    ) -> None:
        self.base_url = (base_url or _setting("BASE_URL") or "http://127.0.0.1:8000").rstrip("/")
        key = api_key or _setting("API_KEY")
        if not key:
            raise AuthenticationError("no key: pass api_key=… or set TINSMITH_API_KEY")
        self._give_up_seconds = give_up_seconds
        self._answered_once = False
        self._session_fields = session
        self._session_id = ""
        self._opening = asyncio.Lock()
        self._heartbeat: asyncio.Task[None] | None = None
        self._closed = False
        self.sample_polls = asyncio.Semaphore(_SAMPLES_POLLED_AT_ONCE)
        self._http = httpx.AsyncClient(
            base_url=f"{self.base_url}/api/v1/",
            headers={"X-API-Key": key},
            timeout=httpx.Timeout(60, connect=5, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tinsmith-connection", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the connection's loop. Work started first runs its first step first."""
        if self._closed:
            work.close()
            raise TinsmithError("this client is closed")
        return Future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def session_id(self) -> str:
        """The session of this client, opened when it is first needed."""
        async with self._opening:
            if not self._session_id:
                self._session_id = (await self.submit("create_session", self._session_fields))["session_id"]
                self._heartbeat = asyncio.create_task(self._beat())
        return self._session_id

    async def submit(self, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """POST a JSON request, without its fields that are None; the JSON answer."""
        body = {name: value for name, value in fields.items() if value is not None}
        return _object(await self._send("POST", path, json=body))

    async def submit_protobuf(self, path: str, content: bytes) -> dict[str, Any]:
        headers = {"Content-Type": _PROTOBUF}
        return _object(await self._send("POST", path, content=content, headers=headers))

    async def result(self, request_id: str) -> dict[str, Any]:
        """The result of a future that answers in JSON; waits for as long as it takes."""
        return _object(await self._poll(request_id, "application/json"))

    async def result_protobuf(self, request_id: str) -> bytes:
        return (await self._poll(request_id, _PROTOBUF)).content

    async def get(self, path: str) -> dict[str, Any]:
        return _object(await self._send("GET", path))

    async def close(self, reason: str, detail: str | None) -> None:
        """Finish the session and the loop; calls still under way are cancelled."""
        self._closed = True
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._session_id:
            # Tried once: a service that is away ends the session itself when the heartbeats stay out.
            with contextlib.suppress(httpx.TransportError):
                finish = {"reason": {"type": reason}, "detail": detail}
                await self._http.post(f"sessions/{self._session_id}/finish", json=finish, timeout=10)
        await self._http.aclose()
        # Stops one turn later, so that whoever waits for this coroutine sees it end.
        self._loop.call_soon(self._loop.call_soon, self._loop.stop)

    async def _send(
        self, method: str, path: str, *, pending_is_answer: bool = False, **request: Any
    ) -> httpx.Response:
        """Send the same bytes until the service answers. Requests carry their number (seq_id), so that
        one whose answer got lost is not applied twice."""
        since = time.monotonic()
        for attempt in itertools.count():
            wait = min(0.5 * 2**attempt, 10) * random.uniform(0.75, 1)  # noqa: S311 - not a secret
            try:
                response = await self._http.request(method, path, **request)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__} {error}".strip()
            else:
                self._answered_once = True
                if response.status_code == 408 and pending_is_answer:
                    return response
                if response.is_success:
                    return response
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    raise _refusal(response)
                trouble = f"{response.status_code} {_sentence(response)}"
                wait = _seconds_asked_for(response) or wait
            patience = self._give_up_seconds if self._answered_once else _FIRST_CONTACT_SECONDS
            if time.monotonic() - since + wait > min(patience, self._give_up_seconds):
                raise ServiceUnavailable(f"{self.base_url} gives no answer to {path}: {trouble}")
            await asyncio.sleep(wait)
        raise AssertionError

    async def _poll(self, request_id: str, accept: str) -> httpx.Response:
        while True:
            response = await self._send(
                "POST",
                "retrieve_future",
                json={"request_id": request_id, "allow_metadata_only": False},
                headers={"Accept": accept},
                timeout=_POLL_TIMEOUT,
                pending_is_answer=True,
            )
            if response.status_code == 408:
                continue
            if _PROTOBUF in response.headers.get("content-type", ""):
                return response
            answer = _object(response)
            if "error" in answer:
                category = answer.get("category", "unknown")
                raise RequestFailed(str(answer["error"]), request_id=request_id, category=category)
            if answer.get("type") != "try_again":
                return response

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            # A lost beat is followed by the next; the calls themselves say what is wrong.
            with contextlib.suppress(httpx.TransportError):
                beat = {"session_id": self._session_id}
                await self._http.post("session_heartbeat", json=beat, timeout=10)


def _setting(name: str) -> str | None:
    return os.environ.get(f"TINSMITH_{name}") or os.environ.get(f"TINKER_{name}")


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise TinsmithError(
            f"{response.url} answered {response.text[:100]!r}: is this the service's address?"
        )
    return answer


def _refusal(response: httpx.Response) -> TinsmithError:
    sentence = _sentence(response)
    match response.status_code:
        case 401 | 403:
            return AuthenticationError(sentence)
        case 404 | 410:
            return NotFound(sentence)
        case status if status < 400:
            return TinsmithError(f"{response.url.path} redirects: give the service's own address")
        case _:
            return InvalidInput(sentence)


def _sentence(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or response.reason_phrase


def _seconds_asked_for(response: httpx.Response) -> float | None:
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return asked if 0 < asked <= 60 else None
