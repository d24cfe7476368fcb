"""Sample requests between their arrival and their answer. Everything here runs on the engine's thread.

Tenants share the sampler by sequences: a place that becomes free goes to the tenant that has fewest, so a
flood of one's requests stands in its own line and in nobody else's.

A request that was under way when workers died, more than once, is a suspect: it is executed alone, no
training beside it, and the journal says so before. If it is survived, it was innocent.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from tinsmith.errors import InvalidInput
from tinsmith_api.journal import leases
from tinsmith_api.journal.operations import Operation
from tinsmith_worker import answers
from tinsmith_worker.contract import Failure, SampledPiece, SampleOutput, Sampler
from tinsmith_worker.intake import Intake, SampleArrived, WeightsRead
from tinsmith_worker.outbox import Outbox

log = logging.getLogger("tinsmith.worker")


class Sampling:
    """`samplers_held`: how many samplers' weights are kept when nothing samples them. `suspect`: leave word
    in the journal that this sample is tried now; False if it is no longer ours to try. `stream`: send tokens
    as they come (to whom, of which request, which)."""

    def __init__(
        self,
        sampler: Sampler,
        intake: Intake,
        outbox: Outbox,
        *,
        suspect: Callable[[Operation], bool],
        stream: Callable[[str, str, Sequence[SampledPiece]], None],
        samplers_held: int,
    ) -> None:
        self._sampler = sampler
        self._intake = intake
        self._outbox = outbox
        self._suspect = suspect
        self._stream_out = stream
        self._samplers_held = samplers_held
        self._samplers: dict[str, None] = {}  # least recently used first
        self._under_way: dict[str, SampleArrived] = {}
        self._waiting: dict[str, deque[str]] = {}  # tenant -> its requests that have no place yet
        self._suspects: deque[str] = deque()  # requests that are to be executed alone
        self._tried: str | None = None  # the one of them that is
        self._placed: dict[str, str] = {}  # request -> the sampler it uses
        self._sequences: Counter[str] = Counter()  # of each tenant's requests that have a place
        self._reading: dict[str, list[str]] = {}  # sampler whose weights are being read -> who waits for them

    @property
    def busy(self) -> bool:
        return self._sampler.busy

    def begin(self, event: SampleArrived) -> None:
        request_id = event.operation.request_id
        self._under_way[request_id] = event
        if event.failure is not None or event.given is None:
            self._fail(request_id, event.failure or Failure("the request could not be read", "server"))
        elif event.operation.deaths >= leases.LAST_DEATHS:
            self._fail(request_id, answers.deadly(event.operation.deaths))
        elif event.operation.deaths >= leases.SUSPECT_DEATHS:
            self._suspects.append(request_id)
        else:
            self._waiting.setdefault(event.operation.tenant_id, deque()).append(request_id)
        self._fill()

    def cancel(self, request_id: str) -> None:
        """Let go of it: it has its outcome already."""
        event = self._take(request_id)
        if event is None:
            return
        waiting = self._waiting.get(event.operation.tenant_id, deque())
        if request_id in self._suspects:
            self._suspects.remove(request_id)
        elif request_id in waiting:
            waiting.remove(request_id)
            if not waiting:
                del self._waiting[event.operation.tenant_id]
        else:
            self._sampler.cancel(request_id)
        self._outbox.announce(event.operation)
        self._fill()

    def weights_read(self, event: WeightsRead) -> None:
        waiting = self._reading.pop(event.object_prefix, [])
        failure = event.failure
        if event.weights is not None:
            try:
                self._sampler.hold(event.object_prefix, event.weights)
                self._keep(event.object_prefix)
            except Exception as error:  # no memory for the weights, say
                if not isinstance(error, InvalidInput):
                    log.exception("the weights of %s cannot be held", event.object_prefix)
                failure = Failure(f"sampling cannot begin: {error}", "server")
        for request_id in waiting:
            if failure is not None:
                self._fail(request_id, failure)
            elif request_id in self._under_way:
                self._add(request_id)
        self._fill()

    def hold(self, prefix: str, weights: object) -> None:
        """Weights that are being saved under this prefix, as the engine has them now."""
        try:
            self._sampler.hold(prefix, weights)
            self._keep(prefix)
        except Exception:  # no memory for them, say: they will be read when they are asked for
            log.exception("the weights of %s cannot be held", prefix)

    def decode(self, *, until: float) -> None:
        """Sample until that time (time.monotonic), at least one step, or until nothing is under way."""
        while self._sampler.busy:
            try:
                finished_now = self._sampler.step()
                self._stream()
                for finished in finished_now:
                    if isinstance(finished, SampleOutput):
                        self._done(finished)
                    else:
                        self._fail(*finished)
            except Exception as error:
                log.exception("sampling failed")
                reading = {r for waiting in self._reading.values() for r in waiting}
                for request_id in self._placed.keys() - reading:
                    self._sampler.cancel(request_id)
                    self._fail(request_id, Failure(f"sampling failed: {error}", "server"))
            self._fill()
            if time.monotonic() >= until and self._tried is None:
                return

    def _stream(self) -> None:
        of_request: dict[str, list[SampledPiece]] = {}
        for piece in self._sampler.pieces():
            of_request.setdefault(piece.request_id, []).append(piece)
        for request_id, pieces in of_request.items():
            if event := self._under_way.get(request_id):
                self._stream_out(event.task.stream_to, request_id, pieces)

    def _fill(self) -> None:
        """Give the places that are free to those that have fewest. One request is always let in; a suspect
        when all places are free, and nobody else until it was survived."""
        while self._suspects and not self._placed:
            self._tried = self._suspects.popleft()
            self._place(self._tried)
        while self._waiting and not self._suspects and self._tried is None:
            tenant_id = min(self._waiting, key=lambda t: self._sequences[t])
            request_id = self._waiting[tenant_id][0]
            given = self._under_way[request_id].given
            assert given is not None
            taken = self._sequences.total()
            if taken and taken + given.num_samples > self._sampler.most_sequences:
                return
            self._waiting[tenant_id].popleft()
            if not self._waiting[tenant_id]:
                del self._waiting[tenant_id]
            self._place(request_id)

    def _place(self, request_id: str) -> None:
        event = self._under_way[request_id]
        assert event.given is not None
        self._sequences[event.operation.tenant_id] += event.given.num_samples
        prefix = event.task.object_prefix
        self._placed[request_id] = prefix
        if not prefix or self._sampler.holds(prefix):
            self._add(request_id)
        elif prefix in self._reading:
            self._reading[prefix].append(request_id)
        else:
            self._reading[prefix] = [request_id]
            self._intake.read_weights(prefix)

    def _add(self, request_id: str) -> None:
        event = self._under_way[request_id]
        event = replace(event, operation=replace(event.operation, started_at=time.time()))
        self._under_way[request_id] = event
        assert event.given is not None
        try:
            if prefix := event.task.object_prefix:
                self._keep(prefix)
            if request_id == self._tried and not self._suspect(event.operation):
                self._take(request_id)  # another worker has it
                return
            self._sampler.add(event.given)
        except InvalidInput as error:
            self._fail(request_id, Failure(str(error)))
        except Exception as error:  # this request's fault alone
            log.exception("sampling %s cannot begin", request_id)
            self._fail(request_id, Failure(f"sampling cannot begin: {error}", "server"))

    def _keep(self, prefix: str) -> None:
        """These weights are used now; let go of the ones not used for longest."""
        self._samplers.pop(prefix, None)
        self._samplers[prefix] = None
        in_use = set(self._placed.values())
        idle = [held for held in self._samplers if held not in in_use]
        for old in idle[: max(0, len(self._samplers) - self._samplers_held)]:
            del self._samplers[old]
            self._sampler.release(old)

    def _done(self, output: SampleOutput) -> None:
        event = self._take(output.request_id)
        if event is None:
            return
        self._outbox.result(
            event.operation,
            lambda: answers.sampled(output, event.task),
            also=lambda c: answers.record_sequences(c, event.operation, event.task, output),
            used=answers.used(output, event.task),
        )

    def _fail(self, request_id: str, failure: Failure) -> None:
        if event := self._take(request_id):
            self._outbox.failure(event.operation, failure)

    def _take(self, request_id: str) -> SampleArrived | None:
        """None if it was answered already."""
        self._intake.sampling.discard(request_id)
        if request_id == self._tried:
            self._tried = None
        event = self._under_way.pop(request_id, None)
        if event and event.given and self._placed.pop(request_id, None) is not None:
            tenant_id = event.operation.tenant_id
            self._sequences[tenant_id] -= event.given.num_samples
            if not self._sequences[tenant_id]:
                del self._sequences[tenant_id]
        return event
