"""`import tinsmith as tinker`: whatever the official SDK has is here under the same name and takes the same
arguments, or is listed as left out, with the reason."""

import dataclasses
import inspect
import typing
from typing import Any

import pytest
import tinker

import tinsmith

CLASSES = (
    "ServiceClient",
    "TrainingClient",
    "SamplingClient",
    "RestClient",
    "AdminClient",
    "APIFuture",
    "LossHandle",
)
INTERNAL = "how the official SDK is built inside"
NO_TELEMETRY = "nothing is reported to anybody"
WIRE = "a message of the wire, never in a user's hands"
AUDIO = "neither takes audio: a Tinsmith takes text"

LEFT_OUT = {
    "BackcompatTrainingClientFuture": "tinsmith.training_client.TrainingClientFuture",
    "BackcompatSamplingClientFuture": "tinsmith.sampling_client.SamplingClientFuture",
    "DmelChunk": AUDIO,
    "ExperimentalWarning": "nothing is experimental here",
    "OptimStepRequest": WIRE,
    "RequestOptions": INTERNAL,
    "SampleRequest": WIRE,
    "Timeout": INTERNAL,
    "__title__": INTERNAL,
    "auth": "credentials are a key, given or in the environment",
}
MEMBERS_LEFT_OUT = {
    "ServiceClient": {"holder": INTERNAL, "get_telemetry": NO_TELEMETRY},
    "TrainingClient": {"get_telemetry": NO_TELEMETRY},
    "SamplingClient": {
        "create": INTERNAL,
        "get_telemetry": NO_TELEMETRY,
        "on_queue_state_change": INTERNAL,
    },
    "RestClient": {"get_telemetry": NO_TELEMETRY},
    "AdminClient": {"get_telemetry": NO_TELEMETRY},
    "LossHandle": {
        "graph": "losses run here, untraced",
        "loss_id": "losses run here, untraced",
        "key": "losses run here, untraced",
        "session_id": "a loss may be used by any session",
        "input_names": "the keys of `inputs`",
    },
}
# Of these only the SDK's own inside passes other arguments.
MADE_INSIDE = {"TrainingClient", "SamplingClient", "LossHandle", "APIFuture"}
PARAMETERS_LEFT_OUT = {
    ("RestClient", "__init__", "_holder"): INTERNAL,
    ("AdminClient", "__init__", "_holder"): INTERNAL,
    ("ServiceClient", "__init__", "kwargs"): "what is not known is refused, not ignored",
}
TYPES_LEFT_OUT = {
    **dict.fromkeys(
        [
            "AuthTokenResponse",
            "ClientConfigRequest",
            "ClientConfigResponse",
            "ClientDynamicConfigResponse",
            "CopyWeightsRequest",
            "CopyWeightsResponse",
            "CreateCustomLossRequest",
            "CreateCustomLossResponse",
            "CreateModelRequest",
            "CreateModelResponse",
            "CreateSamplingSessionRequest",
            "CreateSamplingSessionResponse",
            "CreateSessionRequest",
            "CreateSessionResponse",
            "ForwardBackwardInput",
            "ForwardBackwardRequest",
            "ForwardRequest",
            "FutureCompletion",
            "FutureFailed",
            "FutureFinished",
            "FutureRetrieveRequest",
            "FutureRetrieveResponse",
            "FuturesRetrieveRequest",
            "FuturesRetrieveResponse",
            "GetBillingUsageRequest",
            "GetCurrentCheckpointStorageUsageRequest",
            "GetInfoRequest",
            "HealthResponse",
            "JoinSamplingSessionRequest",
            "JoinSamplingSessionResponse",
            "LoadWeightsRequest",
            "OptimStepRequest",
            "RequestFailedResponse",
            "SampleRequest",
            "SamplingSessionFuturesTarget",
            "SaveWeightsExternalRequest",
            "SaveWeightsExternalResponseInternal",
            "SaveWeightsForSamplerRequest",
            "SaveWeightsForSamplerResponseInternal",
            "SaveWeightsRequest",
            "SessionHeartbeatRequest",
            "SessionHeartbeatResponse",
            "UnloadModelRequest",
            "UnloadModelResponse",
            "UntypedAPIFuture",
        ],
        WIRE,
    ),
    **dict.fromkeys(
        [
            "EventType",
            "SessionEndEvent",
            "SessionStartEvent",
            "Severity",
            "TelemetryBatch",
            "TelemetryEvent",
            "TelemetryResponse",
            "TelemetrySendRequest",
            "UnhandledExceptionEvent",
        ],
        NO_TELEMETRY,
    ),
    "CustomLossGraph": "losses run here, untraced",
    "CustomLossInput": "losses run here, untraced",
    "CustomLossNode": "losses run here, untraced",
    "DmelChunk": AUDIO,
    "RequestErrorCategory": "RequestFailed.category is a text",
    "annotations": "a leftover of `from __future__`",
}
TYPE_MEMBERS_LEFT_OUT = {
    "SaveWeightsResponse": {"get_console_url"},
    "SaveWeightsForSamplerResponse": {"get_console_url", "get_playground_url"},
    "ImageChunk": {"validate_data", "serialize_data"},
}


