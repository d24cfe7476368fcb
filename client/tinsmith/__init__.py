"""Tinsmith's client: train LoRA adapters on a Tinsmith (or any Tinker-compatible) service.

    import tinsmith

    service = tinsmith.connect()  # or tinsmith.ServiceClient(base_url=…, api_key=…)
    training = service.create_lora_training_client("tinsmith/tiny").result()
    step = training.forward_backward(data, "cross_entropy"), training.optim_step(tinsmith.AdamParams())
    print(step[0].result().metrics)

Everything below is imported when it is first named: workers use `tinsmith.wire` and `tinsmith.errors`
on machines that have neither httpx nor protobuf. Scripts of the official SDK find its names here too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from tinsmith import errors, types
    from tinsmith.custom_loss import LossHandle, PerDatumLossFn
    from tinsmith.errors import (
        APIConnectionError,
        APIError,
        APIResponseValidationError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        BillingError,
        ConflictError,
        InternalServerError,
        InvalidInput,
        NotFound,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        RequestFailed,
        RequestFailedError,
        ServiceUnavailable,
        TinkerError,
        TinsmithError,
        UnprocessableEntityError,
    )
    from tinsmith.future import Future
    from tinsmith.future import Future as APIFuture
    from tinsmith.local import connect
    from tinsmith.records import Checkpoint, CheckpointType, ParsedCheckpointTinkerPath, TrainingRun
    from tinsmith.rest_client import AdminClient, RestClient
    from tinsmith.sampling_client import SamplingClient
    from tinsmith.service_client import ServiceClient
    from tinsmith.tokenizer import Tokenizer
    from tinsmith.training_client import TrainingClient
    from tinsmith.types import (
        AdamOptimizerConfig,
        AdamParams,
        Datum,
        DimuonOptimizerConfig,
        DimuonParams,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelID,
        ModelInput,
        ModelInputChunk,
        OptimParams,
        OptimStepResponse,
        PromptProvenanceSpan,
        SampledProvenanceSpan,
        SampledSequence,
        SampleResponse,
        SamplingParams,
        StopReason,
        TensorData,
        TensorDtype,
    )

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AdminClient",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointType",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "Future",
    "InternalServerError",
    "InvalidInput",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFound",
    "NotFoundError",
    "OptimParams",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "RequestFailed",
    "RequestFailedError",
    "RestClient",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "ServiceUnavailable",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TinsmithError",
    "Tokenizer",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__version__",
    "connect",
    "errors",
    "types",
]

_HOMES = {
    "custom_loss": ("LossHandle", "PerDatumLossFn"),
    "errors": (
        "APIConnectionError",
        "APIError",
        "APIResponseValidationError",
        "APIStatusError",
        "APITimeoutError",
        "AuthenticationError",
        "BadRequestError",
        "BillingError",
        "ConflictError",
        "InternalServerError",
        "InvalidInput",
        "NotFound",
        "NotFoundError",
        "PermissionDeniedError",
        "RateLimitError",
        "RequestFailed",
        "RequestFailedError",
        "ServiceUnavailable",
        "TinkerError",
        "TinsmithError",
        "UnprocessableEntityError",
    ),
    "future": ("Future",),
    "local": ("connect",),
    "records": ("Checkpoint", "CheckpointType", "ParsedCheckpointTinkerPath", "TrainingRun"),
    "rest_client": ("AdminClient", "RestClient"),
    "sampling_client": ("SamplingClient",),
    "service_client": ("ServiceClient",),
    "tokenizer": ("Tokenizer",),
    "training_client": ("TrainingClient",),
    "types": (
        "AdamOptimizerConfig",
        "AdamParams",
        "Datum",
        "DimuonOptimizerConfig",
        "DimuonParams",
        "EncodedTextChunk",
        "ForwardBackwardOutput",
        "LoraConfig",
        "ModelID",
        "ModelInput",
        "ModelInputChunk",
        "OptimParams",
        "OptimStepResponse",
        "PromptProvenanceSpan",
        "SampleResponse",
        "SampledProvenanceSpan",
        "SampledSequence",
        "SamplingParams",
        "StopReason",
        "TensorData",
        "TensorDtype",
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "types"):
        return import_module(f"tinsmith.{name}")
    if name == "APIFuture":
        return import_module("tinsmith.future").Future
    if name == "__version__":
        return import_module("importlib.metadata").version("tinsmith")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"tinsmith.{home}"), name)
    raise AttributeError(f"module 'tinsmith' has no attribute {name!r}")
