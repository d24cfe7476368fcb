"""Looking things up, and what may be changed about them: runs, checkpoints, sessions, usage."""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import date, datetime
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from tinsmith.connection import Connection, given, read_json
from tinsmith.errors import InvalidInput, RequestFailed
from tinsmith.future import Future, awaited
from tinsmith.records import (
    AccessScope,
    AuditLogResponse,
    BillingUsageResponse,
    CheckpointsListResponse,
    CurrentCheckpointStorageUsageResponse,
    ExternalWeightsUrlsResponse,
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    SessionSearchRequest,
    SessionSearchResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)
from tinsmith.types import GetServerCapabilitiesResponse, SupportedModel

T = TypeVar("T")
AuditEvents = Literal["all", "checkpoints", "projects", "teams", "organizations"]
_TRACE_POLL_SECONDS = 5.0


class Records:
    """Requests that are answered at once: each is made when its method is called."""

    def __init__(
        self,
        connection: Connection | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._connection = connection or Connection(base_url, api_key)

    def _do(self, call: Callable[[], T]) -> Future[T]:
        return Future(self._connection.promised(call), self._connection.waiters)

    def _get(self, read: Callable[[Any], T], path: str, **query: Any) -> Future[T]:
        return self._do(lambda: read(self._connection.get(path, **given(query))))

    def _change(self, method: str, path: str, **request: Any) -> Future[None]:
        def change() -> None:
            self._connection.send(method, path, **request).result()

        return self._do(change)


class AdminClient(Records):
    """What an organization's administrators look up. Needs no session."""

    def get_audit_log(
        self, event_type: AuditEvents = "all", day: date | None = None
    ) -> Future[AuditLogResponse]:
        """The events of one day (UTC; today if left out)."""
        return self._get(
            AuditLogResponse.model_validate, "audit", event_type=event_type, day=day and day.isoformat()
        )

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> Future[BillingUsageResponse]:
        """Usage by the hour between two times that have a zone."""
        return self._get(
            BillingUsageResponse.model_validate,
            "billing/usage/events",
            starting_on=_rfc3339(starting_on),
            ending_before=_rfc3339(ending_before),
        )

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> Future[CurrentCheckpointStorageUsageResponse]:
        """What checkpoints take up now."""
        return self._get(
            CurrentCheckpointStorageUsageResponse.model_validate,
            "billing/usage/checkpoints/current",
            project_id=project_id,
        )

    get_audit_log_async = awaited(get_audit_log)
    get_billing_usage_async = awaited(get_billing_usage)
    get_current_checkpoint_storage_usage_async = awaited(get_current_checkpoint_storage_usage)


class RestClient(AdminClient):
    """The records of a service. Needs no session."""

    def get_server_capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        """The base models this service knows."""

        def read(answer: Mapping[str, Any]) -> GetServerCapabilitiesResponse:
            names = SupportedModel.__dataclass_fields__
            models = answer["supported_models"]
            return GetServerCapabilitiesResponse(
                [SupportedModel(**{n: m.get(n) for n in names}) for m in models]
            )

        def ask() -> GetServerCapabilitiesResponse:
            return read(
                read_json(self._connection.send("GET", "get_server_capabilities", fatal=(402,)).result())
            )

        return self._do(ask)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> Future[TrainingRun]:
        return self._get(TrainingRun.model_validate, _run(training_run_id), access_scope=access_scope)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> Future[TrainingRun]:
        """The run that a checkpoint is of."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.get_training_run(parsed.training_run_id, access_scope)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> Future[TrainingRunsResponse]:
        """Newest first."""
        return self._get(
            TrainingRunsResponse.model_validate,
            "training_runs",
            limit=limit,
            offset=offset,
            access_scope=access_scope,
            project_id=project_id,
        )

    def list_checkpoints(self, training_run_id: str) -> Future[CheckpointsListResponse]:
        """Those of one run."""
        return self._get(CheckpointsListResponse.model_validate, f"{_run(training_run_id)}/checkpoints")

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> Future[CheckpointsListResponse]:
        """Those of all runs, newest first."""
        return self._get(CheckpointsListResponse.model_validate, "checkpoints", limit=limit, offset=offset)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> Future[WeightsInfoResponse]:
        """What a checkpoint was trained on, and how."""
        asked = {"tinker_path": tinker_path}
        return self._do(
            lambda: WeightsInfoResponse.model_validate(self._connection.post("weights_info", asked))
        )

    def get_external_weights_urls(self, tinker_path: str) -> Future[ExternalWeightsUrlsResponse]:
        """Where the files of external weights can be fetched. TrainingClient.export does it."""
        return self._get(
            ExternalWeightsUrlsResponse.model_validate, f"{_checkpoint(tinker_path)}/external_weights_urls"
        )

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> Future[None]:
        """`checkpoint_id` is "weights/name"."""
        path = f"{_run(training_run_id)}/checkpoints/{quote(checkpoint_id, safe=':/')}"
        return self._change("DELETE", path)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        return self._change("DELETE", _checkpoint(tinker_path))

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> Future[None]:
        """Seconds from now until it is deleted; None: never."""
        return self._change("PUT", f"{_checkpoint(tinker_path)}/ttl", json={"ttl_seconds": ttl_seconds})

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        """Let others read it."""
        return self._change("POST", f"{_checkpoint(tinker_path)}/publish")

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> Future[None]:
        return self._change("DELETE", f"{_checkpoint(tinker_path)}/publish")

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> Future[str]:
        """Copy a checkpoint into a project (TINKER_PROJECT_ID if left out); the copy's path.
        `weights_access_token` is for one readable under another account."""
        project = destination_project_id or os.environ.get("TINKER_PROJECT_ID")
        if not project:
            raise InvalidInput("give destination_project_id, or set TINKER_PROJECT_ID")
        fields = {"source_path": path, "destination_project_id": project, "ttl_seconds": ttl_seconds}
        # The same over all repetitions: it is how the service knows them.
        headers = {"X-Idempotency-Key": str(uuid.uuid4())}
        if weights_access_token:
            headers["X-Tinker-Weights-Access-Token"] = weights_access_token
        return self._do(
            lambda: str(self._connection.post("copy_weights", fields, headers=headers)["tinker_path"])
        )

    def get_session(self, session_id: str, access_scope: AccessScope = "owned") -> Future[GetSessionResponse]:
        path = f"sessions/{quote(session_id)}"
        return self._get(GetSessionResponse.model_validate, path, access_scope=access_scope)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> Future[ListSessionsResponse]:
        """Newest first."""
        return self._get(
            ListSessionsResponse.model_validate,
            "sessions",
            limit=limit,
            offset=offset,
            access_scope=access_scope,
        )

    def search_sessions(self, request: SessionSearchRequest) -> Future[SessionSearchResponse]:
        """One page; the next one is asked for with its `next_cursor` as `cursor`."""
        asked = request.model_dump(mode="json", exclude_none=True)
        return self._do(
            lambda: SessionSearchResponse.model_validate(self._connection.post("sessions/search", asked))
        )

    def assign_session_project(self, session_id: str, project_id: str) -> Future[None]:
        return self._change("PUT", f"sessions/{quote(session_id)}/project", json={"project_id": project_id})

    def export_session_trace(self, session_id: str) -> Future[str]:
        """Where the session's timeline can be fetched, as a Perfetto trace; waits until it is made."""

        def wait() -> str:
            while True:
                answer = self._connection.get(f"sessions/{quote(session_id)}/trace_export")
                if answer["status"] == "ready":
                    return str(answer["url"])
                if answer["status"] == "failed":
                    raise RequestFailed(f"the trace of session {session_id} failed: {answer.get('error')}")
                time.sleep(_TRACE_POLL_SECONDS)

        return self._do(wait)

    def get_sampler(self, sampler_id: str) -> Future[GetSamplerResponse]:
        return self._get(GetSamplerResponse.model_validate, f"samplers/{quote(sampler_id, safe=':')}")

    def whoami(self) -> Future[WhoamiResponse]:
        """Whom the key belongs to: by the claims of its token, or where there is none by the service."""

        def ask() -> WhoamiResponse:
            key = self._connection.key
            if self._connection.config.get("pjwt_auth_enabled"):
                if not key.claims:  # whatever is asked first gets the token
                    self._connection.get("get_server_capabilities")
                org = f"tml:organization:{key.claims['org_id']}"
                return WhoamiResponse(user_urn=key.claims["sub"], org_urn=org, email=key.claims.get("email"))
            own = self._connection.get("auth/apikey/me")
            people = own["details"]
            return WhoamiResponse(
                user_urn=f"tml:key:{own['key_id']}",
                org_urn=f"tml:organization:{people['org_details']['name']}",
                email=people["user_details"]["email"],
            )

        return self._do(ask)

    get_training_run_async = awaited(get_training_run)
    get_training_run_by_tinker_path_async = awaited(get_training_run_by_tinker_path)
    list_training_runs_async = awaited(list_training_runs)
    list_checkpoints_async = awaited(list_checkpoints)
    list_user_checkpoints_async = awaited(list_user_checkpoints)
    get_external_weights_urls_async = awaited(get_external_weights_urls)
    delete_checkpoint_async = awaited(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = awaited(delete_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = awaited(set_checkpoint_ttl_from_tinker_path)
    publish_checkpoint_from_tinker_path_async = awaited(publish_checkpoint_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = awaited(unpublish_checkpoint_from_tinker_path)
    copy_weights_async = awaited(copy_weights)
    get_session_async = awaited(get_session)
    list_sessions_async = awaited(list_sessions)
    assign_session_project_async = awaited(assign_session_project)
    export_session_trace_async = awaited(export_session_trace)
    get_sampler_async = awaited(get_sampler)


def _run(run_id: str) -> str:
    return f"training_runs/{quote(run_id, safe=':')}"


def _checkpoint(tinker_path: str) -> str:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
    return f"{_run(parsed.training_run_id)}/checkpoints/{quote(parsed.checkpoint_id, safe=':/')}"


def _rfc3339(time: datetime | str) -> str:
    return time if isinstance(time, str) else time.isoformat()