def public(names: typing.Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def test_every_name_is_here_or_left_out_for_a_reason() -> None:
    missing = [name for name in tinker.__all__ if not hasattr(tinsmith, name)]
    assert sorted(missing) == sorted(LEFT_OUT)
    # And can be found by whoever reads the list.
    assert {name for name in tinker.__all__ if name not in LEFT_OUT} <= set(tinsmith.__all__)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_method_is_here_and_of_the_same_kind(kind: str) -> None:
    theirs, ours = getattr(tinker, kind), getattr(tinsmith, kind)
    names = public(dir(theirs))
    if dataclasses.is_dataclass(theirs):
        names = sorted({*names, *public(f.name for f in dataclasses.fields(theirs))})
        own = {f.name for f in dataclasses.fields(ours)}
    else:
        own = set()
    left_out = MEMBERS_LEFT_OUT.get(kind, {})
    assert [n for n in names if not hasattr(ours, n) and n not in own and n not in left_out] == []
    assert [n for n in left_out if n not in names or hasattr(ours, n)] == []
    for name in set(names) - set(left_out):
        method = inspect.getattr_static(theirs, name, None)
        if callable(method) or isinstance(method, staticmethod | classmethod):
            # Theirs are wrapped to be counted.
            is_coroutine = inspect.iscoroutinefunction(inspect.unwrap(getattr(theirs, name)))
            assert inspect.iscoroutinefunction(getattr(ours, name)) == is_coroutine, name


def methods() -> list[tuple[str, str]]:
    found = []
    for kind in CLASSES:
        for name in [*public(dir(getattr(tinker, kind))), "__init__"]:
            if name in MEMBERS_LEFT_OUT.get(kind, {}) or (name == "__init__" and kind in MADE_INSIDE):
                continue
            if callable(getattr(getattr(tinker, kind), name)):
                found.append((kind, name))
    return found


@pytest.mark.parametrize("kind, name", methods())
def test_every_method_takes_what_the_official_one_takes(kind: str, name: str) -> None:
    theirs = inspect.signature(getattr(getattr(tinker, kind), name)).parameters
    ours = inspect.signature(getattr(getattr(tinsmith, kind), name)).parameters
    for parameter in theirs.values():
        if parameter.name == "self" or (kind, name, parameter.name) in PARAMETERS_LEFT_OUT:
            continue
        assert parameter.name in ours, parameter.name
        own = ours[parameter.name]
        assert own.kind == parameter.kind, parameter.name
        if parameter.default is not parameter.empty:
            assert own.default == parameter.default, parameter.name
    order = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in ours]
    assert [name for name in ours if name in order] == order


def test_every_type_is_here_or_left_out_for_a_reason() -> None:
    from tinker import types as theirs

    from tinsmith import types as ours

    names = [n for n in public(dir(theirs)) if not inspect.ismodule(getattr(theirs, n))]
    assert [n for n in names if not hasattr(ours, n) and n not in TYPES_LEFT_OUT] == []
    assert [n for n in TYPES_LEFT_OUT if n not in names or hasattr(ours, n)] == []


def members(kind: Any) -> list[str]:
    if hasattr(kind, "model_fields"):
        declared = [*kind.model_fields]
        base: set[str] = set(dir(kind.__mro__[-2])) | {"model_config", "model_fields"}
        return declared + [n for n in public(vars(kind)) if n not in base and n not in declared]
    if dataclasses.is_dataclass(kind):
        declared = public(f.name for f in dataclasses.fields(kind))
        return sorted({*declared, *public(vars(kind))})
    return []


def test_every_type_has_the_members_of_the_official_one() -> None:
    from tinker import types as theirs

    from tinsmith import types as ours

    for name in public(dir(theirs)):
        kind = getattr(theirs, name)
        if name in TYPES_LEFT_OUT or not inspect.isclass(kind) or kind is str:
            continue
        own = getattr(ours, name)
        has = {*dir(own), *members(own)}
        parameters = inspect.signature(own).parameters
        for member in members(kind):
            if member in TYPE_MEMBERS_LEFT_OUT.get(name, ()):
                continue
            assert member in has or member in parameters, f"{name}.{member}"
        required = [
            p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        ]
        given = inspect.signature(kind).parameters
        assert [n for n in required if n not in given] == [], f"{name} asks for more than the official one"


@pytest.mark.parametrize("name", [n for n in tinker.__all__ if n.endswith("Error")])
def test_what_the_sdk_catches_is_caught_here(name: str) -> None:
    assert issubclass(getattr(tinsmith, name), tinsmith.TinkerError)
