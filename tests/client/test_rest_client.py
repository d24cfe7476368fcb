"""Every method of the records' clients: what it asks, and what it makes of the answer."""

import asyncio
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import parse_qs

import pytest

import tinsmith
from tests.client.stub import Answer, Stub
from tinsmith import types

RUN = "s1:train:0"
PATH = f"tinker://{RUN}/weights/one"
TIME = "2026-01-02T03:04:05+00:00"
CHECKPOINT = {
    "checkpoint_id": "weights/one",
    "checkpoint_type": "training",
    "time": TIME,
    "tinker_path": PATH,
    "size_bytes": 10,
    "new_member": 1,
}
TRAINING_RUN = {
    "training_run_id": RUN,
    "base_model": "m",
    "model_owner": "o",
    "is_lora": True,
    "last_request_time": TIME,
    "last_checkpoint": CHECKPOINT,
}
CURSOR = {"offset": 0, "limit": 20, "total_count": 1}
SUMMARY = {
    "session_id": "s1",
    "created_at": TIME,
    "owner": "o",
    "project_id": "p",
    "checkpoints_count": 1,
    "status": {"type": "client_finished", "reason": {"type": "success"}},
}
EVENT = {"bucket_start": TIME, "bucket_end": TIME, "event_info": {"type": "training", "token_count": 5}}
STORED = {"checkpoint_count": 1, "size_bytes": 10, "size_gigabytes": 1e-8}
SEARCH = types.SessionSearchRequest(display_name="n", owner=types.AccessibleSearchOwner())


@pytest.fixture
def rest(stub: Stub) -> tinsmith.RestClient:
    return tinsmith.RestClient(base_url=stub.url, api_key="tml-test")


