"""A worker: one engine, fed by the journal.

Threads: the engine's (`run`, all computing), the intake's (everything before it), one that writes results
out (outbox), one that writes checkpoints and snapshots (archive). They meet in queues.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums
from tinsmith_api.journal import leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import ObjectStore
from tinsmith_api.journal.operations import LeaseLost
from tinsmith_api.journal.store import Store
from tinsmith_worker import answers
from tinsmith_worker.archive import Archive, RecoveryPoint
from tinsmith_worker.channel import Line
from tinsmith_worker.contract import AdamParams, Engine, Failure, LoraSpec, Sampler, Work
from tinsmith_worker.intake import (
    Adopt,
    Arrived,
    Drain,
    Event,
    Intake,
    LeaseGone,
    Prepared,
    SampleArrived,
)
from tinsmith_worker.outbox import Outbox
from tinsmith_worker.sampling import Sampling
from tinsmith_worker.schedule import FORWARD, FORWARD_BACKWARD, OTHER, Item, Schedule

log = logging.getLogger("tinsmith.worker")

_GROUPS = {ops.FORWARD: FORWARD, ops.FORWARD_BACKWARD: FORWARD_BACKWARD}


@dataclass(frozen=True)
class WorkerSettings:
    """snapshot_seconds: a run is snapshotted this long after its last one, at an optim_step; what a killed
    worker must compute again is bounded by it. gap_seconds: how long a number may stay missing before the
    operations behind it fail; longer than a client goes on repeating a lost call (5 minutes)."""

    pass_tokens: int = 8192
    gap_seconds: float = 600.0
    snapshot_seconds: float = 15.0
    samplers_held: int = 32
    slot_bytes: int = 0
    host_bytes: int = 0


@dataclass
class Held:
    """A run this worker holds. done_seq: the last operation that is in the adapter."""

    lease: Lease
    point: RecoveryPoint
    done_seq: int
    prepared: dict[int, Prepared] = field(default_factory=dict)


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
        channel: Line,
        settings: WorkerSettings,
    ) -> None:
        self.worker_id = worker_id
        self.base_model = base_model
        self.journal = journal
        self.engine = engine
        self.channel = channel
        self.settings = settings
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.schedule = Schedule(pass_tokens=settings.pass_tokens, gap_seconds=settings.gap_seconds)
        self.held: dict[str, Held] = {}
        self.alone: set[str] = set()  # operations that nothing may share a pass with
        self.draining = False
        self.intake = Intake(journal, objects, engine.facts, base_model, worker_id, self.inbox)
        self.outbox = Outbox(
            journal,
            worker_id,
            self.intake.known,
            announce=lambda request_id: channel.send("done", request_id),
            on_lost=lambda run_id, epoch: self.inbox.put(LeaseGone(run_id, epoch)),
            on_broken=lambda: self.inbox.put(Drain()),
        )
        self.archive = Archive(
            journal,
            objects,
            self.outbox,
            base_model=base_model,
            seconds=settings.snapshot_seconds,
            on_lost=lambda run_id, epoch: self.inbox.put(LeaseGone(run_id, epoch)),
        )
        self.sampling = Sampling(sampler, self.intake, self.outbox, samplers_held=settings.samplers_held)

    def run(self) -> None:
        """Serve until told to drain or until whoever started this process is gone."""
        facts = vars(self.engine.facts)

        def enter(connection: sa.Connection) -> None:
            leases.describe_worker(connection, self.worker_id, facts)
            # What waits for workers that are gone, before this one looks for what it has to do.
            leases.sweep(connection, self.base_model, dead_after_seconds=None)

        self.journal.write(enter).result()
        threading.Thread(target=self._listen, name="intake", daemon=True).start()
        while not self.draining:
            self._receive(wait=not self.sampling.busy)
            started = time.monotonic()
            batch = self.schedule.next_batch(started)
            if batch:
                self._execute(batch)
            # For about as long as the pass took, so that neither starves the other.
            self.sampling.decode(until=2 * time.monotonic() - started)
            self._fail_overdue()
        self._drain()

    # -- the way in ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            self.intake.start()
            self.channel.send("ready")
            for messages in self.channel.messages():
                if ringing := [m[1] for m in messages if m[0] == "ring"]:
                    self.intake.ring(ringing)
                if ["drain"] in messages:
                    self.inbox.put(Drain())
            log.info("the control plane is gone; draining")
        except Exception:
            # Deaf is worse than dead: another worker takes over.
            log.exception("the journal cannot be read; draining")
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
                elif prepared.operation.subject in self.intake.known:
                    self.inbox.put(event)  # its run is being adopted; behind that, then
                else:
                    self.intake.adopt(prepared.operation.subject)
            case Adopt():
                self._adopt(event)
            case SampleArrived():
                self.sampling.begin(event)
            case LeaseGone(run_id, epoch):
                if self.intake.known.get(run_id) == epoch:
                    self._drop(run_id)
            case Drain():
                self.draining = True

    def _adopt(self, event: Adopt) -> None:
        lease, broken = event.lease, event.broken
        self.engine.drop(lease.run_id)
        if event.snapshot is not None:
            try:
                self.engine.restore(lease.run_id, event.snapshot)
            except Exception as error:  # another base model under the name, no memory
                log.exception("%s cannot be restored", lease.run_id)
                broken = f"the run cannot be restored: {error}"
        point = RecoveryPoint(lease.snapshot_seq, taken_at=time.monotonic())
        self.held[lease.run_id] = Held(lease, point, done_seq=lease.snapshot_seq)
        self.schedule.open_run(lease.run_id, lease.tenant_id, lease.snapshot_seq + 1)
        for prepared in event.operations:
            if not broken:
                self._enqueue(prepared)
                continue
            self.outbox.failure(prepared.operation, Failure(broken, "server"))
            self.schedule.consume(lease.run_id, prepared.operation.seq_id, time.monotonic())

    def _enqueue(self, prepared: Prepared) -> None:
        operation = prepared.operation
        now = time.monotonic()
        if operation.state == ops.FAILED or (
            operation.state == ops.DONE and operation.kind not in ops.CHANGING
        ):
            self.schedule.consume(operation.subject, operation.seq_id, now)
            return
        group = OTHER if prepared.failure else _GROUPS.get(operation.kind, OTHER)
        item = Item(
            operation.request_id,
            operation.subject,
            operation.seq_id,
            group,
            operation.tokens,
            alone=operation.request_id in self.alone,
        )
        if self.schedule.add(item, now):
            self.held[operation.subject].prepared[operation.seq_id] = prepared

    # -- executing -----------------------------------------------------------------------------------

    def _execute(self, batch: list[Item]) -> None:
        work = [(item, self.held[item.run_id].prepared.pop(item.seq_id)) for item in batch]
        if batch[0].group == OTHER:
            for _, prepared in work:
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
            self._done(prepared, functools.partial(datums.write_output, prepared.given, output))
        for run_id in {prepared.operation.subject for prepared in work}:
            self._snapshot_if_due(run_id)

    def _without_orphans(self, work: list[Prepared]) -> list[Prepared]:
        """Fail the operations of runs whose creation failed."""
        alive = []
        for prepared in work:
            if self.engine.holds(prepared.operation.subject):
                alive.append(prepared)
            else:
                self._failed(
                    prepared,
                    Failure("this run was not created, or could not be restored: see its earlier calls"),
                )
        return alive

    def _recover(self, work: list[Prepared], error: Exception) -> None:
        """A pass failed half-way. Its runs go back to their snapshots and are replayed; what shared the pass
        is tried again one by one, and the operation that fails alone is the one that fails."""
        log.exception("a pass over %d operations failed", len(work))
        if len(work) == 1:
            self._failed(work[0], Failure(f"the engine failed on this call: {error}", "server"))
            if work[0].operation.state == ops.DONE:
                self._give_up_run(work[0].operation.subject, error)
                return
        self.alone.update(prepared.operation.request_id for prepared in work)
        # Nothing of these runs may be on its way any more when they are read back.
        self.archive.flush()
        self.outbox.flush()
        for run_id in {prepared.operation.subject for prepared in work}:
            self.schedule.close_run(run_id)
            self.held.pop(run_id)
            self.intake.forget(run_id)
            self.intake.adopt(run_id)

    def _give_up_run(self, run_id: str, why: object) -> None:
        """What was computed once could not be computed again: the run is not what its results say it is."""
        failure = Failure(f"the run could not be brought back: {why}", "server")
        for prepared in self.held[run_id].prepared.values():
            if prepared.operation.state == ops.QUEUED:
                self.outbox.failure(prepared.operation, failure)
        self.outbox.flush()
        self._drop(run_id)

    def _call(self, prepared: Prepared) -> None:
        """An operation that takes no pass."""
        kind = prepared.operation.kind
        if prepared.failure is not None:
            if prepared.operation.state == ops.DONE:
                self._give_up_run(prepared.operation.subject, prepared.failure.message)
            else:
                self._failed(prepared, prepared.failure)
            return
        if kind != ops.CREATE_MODEL and not self._without_orphans([prepared]):
            return
        try:
            match kind:
                case ops.CREATE_MODEL:
                    self._create(prepared)
                case ops.OPTIM_STEP:
                    self._optim_step(prepared)
                case ops.LOAD_WEIGHTS:
                    self._load(prepared)
                case ops.SAVE_WEIGHTS | ops.SAVE_WEIGHTS_FOR_SAMPLER:
                    self._save(prepared)
                case _:
                    raise AssertionError(f"an operation of unknown kind {kind!r}")
        except InvalidInput as error:
            self._failed(prepared, Failure(str(error)))
        except Exception as error:  # it may have been half applied
            self._recover([prepared], error)

    def _create(self, prepared: Prepared) -> None:
        operation = prepared.operation
        self.engine.create(operation.subject, LoraSpec(**self.held[operation.subject].lease.lora))
        body = {"model_id": operation.subject}
        if prepared.loaded is not None:
            try:
                self.engine.load(operation.subject, prepared.loaded, optimizer=prepared.given["optimizer"])
            except InvalidInput:
                self.engine.drop(operation.subject)  # not created, rather than created without its weights
                raise
            body["path"] = prepared.given["path"]
        self._done(prepared, lambda: answers.json_body(body))
        if prepared.loaded is not None:
            self._snapshot(operation.subject)

    def _optim_step(self, prepared: Prepared) -> None:
        run_id = prepared.operation.subject
        metrics = self.engine.optim_step(run_id, AdamParams(**prepared.given["adam_params"]))
        if isinstance(metrics, Failure):
            self._failed(prepared, metrics, has_effect=True)  # such as a cleared gradient
            return
        self._done(prepared, lambda: answers.optim_step(metrics))
        self._snapshot_if_due(run_id)

    def _load(self, prepared: Prepared) -> None:
        assert prepared.loaded is not None
        self.engine.load(prepared.operation.subject, prepared.loaded, optimizer=prepared.given["optimizer"])
        self._done(prepared, lambda: answers.json_body({"path": prepared.given["path"]}))
        # Replaying this would need the checkpoint, which its owner may delete.
        self._snapshot(prepared.operation.subject)

    def _save(self, prepared: Prepared) -> None:
        """Copy the state here and now; it is written out beside the training that goes on."""
        operation = prepared.operation
        held = self.held[operation.subject]
        held.done_seq = operation.seq_id
        self.archive.save(operation, prepared.given, held.lease.lora, self.engine.state(operation.subject))

    def _done(self, prepared: Prepared, body: Callable[[], bytes]) -> None:
        self._leave_behind(prepared)
        self.outbox.result(prepared.operation, body)

    def _failed(self, prepared: Prepared, failure: Failure, *, has_effect: bool = False) -> None:
        self._leave_behind(prepared)
        self.outbox.failure(prepared.operation, failure, has_effect=has_effect)

    def _leave_behind(self, prepared: Prepared) -> None:
        self.held[prepared.operation.subject].done_seq = prepared.operation.seq_id
        self.alone.discard(prepared.operation.request_id)

    def _snapshot_if_due(self, run_id: str) -> None:
        if self.archive.is_due(self.held[run_id].point):
            self._snapshot(run_id)

    def _snapshot(self, run_id: str) -> None:
        held = self.held[run_id]
        self.archive.snapshot(held.lease, held.point, held.done_seq, self.engine.state(run_id))

    def _drop(self, run_id: str) -> None:
        self.engine.drop(run_id)
        self.schedule.close_run(run_id)
        self.held.pop(run_id, None)
        self.intake.forget(run_id)

    def _fail_overdue(self) -> None:
        for run_id, missing, behind in self.schedule.overdue(time.monotonic()):
            held = self.held[run_id]
            give_up = functools.partial(
                ops.give_up,
                run_id=run_id,
                seq_ids=missing,
                tenant_id=held.lease.tenant_id,
                base_model=self.base_model,
                worker_id=self.worker_id,
                epoch=held.lease.epoch,
            )
            try:
                late = self.journal.write(give_up).result()
            except LeaseLost:
                self._drop(run_id)
                continue
            for request_id in late:
                self.channel.send("done", request_id)
            span = str(missing[0]) if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
            failure = Failure(
                f"not executed: of the calls of this run before it, {span} did not all arrive within "
                f"{self.settings.gap_seconds:g} s"
            )
            for seq_id in behind:
                self._failed(held.prepared.pop(seq_id), failure)

    def _drain(self) -> None:
        """Hand over: every run snapshotted, every result written, then leave."""
        self.archive.flush()
        for run_id, held in self.held.items():
            if held.done_seq > held.point.seq_id and self.engine.holds(run_id):
                self._snapshot(run_id)
        self.archive.close()
        self.outbox.close()
        self.journal.write(lambda c: leases.stop_worker(c, self.worker_id)).result()
        self.channel.close()
        self.journal.close()
