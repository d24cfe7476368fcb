"""Tinsmith's client: train LoRA adapters on a Tinsmith (or any Tinker-compatible) service.

    import tinsmith

    service = tinsmith.ServiceClient()
    training = service.create_lora_training_client(base_model="tinsmith/tiny").result()
    step = training.forward_backward(data, "cross_entropy"), training.optim_step(tinsmith.AdamParams())
    print(step[0].result().metrics)

Everything below is imported when it is first named: workers use `tinsmith.wire` and `tinsmith.errors`
on machines that have neither httpx nor protobuf.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinsmith import errors, types
    from tinsmith.errors import (
        AuthenticationError,
        InvalidInput,
        NotFound,
        RequestFailed,
        ServiceUnavailable,
        TinsmithError,
    )
    from tinsmith.future import Future
    from tinsmith.sampling_client import SamplingClient
    from tinsmith.service_client import ServiceClient
    from tinsmith.training_client import TrainingClient
    from tinsmith.types import AdamParams, Datum, ModelInput, SamplingParams, TensorData

__all__ = [
    "AdamParams",
    "AuthenticationError",
    "Datum",
    "Future",
    "InvalidInput",
    "ModelInput",
    "NotFound",
    "RequestFailed",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "ServiceUnavailable",
    "TensorData",
    "TinsmithError",
    "TrainingClient",
    "errors",
    "types",
]

_HOMES = {
    "errors": (
        "AuthenticationError",
        "InvalidInput",
        "NotFound",
        "RequestFailed",
        "ServiceUnavailable",
        "TinsmithError",
    ),
    "future": ("Future",),
    "sampling_client": ("SamplingClient",),
    "service_client": ("ServiceClient",),
    "training_client": ("TrainingClient",),
    "types": ("AdamParams", "Datum", "ModelInput", "SamplingParams", "TensorData"),
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "types"):
        return import_module(f"tinsmith.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"tinsmith.{home}"), name)
    raise AttributeError(f"module 'tinsmith' has no attribute {name!r}")
