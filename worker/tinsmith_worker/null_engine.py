"""An engine that answers without computing, for measuring everything around it. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tinsmith.wire.batch import TrainInput, TrainOutput
from tinsmith_worker.contract import (
    AdapterState,
    Answer,
    Failure,
    LoraSpec,
    ModelFacts,
    OptimizerParams,
    SampledPiece,
    SampledSequence,
    SampleInput,
    SampleOutput,
    StateOnTheWay,
    Work,
    arrived,
)


class NullEngine:
    """Log probabilities are 0, adapters hold one number: the count of their optimizer steps."""

    has_states_in_pieces = False

    def __init__(self) -> None:
        self.facts = ModelFacts(
            vocab_size=1 << 20, max_context_length=1 << 17, architecture="null", tokenizer=""
        )
        self._runs: dict[str, AdapterState] = {}

    @property
    def memory_bytes(self) -> int:
        return 1 << 30

    def size_bytes(self, spec: LoraSpec) -> int:
        return 16

    def close(self) -> None: ...

    def check(self, given: TrainInput) -> None:
        pass

    def create(self, run_id: str, spec: LoraSpec) -> None:
        weights = np.zeros(1, np.float32)
        self._runs[run_id] = AdapterState(spec, (("null", 0, (1,)),), weights, weights, weights)

    def drop(self, run_id: str) -> None:
        self._runs.pop(run_id, None)

    def holds(self, run_id: str) -> bool:
        return run_id in self._runs

    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        return [
            TrainOutput(np.zeros(w.given.targets_TK.shape, np.float32), np.zeros(w.given.tokens, np.float32))
            for w in work
        ]

    def optim_steps(self, steps: Sequence[tuple[str, OptimizerParams]]) -> list[dict[str, float] | Failure]:
        return [self._step(run_id, params) for run_id, params in steps]

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        outputs = self.forward_backward(work)
        return Answer(lambda: outputs)

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        answered = self.optim_steps(steps)
        return Answer(lambda: answered)

    def state(self, run_id: str) -> AdapterState:
        return self._runs[run_id]

    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        return arrived(self.state(run_id))

    def frozen(self, run_id: str) -> AdapterState:
        return self._runs[run_id]

    def restore(self, run_id: str, state: AdapterState) -> None:
        self._runs[run_id] = state

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        self._runs[run_id] = state

    def _step(self, run_id: str, params: OptimizerParams) -> dict[str, float] | Failure:
        state = self._runs[run_id]
        self._runs[run_id] = replace(state, weights=state.weights + 1, gradient=None, step=state.step + 1)
        return {
            "grad_norm": 0.0,
            "optimizer_step": float(state.step + 1),
            "learning_rate": params.learning_rate,
        }


class NullSampler:
    """Samples token 0 until max_tokens."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self.most_sequences = 256
        self._waiting: list[SampleInput] = []

    def hold(self, sampler_id: str, state: AdapterState) -> None:
        self._held.add(sampler_id)

    def holds(self, sampler_id: str) -> bool:
        return sampler_id in self._held

    def release(self, sampler_id: str) -> None:
        self._held.discard(sampler_id)

    def add(self, given: SampleInput) -> None:
        self._waiting.append(given)

    def cancel(self, request_id: str) -> None:
        self._waiting = [w for w in self._waiting if w.request_id != request_id]

    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        waiting, self._waiting = self._waiting, []
        return [_sampled(given) for given in waiting]

    def notify(self, call: Callable[[], None]) -> None: ...

    def pieces(self) -> list[SampledPiece]:
        return []

    @property
    def busy(self) -> bool:
        return bool(self._waiting)


def _sampled(given: SampleInput) -> SampleOutput:
    zeros = np.zeros(given.max_tokens, np.float32)
    sequence = SampledSequence(zeros.astype(np.int32), zeros, stopped=False)
    prompt_logprobs = None
    if given.prompt_logprobs:
        prompt_logprobs = np.zeros(len(given.prompt), np.float32)
        prompt_logprobs[0] = np.nan
    return SampleOutput(given.request_id, [sequence] * given.num_samples, prompt_logprobs)
