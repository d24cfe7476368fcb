"""Sample requests between their arrival and their answer. Everything here runs on the engine's thread."""

import logging
import time
from dataclasses import replace

from tinsmith.errors import InvalidInput
from tinsmith_worker import answers
from tinsmith_worker.contract import AdapterState, Failure, SampleOutput, Sampler
from tinsmith_worker.intake import Intake, SampleArrived
from tinsmith_worker.outbox import Outbox

log = logging.getLogger("tinsmith.worker")


class Sampling:
    """`samplers_held`: how many samplers' weights are kept when nothing samples them."""

    def __init__(self, sampler: Sampler, intake: Intake, outbox: Outbox, *, samplers_held: int) -> None:
        self._sampler = sampler
        self._intake = intake
        self._outbox = outbox
        self._samplers_held = samplers_held
        self._samplers: dict[str, None] = {}  # least recently used first
        self._under_way: dict[str, SampleArrived] = {}

    @property
    def busy(self) -> bool:
        return self._sampler.busy

    def begin(self, event: SampleArrived) -> None:
        request_id, prefix = event.operation.request_id, event.task.object_prefix
        if prefix and event.given and event.weights is None and not self._sampler.holds(prefix):
            # The intake leaves weights out that it sent before; these were let go of since.
            self._intake.load_and_send(event.operation, event.task)
            return
        self._under_way[request_id] = replace(event, weights=None)
        if event.failure is not None or event.given is None:
            self._fail(request_id, event.failure or Failure("the request could not be read", "server"))
            return
        try:
            if prefix:
                self._hold(prefix, event.weights)
            self._sampler.add(event.given)
        except InvalidInput as error:
            self._fail(request_id, Failure(str(error)))
        except Exception as error:  # no memory for the weights, say: this request's fault alone
            log.exception("sampling %s cannot begin", request_id)
            self._fail(request_id, Failure(f"sampling cannot begin: {error}", "server"))

    def decode(self, *, until: float) -> None:
        """Sample until that time (time.monotonic), at least one step, or until nothing is under way."""
        while self._sampler.busy:
            try:
                for finished in self._sampler.step():
                    if isinstance(finished, SampleOutput):
                        self._done(finished)
                    else:
                        self._fail(*finished)
            except Exception as error:
                log.exception("sampling failed")
                for request_id in list(self._under_way):
                    self._sampler.cancel(request_id)
                    self._fail(request_id, Failure(f"sampling failed: {error}", "server"))
            if time.monotonic() >= until:
                return

    def _hold(self, prefix: str, weights: AdapterState | None) -> None:
        """Have the sampler hold these weights, and let go of the ones not used for longest."""
        if not self._sampler.holds(prefix):
            assert weights is not None, prefix
            self._sampler.hold(prefix, weights)
        self._samplers.pop(prefix, None)
        self._samplers[prefix] = None
        in_use = {event.task.object_prefix for event in self._under_way.values()}
        idle = [held for held in self._samplers if held not in in_use]
        for old in idle[: max(0, len(self._samplers) - self._samplers_held)]:
            del self._samplers[old]
            self._intake.samplers.discard(old)
            self._sampler.release(old)

    def _done(self, output: SampleOutput) -> None:
        event = self._take(output.request_id)
        if event is None:
            return
        self._outbox.result(
            event.operation,
            lambda: answers.sampled(output, event.task),
            also=lambda c: answers.record_sequences(c, event.operation, event.task, output),
        )

    def _fail(self, request_id: str, failure: Failure) -> None:
        if event := self._take(request_id):
            self._outbox.failure(event.operation, failure)

    def _take(self, request_id: str) -> SampleArrived | None:
        """None if it was answered already."""
        self._intake.sampling.discard(request_id)
        return self._under_way.pop(request_id, None)
