"""Threads that are borrowed where a caller must not wait."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")


# A thread without work for so long ends, and with it the sockets that it kept.
_IDLE_SECONDS = 60.0


class Threads:
    """At most `limit` daemon threads, each started when there is work that no other is free for. A program
    that ends does not wait for them, which it would for those of concurrent.futures."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._started = 0
        self._lock = threading.Lock()
        self._free = threading.Semaphore(0)
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()

    def run(self, call: Callable[[], T], done: "Future[T] | None" = None) -> "Future[T]":
        """`done`, or a new future, with what `call` returns."""
        done = Future() if done is None else done
        done.set_running_or_notify_cancel()
        with self._lock:
            self._open.add(done)
            self._work.put((done, call))
            if not self._free.acquire(blocking=False) and self._started < self._limit:
                self._started += 1
                threading.Thread(target=self._live, name="tinsmith", daemon=True).start()
        return done

    def close(self, error: Exception) -> None:
        """Everything not done yet ends with `error`, for whoever waits for it."""
        with self._lock:
            left = list(self._open)
            for _ in range(self._started):
                self._work.put(None)
            self._started = 0
        for done in left:  # without the lock: who waits may have work of their own to hand in
            with contextlib.suppress(InvalidStateError):
                done.set_exception(error)

    def _live(self) -> None:
        while (job := self._next()) is not None:
            done, call = job
            with contextlib.suppress(InvalidStateError):
                try:
                    done.set_result(call())
                except BaseException as error:  # it belongs to who waits for it
                    done.set_exception(error)
            with self._lock:
                self._open.discard(done)
            del job, done, call

    def _next(self) -> tuple["Future[Any]", Callable[[], Any]] | None:
        with self._lock:  # else work handed in between the two lines would count on this thread twice
            try:
                return self._work.get_nowait()
            except queue.Empty:
                self._free.release()
        while True:
            try:
                return self._work.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._free.acquire(blocking=False):  # else work that counts on a thread is on its way
                        self._started = max(0, self._started - 1)
                        return None


def in_event_loop() -> bool:
    """Whether this thread runs an event loop, which must not wait."""
    return asyncio._get_running_loop() is not None
