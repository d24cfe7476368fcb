"""A worker: one engine, fed by the journal.

Threads: the engine's (`run`, all computing), the intake's (everything before it), one that writes results
out (outbox), one that writes checkpoints and snapshots (archive). They meet in queues.
"""

import functools
import heapq
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums
from tinsmith.wire.batch import TrainOutput
from tinsmith_api.journal import leases, metrics
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import ObjectStore
from tinsmith_api.journal.operations import LeaseLost, Operation
from tinsmith_api.journal.store import Store
from tinsmith_worker import answers
from tinsmith_worker.archive import Archive, RecoveryPoint
from tinsmith_worker.channel import Line
from tinsmith_worker.contract import (
    AdamParams,
    Answer,
    Engine,
    Failure,
    LoraSpec,
    MuonParams,
    OptimizerParams,
    Sampler,
    Work,
)
from tinsmith_worker.intake import (
    AHEAD,
    Adopt,
    Arrived,
    Computed,
    Drain,
    Event,
    Intake,
    LeaseGone,
    Prepared,
    Room,
    SampleArrived,
    SampleCancelled,
    Settled,
    Share,
    Snapshotted,
    Waiting,
    WeightsRead,
)
from tinsmith_worker.outbox import Outbox
from tinsmith_worker.sampling import Sampling
from tinsmith_worker.schedule import FORWARD, FORWARD_BACKWARD, OTHER, Item, Schedule
from tinsmith_worker.slots import Slots
from tinsmith_worker.streaming import Streaming
from tinsmith_worker.under_way import UnderWay

log = logging.getLogger("tinsmith.worker")

_GROUPS = {ops.FORWARD: FORWARD, ops.FORWARD_BACKWARD: FORWARD_BACKWARD}


@dataclass(frozen=True)
class WorkerSettings:
    """snapshot_seconds: a run that computes is snapshotted this long after its last one; what a killed worker
    must compute again is bounded by it. gap_seconds: how long a number may stay missing before the operations
    behind it fail; longer than a client goes on repeating a lost call (5 minutes). slot_bytes: adapters on
    the device, host_bytes: in host memory; 0 for what the machine has room for. idle_seconds: a run that
    nobody called for so long is snapshotted and let go of. storage_patience_seconds: how long a store that
    does not answer is asked, before a save or load fails. slice_seconds: sampling goes on for so long at
    most while something waits to be trained. role: "train", "sample" or "both", and is given nothing else."""

    pass_tokens: int = 8192
    gap_seconds: float = 600.0
    snapshot_seconds: float = 15.0
    samplers_held: int = 32
    slot_bytes: int = 0
    host_bytes: int = 0
    slice_seconds: float = 0.5
    role: str = "both"
    idle_seconds: float = 600.0
    storage_patience_seconds: float = 120.0


