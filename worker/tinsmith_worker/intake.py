"""From the doorbell to the engine's inbox: what can be prepared without the engine is prepared here.

Runs on threads of its own, beside the engine's. It reads operations from the journal, takes leases, unpacks
payloads into arrays and reads checkpoint files, so that the engine's thread never waits for any of it.
"""

import functools
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import TrainInput
from tinsmith_api.journal import leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import Damaged, ObjectStore
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Store
from tinsmith_worker import checkpoints, in_pieces
from tinsmith_worker.contract import AdapterState, Failure, ModelFacts, SampleInput
from tinsmith_worker.targets import asked

log = logging.getLogger("tinsmith.worker")

Json = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """An operation and what it will be executed with: a TrainInput, a Json, a SampleInput; or why not."""

    operation: Operation
    given: Any
    loaded: AdapterState | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Adopt:
    """A run this worker now holds: its lease, its snapshot and every operation behind that."""

    lease: Lease
    snapshot: AdapterState | None
    operations: list[Prepared]
    waiting: list[Operation] = field(default_factory=list)  # not unpacked yet
    broken: str = ""


@dataclass(frozen=True)
class Arrived:
    prepared: Prepared


@dataclass(frozen=True)
class Waiting:
    """An operation that is not unpacked yet, because its run has enough to do."""

    operation: Operation


@dataclass(frozen=True)
class Snapshotted:
    """A snapshot that was taken so that its run can be let go of."""

    run_id: str
    seq_id: int


@dataclass(frozen=True)
class Settled:
    """Nothing of this run is on its way to the journal or the object store any more."""

    run_id: str


@dataclass(frozen=True)
class Room:
    """The archive takes copies again."""


@dataclass(frozen=True)
class Computed:
    """The device has come to the end of something that is under way."""


@dataclass(frozen=True)
class SampleArrived:
    operation: Operation
    task: pb.SampleTask
    given: SampleInput | None
    failure: Failure | None = None


@dataclass(frozen=True)
class SampleCancelled:
    request_id: str


@dataclass(frozen=True)
class WeightsRead:
    """A sampler's weights that were asked for, or why not."""

    object_prefix: str
    weights: AdapterState | None
    failure: Failure | None = None


@dataclass(frozen=True)
class LeaseGone:
    """The lease that this worker had under `epoch` went to another worker: forget the run."""

    run_id: str
    epoch: int


@dataclass(frozen=True)
class Drain:
    pass


@dataclass(frozen=True)
class Share:
    """Others of the pool have fewer runs: let one go to them. asked_at: by time.monotonic."""

    asked_at: float


_Work = queue.SimpleQueue[Callable[[], None]]
Event = (
    Adopt
    | Share
    | Arrived
    | Waiting
    | Snapshotted
    | Settled
    | Room
    | Computed
    | SampleArrived
    | SampleCancelled
    | WeightsRead
    | LeaseGone
    | Drain
)


# What is read from the object store at once. Operations that need nothing of it are unpacked by others.
_READERS = 8
_UNPACKERS = 2
# Of each run so many operations are unpacked ahead; the others wait in the journal.
AHEAD = 4
# What is unpacked at once by whoever hears the bell, without keeping others from being heard.
_SMALL_BYTES = 256 << 10
_MAX_PAUSE_SECONDS = 5.0


