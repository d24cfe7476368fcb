"""What a service keeps records of, in the shapes of the official SDK: runs, checkpoints, sessions, usage."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from tinsmith.errors import InvalidInput

__all__ = [
    "AccessibleSearchOwner",
    "ActiveSessionStatusQuery",
    "AuditLogEntry",
    "AuditLogResponse",
    "BillingEventInfo",
    "BillingUsageEvent",
    "BillingUsageResponse",
    "BillingUsageSession",
    "CancelledSessionStatusQuery",
    "Checkpoint",
    "CheckpointBillingEvent",
    "CheckpointType",
    "CheckpointsListResponse",
    "ClientFinishedSessionStatusQuery",
    "ClientSessionFinishErrored",
    "ClientSessionFinishInterrupted",
    "ClientSessionFinishReason",
    "ClientSessionFinishReasonType",
    "ClientSessionFinishSuccess",
    "ClientSessionFinished",
    "CurrentCheckpointStorageUsageItem",
    "CurrentCheckpointStorageUsageResponse",
    "Cursor",
    "ExternalWeightsUrlsResponse",
    "FailedSessionStatusQuery",
    "GetSamplerResponse",
    "GetSessionResponse",
    "ListSessionsResponse",
    "OwnSearchOwner",
    "ParsedCheckpointTinkerPath",
    "SamplingPrefillBillingEvent",
    "SamplingSampleBillingEvent",
    "SearchOwner",
    "SessionActive",
    "SessionCancelled",
    "SessionFailed",
    "SessionFailedReason",
    "SessionFailedRequestReason",
    "SessionFailedSamplingSessionReason",
    "SessionFailedTrainingRunReason",
    "SessionSearchCursor",
    "SessionSearchRequest",
    "SessionSearchResponse",
    "SessionStatus",
    "SessionStatusQuery",
    "SessionSummary",
    "StorageBillingEvent",
    "TrainingBillingEvent",
    "TrainingRun",
    "TrainingRunsResponse",
    "UserSearchOwner",
    "WeightsInfoResponse",
    "WhoamiResponse",
]

AccessScope = Literal["owned", "accessible"]
CheckpointType = Literal["training", "sampler", "external"]
_KINDS: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


class Record(BaseModel):
    """Members that a newer service adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Query(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# Runs and checkpoints


class Checkpoint(Record):
    """`checkpoint_id` is "weights/name"; without `expires_at` it stays for good."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class ParsedCheckpointTinkerPath(Record):
    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> "ParsedCheckpointTinkerPath":
        """InvalidInput unless it is `tinker://{run}/{weights|sampler_weights|external_weights}/{name}`."""
        scheme, _, rest = tinker_path.partition("://")
        run_id, *parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 2 or parts[0] not in _KINDS:
            raise InvalidInput(
                f"{tinker_path!r} is no checkpoint: write tinker://RUN/KIND/NAME, KIND being "
                f"one of {', '.join(_KINDS)}"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=run_id,
            checkpoint_type=_KINDS[parts[0]],
            checkpoint_id="/".join(parts),
        )


class TrainingRun(Record):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class Cursor(Record):
    offset: int
    limit: int
    total_count: int


class TrainingRunsResponse(Record):
    training_runs: list[TrainingRun]
    cursor: Cursor


class CheckpointsListResponse(Record):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class WeightsInfoResponse(Record):
    base_model: str
    optimizer_config: dict[str, Any] = {"type": "adamw"}
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class ExternalWeightsUrlsResponse(Record):
    """`urls` maps a file's relative path to where it can be fetched, without a key, until `expires`."""

    urls: dict[str, str]
    expires: datetime


class GetSamplerResponse(Record):
    sampler_id: str
    base_model: str
    model_path: str | None = None


# Sessions


class GetSessionResponse(Record):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(Record):
    sessions: list[str]


class SessionActive(Record):
    type: Literal["active"] = "active"


class SessionCancelled(Record):
    type: Literal["cancelled"] = "cancelled"
    detail: str | None = None


class ClientSessionFinishSuccess(Record):
    type: Literal["success"] = "success"


class ClientSessionFinishErrored(Record):
    type: Literal["errored"] = "errored"


class ClientSessionFinishInterrupted(Record):
    type: Literal["interrupted"] = "interrupted"


ClientSessionFinishReasonType = Literal["success", "errored", "interrupted"]
ClientSessionFinishReason = Annotated[
    ClientSessionFinishSuccess | ClientSessionFinishErrored | ClientSessionFinishInterrupted,
    Field(discriminator="type"),
]


class ClientSessionFinished(Record):
    type: Literal["client_finished"] = "client_finished"
    reason: ClientSessionFinishReason
    detail: str | None = None


class SessionFailedRequestReason(Record):
    type: Literal["request"] = "request"
    request_id: str
    request_type: str


class SessionFailedTrainingRunReason(Record):
    type: Literal["training_run"] = "training_run"
    training_run_id: str


class SessionFailedSamplingSessionReason(Record):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str


SessionFailedReason = Annotated[
    SessionFailedRequestReason | SessionFailedTrainingRunReason | SessionFailedSamplingSessionReason,
    Field(discriminator="type"),
]


class SessionFailed(Record):
    type: Literal["failed"] = "failed"
    category: Literal["user", "internal"]
    reason: SessionFailedReason
    message: str


SessionStatus = Annotated[
    SessionActive | SessionCancelled | ClientSessionFinished | SessionFailed, Field(discriminator="type")
]


class SessionSummary(Record):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchCursor(Record):
    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchResponse(Record):
    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None


class OwnSearchOwner(Query):
    type: Literal["own"] = "own"


class AccessibleSearchOwner(Query):
    type: Literal["accessible"] = "accessible"


class UserSearchOwner(Query):
    type: Literal["user"] = "user"
    owner_urns: list[str] = Field(min_length=1, max_length=10)


SearchOwner = OwnSearchOwner | AccessibleSearchOwner | UserSearchOwner


class ActiveSessionStatusQuery(Query):
    type: Literal["active"] = "active"


class CancelledSessionStatusQuery(Query):
    type: Literal["cancelled"] = "cancelled"


class FailedSessionStatusQuery(Query):
    type: Literal["failed"] = "failed"


class ClientFinishedSessionStatusQuery(Query):
    type: Literal["client_finished"] = "client_finished"
    reasons: list[ClientSessionFinishReasonType] | None = None


SessionStatusQuery = (
    ActiveSessionStatusQuery
    | CancelledSessionStatusQuery
    | FailedSessionStatusQuery
    | ClientFinishedSessionStatusQuery
)


class SessionSearchRequest(Query):
    """`cursor` is the `next_cursor` of the page before."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: SearchOwner = OwnSearchOwner()
    statuses: list[SessionStatusQuery] | None = None
    limit: int = Field(50, ge=1, le=200)
    cursor: SessionSearchCursor | None = None


# What an organization's administrators look up


class AuditLogEntry(Record):
    timestamp: datetime
    event: str
    event_details: dict[str, object] = {}
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(Record):
    entries: list[AuditLogEntry]


class TrainingBillingEvent(Record):
    type: Literal["training"] = "training"
    token_count: int


class SamplingPrefillBillingEvent(Record):
    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SamplingSampleBillingEvent(Record):
    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointBillingEvent(Record):
    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageBillingEvent(Record):
    type: Literal["storage"] = "storage"
    free: bool = False
    gigabyte_hours: float


BillingEventInfo = Annotated[
    TrainingBillingEvent
    | SamplingPrefillBillingEvent
    | SamplingSampleBillingEvent
    | CheckpointBillingEvent
    | StorageBillingEvent,
    Field(discriminator="type"),
]


class BillingUsageEvent(Record):
    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: BillingEventInfo


class BillingUsageSession(Record):
    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(Record):
    data: list[BillingUsageEvent]
    sessions: dict[str, BillingUsageSession] = {}
    cost_data_through: datetime | None = None


class CurrentCheckpointStorageUsageItem(Record):
    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class CurrentCheckpointStorageUsageResponse(Record):
    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]


class WhoamiResponse(Record):
    user_urn: str
    org_urn: str
    email: str | None = None
