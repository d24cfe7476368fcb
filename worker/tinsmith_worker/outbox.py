"""Results on their way out: into the journal, and then the word to whoever waits for them.

The engine's thread hands a result over and goes on. One thread turns results into bytes in the order they
were handed over; the journal's own thread commits them.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal import usage
from tinsmith_api.journal.operations import LeaseLost, Operation
from tinsmith_api.journal.store import Store
from tinsmith_worker import answers
from tinsmith_worker.contract import Failure

log = logging.getLogger("tinsmith.worker")

Json = dict[str, Any]


class Outbox:
    """`epochs` are those of the leases this worker holds. A result is written under the epoch of the moment
    it is handed over: a lease that was lost and won back since is not the one it was computed under.
    `on_lost` hears of a run whose lease is another's by now, `on_broken` that the journal takes no
    results."""

    def __init__(
        self,
        journal: Store,
        worker_id: str,
        epochs: Mapping[str, int],
        *,
        announce: Callable[[str], None],
        on_lost: Callable[[str, int], None],
        on_broken: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._worker_id = worker_id
        self._epochs = epochs
        self._announce = announce
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="results")

    def result(
        self,
        operation: Operation,
        body: Callable[[], bytes],
        *,
        also: Callable[[sa.Connection], object] | None = None,
        used: Mapping[str, int] | None = None,
    ) -> None:
        """The outcome of an executed operation; nothing for one that was replayed. `used`: what it is
        billed for, its own tokens if left out."""
        if operation.state == ops.QUEUED:
            used = {operation.kind: operation.tokens} if used is None else used
            self._thread.submit(self._write_out, operation, self.epoch(operation), body, also, used)

    def epoch(self, operation: Operation) -> int:
        """Of the lease that an operation is executed under now; -1 if there is none."""
        return self._epochs.get(operation.subject, -1)

    def _write_out(
        self,
        operation: Operation,
        epoch: int,
        body: Callable[[], bytes],
        also: Callable[[sa.Connection], object] | None,
        used: Mapping[str, int],
    ) -> None:
        try:
            written = body()
            metrics = answers.metrics(operation.kind, written)
            self.commit(operation, epoch, also, body=written, metrics=metrics, used=used)
        except Exception as error:
            log.exception("the result of %s cannot be written out", operation.kind)
            self._without_result(operation, epoch, error)

    def _without_result(self, operation: Operation, epoch: int, error: BaseException) -> None:
        """It was executed, but its result cannot be kept."""
        failure = Failure(str(error))
        if not isinstance(error, InvalidInput):
            what = f"({type(error).__name__}, see the service's log)"
            failure = Failure(f"executed, but its result could not be kept {what}", "server")
        self.commit(
            operation,
            epoch,
            lambda c: answers.free_name(c, operation),
            error=_json(failure),
            has_effect=operation.kind in ops.CHANGING,
        )

    def failure(self, operation: Operation, failure: Failure, *, has_effect: bool = False) -> None:
        """has_effect: the operation changed the run although it failed, so a replay must execute it."""
        if operation.state == ops.QUEUED:
            epoch = self.epoch(operation)
            self._thread.submit(
                lambda: self.commit(
                    operation,
                    epoch,
                    lambda c: answers.free_name(c, operation),
                    error=_json(failure),
                    has_effect=has_effect,
                )
            )

    def commit(
        self,
        operation: Operation,
        epoch: int,
        also: Callable[[sa.Connection], object] | None = None,
        *,
        body: bytes | None = None,
        error: Json | None = None,
        has_effect: bool = False,
        metrics: Json | None = None,
        used: Mapping[str, int] | None = None,
    ) -> None:
        """Result, state and whatever belongs to them, in one transaction; then wake who waits."""
        is_sample = operation.kind == ops.SAMPLE

        def statement(connection: sa.Connection) -> None:
            finished = ops.finish(
                connection,
                operation.request_id,
                run_id=None if is_sample else operation.subject,
                sampler_id=operation.subject if is_sample else None,
                worker_id=self._worker_id,
                epoch=epoch,
                body=body,
                error=error,
                has_effect=has_effect,
                is_replayed=operation.kind in ops.CHANGING,
                started_at=operation.started_at,
                metrics=metrics,
            )
            if finished and also is not None:
                also(connection)
            if finished and used:
                usage.count(connection, operation, self._worker_id, used)

        self._journal.write(statement).add_done_callback(
            lambda done: self._committed(operation, epoch, body is not None, done)
        )

    def announce(self, operation: Operation) -> None:
        """It has its outcome: wake who waits for it, or for any sample of its sampler."""
        self._announce(operation.request_id)
        if operation.kind == ops.SAMPLE:
            self._announce(operation.subject)

    def handed_over(self) -> "Future[None]":
        """Done when the journal's thread has everything that was given to this one before."""
        return self._thread.submit(lambda: None)

    def flush(self) -> None:
        """Wait until everything handed over is on disk."""
        self.handed_over().result()
        self._journal.write(lambda c: None).result()

    def close(self) -> None:
        self._thread.shutdown()

    def _committed(self, operation: Operation, epoch: int, has_body: bool, done: "Future[None]") -> None:
        failure = done.exception()
        if failure is None:
            self.announce(operation)
        elif isinstance(failure, LeaseLost):
            log.warning("the lease of %s went to another worker", operation.subject)
            self._on_lost(operation.subject, epoch)
        elif has_body:
            log.error("the result of %s could not be written: %s", operation.kind, failure)
            self._without_result(operation, epoch, failure)
        else:
            # Not even the failure: better to start anew than to go on without anybody hearing of it.
            log.error("the journal takes no results: %s", failure)
            self._on_broken()


def _json(failure: Failure) -> Json:
    return {"error": failure.message, "category": failure.category}
