"""Sessions are found, moved and looked at: with the official SDK and its command line, against both forms."""

import json
import subprocess
import uuid
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.conftest import RunningService
from tests.e2e.test_weights import MODEL, cli
from tests.e2e.wire import Wire, datum


@pytest.fixture(scope="module")
def wire(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.key)


@pytest.fixture(scope="module")
def rest(null_service: RunningService) -> tinker.RestClient:
    return tinker.RestClient(base_url=null_service.url, api_key=null_service.key)


def search(rest: tinker.RestClient, **request: object) -> list[str]:
    """Ids on all pages."""
    found: list[str] = []
    cursor = None
    while True:
        asked = types.SessionSearchRequest(**request, cursor=cursor)  # type: ignore[arg-type]
        page = rest.search_sessions(asked).result()
        found += [session.session_id for session in page.sessions]
        cursor = page.next_cursor
        if cursor is None:
            return found


def test_sessions_are_listed_newest_first_with_what_is_in_them(wire: Wire, rest: tinker.RestClient) -> None:
    old, new = wire.session(), wire.session()
    listed = rest.list_sessions(limit=2).result().sessions
    assert listed == [new, old]
    run = wire.run(MODEL, session=new)
    sampler = wire.post(
        "/create_sampling_session", session_id=new, sampling_session_seq_id=0, base_model=MODEL
    )
    found = rest.get_session(new).result()
    assert (found.training_run_ids, found.sampler_ids) == ([run], [sampler["sampling_session_id"]])


def test_a_search_finds_by_name_metadata_status_and_page_by_page(wire: Wire, rest: tinker.RestClient) -> None:
    word = uuid.uuid4().hex
    made = [
        wire.post(
            "/create_session",
            display_name=f"{name} {word} 100%",
            user_metadata={"word": word, "name": name, "number": 5, 'quoted"': "x"},
        )["session_id"]
        for name in ("Alpha", "Beta", "Gamma")
    ]
    everything = list(reversed(made))
    assert search(rest, user_metadata={"word": word}) == everything
    assert search(rest, user_metadata={"word": word}, limit=1) == everything
    assert search(rest, user_metadata={"word": word, "name": "Beta"}) == [made[1]]
    assert search(rest, display_name=f"{word[:20].upper()} alpha") == [made[0]]
    assert search(rest, display_name=f"{word} 100%") == everything
    assert search(rest, display_name=f"{word} _00%") == []
    assert search(rest, display_name=f"{word} beta", session_id=made[0]) == [made[1], made[0]]
    wire.post(f"/sessions/{made[0]}/finish", reason={"type": "errored"}, detail="a reason")
    mine = {"user_metadata": {"word": word}}
    active, finished = {"type": "active"}, {"type": "client_finished"}
    assert search(rest, **mine, statuses=[active]) == [made[2], made[1]]
    assert search(rest, **mine, statuses=[finished]) == [made[0]]
    assert search(rest, **mine, statuses=[{**finished, "reasons": ["success"]}]) == []
    assert search(rest, **mine, statuses=[active, {**finished, "reasons": ["errored"]}]) == everything
    assert search(rest, **mine, statuses=[{"type": "cancelled"}, {"type": "failed"}]) == []
    asked = types.SessionSearchRequest(session_id=made[0])
    (summary,) = rest.search_sessions(asked).result().sessions
    assert isinstance(summary.status, object)
    assert summary.status.type == "client_finished"  # type: ignore[union-attr]
    assert (summary.checkpoints_count, summary.user_metadata["number"]) == (0, "5")  # type: ignore[index]


