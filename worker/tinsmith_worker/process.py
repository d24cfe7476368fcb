"""A worker: one engine, fed by the journal.

Threads: the engine's (`run`, all computing), the intake's (everything before it), one that writes results
out, one that writes checkpoints and snapshots. They meet in queues; no state is shared but what is said here.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums
from tinsmith_api.journal import leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import ObjectStore
from tinsmith_api.journal.operations import LeaseLost, Operation
from tinsmith_api.journal.store import Store
from tinsmith_worker import answers, checkpoints
from tinsmith_worker.channel import Channel
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    Engine,
    Failure,
    LoraSpec,
    SampleOutput,
    Sampler,
    Work,
)
from tinsmith_worker.intake import (
    Adopt,
    Arrived,
    Cancel,
    Drain,
    Event,
    Finished,
    Intake,
    Prepared,
    SampleArrived,
)
from tinsmith_worker.schedule import FORWARD, FORWARD_BACKWARD, OTHER, Item, Schedule

log = logging.getLogger("tinsmith.worker")

Json = dict[str, Any]


@dataclass(frozen=True)
class WorkerSettings:
    """snapshot_seconds: a run is snapshotted this long after its last one, at an optim_step; what a killed
    worker must compute again is bounded by it. gap_seconds: how long a number may stay missing before the
    operations behind it fail; longer than a client goes on repeating a lost call (5 minutes)."""

    pass_tokens: int = 8192
    gap_seconds: float = 600.0
    snapshot_seconds: float = 15.0
    samplers_held: int = 32


@dataclass
class Held:
    """A run this worker holds."""

    lease: Lease
    prepared: dict[int, Prepared] = field(default_factory=dict)
    done_seq: int = -1  # the last operation that is in the adapter
    snapshot_seq: int = -1
    snapshot_at: float = 0.0
    snapshot_seconds: float = 0.0  # what the last one took to write
    writing: bool = False
    given_up: set[int] = field(default_factory=set)


class Worker:
    def __init__(
        self,
        *,
        worker_id: str,
        base_model: str,
        journal: Store,
        objects: ObjectStore,
        engine: Engine,
        sampler: Sampler,
        channel: Channel,
        settings: WorkerSettings,
    ) -> None:
        self.worker_id = worker_id
        self.base_model = base_model
        self.journal = journal
        self.objects = objects
        self.engine = engine
        self.sampler = sampler
        self.channel = channel
        self.settings = settings
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.intake = Intake(journal, objects, engine.facts, base_model, worker_id, self.inbox)
        self.schedule = Schedule(pass_tokens=settings.pass_tokens, gap_seconds=settings.gap_seconds)
        self.held: dict[str, Held] = {}
        self.sampling: dict[str, SampleArrived] = {}
        self.samplers: dict[str, None] = {}  # what the sampler holds, least recently used first
        self.alone: set[str] = set()
        self.draining = False
        self._results = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._storage = ThreadPoolExecutor(1, thread_name_prefix="storage")

    def run(self) -> None:
        """Serve until told to drain or until whoever started this process is gone."""
        facts = vars(self.engine.facts)
        self.journal.write(
            lambda c: leases.register_worker(c, self.worker_id, self.base_model, facts)
        ).result()
        threading.Thread(target=self._listen, name="intake", daemon=True).start()
        while not self.draining:
            self._receive(wait=not self.sampler.busy)
            started = time.monotonic()
            batch = self.schedule.next_batch(started)
            if batch:
                self._execute(batch)
            self._sample(until=2 * time.monotonic() - started)
            self._fail_overdue()
        self._drain()

    # -- the way in ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        self.intake.start()
        self.channel.send("ready")
        for messages in self.channel.messages():
            if ringing := [m[1] for m in messages if m[0] == "ring"]:
                self.intake.ring(ringing)
            for message in messages:
                if message[0] == "cancel":
                    self.inbox.put(Cancel(message[1]))
                elif message[0] == "drain":
                    self.inbox.put(Drain())
        log.info("the control plane is gone; draining")
        self.inbox.put(Drain())

    def _receive(self, *, wait: bool) -> None:
        """Take in what has arrived; if there is nothing to do, wait for something."""
        if wait and not self.schedule.ready():
            deadline = self.schedule.next_deadline()
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                self._take_in(self.inbox.get(timeout=timeout))
            except queue.Empty:
                return
        while not self.inbox.empty():
            self._take_in(self.inbox.get())

    def _take_in(self, event: Event) -> None:
        match event:
            case Arrived(prepared):
                if prepared.operation.subject in self.held:
                    self._enqueue(prepared)
            case Adopt():
                self._adopt(event)
            case SampleArrived():
                self._begin_sample(event)
            case Finished(run_id):
                self._drop(run_id)
            case Cancel(request_id):
                self.sampler.cancel(request_id)
                if self.sampling.pop(request_id, None):
                    self._finish_sample(request_id, error=Failure("the request was cancelled"))
            case Drain():
                self.draining = True

    def _adopt(self, event: Adopt) -> None:
        lease = event.lease
        self.engine.drop(lease.run_id)
        if event.snapshot is not None:
            self.engine.restore(lease.run_id, event.snapshot)
        self.held[lease.run_id] = Held(
            lease, done_seq=lease.snapshot_seq, snapshot_seq=lease.snapshot_seq, snapshot_at=time.monotonic()
        )
        self.schedule.open_run(lease.run_id, lease.tenant_id, lease.snapshot_seq + 1)
        for prepared in event.operations:
            if event.broken and prepared.operation.state == ops.QUEUED:
                self._finish(prepared.operation, error=Failure(event.broken, "server"))
            else:
                self._enqueue(prepared)

    def _enqueue(self, prepared: Prepared) -> None:
        operation = prepared.operation
        held = self.held[operation.subject]
        now = time.monotonic()
        if operation.state == ops.FAILED or (operation.state == ops.DONE and not _changes_state(prepared)):
            self.schedule.consume(operation.subject, operation.seq_id, now)
            return
        group = OTHER
        if operation.kind == ops.FORWARD_BACKWARD and prepared.failure is None:
            group = FORWARD if prepared.given.forward_only else FORWARD_BACKWARD
        item = Item(
            operation.request_id,
            operation.subject,
            operation.seq_id,
            group,
            operation.tokens,
            alone=operation.request_id in self.alone,
        )
        if self.schedule.add(item, now):
            held.prepared[operation.seq_id] = prepared
        elif operation.seq_id in held.given_up:
            self._finish(operation, error=Failure("this call arrived after it had been given up as missing"))

    # -- executing -----------------------------------------------------------------------------------

    def _execute(self, batch: list[Item]) -> None:
        work = [(item, self.held[item.run_id].prepared.pop(item.seq_id)) for item in batch]
        if batch[0].group == OTHER:
            for item, prepared in work:
                if item.run_id in self.held:  # an earlier one of this batch may have lost it
                    self._call(prepared)
        else:
            self._pass([prepared for _, prepared in work])

    def _pass(self, work: list[Prepared]) -> None:
        """forward_backwards (or forwards) of many runs, together."""
        if not (work := self._without_orphans(work)):
            return
        try:
            outputs = self.engine.forward_backward([Work(p.operation.subject, p.given) for p in work])
        except Exception as error:  # whatever the engine raises; its gradients are undefined now
            self._recover(work, error)
            return
        for prepared, output in zip(work, outputs, strict=True):
            self._done(prepared.operation, functools.partial(datums.write_output, prepared.given, output))

    def _without_orphans(self, work: list[Prepared]) -> list[Prepared]:
        """Fail the operations of runs whose creation failed."""
        alive = []
        for prepared in work:
            if self.engine.holds(prepared.operation.subject):
                alive.append(prepared)
            else:
                self._failed(
                    prepared.operation, Failure("this run was never created: its create_model failed")
                )
        return alive

    def _recover(self, work: list[Prepared], error: Exception) -> None:
        """A pass failed half-way. Its runs go back to their snapshots and are replayed; what shared the pass
        is tried again one by one, and the operation that fails alone is the one that fails."""
        log.exception("a pass over %d operations failed", len(work))
        if len(work) == 1:
            operation = work[0].operation
            self._failed(operation, Failure(f"the engine failed on this call: {error}", "server"))
            if operation.state == ops.DONE:
                self._give_up_run(operation.subject, error)
                return
        self._results.submit(lambda: None).result()
        for run_id in {p.operation.subject for p in work}:
            self.alone.update(p.operation.request_id for p in work if p.operation.subject == run_id)
            self.schedule.close_run(run_id)
            self.held.pop(run_id)
            self.journal.write(lambda c: None).result()  # what was handed to the writer is on disk
            self.intake.adopt(run_id)

    def _give_up_run(self, run_id: str, error: Exception) -> None:
        """What was computed once could not be computed again: the run is not what its results say it is."""
        failure = Failure(f"the run could not be brought back after a fault: {error}", "server")
        for prepared in self.held[run_id].prepared.values():
            if prepared.operation.state == ops.QUEUED:
                self._finish(prepared.operation, error=failure)
        self._drop(run_id)

    def _call(self, prepared: Prepared) -> None:
        """An operation that takes no pass."""
        operation, given = prepared.operation, prepared.given
        if prepared.failure is not None:
            self._failed(operation, prepared.failure)
            return
        if operation.kind != ops.CREATE_MODEL and not self._without_orphans([prepared]):
            return
        try:
            match operation.kind:
                case ops.CREATE_MODEL:
                    self._create(prepared)
                case ops.OPTIM_STEP:
                    metrics = self.engine.optim_step(operation.subject, AdamParams(**given["adam_params"]))
                    if isinstance(metrics, Failure):
                        self._failed(operation, metrics)
                    else:
                        self._done(operation, lambda: answers.optim_step(metrics))
                        self._snapshot_if_due(operation.subject)
                case ops.LOAD_WEIGHTS:
                    assert prepared.loaded is not None
                    self.engine.load(operation.subject, prepared.loaded, optimizer=given["optimizer"])
                    self._done(operation, lambda: answers.json_body({"path": given["path"]}))
                    self._snapshot(operation.subject)
                case ops.SAVE_WEIGHTS | ops.SAVE_WEIGHTS_FOR_SAMPLER:
                    self._save(operation, given)
        except InvalidInput as error:
            self._failed(operation, Failure(str(error)))
        except Exception as error:
            log.exception("%s failed", operation.kind)
            self._failed(operation, Failure(f"{operation.kind} failed: {error}", "server"))

    def _create(self, prepared: Prepared) -> None:
        operation, given = prepared.operation, prepared.given
        lora = self.held[operation.subject].lease.lora
        self.engine.create(operation.subject, LoraSpec(**lora))
        if prepared.loaded is not None:
            self.engine.load(operation.subject, prepared.loaded, optimizer=given["optimizer"])
        body = {"model_id": operation.subject}
        if given.get("path"):
            body["path"] = given["path"]
        self._done(operation, lambda: answers.json_body(body))
        if prepared.loaded is not None:
            # Replaying this would need the checkpoint, which its owner may delete.
            self._snapshot(operation.subject)

    def _save(self, operation: Operation, given: Json) -> None:
        """Copy the state here and now; write it out beside the training that goes on."""
        held = self.held[operation.subject]
        held.done_seq = operation.seq_id
        if operation.state == ops.DONE:
            return
        # A checkpoint is what load_weights reads: it never restores a gradient, a sampler no moments either.
        state = replace(self.engine.state(operation.subject), gradient=None)
        if operation.kind == ops.SAVE_WEIGHTS_FOR_SAMPLER:
            state = replace(state, moment1=None, moment2=None, step=0)

        def write() -> None:
            try:
                size = self.objects.put(given["object_prefix"], checkpoints.write(state, self.base_model))
            except Exception as error:
                # A full disk is the world's error: a line says it all.
                log.error(
                    "saving %s failed: %s", given["path"], error, exc_info=not isinstance(error, OSError)
                )
                self._finish(
                    operation, error=Failure(f"the checkpoint could not be written: {error}", "server")
                )
                return
            row = answers.checkpoint_row(operation, given, held.lease.lora, size)
            body = answers.json_body(answers.saved(operation, given))
            self._commit(operation, lambda c: answers.publish(c, operation, given, row), body=body)

        self._storage.submit(write)

    # -- the way out ---------------------------------------------------------------------------------

    def _done(self, operation: Operation, body: Callable[[], bytes]) -> None:
        self.held[operation.subject].done_seq = operation.seq_id
        if operation.state == ops.QUEUED:
            self._results.submit(lambda: self._commit(operation, None, body=body()))

    def _failed(self, operation: Operation, failure: Failure) -> None:
        if operation.subject in self.held:
            self.held[operation.subject].done_seq = operation.seq_id
        if operation.state == ops.QUEUED:
            self._results.submit(lambda: self._finish(operation, error=failure))

    def _finish(self, operation: Operation, *, error: Failure) -> None:
        self._commit(
            operation,
            lambda c: answers.free_name(c, operation),
            error={"error": error.message, "category": error.category},
        )

    def _commit(
        self,
        operation: Operation,
        also: Callable[[sa.Connection], object] | None,
        *,
        body: bytes | None = None,
        error: Json | None = None,
    ) -> None:
        """Result, state and whatever belongs to them, in one transaction; then wake who waits."""
        is_run = operation.kind != ops.SAMPLE
        epoch = self.intake.known.get(operation.subject, -1)

        def statement(connection: sa.Connection) -> None:
            finished = ops.finish(
                connection,
                operation.request_id,
                run_id=operation.subject if is_run else None,
                worker_id=self.worker_id,
                epoch=epoch,
                body=body,
                error=error,
            )
            if finished and also is not None:
                also(connection)

        self.journal.write(statement).add_done_callback(lambda done: self._committed(operation, done))

    def _committed(self, operation: Operation, done: "Future[None]") -> None:
        failure = done.exception()
        if failure is None:
            self.channel.send("done", operation.request_id)
        elif isinstance(failure, LeaseLost):
            log.warning("the lease of %s went to another worker", operation.subject)
            self.inbox.put(Finished(operation.subject))
        else:
            log.error("a result could not be written: %s", failure)
            self.inbox.put(Drain())  # a journal that takes no results: start anew rather than go on blind

    def _drop(self, run_id: str) -> None:
        self.engine.drop(run_id)
        self.schedule.close_run(run_id)
        self.held.pop(run_id, None)
        self.intake.forget(run_id)

    def _fail_overdue(self) -> None:
        for run_id, missing, behind in self.schedule.overdue(time.monotonic()):
            held = self.held[run_id]
            held.given_up.update(missing)
            tenant_id = held.lease.tenant_id
            give_up = functools.partial(
                ops.give_up, run_id=run_id, seq_ids=missing, tenant_id=tenant_id, base_model=self.base_model
            )
            self.journal.write(give_up).result()
            names = ", ".join(map(str, missing))
            failure = Failure(
                f"not executed: call {names} of this run, which comes before it, did not arrive within "
                f"{self.settings.gap_seconds:g} s"
            )
            for seq_id in behind:
                self._failed(held.prepared.pop(seq_id).operation, failure)

    # -- snapshots -----------------------------------------------------------------------------------

    def _snapshot_if_due(self, run_id: str) -> None:
        held = self.held[run_id]
        # A snapshot that takes long to write is taken more rarely: at most a twentieth of the time.
        interval = max(self.settings.snapshot_seconds, 20 * held.snapshot_seconds)
        if not held.writing and time.monotonic() - held.snapshot_at >= interval:
            self._snapshot(run_id)

    def _snapshot(self, run_id: str) -> None:
        """Copy the adapter; write it and move the run's recovery point beside the training that goes on."""
        held = self.held[run_id]
        state, seq_id = self.engine.state(run_id), held.done_seq
        held.writing = True
        # Operations up to seq_id are in the snapshot and will not be executed again, so their results must
        # be on disk first. They were handed to the results thread before this line.
        results_written = self._results.submit(lambda: None)

        def write() -> None:
            started = time.monotonic()
            key = f"snapshots/{run_id}/{seq_id}-{uuid4().hex[:8]}"
            try:
                self.objects.put(key, checkpoints.write(state, self.base_model))
                results_written.result()

                def record(connection: sa.Connection) -> str | None:
                    return ops.record_snapshot(
                        connection,
                        run_id,
                        seq_id=seq_id,
                        key=key,
                        worker_id=self.worker_id,
                        epoch=held.lease.epoch,
                    )

                before = self.journal.write(record).result()
                held.snapshot_seq = seq_id
                if before:
                    self.objects.delete(before)
            except LeaseLost:
                self.objects.delete(key)
                self.inbox.put(Finished(run_id))
            except Exception:
                log.exception("a snapshot of %s could not be written; the last one stands", run_id)
            finally:
                held.snapshot_at = time.monotonic()
                held.snapshot_seconds = held.snapshot_at - started
                held.writing = False

        self._storage.submit(write)

    def _drain(self) -> None:
        """Hand over: every run snapshotted, every result written, then leave."""
        self._storage.submit(lambda: None).result()
        for run_id, held in self.held.items():
            if held.done_seq > held.snapshot_seq and self.engine.holds(run_id):
                self._snapshot(run_id)
        self._storage.shutdown()
        self._results.shutdown()
        self.journal.write(lambda c: leases.stop_worker(c, self.worker_id)).result()
        self.journal.close()

    # -- sampling ------------------------------------------------------------------------------------

    def _begin_sample(self, event: SampleArrived) -> None:
        request_id = event.operation.request_id
        self.sampling[request_id] = event
        if event.failure is not None or event.given is None:
            self._finish_sample(request_id, error=event.failure)
            return
        if prefix := event.task.object_prefix:
            try:
                self._hold(prefix, event.weights)
            except InvalidInput as error:
                self._finish_sample(request_id, error=Failure(str(error)))
                return
        self.sampler.add(event.given)

    def _hold(self, prefix: str, weights: AdapterState | None) -> None:
        """Have the sampler hold these weights, and let go of the ones not used for longest."""
        if not self.sampler.holds(prefix):
            # The intake leaves weights out that it sent before; they may have been let go since.
            self.sampler.hold(prefix, weights if weights is not None else self.intake.load(prefix))
        self.samplers.pop(prefix, None)
        self.samplers[prefix] = None
        in_use = {event.task.object_prefix for event in self.sampling.values()}
        idle = [held for held in self.samplers if held not in in_use]
        for old in idle[: max(0, len(self.samplers) - self.settings.samplers_held)]:
            del self.samplers[old]
            self.intake.samplers.discard(old)
            self.sampler.release(old)

    def _sample(self, *, until: float) -> None:
        """Decode for about as long as the pass before it took, so that neither starves the other."""
        while self.sampler.busy:
            try:
                for finished in self.sampler.step():
                    if isinstance(finished, SampleOutput):
                        self._finish_sample(finished.request_id, output=finished)
                    else:
                        self._finish_sample(finished[0], error=finished[1])
            except Exception as error:
                log.exception("sampling failed")
                for request_id in list(self.sampling):
                    self.sampler.cancel(request_id)
                    self._finish_sample(request_id, error=Failure(f"sampling failed: {error}", "server"))
            if time.monotonic() >= until:
                return

    def _finish_sample(
        self, request_id: str, *, output: SampleOutput | None = None, error: Failure | None = None
    ) -> None:
        event = self.sampling.pop(request_id, None)
        if event is None:
            return  # cancelled
        self.intake.sampling.discard(request_id)
        if output is None:
            failure = error or Failure("sampling failed", "server")
            self._results.submit(lambda: self._finish(event.operation, error=failure))
            return
        self._results.submit(
            lambda: self._commit(
                event.operation,
                lambda c: answers.record_sequences(c, event.operation, event.task, output),
                body=answers.sampled(output),
            )
        )


def _changes_state(prepared: Prepared) -> bool:
    """Whether replaying a run needs this operation."""
    kind = prepared.operation.kind
    if kind == ops.FORWARD_BACKWARD:
        return prepared.failure is not None or not prepared.given.forward_only
    return kind not in (ops.SAVE_WEIGHTS, ops.SAVE_WEIGHTS_FOR_SAMPLER)
