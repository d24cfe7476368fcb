"""One service and one key: every byte between a client and the service passes here."""

import concurrent.futures
import functools
import itertools
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from tinsmith.errors import (
    AuthenticationError,
    BillingError,
    InvalidInput,
    NotFound,
    RequestFailed,
    ServiceUnavailable,
    TinsmithError,
)
from tinsmith.future import left
from tinsmith.key import Key
from tinsmith.progress import Progress
from tinsmith.threads import Threads, in_event_loop

T = TypeVar("T")
GIVE_UP_SECONDS = 300.0
"""A service that answered before may be away this long, e.g. to restart; one that never did, ten."""
_FIRST_CONTACT_SECONDS = 10.0
# The service holds a long poll for up to 30 s.
_POLL_SECONDS = 45.0
# Samples are submitted side by side by so many threads, and waited for by so many: more sockets than this
# would run into the usual limit of 1024 open files. Everything else is awaited by others, so that it never
# stands in line behind samples.
_SENDERS, _SAMPLE_WAITERS, _WAITERS = 32, 400, 64
# A service that usually takes so long to take a call on is far away or busy: calls are sent to it from
# another thread, so that a step's two are under way together and not one after the other's answer.
_SLOW_SECONDS, _FIRST_ANSWERS = 0.02, 10
# While an account is not in order, a call is repeated so often, as the official SDK does.
_BILLING_PAUSE_SECONDS = 5.0
# The version of the wire that this client speaks, by the official SDK's number.
WIRE_VERSION = "0.38.0"

JSON, PROTOBUF = "application/json", "application/x-protobuf"


class Sent(concurrent.futures.Future[httpx.Response]):
    """The answer to a request. Whoever was told that the service was away and asks again has the same request
    sent again: the call keeps its number, so no other one waits for it in vain."""

    again: "Callable[..., Sent] | None" = None

    def __init__(self) -> None:
        super().__init__()
        self._was_away = False
        self._later: Sent | None = None

    def result(self, timeout: float | None = None) -> httpx.Response:
        if self._was_away:
            assert self.again is not None
            until = None if timeout is None else time.monotonic() + timeout
            later = self._later = self._later or self.again(until=until)
            try:
                return later.result(timeout)
            except TimeoutError:
                if later.done():  # it was sent for no longer than that
                    self._later = None
                raise
        try:
            return super().result(timeout)
        except ServiceUnavailable:
            self._was_away = True
            raise

    def set_result(self, result: httpx.Response) -> None:
        self.again = None  # and with it the request's body
        super().set_result(result)