class Intake:
    """`inbox` is read by the engine's thread. `known` (run -> epoch) and `sampling` remember what
    it was sent; `ahead` counts the unpacked operations of every run, and the engine corrects it at each turn.

    `patience_seconds`: for how long an object store that does not answer is asked for a checkpoint. A run's
    snapshot is waited for without end: nobody is served by a run that fails because of it. `check` raises
    InvalidInput for a call that could break a pass.
    """

    def __init__(
        self,
        journal: Store,
        objects: ObjectStore,
        facts: ModelFacts,
        base_model: str,
        worker_id: str,
        inbox: "queue.SimpleQueue[Event]",
        *,
        patience_seconds: float = 120.0,
        check: Callable[[TrainInput], None] = lambda given: None,
        reads_in_pieces: bool = False,
    ) -> None:
        self.journal = journal
        self.objects = objects
        self.facts = facts
        self.base_model = base_model
        self.worker_id = worker_id
        self.inbox = inbox
        self.patience_seconds = patience_seconds
        self.check = check
        self.reads_in_pieces = reads_in_pieces
        self.known: dict[str, int] = {}
        self.sampling: set[str] = set()
        self.ahead: dict[str, int] = {}
        # Runs being adopted, with what was rung for meanwhile: it must reach the inbox behind them.
        self._adopting: dict[str, list[Operation]] = {}
        self._asked_again: set[str] = set()  # those of them that somebody wanted adopted meanwhile
        self._changing = threading.Lock()  # known, _adopting and _asked_again, together
        self._reading: _Work = queue.SimpleQueue()
        self._unpacking: _Work = queue.SimpleQueue()
        for work, count, name in (
            (self._reading, _READERS, "read-objects"),
            (self._unpacking, _UNPACKERS, "unpack"),
        ):
            for _ in range(count):
                threading.Thread(target=self._work_forever, args=(work,), name=name, daemon=True).start()

    def start(self) -> None:
        """Everything that was waiting when this process began."""
        backlog = self.journal.read(lambda c: ops.backlog(c, self.worker_id, self.base_model)).result()
        self.ring(list(backlog))

    def ring(self, request_ids: Sequence[str]) -> None:
        """Bring these operations, and the runs they belong to, into the inbox."""
        for start in range(0, len(request_ids), 256):
            piece = request_ids[start : start + 256]
            # A few are wanted at once, with all that belongs to them. Of many, most will have to wait.
            fetch = ops.fetch if len(piece) <= AHEAD else ops.look_up
            found = self.journal.read(functools.partial(fetch, request_ids=piece)).result()
            for operation in sorted(found, key=lambda o: o.seq_id):
                if operation.kind == ops.SAMPLE:
                    self._sample(operation)
                else:
                    self._arrived(operation)

    def adopt(self, run_id: str) -> None:
        """Take the run's lease if it is to be had, and send all of it: snapshot and operations behind."""
        with self._changing:
            if run_id in self._adopting:
                self._asked_again.add(run_id)
                return
            if run_id in self.known:
                return
            self._adopting[run_id] = []
        self._unpacking.put(functools.partial(self._adopt, run_id))

    def prepare(self, operations: Sequence[Operation]) -> None:
        """Unpack these and send them."""
        self._unpacking.put(functools.partial(self._prepare_and_send, list(operations)))

    def look_for(self, run_id: str, seq_id: int) -> None:
        """Send what the journal has of this run from that number on: it was not heard of."""
        self._unpacking.put(functools.partial(self._look_for, run_id, seq_id))

    def _look_for(self, run_id: str, seq_id: int) -> None:
        for operation in self.journal.read(lambda c: ops.history(c, run_id, seq_id - 1)).result():
            self._arrived(operation)

    def forget(self, run_id: str) -> None:
        with self._changing:
            self.known.pop(run_id, None)
            self.ahead.pop(run_id, None)

    def _work_forever(self, work: "_Work") -> None:
        while True:
            do = work.get()
            try:
                do()
            except Exception:
                # The journal cannot be read. Deaf is worse than dead: another worker takes over.
                log.exception("preparing failed; draining")
                self.inbox.put(Drain())

    # -- runs -----------------------------------------------------------------------------------------

    def _arrived(self, operation: Operation) -> None:
        run_id = operation.subject
        with self._changing:
            if run_id in self._adopting:
                # Its body is read again when its turn comes: this may take as long as the object store is
                # gone.
                self._adopting[run_id].append(replace(operation, payload=None))
                return
            is_known = run_id in self.known
        if not is_known:
            self.adopt(run_id)
        elif operation.state != ops.DONE:  # it came with its run already
            self._send(operation)

    def _send(self, operation: Operation) -> None:
        if operation.state == ops.FAILED:
            self.inbox.put(Arrived(Prepared(operation, None)))
            return
        ahead = self.ahead.get(operation.subject, 0)
        self.ahead[operation.subject] = ahead + 1
        if ahead >= AHEAD:
            self.inbox.put(Waiting(replace(operation, payload=None)))
        elif operation.payload is None:
            self.prepare([operation])
        elif len(operation.payload) > _SMALL_BYTES:
            self._unpacking.put(functools.partial(self._send_prepared, operation))
        else:
            self._send_prepared(operation)

    def _prepare_and_send(self, operations: list[Operation]) -> None:
        for operation in self._with_payloads(operations):
            self._send_prepared(operation)

    def _send_prepared(self, operation: Operation, *, reads: bool = False) -> None:
        if _reads_checkpoint(operation) and not reads:
            self._reading.put(functools.partial(self._send_prepared, operation, reads=True))
        else:
            self.inbox.put(Arrived(self._prepare(operation)))

    def _with_payloads(self, operations: Sequence[Operation]) -> list[Operation]:
        request_ids = [o.request_id for o in operations if o.payload is None and o.state != ops.FAILED]
        fetch = functools.partial(ops.fetch, request_ids=request_ids)
        found = {o.request_id: o for o in self.journal.read(fetch).result()} if request_ids else {}
        return [found.get(o.request_id, o) for o in operations]

    def _adopt(self, run_id: str, *, reads: bool = False, pause: float = 0.1) -> None:
        try:
            while True:
                if not self._send_run(run_id, reads=reads):
                    self._reading.put(functools.partial(self._adopt, run_id, reads=True))
                    return
                if self._send_late(run_id):
                    return
        except OSError as error:
            # Nobody is served by a run that fails because its snapshot cannot be read now. Others are by this
            # thread meanwhile.
            log.warning("%s; trying again", error)
            longer = min(2 * pause, _MAX_PAUSE_SECONDS)
            again = functools.partial(self._adopt, run_id, reads=True, pause=longer)
            timer = threading.Timer(pause, self._reading.put, [again])
            timer.daemon = True
            timer.start()
        except Exception:
            with self._changing:
                self._adopting.pop(run_id, None)
            raise

    def _send_late(self, run_id: str) -> bool:
        """What was rung for during the adoption; the adoption is over with it. False if it has to be done
        once more: the run was let go of again, or only now is to be had, and somebody wants it."""
        while True:
            with self._changing:
                late, is_known = self._adopting[run_id], run_id in self.known
                is_wanted = bool(late) or run_id in self._asked_again
                self._asked_again.discard(run_id)
                if not late and (is_known or not is_wanted):
                    del self._adopting[run_id]
                    return True
                self._adopting[run_id] = []
            if not is_known:
                return False
            for operation in late:
                if operation.state != ops.DONE:
                    self._send(operation)

    def _send_run(self, run_id: str, *, reads: bool) -> bool:
        """Nothing if its lease is not to be had. False if it has a snapshot and this thread reads none."""
        lease = self.journal.write(lambda c: leases.take(c, run_id, self.worker_id)).result()
        if lease is None:
            return True
        snapshot, broken = None, ""
        if lease.snapshot_key is not None:
            if not reads:
                return False
            key = lease.snapshot_key
            try:
                snapshot = self._read(key)
            except OSError:
                raise
            except Exception as error:
                log.exception("the snapshot of %s cannot be read", run_id)
                broken = f"the run's snapshot cannot be read ({error}); create a run from its last checkpoint"
        behind = self.journal.read(lambda c: ops.history(c, run_id, lease.snapshot_seq)).result()
        executed = [o for o in behind if o.state == ops.QUEUED or _is_replayed(o)]
        first = {o.request_id for o in executed[:AHEAD]} if not broken else set()
        waiting = [o for o in executed if o.request_id not in first]
        ahead = self._with_payloads([o for o in behind if o.request_id in first])
        ready = [self._prepare(o) for o in ahead if not _reads_checkpoint(o)]
        passed = [Prepared(o, None) for o in behind if o.state != ops.QUEUED and not _is_replayed(o)]
        with self._changing:
            self.known[run_id] = lease.epoch
        self.inbox.put(Adopt(lease, snapshot, [*passed, *ready], waiting, broken))
        for operation in filter(_reads_checkpoint, ahead):
            self._send_prepared(operation)
        return True

    def _prepare(self, operation: Operation) -> Prepared:
        if operation.state != ops.QUEUED and not _is_replayed(operation):
            return Prepared(operation, None)
        try:
            return self._unpack(operation)
        except InvalidInput as error:
            return Prepared(operation, None, failure=Failure(str(error)))
        except Exception as error:  # whatever it is, it is this operation's and nobody else's
            log.exception("%s %s cannot be prepared", operation.kind, operation.request_id)
            return Prepared(operation, None, failure=Failure(f"cannot be executed: {error}", "server"))

    def _unpack(self, operation: Operation) -> Prepared:
        assert operation.payload is not None, "its payload is gone"
        if operation.kind in (ops.FORWARD, ops.FORWARD_BACKWARD):
            message = datums.parse(operation.payload)
            limits = self.facts
            given = datums.read(
                message, vocab_size=limits.vocab_size, max_context_length=limits.max_context_length
            )
            self.check(given)
            return Prepared(operation, given)
        call: Json = json.loads(operation.payload)
        reads = operation.kind in _READING and call.get("object_prefix")
        return Prepared(operation, call, self.load(call["object_prefix"]) if reads else None)

    # -- samples --------------------------------------------------------------------------------------

    def _sample(self, operation: Operation) -> None:
        if operation.state != ops.QUEUED and operation.request_id in self.sampling:
            self.inbox.put(SampleCancelled(operation.request_id))
        if operation.state != ops.QUEUED or operation.request_id in self.sampling:
            return
        self.sampling.add(operation.request_id)
        if operation.payload is None:
            self._unpacking.put(functools.partial(self._fetch_sample, operation.request_id))
            return
        task = pb.SampleTask()
        try:
            task.ParseFromString(operation.payload)
            given = sample_input(operation.request_id, task, tenant_id=operation.tenant_id)
            self.inbox.put(SampleArrived(operation, task, given))
        except Exception as error:
            self.inbox.put(SampleArrived(operation, task, None, _cannot(error, "be sampled")))

    def read_weights(self, object_prefix: str) -> None:
        """Send a sampler's weights."""
        self._reading.put(functools.partial(self._read_weights, object_prefix))

    def _read_weights(self, object_prefix: str) -> None:
        try:
            self.inbox.put(WeightsRead(object_prefix, self.load(object_prefix)))
        except Exception as error:
            self.inbox.put(WeightsRead(object_prefix, None, _cannot(error, "be sampled")))

    def _fetch_sample(self, request_id: str) -> None:
        fetch = functools.partial(ops.fetch, request_ids=[request_id])
        for operation in self.journal.read(fetch).result():
            self.sampling.discard(request_id)
            self._sample(replace(operation, payload=operation.payload or b""))

    def load(self, object_prefix: str) -> AdapterState:
        """A checkpoint's adapter; InvalidInput if its files are not whole."""
        try:
            return self._patiently(lambda: self._read(object_prefix), self.patience_seconds)
        except Damaged as error:
            raise InvalidInput(f"the checkpoint's files are gone or damaged: {error}") from None

    def _read(self, prefix: str) -> AdapterState:
        if self.reads_in_pieces:
            return in_pieces.open_stored(self.objects, prefix)
        return checkpoints.read(self.objects.get(prefix))

    def _patiently(self, read: Callable[[], AdapterState], seconds: float) -> AdapterState:
        """Again and again while the object store does not answer."""
        until, pause = time.monotonic() + seconds, 0.1
        while True:
            try:
                return read()
            except OSError as error:
                if time.monotonic() + pause > until:
                    raise
                log.warning("%s; trying again", error)
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)