@dataclass
class Held:
    """A run this worker holds. done_seq: the last operation that is in the adapter."""

    lease: Lease
    point: RecoveryPoint
    done_seq: int
    prepared: dict[int, Prepared] = field(default_factory=dict)
    waiting: dict[int, Operation] = field(default_factory=dict)  # not unpacked yet
    requested: set[int] = field(default_factory=set)  # being unpacked
    used_at: float = field(default_factory=time.monotonic)
    leaving_at: int | None = None  # the snapshot, by its number, with which it is let go of
    is_suspect: bool = False  # its last workers died holding it: one operation at a time, alone
    is_shut: bool = False  # a pass of it failed, or it leaves: nothing is executed until it is read back


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
        self.slots = Slots(engine, **_budgets(engine, settings))
        self.channel = channel
        self.settings = settings
        self.inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.schedule = Schedule(
            pass_tokens=settings.pass_tokens,
            gap_seconds=settings.gap_seconds,
            slot_bytes=self.slots.slot_bytes,
        )
        self.held: dict[str, Held] = {}
        self.page_limits: dict[str, int] = {}  # tenant -> bytes, for those that have a limit
        self.alone: set[str] = set()  # operations that nothing may share a pass with
        self.draining = False
        self._looked_for_idle_at = time.monotonic()
        self._shared_at = 0.0
        self.under_way = UnderWay(lambda: self.inbox.put(Computed()))
        self._taken_up_at = 0.0
        self.intake = Intake(
            journal,
            objects,
            engine.facts,
            base_model,
            worker_id,
            self.inbox,
            patience_seconds=settings.storage_patience_seconds,
            check=engine.check,
            reads_in_pieces=engine.has_states_in_pieces,
        )
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
            patience_seconds=settings.storage_patience_seconds,
            room_bytes=self.slots.host_bytes // 4,
            on_lost=lambda run_id, epoch: self.inbox.put(LeaseGone(run_id, epoch)),
            on_room=lambda: self.inbox.put(Room()),
        )
        sampler.notify(lambda: self.inbox.put(Computed()))
        self.sampling = Sampling(
            sampler,
            self.intake,
            self.outbox,
            stream=Streaming(channel.send).send,
            suspect=lambda sample: journal.write(lambda c: ops.suspect_sample(c, sample)).result(),
            samplers_held=settings.samplers_held,
        )

    def run(self) -> None:
        """Serve until told to drain or until whoever started this process is gone."""
        facts = vars(self.engine.facts) | {"role": self.settings.role}

        def enter(connection: sa.Connection) -> None:
            leases.describe_worker(connection, self.worker_id, facts)
            # What waits for workers that are gone, before this one looks for what it has to do.
            leases.sweep(connection, self.base_model, dead_after_seconds=None)

        self.journal.write(enter).result()
        threading.Thread(target=self._listen, name="intake", daemon=True).start()
        while not self.draining:
            self._receive(wait=not self.sampling.busy)
            started = time.monotonic()
            self.schedule.archive_is_full = not self.archive.has_room
            batch = self.schedule.next_batch(started)
            if batch:
                self._execute(batch)
            if self.sampling.busy:
                self.under_way.take_up()
            # For about as long as the pass took, so that neither starves the other; but what comes to be
            # trained meanwhile waits for no more than a slice.
            now = time.monotonic()
            self.sampling.decode(until=now + min(now - started, self.settings.slice_seconds))
            self._fail_overdue()
            self._let_go()
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
                if ["share"] in messages:
                    self.inbox.put(Share(time.monotonic()))
            log.info("the control plane is gone; draining")
        except Exception:
            # Deaf is worse than dead: another worker takes over.
            log.exception("the journal cannot be read; draining")
        self.inbox.put(Drain())

    def _receive(self, *, wait: bool) -> None:
        """Take in what has arrived; if there is nothing to do, wait for something."""
        self.schedule.archive_is_full = not self.archive.has_room
        if wait and not self.schedule.ready():
            deadlines = [self.schedule.next_deadline()]
            if self.held:
                deadlines.append(self._looked_for_idle_at + self._idle_check_seconds())
            known = [deadline for deadline in deadlines if deadline is not None]
            timeout = max(0.0, min(known) - time.monotonic()) if known else None
            try:
                self._take_in(self.inbox.get(timeout=timeout))
            except queue.Empty:
                return
        while not self.inbox.empty():
            self._take_in(self.inbox.get())

    def _take_in(self, event: Event) -> None:
        if isinstance(event, Adopt | Settled | LeaseGone | Share):
            self.under_way.take_up()  # of what the run was until now
        match event:
            case Computed():
                self.under_way.take_up_arrived()
            case Arrived(prepared):
                if (held := self.held.get(prepared.operation.subject)) is None:
                    # Let go of meanwhile; if it is being adopted again, this comes with it.
                    self.intake.adopt(prepared.operation.subject)
                elif not held.is_shut:
                    self._enqueue(prepared)
            case Waiting(operation):
                if (held := self.held.get(operation.subject)) is None:
                    self.intake.adopt(operation.subject)
                elif held.is_shut:
                    pass  # it comes again when the run is read back
                elif operation.seq_id not in held.prepared:
                    held.waiting[operation.seq_id] = operation
                    held.used_at = time.monotonic()
                    self._unpack_ahead(held)
            case Snapshotted():
                self._part(event)
            case Settled(run_id):
                if run_id in self.held and self.held[run_id].is_shut:
                    self._drop(run_id)
                    self.intake.adopt(run_id)
            case Room():
                pass  # what had to wait for it is found ready now
            case Adopt():
                self._adopt(event)
            case SampleArrived():
                self.sampling.begin(event)
            case SampleCancelled(request_id):
                self.sampling.cancel(request_id)
            case WeightsRead():
                self.sampling.weights_read(event)
            case LeaseGone(run_id, epoch):
                if self.intake.known.get(run_id) == epoch:
                    metrics.LEASE_LOSSES.inc()
                    self._drop(run_id)
                    self.intake.adopt(run_id)  # if it is to be had: what was refused has to be done again
            case Share(asked_at):
                if asked_at > self._shared_at:  # or it was asked before the one that left last
                    self._share()
            case Drain():
                self.draining = True

    def _adopt(self, event: Adopt) -> None:
        lease, broken = event.lease, event.broken
        if self.intake.known.get(lease.run_id) != lease.epoch:
            return  # lost again before it came here
        self.slots.drop(lease.run_id)
        if event.snapshot is not None:
            metrics.PAGE_INS.labels("objects").inc()
            try:
                self.slots.restore(lease.run_id, event.snapshot, lease.tenant_id)
            except Exception as error:  # another base model under the name, no memory
                log.exception("%s cannot be restored", lease.run_id)
                broken = f"the run cannot be restored: {error}"
        point = RecoveryPoint(lease.snapshot_seq, taken_at=time.monotonic())
        held = Held(lease, point, done_seq=lease.snapshot_seq)
        held.is_suspect = lease.deaths >= leases.SUSPECT_DEATHS
        self.held[lease.run_id] = held
        self.page_limits.pop(lease.tenant_id, None)
        if lease.max_page_bytes:
            self.page_limits[lease.tenant_id] = lease.max_page_bytes
        self.schedule.open_run(
            lease.run_id,
            lease.tenant_id,
            lease.snapshot_seq + 1,
            weight=lease.weight,
            priority=lease.priority,
            size_bytes=self.engine.size_bytes(LoraSpec(**lease.lora)),
        )
        held.waiting = {operation.seq_id: operation for operation in event.waiting}
        for prepared in event.operations:
            if not broken:
                self._enqueue(prepared)
        self._unpack_ahead(held)
        if broken:
            everything = [*(p.operation for p in event.operations), *held.waiting.values()]
            self._fail_all(held, everything, Failure(broken, "server"))
        elif lease.deaths >= leases.LAST_DEATHS:
            self._fail_deadly(held)

    def _fail_deadly(self, held: Held) -> None:
        """The call at the head was tried alone, more than once, and each time the worker ended."""
        known = [*(p.operation for p in held.prepared.values()), *held.waiting.values()]
        queued = sorted((o for o in known if o.state == ops.QUEUED), key=lambda o: o.seq_id)
        self._fail_all(held, queued[:1], answers.deadly(held.lease.deaths))
        held.is_suspect = False

    def _fail_all(self, held: Held, operations: Sequence[Operation], failure: Failure) -> None:
        for operation in operations:
            held.prepared.pop(operation.seq_id, None)
            held.waiting.pop(operation.seq_id, None)
            self.outbox.failure(operation, failure)
            self.schedule.consume(operation.subject, operation.seq_id, time.monotonic())

    def _enqueue(self, prepared: Prepared) -> None:
        operation = prepared.operation
        now = time.monotonic()
        if operation.state == ops.FAILED or (
            operation.state == ops.DONE and operation.kind not in ops.CHANGING
        ):
            self.schedule.consume(operation.subject, operation.seq_id, now)
            return
        held = self.held[operation.subject]
        held.requested.discard(operation.seq_id)
        held.waiting.pop(operation.seq_id, None)
        held.used_at = now
        group = OTHER if prepared.failure else _GROUPS.get(operation.kind, OTHER)
        item = Item(
            operation.request_id,
            operation.subject,
            operation.seq_id,
            group,
            operation.tokens,
            alone=held.is_suspect or operation.request_id in self.alone,
            copies=operation.kind in ops.SAVES or prepared.loaded is not None,
        )
        if self.schedule.add(item, now):
            held.prepared[operation.seq_id] = prepared
        self._unpack_ahead(held)

    def _unpack_ahead(self, held: Held) -> None:
        """Have the next few operations of a run unpacked, and no more: a thousand bodies are a lot of memory,
        and other tenants' would have to wait for theirs."""
        ahead = held.prepared.keys() | held.requested
        wanted = []
        for seq_id in heapq.nsmallest(AHEAD, held.waiting):
            if len(ahead) < AHEAD or seq_id < max(ahead):
                wanted.append(held.waiting.pop(seq_id))
                ahead.add(seq_id)
                held.requested.add(seq_id)
        if wanted:
            self.intake.prepare(wanted)
        self.intake.ahead[held.lease.run_id] = len(ahead)

    # -- executing -----------------------------------------------------------------------------------

    def _execute(self, batch: list[Item]) -> None:
        work = [self.held[item.run_id].prepared.pop(item.seq_id) for item in batch]
        for run_id in {item.run_id for item in batch}:
            self._unpack_ahead(self.held[run_id])
        now = time.time()
        work = [replace(p, operation=replace(p.operation, started_at=now)) for p in work]
        for prepared in work:
            if prepared.operation.state == ops.QUEUED:
                metrics.QUEUE_WAIT.labels(prepared.operation.kind).observe(
                    max(0.0, now - prepared.operation.submitted_at)
                )
            else:
                metrics.REPLAYED.inc()
        work = [prepared for prepared in work if self._may_try(prepared.operation)]
        if batch[0].group != OTHER:
            self._pass(work)
            metrics.TOKENS.labels(batch[0].group).inc(sum(item.tokens for item in batch))
            return
        steps = []
        if any(p.operation.kind != ops.OPTIM_STEP or p.failure for p in work):
            self.under_way.take_up()
        for prepared in work:
            if prepared.operation.kind == ops.OPTIM_STEP and prepared.failure is None:
                steps.append(prepared)
            elif self._is_here(prepared.operation.subject):  # unless the call before it was this run's end
                with metrics.COMPUTE.labels(prepared.operation.kind).time():
                    self._call(prepared)
        self._optim_steps([p for p in steps if self._is_here(p.operation.subject)])

    def _is_here(self, run_id: str) -> bool:
        return run_id in self.held and not self.held[run_id].is_shut

    def _may_try(self, operation: Operation) -> bool:
        """Leave word of what is tried now, if it may be the end of this process: a new call, not one that
        was survived before. False if the run is lost."""
        held = self.held[operation.subject]
        if not held.is_suspect or operation.state != ops.QUEUED:
            return True
        lease = held.lease
        try:
            self.journal.write(
                lambda c: leases.suspect(c, lease.run_id, lease.worker_id, lease.epoch)
            ).result()
        except LeaseLost:
            self._drop(operation.subject)
            return False
        return True

    def _pass(self, work: list[Prepared]) -> None:
        """Begin forward_backwards (or forwards) of many runs, together. What was begun before them is taken
        up while the device computes them."""
        work = self._without_orphans(self._settled(work))
        if not work:
            return
        is_suspect = any(self.held[p.operation.subject].is_suspect for p in work)
        run_ids, started = {p.operation.subject for p in work}, time.monotonic()
        try:
            self.slots.bring(run_ids)
            answer = self.engine.begin_forward_backward([Work(p.operation.subject, p.given) for p in work])
        except Exception as error:  # whatever the engine raises; its gradients are undefined now
            self._break_off(work, error)
            return
        self.under_way.begin(run_ids, answer.wait, lambda: self._passed(work, answer, started))
        self.under_way.take_up(keep=0 if is_suspect else 1)

    def _settled(self, work: list[Prepared]) -> list[Prepared]:
        """What of it may begin now. A snapshot that is due comes first: what it covers must be taken up, and
        nothing later begun. And what may kill the worker has it alone."""
        for run_id in {prepared.operation.subject for prepared in work}:
            held = self.held[run_id]
            if held.is_suspect or (self.under_way.holds(run_id) and self.archive.is_due(held.point)):
                self.under_way.take_up()
                break
        return [prepared for prepared in work if self._is_here(prepared.operation.subject)]

    def _passed(self, work: list[Prepared], answer: Answer[list[TrainOutput]], started: float) -> None:
        try:
            outputs = answer.get()
        except Exception as error:
            self._recover([p for p in work if self._is_here(p.operation.subject)], error)
            return
        seconds = self._took(work[0].operation.kind, started)
        for prepared, output in zip(work, outputs, strict=True):
            if self._is_here(prepared.operation.subject):
                self._done(prepared, functools.partial(datums.write_output, prepared.given, output))
        for run_id in {prepared.operation.subject for prepared in work}:
            if self._is_here(run_id):
                self.held[run_id].point.computed_seconds += seconds
                self._snapshot_if_due(run_id)

    def _took(self, kind: str, started: float) -> float:
        """How long the device had it alone, about; what was queued behind something began when that ended."""
        now = time.monotonic()
        seconds = now - max(started, self._taken_up_at)
        self._taken_up_at = now
        metrics.COMPUTE.labels(kind).observe(seconds)
        return seconds

    def _break_off(self, work: list[Prepared], error: Exception) -> None:
        """It could not even be begun. What is under way of the same runs is computed again with it: their
        adapters hold something of both."""
        for prepared in work:
            self.held[prepared.operation.subject].is_shut = True
        self.under_way.take_up()
        self._recover(work, error)

    def _without_orphans(self, work: list[Prepared]) -> list[Prepared]:
        """Fail the operations of runs whose creation failed."""
        alive = []
        for prepared in work:
            if self.slots.holds(prepared.operation.subject):
                alive.append(prepared)
            else:
                self._failed(
                    prepared,
                    Failure("this run was not created, or could not be restored: see its earlier calls"),
                )
        return alive

    def _recover(self, work: list[Prepared], error: Exception) -> None:
        """A pass failed half-way. Its runs go back to their snapshots and are replayed; what shared the pass
        is tried again one by one, and the operation that fails alone is the one that fails. After
        one for which the device had no room the engine leaves more: who was alone in it has a try, too."""
        if not work:
            return
        log.error("a pass over %d operations failed", len(work), exc_info=error)
        found_no_room = isinstance(error, MemoryError) and work[0].operation.request_id not in self.alone
        if len(work) == 1 and not found_no_room:
            self._failed(work[0], Failure(f"the engine failed on this call: {error}", "server"))
            if work[0].operation.state == ops.DONE:
                self._give_up_run(work[0].operation.subject, error)
                return
        self.alone.update(prepared.operation.request_id for prepared in work)
        for run_id in {prepared.operation.subject for prepared in work}:
            self._shut(run_id)

    def _shut(self, run_id: str, then: Callable[[], object] = lambda: None) -> None:
        """Until it is read back. Nothing of it may be on its way any more by then; nobody else waits for
        that."""

        def settle() -> None:
            self.outbox.flush()
            then()
            self.inbox.put(Settled(run_id))

        self.held[run_id].is_shut = True
        self.slots.drop(run_id)
        self.schedule.close_run(run_id)
        self.archive.afterwards(settle)

    def _give_up_run(self, run_id: str, why: object) -> None:
        """What was computed once could not be computed again: the run is not what its results say it is."""
        failure = Failure(f"the run could not be brought back: {why}", "server")
        held = self.held[run_id]
        for operation in (*(p.operation for p in held.prepared.values()), *held.waiting.values()):
            self.outbox.failure(operation, failure)
        self.archive.flush()
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
                case ops.LOAD_WEIGHTS:
                    self._load(prepared)
                case _:
                    assert kind in ops.SAVES, f"an operation of unknown kind {kind!r}"
                    self._save(prepared)
        except InvalidInput as error:
            self._failed(prepared, Failure(str(error)))
        except Exception as error:  # it may have been half applied
            self._recover([prepared], error)

    def _create(self, prepared: Prepared) -> None:
        operation = prepared.operation
        lease = self.held[operation.subject].lease
        self.slots.create(operation.subject, LoraSpec(**lease.lora), lease.tenant_id)
        body = {"model_id": operation.subject}
        if prepared.loaded is not None:
            try:
                self.engine.load(operation.subject, prepared.loaded, optimizer=prepared.given["optimizer"])
            except InvalidInput:
                self.slots.drop(operation.subject)  # not created, rather than created without its weights
                raise
            body["path"] = prepared.given["path"]
        self._done(prepared, lambda: answers.json_body(body))
        if prepared.loaded is not None:
            self._snapshot(operation.subject)

    def _optim_steps(self, work: list[Prepared]) -> None:
        """The steps of many runs at once: as many as there is room for, and by themselves those that failed
        in company."""
        of_run = {prepared.operation.subject: prepared for prepared in self._without_orphans(work)}
        singles = [
            run_id
            for run_id, prepared in of_run.items()
            if self.held[run_id].is_suspect or prepared.operation.request_id in self.alone
        ]
        together = [r for r in of_run if r not in singles]
        for run_ids in [*([r] for r in singles), *self.slots.in_parts(together)]:
            group, started = self._settled([of_run[run_id] for run_id in run_ids]), time.monotonic()
            if not group:
                continue
            try:
                self.slots.bring([p.operation.subject for p in group])
                answer = self.engine.begin_optim_steps(
                    [(p.operation.subject, _optimizer_params(p.given)) for p in group]
                )
            except Exception as error:  # some may have been applied
                self._break_off(group, error)
                continue
            take_up = functools.partial(self._all_stepped, group, answer, started)
            self.under_way.begin([p.operation.subject for p in group], answer.wait, take_up)
            if any(run_id in singles for run_id in run_ids):
                self.under_way.take_up()

    def _all_stepped(
        self, work: list[Prepared], answer: Answer[list[dict[str, float] | Failure]], started: float
    ) -> None:
        try:
            answered = answer.get()
        except Exception as error:
            self._recover([p for p in work if self._is_here(p.operation.subject)], error)
            return
        seconds = self._took(ops.OPTIM_STEP, started)
        for prepared, stepped in zip(work, answered, strict=True):
            if self._is_here(prepared.operation.subject):
                self.held[prepared.operation.subject].point.computed_seconds += seconds
                self._stepped(prepared, stepped)

    def _stepped(self, prepared: Prepared, stepped: dict[str, float] | Failure) -> None:
        if isinstance(stepped, Failure):
            self._failed(prepared, stepped, has_effect=True)  # such as a cleared gradient
            return
        self._done(prepared, lambda: answers.optim_step(stepped))
        self._snapshot_if_due(prepared.operation.subject)

    def _load(self, prepared: Prepared) -> None:
        assert prepared.loaded is not None
        self.slots.bring([prepared.operation.subject])
        self.engine.load(prepared.operation.subject, prepared.loaded, optimizer=prepared.given["optimizer"])
        self._done(prepared, lambda: answers.json_body({"path": prepared.given["path"]}))
        # Replaying this would need the checkpoint, which its owner may delete.
        self._snapshot(prepared.operation.subject)

    def _save(self, prepared: Prepared) -> None:
        """Copy the state here and now; it is written out beside the training that goes on."""
        operation = prepared.operation
        held = self.held[operation.subject]
        held.done_seq = operation.seq_id
        samples = self.settings.role != "train" and self.engine.holds(operation.subject)
        if samples and operation.kind == ops.SAVE_WEIGHTS_FOR_SAMPLER:
            # Whoever samples them here need not wait until they are read back.
            self.sampling.hold(prepared.given["object_prefix"], self.engine.frozen(operation.subject))
        only_weights = operation.kind != ops.SAVE_WEIGHTS
        state = self.slots.begin_state(operation.subject, only_weights=only_weights)
        self.archive.save(operation, prepared.given, held.lease.lora, state)

    def _done(self, prepared: Prepared, body: Callable[[], bytes]) -> None:
        self._leave_behind(prepared)
        self.outbox.result(prepared.operation, body)

    def _failed(self, prepared: Prepared, failure: Failure, *, has_effect: bool = False) -> None:
        self._leave_behind(prepared)
        self.outbox.failure(prepared.operation, failure, has_effect=has_effect)

    def _leave_behind(self, prepared: Prepared) -> None:
        held = self.held[prepared.operation.subject]
        held.done_seq = prepared.operation.seq_id
        held.used_at = time.monotonic()
        if prepared.operation.state == ops.QUEUED:
            held.is_suspect = False  # it survived
        self.alone.discard(prepared.operation.request_id)

    def _snapshot_if_due(self, run_id: str) -> None:
        if self.archive.is_due(self.held[run_id].point) and not self.under_way.holds(run_id):
            self._snapshot(run_id)

    def _snapshot(self, run_id: str) -> None:
        held = self.held[run_id]
        self.archive.snapshot(held.lease, held.point, held.done_seq, self.slots.begin_state(run_id))

    # -- letting go ----------------------------------------------------------------------------------

    def _let_go(self) -> None:
        """Of runs that there is no room for, or that are beyond their tenant's limit, and of those that
        nobody called for long: all are snapshotted, and come back with their next operation."""
        if self.archive.has_room:
            surplus = self.slots.surplus(self.page_limits, is_idle=lambda r: self._is_idle(self.held[r]))
            for run_id in surplus:
                self._leave_with_snapshot(run_id)
        now = time.monotonic()
        if now - self._looked_for_idle_at < self._idle_check_seconds():
            return
        self._looked_for_idle_at = now
        for run_id, held in list(self.held.items()):
            if now - held.used_at > self.settings.idle_seconds and self._is_idle(held):
                self._leave_with_snapshot(run_id)

    def _idle_check_seconds(self) -> float:
        return max(0.2, self.settings.idle_seconds / 10)

    def _is_idle(self, held: Held) -> bool:
        is_quiet = not (held.is_shut or held.waiting or held.requested)
        run_id = held.lease.run_id
        return is_quiet and self.schedule.is_idle(run_id) and not self.under_way.holds(run_id)

    def _leave_with_snapshot(self, run_id: str) -> None:
        held = self.held[run_id]
        if held.leaving_at is not None or held.point.writing:
            return  # under way, or the one that is being written comes first
        if not self.slots.holds(run_id) or held.done_seq == held.point.seq_id:
            self._part(Snapshotted(run_id, held.done_seq))
            return
        if not self.archive.has_room:
            return  # soon
        held.leaving_at = held.done_seq
        event = Snapshotted(run_id, held.done_seq)
        self.archive.snapshot(
            held.lease,
            held.point,
            held.done_seq,
            self.slots.begin_state(run_id),
            then=lambda: self.inbox.put(event),
        )

    def _part(self, event: Snapshotted) -> None:
        """Forget the run and give it back, if nothing happened to it since it was snapshotted."""
        held = self.held.get(event.run_id)
        if held is None:
            return
        held.leaving_at = None
        is_covered = held.done_seq == event.seq_id == held.point.seq_id
        if not self._is_idle(held) or (not is_covered and self.slots.holds(event.run_id)):
            return
        metrics.PAGE_OUTS.labels("objects").inc()
        self._drop(event.run_id)
        lease = held.lease
        release = functools.partial(
            leases.release, run_id=lease.run_id, worker_id=lease.worker_id, epoch=lease.epoch
        )
        # Nobody waits for this: if it fails, the run just stays with this worker.
        self.journal.write(release).add_done_callback(lambda done: done.exception())

    def _share(self) -> None:
        """Let another worker have a run, the one that was called least lately: with all that waits for it, or
        with its next call."""
        there = [held for held in self.held.values() if not held.is_shut]
        if len(there) < len(self.held) or not there or not self.archive.has_room:
            return  # one after the other
        held = min(there, key=lambda held: held.used_at)
        lease = held.lease
        self._shared_at = time.monotonic()
        if self._is_idle(held):
            self._leave_with_snapshot(lease.run_id)
            return
        if held.point.writing or held.leaving_at is not None or not self.slots.holds(lease.run_id):
            return
        if held.done_seq > held.point.seq_id:
            self._snapshot(lease.run_id)
        hand_over = functools.partial(leases.hand_over, lease=lease, base_model=self.base_model)
        # If nobody takes it, or the journal does not answer, it is read back here.
        self._shut(lease.run_id, lambda: self.journal.write(hand_over).exception())

    def _drop(self, run_id: str) -> None:
        self.slots.drop(run_id)
        self.schedule.close_run(run_id)
        self.held.pop(run_id, None)
        self.intake.forget(run_id)

    def _fail_overdue(self) -> None:
        for run_id, missing_from in self.schedule.stuck(time.monotonic()):
            self.intake.look_for(run_id, missing_from)
        overdue = self.schedule.overdue(time.monotonic())
        if overdue:
            self.under_way.take_up()  # results in their order
        for run_id, missing, behind in overdue:
            if (held := self.held.get(run_id)) is None:
                continue
            give_up = functools.partial(
                answers.give_up,
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
            self._fail_all(held, list(held.waiting.values()), failure)

    def _drain(self) -> None:
        """Hand over: every run snapshotted, every result written, then leave."""
        self.under_way.take_up()
        # From now on it is given nothing new, whoever it was that told it to leave.
        self.journal.write(lambda c: leases.drain_worker(c, self.worker_id))
        self.archive.hurry()
        self.archive.flush()
        for run_id, held in self.held.items():
            if held.done_seq > held.point.seq_id and self.slots.holds(run_id):
                if not self.archive.has_room:
                    self.archive.flush()
                self._snapshot(run_id)
        self.archive.close()
        self.outbox.close()
        self.channel.send("leaving")
        self.journal.write(lambda c: leases.stop_worker(c, self.worker_id)).result()
        self.channel.close()
        self.journal.close()


def _optimizer_params(given: dict[str, Any]) -> OptimizerParams:
    if "muon_params" in given:
        return MuonParams(**given["muon_params"])
    return AdamParams(**given["adam_params"])


def _budgets(engine: Engine, settings: WorkerSettings) -> dict[str, int]:
    """Half of what the device has left for slots, a quarter of this machine's memory for the host's tier."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "slot_bytes": settings.slot_bytes or engine.memory_bytes // 2,
        "host_bytes": settings.host_bytes or memory // 4,
    }