def test_a_search_counts_checkpoints(wire: Wire, rest: tinker.RestClient) -> None:
    session = wire.session()
    run = wire.run(MODEL, session=session)
    for number in (1, 2):
        wire.result(wire.post("/save_weights", model_id=run, seq_id=number, path=f"s{number}"))
    (summary,) = rest.search_sessions(types.SessionSearchRequest(session_id=session)).result().sessions
    assert summary.checkpoints_count == 2
    sizes = [c.size_bytes for c in rest.list_checkpoints(run).result().checkpoints]
    assert summary.checkpoint_storage_bytes == sum(sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"limit": 0},
        {"limit": 201},
        {"statuses": []},
        {"statuses": [{"type": "sleeping"}]},
        {"owner": {"type": "user"}},
        {"owner": {"type": "user", "owner_urns": []}},
        {"cursor": {"last_created_at": "yesterday", "last_session_id": "x"}},
        {"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "x"}},
        {"user_metadata": {'a"b': "x"}},
        {"user_metadata": {"a": 1}},
        {"unknown": 1},
        {"display_name": ""},
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(wire: Wire, bad: dict[str, object]) -> None:
    refused = wire.post("/sessions/search", **bad)
    assert (wire.status, bool(refused["detail"])) == (400, True), refused


def test_metadata_that_could_not_be_searched_is_refused(wire: Wire) -> None:
    for bad in (b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": {"b": "\\u0000"}}', b'{"\\u0000": 1}'):
        refused = wire.raw("/create_session", b'{"user_metadata": ' + bad + b"}")
        assert (wire.status, "user_metadata" in refused["detail"]) == (400, True), refused
    wire.post("/sessions/search", user_metadata={"a": "b"}, owner={"type": "accessible"})
    assert wire.status == 200


def test_metadata_is_found_as_it_is_shown(wire: Wire) -> None:
    mark = uuid.uuid4().hex
    session = wire.post("/create_session", user_metadata={"größe": "ß", "epoch": 5, "mark": mark})[
        "session_id"
    ]
    for key, value in (("größe", "ß"), ("epoch", "5")):
        found = wire.post("/sessions/search", user_metadata={"mark": mark, key: value})["sessions"]
        assert [(s["session_id"], s["user_metadata"][key]) for s in found] == [(session, value)]


@pytest.mark.parametrize("path", ["/sessions", "/training_runs", "/checkpoints"])
def test_what_lies_beyond_any_list_is_nothing_or_refused(wire: Wire, path: str) -> None:
    wire.get(path, offset=2**63 - 1)
    assert wire.status == 200
    wire.get(path, offset=2**63)
    assert wire.status == 422


def test_owners_of_one_organization_see_each_other_when_they_ask_to(
    null_service: RunningService, wire: Wire
) -> None:
    keys = [null_service.admin("keys", "create", "lab", "--member", f"{name}@lab") for name in ("ann", "bo")]
    ann, bo = (tinker.RestClient(base_url=null_service.url, api_key=key) for key in keys)
    session = Wire(null_service.url, keys[0]).session()
    run = Wire(null_service.url, keys[0]).run(MODEL, session=session)
    assert search(ann) == [session]
    assert search(bo) == []
    assert search(bo, owner={"type": "accessible"}) == [session]
    (summary,) = (
        bo.search_sessions(types.SessionSearchRequest(session_id=session, owner={"type": "accessible"}))
        .result()
        .sessions
    )  # type: ignore[arg-type]
    assert search(bo, owner={"type": "user", "owner_urns": [summary.owner]}) == [session]
    assert bo.list_sessions().result().sessions == []
    assert bo.list_sessions(access_scope="accessible").result().sessions == [session]
    assert bo.list_training_runs().result().training_runs == []
    shared = bo.list_training_runs(access_scope="accessible").result()
    assert ([r.training_run_id for r in shared.training_runs], shared.cursor.total_count) == ([run], 1)
    assert bo.get_training_run(run, access_scope="accessible").result().training_run_id == run
    with pytest.raises(tinker.NotFoundError, match="access_scope=accessible"):
        bo.get_training_run(run).result()
    assert ann.get_training_run(run).result().training_run_id == run
    wire.get(f"/sessions/{session}")
    assert wire.status == 404
    outsiders = types.SessionSearchRequest(owner={"type": "user", "owner_urns": [summary.owner]})  # type: ignore[arg-type]
    assert wire.post("/sessions/search", **outsiders.model_dump(exclude_none=True))["sessions"] == []


def test_a_session_moves_into_a_project(
    null_service: RunningService, wire: Wire, rest: tinker.RestClient
) -> None:
    name = f"project-{uuid.uuid4().hex[:8]}"
    project = null_service.admin("projects", "create", "local", name)
    session = wire.session()
    run = wire.run(MODEL, session=session)
    assert rest.list_training_runs(project_id=project).result().training_runs == []
    rest.assign_session_project(session, project).result()
    assert [r.training_run_id for r in rest.list_training_runs(project_id=name).result().training_runs] == [
        run
    ]
    assert search(rest, project_ids=[project]) == [session]
    born_there = wire.post("/create_session", project_id=name)["session_id"]
    assert search(rest, project_ids=[project]) == [born_there, session]
    for attempt in (
        lambda: wire.post("/create_session", project_id="nowhere"),
        lambda: wire.post("/sessions/search", project_ids=["nowhere"]),
        lambda: wire.get("/training_runs", project_id="nowhere"),
        lambda: wire._decode(wire.http.put(f"/sessions/{session}/project", json={"project_id": "nowhere"})),
    ):
        refused = attempt()
        assert (wire.status, "no project 'nowhere'" in refused["detail"]) == (404, True), refused


def test_a_trace_shows_every_operation_of_a_session_and_where_its_time_went(
    null_service: RunningService, wire: Wire, tmp_path: Path
) -> None:
    session = wire.session()
    runs = [wire.run(MODEL, session=session, number=number) for number in (0, 1)]
    for run in runs:
        wire.output(wire.submit(run, 1, datum([1, 2, 3])))
        wire.result(wire.optim(run, 2))
    made = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    wire.sampled(wire.sample(made["sampling_session_id"], 0, [1, 2]))
    import time

    time.sleep(2.0)  # what was fetched is noted within a second
    file = tmp_path / "trace.json"
    done: subprocess.CompletedProcess[str] = cli(
        null_service, tmp_path, "session", "export-trace", session, "-o", str(file)
    )
    assert done.returncode == 0, done.stderr + done.stdout
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert tracks == {*runs, made["sampling_session_id"]}
    begun = [e for e in events if e["ph"] == "b"]
    ended = {(e["id"], e["name"]): e["ts"] for e in events if e["ph"] == "e"}
    assert sorted(e["name"] for e in begun if e["args"]) == sorted(
        [*["create_model 0", "forward_backward 1", "optim_step 2"] * 2, "sample 0"]
    )
    for phase in ("queue wait", "compute", "result wait"):
        assert sum(e["name"] == phase for e in begun) == 7, phase
    for event in begun:
        assert 0 <= event["ts"] <= ended[event["id"], event["name"]]
        whole = next(e for e in begun if e["id"] == event["id"] and e["args"])
        assert whole["ts"] <= event["ts"]
        assert ended[event["id"], event["name"]] <= ended[event["id"], whole["name"]]


def test_a_trace_of_a_session_in_which_nothing_happened_is_empty(wire: Wire, rest: tinker.RestClient) -> None:
    url = rest.export_session_trace(wire.session()).result()
    assert httpx.get(url).json()["traceEvents"] == []
