"""The engine and the sampler of a single-tenant worker: those of LoRA, on a TunedBase.

More runs than one may be here. The one that computes is on the device; the worker puts the others away.
"""

import itertools
from collections.abc import Sequence

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import TrainOutput
from tinsmith_worker.adapters import elements
from tinsmith_worker.contract import Answer, LoraSpec, Work
from tinsmith_worker.engine import TorchEngine
from tinsmith_worker.sampler import TorchSampler
from tinsmith_worker.sampler.requests import Request
from tinsmith_worker.tuning.base import TunedBase

FULL = LoraSpec(0, 0, method="full")


class TunedEngine(TorchEngine):
    """Keeps `contract.Engine`."""

    base: TunedBase

    @property
    def memory_bytes(self) -> int:
        """So that half of it, which the worker fills with runs, is one that trains everything."""
        return 2 * self.size_bytes(FULL)

    def size_bytes(self, spec: LoraSpec) -> int:
        """0 for what `create` refuses."""
        try:
            form = self.base.form_of(spec)
        except InvalidInput:
            return 0
        copy = 0 if form.dtype.itemsize == 4 else form.dtype.itemsize
        return elements(form.layout) * (4 * 4 + copy)

    def drop(self, run_id: str) -> None:
        self.base.release(self._adapters.get(run_id))
        super().drop(run_id)

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        """Run by run. In deterministic mode call by call: what shares a pass is one product with the weights,
        whose gradient is summed over all of its rows at once."""
        parts = (
            [[one] for one in work]
            if self._settings.deterministic
            else [list(part) for _, part in itertools.groupby(work, key=lambda one: one.run_id)]
        )
        begin = super().begin_forward_backward
        answers = [begin(part) for part in parts]
        return Answer(
            lambda: [output for answer in answers for output in answer.get()],
            answers[-1].wait if answers else None,
        )

    def _warm_up(self) -> None:
        """Compiling such a base is passes already, and what its layers keep it looks up for every method."""

    def _check_rank(self, spec: LoraSpec) -> None:
        self.base.form_of(spec)


class TunedSampler(TorchSampler):
    """Keeps `contract.Sampler`. Requests for other weights than those that are sampled wait until these are
    done, in the order of arrival: the model has one set of weights at a time."""

    def _prepare(self, request: Request) -> bool:
        if self._places.samplers - {request.given.sampler_id}:
            return False
        return super()._prepare(request)
