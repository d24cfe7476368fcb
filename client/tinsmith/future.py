"""The promise of a result, which can be waited for or awaited."""

import asyncio
import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from tinsmith.errors import ServiceUnavailable
from tinsmith.threads import Threads

T = TypeVar("T")
Other = TypeVar("Other")
Owner = TypeVar("Owner")
P = ParamSpec("P")
Made = TypeVar("Made", bound="Future[Any]")


class Future(Generic[T]):
    """`.result()` blocks, `await` awaits; both may be repeated, and neither starts or stops the call.

    A TimeoutError, or the cancellation of a task that awaits, leaves the call running: ask again. Whoever
    blocks fetches the result in their own thread; only who awaits borrows one.
    """

    def __init__(self, fetch: Callable[[float | None], T], threads: Threads) -> None:
        """`fetch(until)` gets the result, or raises TimeoutError when time.monotonic() passes `until`."""
        self._fetch = fetch
        self._threads = threads
        self._turn = threading.Lock()
        self._outcome: tuple[T] | Exception | None = None
        self._elsewhere: concurrent.futures.Future[T] | None = None

    def result(self, timeout: float | None = None) -> T:
        """The result within `timeout` seconds, else TimeoutError; raises what the call raised."""
        until = None if timeout is None else time.monotonic() + timeout
        if not self._turn.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            raise TimeoutError
        try:
            if self._outcome is None:
                self._outcome = self._settle(until)
                self._fetch = _fetched  # and with it the request's data
        finally:
            self._turn.release()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome[0]

    def _settle(self, until: float | None) -> tuple[T] | Exception:
        """What the call came to. Not to have heard of it in time is nothing it came to, and raised."""
        try:
            return (self._fetch(until),)
        except (TimeoutError, ServiceUnavailable):
            raise
        except Exception as error:
            return error

    def future(self) -> "concurrent.futures.Future[T]":
        """For what takes a future of the standard library: concurrent.futures.wait, as_completed, …"""
        if self._elsewhere is None or (self._elsewhere.done() and not self.done()):
            self._elsewhere = self._threads.run(self.result)
        return self._elsewhere

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(asyncio.wrap_future(self.future())).__await__()

    async def result_async(self, timeout: float | None = None) -> T:  # noqa: ASYNC109 - the official SDK's
        """As `await`, with a TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            return await self

    async def coroutine(self) -> T:
        """For what takes a coroutine and no other awaitable: asyncio.create_task(future.coroutine())."""
        return await self

    def then(self, read: Callable[[T], Other]) -> "Future[Other]":
        """The promise of what `read` makes of the result."""
        return Future(lambda until: read(self.result(left(until))), self._threads)

    def done(self) -> bool:
        """Whether the result was fetched already. It may be ready at the service before."""
        return self._outcome is not None


class ClientFuture(Future[T]):
    """The promise of a client, which may be used as the client itself: what is not here is asked of the
    client, once it is there.

    A subclass names the client's class as its second base: its methods then run on this object, and find
    the client's own attributes through `__getattr__`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {'ready' if self.done() else 'pending'}>"


def _fetched(until: float | None) -> Any:
    raise AssertionError


def left(until: float | None) -> float | None:
    """Seconds from now."""
    return None if until is None else max(0.0, until - time.monotonic())


# The official SDK has most methods twice. Here the second is made of the first:


def submitted(
    method: Callable[Concatenate[Owner, P], Made],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, Made]]:
    """`method` for `await client.method_async(…)`, which gives the future."""

    @functools.wraps(method)
    async def method_async(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Made:
        return method(self, *args, **kwargs)

    return method_async


def awaited(
    method: Callable[Concatenate[Owner, P], Future[T]],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]:
    """`method` for `await client.method_async(…)`, which gives the result."""

    @functools.wraps(method)
    async def method_async(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await method(self, *args, **kwargs)

    return method_async
