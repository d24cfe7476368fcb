"""What goes into a call and what comes out of it, in the shapes of the official SDK. numpy only.

Shapes: N tokens of one datum or prompt, K targets or candidates per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tinsmith.errors import InvalidInput

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
LossFn = Literal[
    "cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "custom"
]


class EncodedTextChunk:
    """Tokens, kept as int32 [N]."""

    type = "encoded_text"

    def __init__(self, tokens: npt.ArrayLike) -> None:
        self.tokens: npt.NDArray[np.int32] = np.asarray(tokens, np.int32).reshape(-1)

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """A prompt, or the input side of a datum. Text only, so far."""

    chunks: list[EncodedTextChunk]

    @classmethod
    def from_ints(cls, tokens: npt.ArrayLike) -> "ModelInput":
        return cls([EncodedTextChunk(tokens)])

    @classmethod
    def empty(cls) -> "ModelInput":
        return cls([])

    def append(self, chunk: EncodedTextChunk) -> "ModelInput":
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens.tolist()]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class TensorData:
    """A float32 or int64 array. Integers and booleans become int64, everything else float32."""

    def __init__(
        self,
        data: npt.ArrayLike,
        dtype: Literal["float32", "int64"] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        given = np.asarray(data)
        kind: Literal["float32", "int64"] = dtype or ("int64" if given.dtype.kind in "iub" else "float32")
        self._array: Array = np.ascontiguousarray(given, np.dtype(kind))
        self.dtype = kind
        if shape is not None:
            self._array = self._array.reshape(tuple(shape))

    @classmethod
    def from_numpy(cls, array: Array) -> "TensorData":
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        tensor = tensor.detach().cpu()
        return cls((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape)

    @property
    def data(self) -> list[int] | list[float]:
        """All values, flat."""
        return self._array.reshape(-1).tolist()

    def to_numpy(self) -> Array:
        return self._array

    def to_torch(self) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self._array.copy())

    def tolist(self) -> list[Any]:
        return self._array.tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan:
    """`length` tokens that were the prompt of the sampled sequence `sequence_id`, from `offset` on."""

    sequence_id: str
    length: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan:
    """`length` tokens that were sampled as `sequence_id`, from `offset` on."""

    sequence_id: str
    length: int
    offset: int = 0


Spans = Sequence[PromptProvenanceSpan | SampledProvenanceSpan]

_INTEGER_INPUTS = ("target_tokens",)


@dataclass(frozen=True)
class Datum:
    """One training example: N input tokens, and per-token inputs of the loss.

    `loss_fn_inputs` takes TensorData, numpy arrays, torch tensors or lists. Position i of
    `target_tokens` is what position i of the input should predict: the caller shifts.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)
    model_input_spans: Spans | None = None
    loss_fn_input_spans: Spans | None = None

    def __post_init__(self) -> None:
        tensors = {name: _tensor(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise InvalidInput("provenance comes as a pair: give both span lists or neither")

    def with_provenance(self, model_input: Spans, loss_fn_inputs: Spans) -> "Datum":
        """A copy that says which samples its tokens came from; both lists must tile the N tokens."""
        for name, spans in (("model_input", model_input), ("loss_fn_inputs", loss_fn_inputs)):
            covered = sum(span.length for span in spans)
            if covered != self.model_input.length:
                raise InvalidInput(f"the {name} spans cover {covered} of {self.model_input.length} tokens")
        return replace(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    if isinstance(value, np.ndarray):
        return TensorData.from_numpy(value)
    return TensorData(value, "int64" if name in _INTEGER_INPUTS else "float32")


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """AdamW as torch has it, without decay or clipping unless asked. grad_clip_norm 0: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy, top_k -1 is off. stop None: the model's end of sequence; []: nothing."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """`loss_fn_outputs` has one entry per datum; its `logprobs` have the shape of the targets."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class OptimStepResponse:
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SaveWeightsResponse:
    path: str


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    path: str | None = None


@dataclass(frozen=True)
class ModelData:
    """tokenizer_id: a hub id, or a folder on the service's machine."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    model_id: str
    model_data: ModelData
    lora_rank: int | None = None


@dataclass(frozen=True)
class SupportedModel:
    model_name: str | None = None
    max_context_length: int | None = None


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    supported_models: list[SupportedModel]


@dataclass(frozen=True)
class TopkLogprobs:
    """token_ids and logprobs [N, k], best first. A cell of logprob -99999 is empty."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def tolist(self) -> list[list[tuple[int, float]] | None]:
        """Per position its (token, logprob) pairs; None where there are none."""
        rows = zip(self.token_ids.tolist(), self.logprobs.tolist(), strict=True)
        pairs = [[(t, p) for t, p in zip(*row, strict=True) if p > -99999.0] for row in rows]
        return [row or None for row in pairs]


@dataclass(frozen=True)
class SampledSequence:
    stop_reason: Literal["stop", "length"]
    sequence_id: str
    tokens_np: npt.NDArray[np.int32]
    logprobs_np: npt.NDArray[np.float32] | None = None
    topk_logprobs_np: TopkLogprobs | None = None

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.tokens_np.tolist()
        return tokens

    @property
    def logprobs(self) -> list[float] | None:
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.tolist()


@dataclass(frozen=True)
class PromptAltTokens:
    """tokens and logprobs [N - 1, k]: row i offers alternatives to prompt token i + 1."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampleResponse:
    """prompt_logprobs_np is [N], NaN where there is none (position 0 always)."""

    sequences: list[SampledSequence]
    prompt_logprobs_np: npt.NDArray[np.float32] | None = None
    topk_prompt_logprobs_np: TopkLogprobs | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    @property
    def prompt_logprobs(self) -> list[float | None] | None:
        if self.prompt_logprobs_np is None:
            return None
        return [None if value != value else value for value in self.prompt_logprobs_np.tolist()]

    @property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.tolist()
