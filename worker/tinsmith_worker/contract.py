"""What the worker process asks of an engine and a sampler, and the plain data between them. No torch.

The torch engine (`engine.py`, `sampler/`) and the null engine (`null_engine.py`) both keep this contract.
Everything here runs on one thread, the engine's; only `AdapterState` and outputs leave it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tinsmith.wire.batch import TrainInput, TrainOutput

T = TypeVar("T")

LORA_ALPHA = 32
"""Fixed by the wire, whatever the rank: the delta is scaled by 32 / rank."""


@dataclass(frozen=True)
class LoraSpec:
    """What a run trains: LoRA of a rank; or, on a single-tenant worker and with rank 0, what `method` of
    `tinsmith.wire.methods` does with these `settings` ("full": all of the base's own weights)."""

    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    method: str = "lora"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamParams:
    """torch AdamW: decoupled weight decay; grad_clip_norm 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class MuonParams:
    """See `muon.py`. Its momentum is kept where AdamW keeps its first moment."""

    learning_rate: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


OptimizerParams = AdamParams | MuonParams


@dataclass(frozen=True)
class AdapterState:
    """All of an adapter, in host memory: what a snapshot or a checkpoint is made of.

    Arrays are flat float32 in the layout `tensors` names: (name as in the files that others load, offset,
    shape). `moment1`, `moment2` and `gradient` are None where there is none (weights only; an optimizer that
    has no second moment; nothing accumulated). `config`: the JSON that others want beside the weights; ""
    for LoRA, whose follows from the rest.
    """

    spec: LoraSpec
    tensors: tuple[tuple[str, int, tuple[int, ...]], ...]
    weights: npt.NDArray[np.float32]
    moment1: npt.NDArray[np.float32] | None = None
    moment2: npt.NDArray[np.float32] | None = None
    gradient: npt.NDArray[np.float32] | None = None
    step: int = 0
    config: str = ""

    @property
    def nbytes(self) -> int:
        flats = (self.weights, self.moment1, self.moment2, self.gradient)
        return sum(flat.nbytes for flat in flats if flat is not None)


@dataclass(frozen=True)
class StateOnTheWay:
    """A run's state as it was when it was asked for. `arrival` gives it, on any thread."""

    spec: LoraSpec
    nbytes: int
    arrival: "Future[AdapterState]"


def arrived(state: AdapterState) -> StateOnTheWay:
    future: Future[AdapterState] = Future()
    future.set_result(state)
    return StateOnTheWay(state.spec, state.nbytes, future)


@dataclass(frozen=True)
class Work:
    """One forward_backward (or forward) of one run."""

    run_id: str
    given: TrainInput


@dataclass(frozen=True)
class SampleInput:
    """One sample operation. `sampler_id` names weights given to `Sampler.hold`, "" the base model.

    stop None: the model's end-of-sequence tokens; () : nothing stops it but max_tokens.
    """

    request_id: str
    sampler_id: str
    prompt: npt.NDArray[np.int32]
    num_samples: int
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: npt.NDArray[np.int64] | None = None  # [prompt - 1, K]; -1 in an empty cell
    prompt_alt_tokens_k: int = 0
    tenant_id: str = ""  # nobody else's prompts are known to have been read before
    is_streamed: bool = False  # somebody reads its tokens as they come


@dataclass(frozen=True)
class TopK:
    """token_ids and logprobs [length, k], best first."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class SampledSequence:
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stopped: bool  # by a stop token or string; else by length
    topk: TopK | None = None


@dataclass(frozen=True)
class SampledPiece:
    """Tokens of sequence `index` that come after its first `start`; its last ones if `ends`."""

    request_id: str
    index: int
    start: int
    sequence: SampledSequence
    ends: bool


@dataclass(frozen=True)
class SampleOutput:
    request_id: str
    sequences: list[SampledSequence]
    prompt_logprobs: npt.NDArray[np.float32] | None = None  # [prompt], NaN where there is none
    topk_prompt: TopK | None = None  # [prompt, k]; row 0 is empty: token 0, logprob -99999
    target_prompt_logprobs: npt.NDArray[np.float32] | None = None
    prompt_alt_tokens: TopK | None = None  # [prompt - 1, k]
    cache_hit_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why one operation failed. category: "user" or "server"."""

    message: str
    category: str = "user"


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a device may still be computing. `get` gives it, on the engine's thread, however often it is
    asked; `wait` returns on any thread once `get` will not have to wait. None: it is here already."""

    get: Callable[[], T]
    wait: Callable[[], None] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the control plane must know of a base model to validate requests."""

    vocab_size: int
    max_context_length: int
    architecture: str
    max_rank: int = 256
    tokenizer: str = ""  # a hub id or a folder
    tokenizer_files: str = ""  # where in the object store they are
    single_tenant: bool = False  # its workers train one run at a time, and not LoRA


class Engine(Protocol):
    facts: ModelFacts
    has_states_in_pieces: bool  # its states are `in_pieces.Held`, and it is given `in_pieces.Stored`

    @property
    def memory_bytes(self) -> int:
        """What its device has left beside the base (on a CPU: half of what the machine has)."""
        ...

    def size_bytes(self, spec: LoraSpec) -> int:
        """What such an adapter takes on the device, with gradient and moments."""
        ...

    def close(self) -> None:
        """End what else runs for it. The last call."""
        ...

    def check(self, given: TrainInput) -> None:
        """InvalidInput for what could break the pass it shares with others. Called on any thread."""
        ...

    def create(self, run_id: str, spec: LoraSpec) -> None: ...
    def drop(self, run_id: str) -> None: ...
    def holds(self, run_id: str) -> bool: ...
    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        """One pass or several over all of `work`, in order; gradients accumulate unless forward_only.

        If it raises, the accumulated gradients of the runs in `work` are undefined.
        """
        ...

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        """The same, without waiting for the device: calls that follow act on what this one leaves behind.
        MemoryError where the device had no room: gradients are undefined, and the next try asks for less."""
        ...

    def optim_steps(self, steps: Sequence[tuple[str, OptimizerParams]]) -> list[dict[str, float] | Failure]:
        """Step each of these runs, all different, and clear its gradient. A gradient that is not finite is
        that run's Failure, and is cleared too."""
        ...

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        """The same, without waiting for the device."""
        ...

    def state(self, run_id: str) -> AdapterState: ...
    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        """The same, without waiting for the device: what is done to the run from now on is not in it.
        `only_weights`: no moments, step or gradient. `leaves`: the next call drops the run."""
        ...

    def frozen(self, run_id: str) -> object:
        """A copy of its weights on the device, for `Sampler.hold`."""
        ...

    def restore(self, run_id: str, state: AdapterState) -> None:
        """Make (or replace) the adapter exactly as `state` has it."""
        ...

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        """Load a checkpoint into an existing adapter of equal rank and targets (else InvalidInput);
        without `optimizer`, moments and step start anew. The accumulated gradient is cleared."""
        ...


class Sampler(Protocol):
    def hold(self, sampler_id: str, weights: Any) -> None:
        """Keep these weights, an AdapterState or what `Engine.frozen` gave, under this name (idempotent)."""
        ...

    def holds(self, sampler_id: str) -> bool: ...
    def release(self, sampler_id: str) -> None:
        """Let go of these weights; nothing that samples them is under way."""
        ...

    def add(self, given: SampleInput) -> None: ...
    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        """One decode step of everything under way (prefilling what is new); what finished."""
        ...

    def notify(self, call: Callable[[], None]) -> None:
        """Call this, on any thread, when it became busy by itself."""
        ...

    def pieces(self) -> list[SampledPiece]:
        """Tokens that came back since this was called last, of requests that are streamed. What is left out
        comes with the whole."""
        ...

    def cancel(self, request_id: str) -> None: ...
    @property
    def most_sequences(self) -> int:
        """So many can grow at once. It is given no more: what waits in it, it serves in the order of
        arrival."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        ...
