"""Checkpoints and snapshots on their way to the object store, beside the training that goes on.

One thread, in the order of asking. A snapshot is recorded only once everything it covers has its result.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from tinsmith.errors import InvalidInput
from tinsmith_api.journal import age, metrics, snapshots, usage
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.checkpoints import forget_garbage
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import Body, ObjectStore
from tinsmith_api.journal.operations import LeaseLost, Operation
from tinsmith_api.journal.snapshots import Unfinished
from tinsmith_api.journal.store import Store
from tinsmith_worker import answers, checkpoints, in_pieces
from tinsmith_worker.contract import AdapterState, Failure, StateOnTheWay
from tinsmith_worker.in_pieces import Held
from tinsmith_worker.outbox import Outbox

log = logging.getLogger("tinsmith.worker")

Json = dict[str, Any]


_MAX_PAUSE_SECONDS = 5.0
# What waits to be written is a copy of an adapter, and whoever comes next stands behind it.
_COPIES_AT_MOST = 16
# Copies that still come from a device: with more of them another snapshot is put off, rather than waited for.
_ON_THE_WAY_BYTES = 2 << 30


@dataclass
class RecoveryPoint:
    """Where a run would be restored to, and how it came to be there."""

    seq_id: int
    taken_at: float
    computed_seconds: float = 0.0  # since then
    write_seconds: float = 0.0
    writing: bool = False


class Archive:
    """`seconds`: a run is snapshotted this long after its last snapshot, one that computes little more
    rarely. `patience_seconds`: so long after it was asked for, a checkpoint that could not be written is
    given up; a snapshot at once, the next one comes. `room_bytes`: how much may wait to be written before
    `has_room` says no; `on_room` hears that it says yes again.
    """

    def __init__(
        self,
        journal: Store,
        objects: ObjectStore,
        outbox: Outbox,
        *,
        base_model: str,
        seconds: float,
        patience_seconds: float = 120.0,
        room_bytes: int = 1 << 40,
        on_lost: Callable[[str, int], None],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._objects = objects
        self._outbox = outbox
        self._base_model = base_model
        self._seconds = seconds
        self._patience_seconds = patience_seconds
        self._on_lost = on_lost
        self._room_bytes = room_bytes
        self._on_room = on_room
        self._copies: list[StateOnTheWay] = []  # those that wait, in the order of asking
        self._counting = threading.Lock()
        self._is_hurried = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")

    @property
    def has_room(self) -> bool:
        """Whether another copy of an adapter may be handed over. The first always may."""
        copies = self._copies
        size = sum(copy.nbytes for copy in copies)
        return not copies or (len(copies) < _COPIES_AT_MOST and size < self._room_bytes)

    def _submit(self, state: StateOnTheWay, write: Callable[[], None]) -> None:
        with self._counting:
            self._copies = [*self._copies, state]
        self._thread.submit(self._run, write)

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        finally:
            with self._counting:
                was_full = not self.has_room
                self._copies = self._copies[1:]
            if was_full:
                self._on_room()

    def save(self, operation: Operation, given: Json, lora: Json, copy: StateOnTheWay) -> None:
        """Write a checkpoint and finish the operation that asked for it."""
        # From now, and not from when its turn comes: a store that is gone is gone for all that wait.
        until = time.monotonic() + self._patience_seconds
        epoch = self._outbox.epoch(operation)

        def write() -> None:
            try:
                state = _as_saved(copy.arrival.result(), with_optimizer=operation.kind == ops.SAVE_WEIGHTS)
                size = self._put(given["object_prefix"], given, state, until)
            except Exception as error:
                if self._is_hurried:
                    return
                if isinstance(error, InvalidInput):
                    self._outbox.failure(operation, Failure(str(error)))
                    return
                # A full disk is the world's error: a line says it all.
                log.error(
                    "saving %s failed: %s", given["path"], error, exc_info=not isinstance(error, OSError)
                )
                self._outbox.failure(
                    operation, Failure(f"the checkpoint could not be written: {error}", "server")
                )
                return
            row = answers.checkpoint_row(operation, given, lora, size)
            body = answers.json_body(answers.saved(given, size))
            self._outbox.commit(
                operation,
                epoch,
                lambda c: answers.publish(c, operation, given, row),
                body=body,
                used={usage.CHECKPOINT: 1},
            )

        self._submit(copy, write)

    def _writing(self, prefix: str, given: Json, state: AdapterState) -> Callable[[], int]:
        if not isinstance(state, Held):
            files = self._files(given, state)
            return lambda: self._objects.put(prefix, files)
        is_export = given["kind"] == "external_weights"
        if is_export and given.get("age_encryption_recipients"):
            raise InvalidInput(
                "weights that are cut among several processes are not encrypted: leave out the recipients"
            )
        pieces = in_pieces.export(state) if is_export else in_pieces.write(state)
        return lambda: self._objects.put_stream(prefix, pieces)

    def _files(self, given: Json, state: AdapterState) -> dict[str, Body]:
        if given["kind"] != "external_weights":
            return checkpoints.write(state, self._base_model)
        files = checkpoints.export(state, self._base_model)
        recipients = given.get("age_encryption_recipients")
        return age.encrypt(files, age.read_recipients(recipients)) if recipients else files

    def _put(self, prefix: str, given: Json, state: AdapterState, until: float) -> int:
        write = self._writing(prefix, given, state)
        pause = 0.1
        while True:
            try:
                return write()
            except OSError as error:
                if self._is_hurried or time.monotonic() + pause > until:
                    raise
                log.warning("%s; trying again", error)
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    def is_due(self, point: RecoveryPoint) -> bool:
        # What is repeated after a crash is computing: a run that did little of it has time.
        is_busy = point.computed_seconds >= self._seconds / 4
        # A snapshot that takes long to write is taken more rarely: at most a twentieth of the time.
        interval = max(self._seconds if is_busy else 8 * self._seconds, 20 * point.write_seconds)
        is_time = not point.writing and time.monotonic() - point.taken_at >= interval
        return is_time and self.has_room and self._on_the_way_bytes() < _ON_THE_WAY_BYTES

    def _on_the_way_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies if not copy.arrival.done())

    def snapshot(
        self,
        lease: Lease,
        point: RecoveryPoint,
        seq_id: int,
        copy: StateOnTheWay,
        *,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Write `copy`, the run after operation `seq_id`, and move its recovery point there; `then` is
        called in the end, whether it was moved or not."""
        point.writing = True
        point.computed_seconds = 0.0
        # Operations up to seq_id will not be executed again, so their results must be on disk first. They
        # were handed to the outbox before this line.
        results_handed_over = self._outbox.handed_over()
        key = f"{lease.tenant_id}/snapshots/{lease.run_id}/{seq_id}-{uuid4().hex[:8]}"

        def write() -> None:
            started = time.monotonic()
            try:
                # If this process dies before it is recorded, somebody has to know of the files.
                self._journal.write(lambda c: snapshots.announce(c, key)).result()
                self._writing(key, {"kind": "snapshot"}, copy.arrival.result())()
                results_handed_over.result()
                before = self._journal.write(
                    lambda c: snapshots.record(
                        c,
                        lease.run_id,
                        seq_id=seq_id,
                        key=key,
                        worker_id=lease.worker_id,
                        epoch=lease.epoch,
                    )
                ).result()
                point.seq_id = seq_id
                metrics.SNAPSHOTS.inc()
                if before:
                    self._delete(before)
            except LeaseLost:
                self._delete(key)
                self._on_lost(lease.run_id, lease.epoch)
            except Unfinished as missing:
                # A result was refused by the journal. The run stays recoverable from where it was.
                log.error("no snapshot, the last one stands: %s", missing)
                self._delete(key)
            except OSError as error:
                log.error(
                    "a snapshot of %s could not be written; the last one stands: %s", lease.run_id, error
                )
            except Exception:
                log.exception("a snapshot of %s could not be written; the last one stands", lease.run_id)
            finally:
                point.taken_at = time.monotonic()
                point.write_seconds = point.taken_at - started
                point.writing = False
                metrics.SNAPSHOT_SECONDS.observe(point.write_seconds)
                then()

        self._submit(copy, write)

    def _delete(self, prefix: str) -> None:
        """At once. If that fails, or this process does, whoever collects garbage will."""
        with contextlib.suppress(OSError):
            self._objects.delete(prefix)
            self._journal.write(lambda c: forget_garbage(c, prefix))

    def hurry(self) -> None:
        """From now on wait for nothing: a checkpoint that cannot be written is left to the next worker."""
        self._is_hurried = True

    def flush(self) -> None:
        """Wait until everything asked for is written."""
        self._thread.submit(lambda: None).result()

    def afterwards(self, do: Callable[[], None]) -> None:
        """Once everything asked for is written."""
        self._thread.submit(do)

    def close(self) -> None:
        """Write what was asked for."""
        self._thread.shutdown()


def _as_saved(state: AdapterState, *, with_optimizer: bool) -> AdapterState:
    """A checkpoint is what load_weights reads: it never restores a gradient, a sampler no moments either."""
    if with_optimizer:
        return replace(state, gradient=None)
    return replace(state, moment1=None, moment2=None, gradient=None, step=0)
