"""The promise of a result, which can be waited for or awaited."""

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Future(Generic[T]):
    """`.result()` blocks, `await` awaits; both may be repeated, and neither starts or stops the call.

    A TimeoutError, or the cancellation of a task that awaits, leaves the call running.
    """

    def __init__(self, inner: "concurrent.futures.Future[T]") -> None:
        self._inner = inner

    def result(self, timeout: float | None = None) -> T:
        """The result within `timeout` seconds, else TimeoutError; raises what the call raised."""
        return self._inner.result(timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.shield(asyncio.wrap_future(self._inner)).__await__()

    def done(self) -> bool:
        return self._inner.done()
