"""What goes into a call and what comes out of it, in the shapes of the official SDK. numpy only.

Shapes: N tokens of one datum or prompt, K targets or candidates per token. What the service keeps records
of (checkpoints, training runs, …) is in `tinsmith.records`, and can be named here too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
LossFnType = LossFn
ModelID = RequestID = str
TensorDtype = Literal["int64", "float32"]
StopReason = Literal["length", "stop"]
SamplingClientKind = Literal["snapshot", "inflight"]
CustomLossInputRank = Literal[0, 1, 2]


class EncodedTextChunk:
    """Tokens; `array` has them as int32 [N]."""

    type: Literal["encoded_text"] = "encoded_text"

    def __init__(self, tokens: npt.ArrayLike) -> None:
        self.array: npt.NDArray[np.int32] = np.asarray(tokens, np.int32).reshape(-1)

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.array.tolist()
        return tokens

    @property
    def length(self) -> int:
        return len(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EncodedTextChunk) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        return f"EncodedTextChunk(tokens={self.tokens})"


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """An image's bytes. For services that take images; a Tinsmith takes text."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    @property
    def length(self) -> int:
        if self.expected_tokens is None:
            raise InvalidInput("the length of an image is known only if it has expected_tokens")
        return self.expected_tokens


@dataclass(frozen=True, kw_only=True)
class ImageAssetPointerChunk:
    """An image that the service knows by its location. For sampling, at services that take images."""

    location: str
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        if self.expected_tokens is None:
            raise InvalidInput("the length of an image is known only if it has expected_tokens")
        return self.expected_tokens


ModelInputChunk = EncodedTextChunk | ImageChunk | ImageAssetPointerChunk