class Connection:
    """Safe to use from many threads. Starts none itself, but where a caller must or had better not wait."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        give_up_seconds: float = GIVE_UP_SECONDS,
        headers: Mapping[str, str] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.base_url = (base_url or _setting("BASE_URL") or "http://127.0.0.1:8000").rstrip("/")
        self.key = Key(api_key or _setting("API_KEY"), f"{self.base_url}/api/v1/auth/token")
        self.progress = Progress(progress)
        self.waiters = Threads(_WAITERS)
        self.sample_waiters = Threads(_SAMPLE_WAITERS)
        self._senders = Threads(_SENDERS)
        self._give_up_seconds = give_up_seconds
        self._answered_once = False
        self._answers, self._usual_seconds = 0, 0.0
        self._closed = threading.Event()
        self._config: dict[str, Any] | None = None
        self._greeting = threading.Lock()
        self._headers = {"Accept": JSON, **(headers or {})}
        # Reading the certificates takes a quarter of a second; plain HTTP needs none.
        self._tls = httpx.create_ssl_context(verify=not self.base_url.startswith("http://"))
        self._own = threading.local()
        self._clients: weakref.WeakSet[httpx.Client] = weakref.WeakSet()

    def send(
        self,
        method: str,
        path: str,
        *,
        aside: bool | None = None,
        fatal: tuple[int, ...] = (),
        patience: float | None = None,
        until: float | None = None,
        **request: Any,
    ) -> Sent:
        """Send the same bytes until the service answers; done when it has, unless an event loop runs in this
        thread, the service answers slowly, or the caller wants it `aside`. Calls carry their number (seq_id):
        one whose answer got lost is not applied twice. `until` is when time.monotonic() makes it a
        TimeoutError."""
        sent, since = Sent(), time.monotonic()
        options = {"fatal": fatal, "patience": patience, **request}
        sent.again = functools.partial(self.send, method, path, aside=aside, **options)
        if (in_event_loop() or self._is_slow()) if aside is None else aside:
            here = functools.partial(self.send, method, path, aside=False, until=until, **options)
            self._senders.run(lambda: here().result(), sent)
            return sent
        try:
            if self._config is None and path != "client/config":
                _ = self.config
            for attempt in itertools.count():
                if self._closed.is_set():
                    raise TinsmithError("this client is closed")
                wait = min(0.5 * 2**attempt, 10) * random.uniform(0.75, 1)  # noqa: S311 - not a secret
                give_up = self._give_up_seconds if patience is None else patience
                asked = time.monotonic()
                try:
                    response = self._http().request(method, path, timeout=_timeout(until), **request)
                except httpx.TransportError as error:
                    trouble: TinsmithError = self._away(path, f"{type(error).__name__} {error}".strip())
                    if not self._answered_once:
                        give_up = min(give_up, _FIRST_CONTACT_SECONDS)
                else:
                    self._answered_once = True
                    if path != "retrieve_future":  # which takes as long as what it waits for
                        self._answers += 1
                        self._usual_seconds += 0.2 * (time.monotonic() - asked - self._usual_seconds)
                    # 304: what the caller has is still right. 408: there is no result yet.
                    status = response.status_code
                    if response.is_success or status == 304 or (status == 408 and path == "retrieve_future"):
                        sent.set_result(response)
                        return sent
                    if status in fatal or not _is_passing(response):
                        raise _refusal(response)
                    trouble = self._away(path, f"{status} {_sentence(response)}")
                    wait = _seconds_asked_for(response) or wait
                    if status == 402:
                        trouble, wait = _refusal(response), _BILLING_PAUSE_SECONDS
                        give_up = (self._config or {}).get("billing_exception_max_pause_duration_sec", 3600)
                now = time.monotonic()
                if until is not None and now + wait > until:
                    raise TimeoutError
                if now + wait > since + give_up:
                    raise trouble
                self._closed.wait(wait)
        except Exception as error:
            # It belongs to who asks for the answer.
            sent.set_exception(error)
        return sent

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return read_json(self.send("GET", path, aside=False, params=query).result())

    def post(self, path: str, fields: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """POST a JSON request, without its fields that are None; the JSON answer."""
        return read_json(self.send("POST", path, aside=False, json=given(fields), **options).result())

    def run(self, call: Callable[[], T], threads: Threads | None = None) -> "concurrent.futures.Future[T]":
        """What `call` returns; called in this thread, unless that runs an event loop."""
        if in_event_loop():
            return (threads or self.waiters).run(call)
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done

    def promised(self, call: Callable[[], T]) -> Callable[[float | None], T]:
        """As `run`, for a Future to fetch: whoever was told that the service was away and asks again has
        `call` made again."""
        made, was_away = self.run(call), False

        def fetch(until: float | None) -> T:
            nonlocal made, was_away
            if was_away:
                made, was_away = self.run(call), False
            try:
                return made.result(left(until))
            except ServiceUnavailable:
                was_away = True
                raise

        return fetch

    def result(self, sent: Sent, accept: str = JSON, until: float | None = None) -> httpx.Response:
        """The result that the answer to a submission promised; waits for as long as it takes."""
        request_id = read_json(sent.result(left(until)))["request_id"]
        asked = {"request_id": request_id, "allow_metadata_only": False}
        with self.progress.waiting():
            while True:
                response = self.send(
                    "POST",
                    "retrieve_future",
                    aside=False,
                    json=asked,
                    headers={"Accept": accept},
                    until=until,
                ).result()
                if PROTOBUF in response.headers.get("content-type", ""):
                    return response
                answer = read_json(response)
                if "error" in answer:
                    category = answer.get("category", "unknown")
                    raise RequestFailed(str(answer["error"]), request_id, category)
                if response.status_code != 408 and answer.get("type") != "try_again":
                    return response
                self.progress.note(answer.get("queue_state_reason"))
                if until is not None and time.monotonic() >= until:
                    raise TimeoutError

    @property
    def config(self) -> dict[str, Any]:
        """What the service told us about itself when it was first asked for anything."""
        with self._greeting:
            if self._config is None:
                try:
                    config = self.post("client/config", {"sdk_version": WIRE_VERSION})
                except NotFound:
                    config = {}
                self.key.is_exchanged = bool(config.get("pjwt_auth_enabled"))
                self._config = config
        return self._config

    def _is_slow(self) -> bool:
        return self._answers >= _FIRST_ANSWERS and self._usual_seconds > _SLOW_SECONDS

    def _http(self) -> httpx.Client:
        """Of this thread. One for all would look through its hundreds of connections for every request."""
        client: httpx.Client | None = getattr(self._own, "http", None)
        if client is None:
            base_url = f"{self.base_url}/api/v1/"
            client = httpx.Client(base_url=base_url, headers=self._headers, auth=self.key, verify=self._tls)
            self._own.http = client
            self._clients.add(client)
        return client

    def _away(self, path: str, why: str) -> ServiceUnavailable:
        return ServiceUnavailable(f"{self.base_url} gives no answer to {path}: {why}")

    def close(self) -> None:
        """Whatever is awaited ends with an error now, and so does a wait in another thread once its poll
        returns."""
        self._closed.set()
        self.progress.close()
        for threads in (self._senders, self.waiters, self.sample_waiters):
            threads.close(TinsmithError("this client is closed"))
        for client in list(self._clients):
            client.close()


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def read_json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise TinsmithError(
            f"{response.url} answered {response.text[:100]!r}: is this the service's address?"
        )
    return answer


def _setting(name: str) -> str | None:
    return os.environ.get(f"TINSMITH_{name}") or os.environ.get(f"TINKER_{name}")


def _timeout(until: float | None) -> httpx.Timeout:
    seconds = left(until)
    read = _POLL_SECONDS if seconds is None else min(_POLL_SECONDS, max(seconds, 0.001))
    return httpx.Timeout(60, connect=5, read=read, pool=None)


def _is_passing(response: httpx.Response) -> bool:
    """Whether the same request may have another answer later. A 400 without a body comes from a proxy."""
    status = response.status_code
    return status in (402, 408, 409, 429) or status >= 500 or (status == 400 and not response.content)


def _refusal(response: httpx.Response) -> TinsmithError:
    kinds = {
        401: AuthenticationError,
        402: BillingError,
        403: AuthenticationError,
        404: NotFound,
        410: NotFound,
    }
    sentence = _sentence(response)
    if response.is_redirect:
        error = TinsmithError(f"{response.url.path} redirects: give the service's own address")
    else:
        error = kinds.get(response.status_code, InvalidInput)(sentence)
    error.status_code = response.status_code
    return error


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
