"""Two tenants: neither can see, use or harm what is the other's, on any route."""

import datetime

import pytest

from tests.conftest import RunningService
from tests.e2e.wire import Json, Wire, datum

MODEL = "base/null"


@pytest.fixture(scope="module")
def owner(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.key)


@pytest.fixture(scope="module")
def stranger(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.new_key("stranger"))


@pytest.fixture(scope="module")
def things(owner: Wire) -> Json:
    """One of everything that can be owned."""
    session = owner.session()
    run = owner.run(MODEL, session=session)
    future = owner.submit(run, 1, datum([1, 2, 3]))
    path = owner.result(owner.post("/save_weights", model_id=run, seq_id=2, path="mine"))["path"]
    unnamed = owner.post("/save_weights_for_sampler", model_id=run, seq_id=3, sampling_session_seq_id=0)
    owner.result(owner.post("/save_weights_external", model_id=run, seq_id=4, path="out"))
    return {
        "session": session,
        "run": run,
        "future": future,
        "path": path,
        "sampler": owner.result(unnamed)["sampling_session_id"],
    }


def test_every_route_answers_404_for_what_is_anothers(stranger: Wire, things: Json) -> None:
    session, run, path, sampler = (things[name] for name in ("session", "run", "path", "sampler"))
    own_session = stranger.session()
    lora = {"rank": 4}
    attempts = [
        lambda: stranger.post("/session_heartbeat", session_id=session),
        lambda: stranger.post(f"/sessions/{session}/finish", reason={"type": "success"}),
        lambda: stranger.post(
            "/create_model", session_id=session, model_seq_id=5, base_model=MODEL, lora_config=lora
        ),
        lambda: stranger.post(
            "/create_custom_loss", session_id=session, custom_loss_seq_id=0, name="x", inputs=[], graph={}
        ),
        lambda: stranger.post("/join_sampling_session", sampling_session_id=sampler),
        lambda: stranger.post("/retrieve_futures", target={"sampling_session_id": sampler}),
        lambda: stranger.post("/cancel_future", request_id=things["future"]["request_id"]),
        lambda: stranger.post("/get_info", model_id=run),
        lambda: stranger.submit(run, 5, datum([1, 2])),
        lambda: stranger.post(
            "/forward", model_id=run, seq_id=5, forward_input={"data": [], "loss_fn": "cross_entropy"}
        ),
        lambda: stranger.optim(run, 5),
        lambda: stranger.post("/save_weights", model_id=run, seq_id=5, path="x"),
        lambda: stranger.post("/save_weights_for_sampler", model_id=run, seq_id=5, path="x"),
        lambda: stranger.post("/load_weights", model_id=run, seq_id=5, path=path, optimizer=False),
        lambda: stranger.post(
            "/load_weights", session_id=own_session, model_seq_id=0, path=path, optimizer=False
        ),
        lambda: stranger.post(
            "/load_weights", session_id=session, model_seq_id=9, path=path, optimizer=False
        ),
        lambda: stranger.post("/weights_info", tinker_path=path),
        lambda: stranger.post(
            "/create_sampling_session", session_id=own_session, sampling_session_seq_id=0, model_path=path
        ),
        lambda: stranger.post(
            "/create_sampling_session", session_id=session, sampling_session_seq_id=7, base_model=MODEL
        ),
        lambda: stranger.sample(sampler, 0, [1, 2]),
        lambda: stranger.get(f"/samplers/{sampler}"),
        lambda: stranger.get(f"/training_runs/{run}"),
        lambda: stranger.get(f"/training_runs/{run}/checkpoints"),
        lambda: stranger.get(f"/training_runs/{run}/metrics"),
        lambda: stranger.get(f"/training_runs/{run}/cost"),
        lambda: stranger.delete(f"/training_runs/{run}/checkpoints/weights/mine"),
        lambda: stranger.post(f"/training_runs/{run}/checkpoints/weights/mine/publish"),
        lambda: stranger.delete(f"/training_runs/{run}/checkpoints/weights/mine/publish"),
        lambda: stranger.put(f"/training_runs/{run}/checkpoints/weights/mine/ttl", ttl_seconds=3600),
        lambda: stranger.get(f"/training_runs/{run}/checkpoints/weights/mine/archive"),
        lambda: stranger.get(f"/training_runs/{run}/checkpoints/external_weights/out/external_weights_urls"),
        lambda: stranger.post("/copy_weights", source_path=path, destination_project_id="default"),
        lambda: stranger.post("/copy_weights", source_path=path, session_id=session, model_seq_id=9),
        lambda: stranger.post("/save_weights_external", model_id=run, seq_id=5, path="x"),
        lambda: stranger.get(f"/sessions/{session}"),
        lambda: stranger.put(f"/sessions/{session}/project", project_id="default"),
        lambda: stranger.get(f"/sessions/{session}/trace_export"),
        lambda: stranger.post("/retrieve_future", **things["future"]),
        # A refused body names the run too; it must not consume the owner's numbers.
        lambda: stranger.post("/optim_step", model_id=run, seq_id=5, adam_params={"beta1": 7}),
    ]
    for number, attempt in enumerate(attempts):
        answer = attempt()
        assert stranger.status == 404, (number, answer)


def test_lists_show_only_what_is_ones_own(owner: Wire, stranger: Wire, things: Json) -> None:
    assert stranger.get("/training_runs")["training_runs"] == []
    assert stranger.get("/checkpoints")["checkpoints"] == []
    accessible = {"type": "accessible"}
    found = stranger.post("/sessions/search", session_id=things["session"], owner=accessible)
    assert found["sessions"] == []
    assert things["session"] not in stranger.get("/sessions", access_scope="accessible")["sessions"]
    hour = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    window = {"starting_on": hour, "ending_before": hour + datetime.timedelta(hours=1)}
    assert (
        stranger.get("/billing/usage/events", **{k: v.isoformat() for k, v in window.items()})["data"] == []
    )
    assert stranger.get("/billing/usage/checkpoints/current")["data"] == []
    assert things["path"] not in str(stranger.get("/audit"))
    assert things["run"] in {r["training_run_id"] for r in owner.get("/training_runs")["training_runs"]}


def test_the_owner_notices_nothing_of_the_attempts(owner: Wire, things: Json) -> None:
    assert owner.output(things["future"]).metrics["loss:sum"] == 0
    assert owner.result(owner.optim(things["run"], 5))["metrics"]["optimizer_step"] == 1
    listed = owner.get(f"/training_runs/{things['run']}/checkpoints")["checkpoints"]
    assert things["path"] in [checkpoint["tinker_path"] for checkpoint in listed]
    assert not [checkpoint for checkpoint in listed if checkpoint["public"] or checkpoint["expires_at"]]


def test_a_revoked_key_opens_nothing(null_service: RunningService) -> None:
    import time

    wire = Wire(null_service.url, null_service.new_key("leaver"))
    assert wire.session()
    listed = null_service.admin("keys", "list")
    number = next(line.split()[0] for line in listed.splitlines() if " leaver " in line)
    null_service.admin("keys", "revoke", number)
    time.sleep(10.5)  # a key that was just used is remembered for ten seconds
    wire.post("/create_session")
    assert wire.status == 401


def test_no_key_is_stored_as_it_is(null_service: RunningService) -> None:
    key = null_service.new_key("hashed")
    assert key.encode() not in null_service.database_bytes()