@dataclass(frozen=True)
class ModelInput:
    """A prompt, or the input side of a datum."""

    chunks: list[ModelInputChunk]

    @classmethod
    def from_ints(cls, tokens: npt.ArrayLike) -> "ModelInput":
        return cls([EncodedTextChunk(tokens)])

    @classmethod
    def empty(cls) -> "ModelInput":
        return cls([])

    def append(self, chunk: ModelInputChunk) -> "ModelInput":
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> "ModelInput":
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        """All tokens. InvalidInput if there is more than text."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise InvalidInput(f"only text has tokens, and this input has a chunk of type {chunk.type}")
            tokens += chunk.tokens
        return tokens

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class TensorData:
    """A float32 or int64 array. Integers and booleans become int64, everything else float32.

    One of two dimensions may be given sparse, as CSR: `data` has the listed values, `sparse_crow_indices`
    where each row's begin, `sparse_col_indices` their columns, and `shape` the dense shape.
    """

    def __init__(
        self,
        data: npt.ArrayLike | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        values = np.asarray([] if data is None else data)
        self.dtype: TensorDtype = dtype or ("int64" if values.dtype.kind in "iub" else "float32")
        self.values: Array = np.ascontiguousarray(values, np.dtype(self.dtype))
        self.sparse_crow_indices = None if sparse_crow_indices is None else list(sparse_crow_indices)
        self.sparse_col_indices = None if sparse_col_indices is None else list(sparse_col_indices)
        if (sparse_crow_indices is None) != (sparse_col_indices is None):
            raise InvalidInput("sparse_crow_indices and sparse_col_indices come as a pair")
        if self.sparse_crow_indices is None:
            self.values = self.values.reshape(self.values.shape if shape is None else tuple(shape))
            self.shape = list(self.values.shape)
        elif shape is None or len(shape) != 2:
            raise InvalidInput("a sparse tensor needs the shape of the dense one, [rows, columns]")
        else:
            self.shape = list(shape)

    @classmethod
    def from_numpy(cls, array: Array) -> "TensorData":
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        tensor = tensor.detach().cpu()
        return cls((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    @classmethod
    def from_torch_sparse(cls, tensor: "torch.Tensor", pad_value: int = 0) -> "TensorData":
        """Sparse if that is smaller: cells of `pad_value` are left out."""
        return cls.from_torch(tensor).to_sparse(pad_value)

    def to_sparse(self, pad_value: int = 0) -> "TensorData":
        """The same, as CSR if that is smaller: cells of `pad_value` are left out."""
        if len(self.shape) != 2 or self.sparse_crow_indices is not None:
            return self
        rows, columns = np.nonzero(self.values != pad_value)
        if self.shape[0] + 1 + 2 * len(rows) >= self.values.size:
            return self
        starts = np.searchsorted(rows, np.arange(self.shape[0] + 1))
        values = self.values[rows, columns]
        return TensorData(values, self.dtype, self.shape, starts.tolist(), columns.tolist())

    @property
    def data(self) -> list[int] | list[float]:
        """All values, flat; of a sparse tensor those listed."""
        return self.values.reshape(-1).tolist()

    def to_numpy(self, pad_value: int = 0) -> Array:
        """Dense: what a sparse tensor does not list is `pad_value`."""
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            return self.values
        dense = np.full(self.shape, pad_value, self.values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self.values
        return dense

    def to_torch(self, pad_value: int = 0) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.to_numpy(pad_value).copy())

    def tolist(self, pad_value: int = 0) -> list[Any]:
        return self.to_numpy(pad_value).tolist()  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"TensorData({self.dtype}, shape={self.shape})"


LossFnInputs = LossFnOutput = dict[str, TensorData]


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan:
    """`length` tokens that were the prompt of the sampled sequence `sequence_id`, from `offset` on."""

    sequence_id: str
    offset: int = 0
    length: int


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan:
    """`length` tokens that were sampled as `sequence_id`, from `offset` on."""

    sequence_id: str
    offset: int = 0
    length: int


ProvenanceSpans = Sequence[PromptProvenanceSpan | SampledProvenanceSpan]

_INTEGER_INPUTS = ("target_tokens",)
_OFTEN_SPARSE = ("target_tokens", "weights")


@dataclass(frozen=True)
class Datum:
    """One training example: N input tokens, and per-token inputs of the loss.

    `loss_fn_inputs` takes TensorData, numpy arrays, torch tensors or lists. Position i of
    `target_tokens` is what position i of the input should predict: the caller shifts.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    def __post_init__(self) -> None:
        tensors = {name: _tensor(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", tensors)
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise InvalidInput("provenance comes as a pair: give both span lists or neither")

    def with_provenance(self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans) -> "Datum":
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
        tensor = TensorData.from_torch(value)
    elif isinstance(value, np.ndarray):
        tensor = TensorData.from_numpy(value)
    else:
        try:
            tensor = TensorData(value, "int64" if name in _INTEGER_INPUTS else "float32")
        except ValueError as error:
            raise InvalidInput(f"{name} must be a rectangular array of numbers: {error}") from None
    return tensor.to_sparse() if name in _OFTEN_SPARSE else tensor


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
class DimuonParams:
    """For services that have this optimizer; a Tinsmith has AdamW and Muon."""

    learning_rate: float
    grad_clip_norm: float = 0.0
    beta1: float = 0.9
    type: Literal["dimuon"] = "dimuon"


@dataclass(frozen=True, kw_only=True)
class MuonParams:
    """For runs that were created with MuonOptimizerConfig. grad_clip_norm 0: no clipping."""

    learning_rate: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    type: Literal["muon"] = "muon"


OptimParams = AdamParams | DimuonParams | MuonParams


@dataclass(frozen=True, kw_only=True)
class AdamOptimizerConfig:
    type: Literal["adamw"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class DimuonOptimizerConfig:
    version: Literal[1] = 1
    type: Literal["dimuon"] = "dimuon"


@dataclass(frozen=True, kw_only=True)
class MuonOptimizerConfig:
    type: Literal["muon"] = "muon"


OptimizerConfig = AdamOptimizerConfig | DimuonOptimizerConfig | MuonOptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """seed None: a random one."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


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
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SaveWeightsResponse:
    path: str
    type: Literal["save_weights"] | None = None


@dataclass(frozen=True)
class SaveWeightsForSamplerResponse:
    path: str
    type: Literal["save_weights_for_sampler"] | None = None


@dataclass(frozen=True)
class SaveWeightsExternalResponse:
    path: str
    type: Literal["save_weights_external"] | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class LoadWeightsResponse:
    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


@dataclass(frozen=True)
class ModelData:
    """tokenizer_id: a hub id, or a folder on the service's machine. `get_tokenizer` needs neither."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True)
class GetInfoResponse:
    """`tuning_config`: of a run that is not LoRA, its `method` and `settings`."""

    model_id: str
    model_data: ModelData
    lora_rank: int | None = None
    is_lora: bool | None = None
    model_name: str | None = None
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    type: Literal["get_info"] | None = None
    tuning_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class SupportedModel:
    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


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
    """`sequence_id` names it in the provenance of a datum."""

    stop_reason: StopReason
    sequence_id: str = ""
    tokens_np: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    logprobs_np: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)

    @cached_property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.tokens_np.tolist()
        return tokens

    @cached_property
    def logprobs(self) -> list[float] | None:
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
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

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        if self.prompt_logprobs_np is None:
            return None
        return [None if value != value else value for value in self.prompt_logprobs_np.tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_prompt_logprobs_np is None else self.topk_prompt_logprobs_np.tolist()


def __getattr__(name: str) -> Any:
    from tinsmith import records

    if name in records.__all__:
        return getattr(records, name)
    raise AttributeError(f"module 'tinsmith.types' has no attribute {name!r}")
