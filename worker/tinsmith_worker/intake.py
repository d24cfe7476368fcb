"""From the doorbell to the engine's inbox: what can be prepared without the engine is prepared here.

Runs on its own thread, beside the engine's. It reads operations from the journal, takes leases, unpacks
payloads into arrays and reads checkpoint files, so that the engine's thread never waits for any of it.
"""

import functools
import json
import logging
import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.journal import leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Lease
from tinsmith_api.journal.objects import Damaged, ObjectStore
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Store
from tinsmith_worker import checkpoints
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
    broken: str = ""


@dataclass(frozen=True)
class Arrived:
    prepared: Prepared


@dataclass(frozen=True)
class SampleArrived:
    operation: Operation
    task: pb.SampleTask
    given: SampleInput | None
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


Event = Adopt | Arrived | SampleArrived | LeaseGone | Drain


@dataclass
class Intake:
    """`inbox` is read by the engine's thread. `known` (run -> epoch), `samplers` and `sampling` remember
    what it was sent."""

    journal: Store
    objects: ObjectStore
    facts: ModelFacts
    base_model: str
    worker_id: str
    inbox: "queue.SimpleQueue[Event]"
    known: dict[str, int] = field(default_factory=dict)
    samplers: set[str] = field(default_factory=set)
    sampling: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Everything that was waiting when this process began."""
        backlog = self.journal.read(lambda c: ops.backlog(c, self.worker_id, self.base_model)).result()
        self.ring(list(backlog))

    def ring(self, request_ids: Sequence[str]) -> None:
        """Bring these operations, and the runs they belong to, into the inbox."""
        for start in range(0, len(request_ids), 256):
            fetch = functools.partial(ops.fetch, request_ids=request_ids[start : start + 256])
            for operation in self.journal.read(fetch).result():
                if operation.kind == ops.SAMPLE:
                    self._sample(operation)
                elif operation.subject in self.known:
                    if operation.state != ops.DONE:  # it came with its run already
                        self.inbox.put(Arrived(self._prepare(operation)))
                else:
                    self.adopt(operation.subject)

    def adopt(self, run_id: str) -> None:
        """Take the run's lease if it is to be had, and send all of it: snapshot and operations behind."""
        lease = self.journal.write(lambda c: leases.take(c, run_id, self.worker_id)).result()
        if lease is None:
            return
        self.known[run_id] = lease.epoch
        behind = self.journal.read(lambda c: ops.history(c, run_id, lease.snapshot_seq)).result()
        snapshot, broken = None, ""
        if lease.snapshot_key is not None:
            try:
                snapshot = checkpoints.read(self.objects.get(lease.snapshot_key))
            except Exception as error:
                log.exception("the snapshot of %s cannot be read", run_id)
                broken = f"the run's snapshot cannot be read ({error}); create a run from its last checkpoint"
        self.inbox.put(Adopt(lease, snapshot, [self._prepare(o) for o in behind], broken))

    def forget(self, run_id: str) -> None:
        self.known.pop(run_id, None)

    def _prepare(self, operation: Operation) -> Prepared:
        if operation.state == ops.FAILED or (
            operation.state == ops.DONE and operation.kind not in ops.CHANGING
        ):
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
            return Prepared(operation, given)
        call: Json = json.loads(operation.payload)
        reads = operation.kind in (ops.CREATE_MODEL, ops.LOAD_WEIGHTS) and call.get("object_prefix")
        return Prepared(operation, call, self.load(call["object_prefix"]) if reads else None)

    def _sample(self, operation: Operation) -> None:
        if operation.state != ops.QUEUED or operation.request_id in self.sampling:
            return
        self.sampling.add(operation.request_id)
        task = pb.SampleTask()
        try:
            task.ParseFromString(operation.payload or b"")
            weights = None
            if task.object_prefix and task.object_prefix not in self.samplers:
                weights = self.load(task.object_prefix)
                self.samplers.add(task.object_prefix)
            self.inbox.put(SampleArrived(operation, task, sample_input(operation.request_id, task), weights))
        except InvalidInput as error:
            self.inbox.put(SampleArrived(operation, task, None, None, Failure(str(error))))
        except Exception as error:
            log.exception("sample %s cannot be prepared", operation.request_id)
            failure = Failure(f"cannot be sampled: {error}", "server")
            self.inbox.put(SampleArrived(operation, task, None, None, failure))

    def load(self, object_prefix: str) -> AdapterState:
        """A checkpoint's adapter; InvalidInput if its files are not whole."""
        try:
            return checkpoints.read(self.objects.get(object_prefix))
        except Damaged as error:
            raise InvalidInput(f"the checkpoint's files are gone or damaged: {error}") from None


def sample_input(request_id: str, task: pb.SampleTask) -> SampleInput:
    targets = None
    if task.HasField("target_prompt_logprobs"):
        targets = asked(task.target_prompt_logprobs)
    return SampleInput(
        request_id=request_id,
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
    )