_READING = (ops.CREATE_MODEL, ops.LOAD_WEIGHTS)  # may read a checkpoint


def _cannot(error: Exception, what: str) -> Failure:
    if isinstance(error, InvalidInput):
        return Failure(str(error))
    log.error("cannot %s", what, exc_info=error)
    return Failure(f"cannot {what}: {error}", "server")


def _reads_checkpoint(operation: Operation) -> bool:
    return operation.kind in _READING and b'"object_prefix"' in (operation.payload or b"")


def _is_replayed(operation: Operation) -> bool:
    return operation.state == ops.DONE and operation.kind in ops.CHANGING


def sample_input(request_id: str, task: pb.SampleTask, *, tenant_id: str = "") -> SampleInput:
    targets = None
    if task.HasField("target_prompt_logprobs"):
        targets = asked(task.target_prompt_logprobs)
    return SampleInput(
        request_id=request_id,
        tenant_id=tenant_id,
        sampler_id=task.object_prefix,
        prompt=np.frombuffer(task.prompt, "<i4"),
        num_samples=task.num_samples,
        max_tokens=task.max_tokens,
        seed=task.seed,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        stop_tokens=None if task.default_stop else tuple(task.stop_tokens),
        stop_strings=tuple(task.stop_strings),
        prompt_logprobs=task.prompt_logprobs,
        prompt_logprobs_last_n=(
            task.prompt_logprobs_last_n if task.HasField("prompt_logprobs_last_n") else None
        ),
        topk_prompt_logprobs=task.topk_prompt_logprobs,
        topk_sample_logprobs=task.topk_sample_logprobs,
        target_prompt_logprobs=targets,
        prompt_alt_tokens_k=task.prompt_alt_tokens_k,
        is_streamed=bool(task.stream_to),
    )