# (method, arguments, answer, what is sent, what is read of the result)
READS: list[tuple[str, tuple[Any, ...], Any, str, dict[str, str], Any]] = [
    ("get_training_run", (RUN,), TRAINING_RUN, f"training_runs/{RUN}", {"access_scope": "owned"}, lambda r: r.base_model == "m" and r.last_checkpoint.time.year == 2026),
    ("get_training_run_by_tinker_path", (PATH, "accessible"), TRAINING_RUN, f"training_runs/{RUN}", {"access_scope": "accessible"}, lambda r: r.training_run_id == RUN),
    ("list_training_runs", (5, 10, "owned", "p"), {"training_runs": [TRAINING_RUN], "cursor": CURSOR}, "training_runs", {"limit": "5", "offset": "10", "access_scope": "owned", "project_id": "p"}, lambda r: r.cursor.total_count == 1),
    ("list_checkpoints", (RUN,), {"checkpoints": [CHECKPOINT]}, f"training_runs/{RUN}/checkpoints", {}, lambda r: r.checkpoints[0].tinker_path == PATH),
    ("list_user_checkpoints", (), {"checkpoints": [CHECKPOINT], "cursor": CURSOR}, "checkpoints", {"limit": "100", "offset": "0"}, lambda r: r.cursor.limit == 20),
    ("get_external_weights_urls", (f"tinker://{RUN}/external_weights/e",), {"urls": {"a": "http://x/a"}, "expires": TIME}, f"training_runs/{RUN}/checkpoints/external_weights/e/external_weights_urls", {}, lambda r: r.urls == {"a": "http://x/a"} and r.expires.tzinfo),
    ("get_session", ("s1",), {"training_run_ids": [RUN], "sampler_ids": []}, "sessions/s1", {"access_scope": "owned"}, lambda r: r.training_run_ids == [RUN]),
    ("list_sessions", (), {"sessions": ["s1"]}, "sessions", {"limit": "20", "offset": "0", "access_scope": "owned"}, lambda r: r.sessions == ["s1"]),
    ("get_sampler", ("s1:sample:0",), {"sampler_id": "s1:sample:0", "base_model": "m"}, "samplers/s1:sample:0", {}, lambda r: r.model_path is None),
    ("get_audit_log", ("all", date(2026, 1, 2)), {"entries": [{"timestamp": TIME, "event": "x"}]}, "audit", {"event_type": "all", "day": "2026-01-02"}, lambda r: r.entries[0].event == "x"),
    ("get_billing_usage", (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-02T00:00:00Z"), {"data": [EVENT]}, "billing/usage/events", {"starting_on": "2026-01-01T00:00:00+00:00", "ending_before": "2026-01-02T00:00:00Z"}, lambda r: r.data[0].event_info.token_count == 5),
    ("get_current_checkpoint_storage_usage", (), {"data": [STORED]}, "billing/usage/checkpoints/current", {}, lambda r: r.data[0].size_bytes == 10),
]  # fmt: skip


@pytest.mark.parametrize("method, arguments, answer, path, query, is_right", READS, ids=[r[0] for r in READS])
def test_lookups(
    stub: Stub,
    rest: tinsmith.RestClient,
    method: str,
    arguments: tuple[Any, ...],
    answer: Any,
    path: str,
    query: dict[str, str],
    is_right: Any,
) -> None:
    stub.answers[path] = lambda request: Answer(body=answer)
    assert is_right(getattr(rest, method)(*arguments).result(10))
    assert is_right(asyncio.run(getattr(rest, f"{method}_async")(*arguments)))
    first, second = stub.of(path)
    assert first.method == "GET"
    assert {name: value[0] for name, value in parse_qs(first.query).items()} == query
    assert (second.method, second.query) == (first.method, first.query)


ONE = f"training_runs/{RUN}/checkpoints/weights/one"
CHANGES = [
    ("delete_checkpoint", (RUN, "weights/one"), "DELETE", ONE, None),
    ("delete_checkpoint_from_tinker_path", (PATH,), "DELETE", ONE, None),
    ("set_checkpoint_ttl_from_tinker_path", (PATH, 3600), "PUT", f"{ONE}/ttl", {"ttl_seconds": 3600}),
    ("set_checkpoint_ttl_from_tinker_path", (PATH, None), "PUT", f"{ONE}/ttl", {"ttl_seconds": None}),
    ("publish_checkpoint_from_tinker_path", (PATH,), "POST", f"{ONE}/publish", None),
    ("unpublish_checkpoint_from_tinker_path", (PATH,), "DELETE", f"{ONE}/publish", None),
    ("assign_session_project", ("s1", "p"), "PUT", "sessions/s1/project", {"project_id": "p"}),
]


@pytest.mark.parametrize("method, arguments, verb, path, body", CHANGES)
def test_changes(
    stub: Stub,
    rest: tinsmith.RestClient,
    method: str,
    arguments: tuple[Any, ...],
    verb: str,
    path: str,
    body: Any,
) -> None:
    """They are made when the method is called, whoever asks for the result."""
    getattr(rest, method)(*arguments)
    (sent,) = stub.of(path)
    assert sent.method == verb
    assert (sent.json if sent.body else None) == body
    assert asyncio.run(getattr(rest, f"{method}_async")(*arguments)) is None


def test_what_is_asked_by_post(stub: Stub, rest: tinsmith.RestClient) -> None:
    stub.answers["weights_info"] = lambda r: Answer(body={"base_model": "m", "is_lora": True, "lora_rank": 8})
    assert rest.get_weights_info_by_tinker_path(PATH).result(10).lora_rank == 8
    assert stub.of("weights_info")[0].json == {"tinker_path": PATH}
    stub.answers["sessions/search"] = lambda r: Answer(body={"sessions": [SUMMARY]})
    assert rest.search_sessions(SEARCH).result(10).sessions[0].status.reason.type == "success"
    assert stub.of("sessions/search")[0].json == {
        "user_metadata": {},
        "display_name": "n",
        "owner": {"type": "accessible"},
        "limit": 50,
    }


def test_a_copy_is_asked_for_under_one_name_however_often(
    stub: Stub, rest: tinsmith.RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_PROJECT_ID", raising=False)
    answers = [Answer(503, {}, {"Retry-After": "0.01"}), Answer(body={"tinker_path": "tinker://c/weights/x"})]
    stub.answers["copy_weights"] = lambda request: answers.pop(0)
    assert rest.copy_weights(PATH, "p", weights_access_token="t").result(10) == "tinker://c/weights/x"
    first, second = stub.of("copy_weights")
    assert first.json == {"source_path": PATH, "destination_project_id": "p"}
    assert first.headers["x-tinker-weights-access-token"] == "t"
    assert first.headers["x-idempotency-key"] == second.headers["x-idempotency-key"]
    with pytest.raises(tinsmith.InvalidInput, match="TINKER_PROJECT_ID"):
        rest.copy_weights(PATH)


def test_a_trace_is_waited_for(
    stub: Stub, rest: tinsmith.RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.rest_client._TRACE_POLL_SECONDS", 0.01)
    answers = [
        {"status": "pending"},
        {"status": "ready", "url": "http://x/t"},
        {"status": "failed", "error": "e"},
    ]
    stub.answers["sessions/s1/trace_export"] = lambda request: Answer(body=answers.pop(0))
    assert rest.export_session_trace("s1").result(10) == "http://x/t"
    with pytest.raises(tinsmith.RequestFailed, match="e"):
        rest.export_session_trace("s1").result(10)


def test_a_key_that_is_no_token_is_asked_about(stub: Stub, rest: tinsmith.RestClient) -> None:
    details = {"org_details": {"name": "acme"}, "user_details": {"email": "a@b"}}
    stub.answers["auth/apikey/me"] = lambda request: Answer(
        body={"key_id": 3, "name": "k", "details": details}
    )
    found = rest.whoami().result(10)
    assert (found.user_urn, found.org_urn, found.email) == ("tml:key:3", "tml:organization:acme", "a@b")


@pytest.mark.parametrize(
    "path", ["", "tinker://a/b", "tinker://a/nothing/b", "tinker://a/weights/b/c", "s3://a/weights/b"]
)
def test_what_is_no_checkpoint_is_not_asked_for(stub: Stub, rest: tinsmith.RestClient, path: str) -> None:
    with pytest.raises(tinsmith.InvalidInput, match="tinker://RUN/KIND/NAME"):
        rest.delete_checkpoint_from_tinker_path(path)
    assert not stub.requests


def test_ids_stay_inside_their_path(stub: Stub, rest: tinsmith.RestClient) -> None:
    stub.answers["training_runs/..%2Fcheckpoints"] = lambda request: Answer(404, {"detail": "no such run"})
    with pytest.raises(tinsmith.NotFound):
        rest.get_training_run("../checkpoints").result(10)


def test_a_missing_route_is_one_sentence(stub: Stub, rest: tinsmith.RestClient) -> None:
    stub.answers["audit"] = lambda request: Answer(404, {"detail": "Not Found"})
    with pytest.raises(tinsmith.NotFound, match="Not Found"):
        rest.get_audit_log().result(10)
