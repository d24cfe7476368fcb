"""Members, roles, keys and their limits, tokens, the audit log, bills and budgets, on both forms."""

import base64
import contextlib
import datetime
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import sqlalchemy as sa
import tinker
from fastapi.routing import APIRoute
from tinker import types

from tests.conftest import RunningFleet, RunningService
from tests.e2e.test_weights import MODEL, Run, cli, route
from tests.e2e.wire import Wire, datum
from tinsmith_api.journal import identities
from tinsmith_api.journal.store import Store

_numbers = itertools.count()


@pytest.fixture
def tenant() -> str:
    """A name that no other test has."""
    return f"tenant-{next(_numbers)}"


@pytest.fixture(scope="module")
def journal(null_service: RunningService | RunningFleet) -> Iterator[Store]:
    """The service's own: `tinsmith admin` would do the same in a process of its own."""
    file = null_service.folder / "journal.db"
    url = null_service.postgres.url if isinstance(null_service, RunningFleet) else f"sqlite:///{file}"
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def new_wire(null_service: RunningService, journal: Store, tenant: str) -> Callable[..., Wire]:
    """A key of this tenant's, with these options of `identities.create_key`."""

    def make(**options: Any) -> Wire:
        key = journal.write(lambda c: identities.create_key(c, tenant, **options)).result()
        return Wire(null_service.url, key)

    return make


def sample(wire: Wire, session: str, number: int, tokens: int = 8) -> dict[str, object]:
    sampler = f"{session}:sample:0"
    return wire.sample(sampler, number, [1, 2, 3, 4], params={"max_tokens": tokens})


def sampling_session(wire: Wire) -> str:
    session = wire.session()
    wire.post("/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    return session


# -- roles -----------------------------------------------------------------------------------------------

# Routes that a viewer may call although they are not GET: they change nothing.
READING = {
    "/api/v1/client/config",
    "/api/v1/client/dynamic_config",
    "/api/v1/telemetry",
    "/api/v1/retrieve_future",
    "/api/v1/retrieve_futures",
    "/api/v1/get_info",
    "/api/v1/weights_info",
    "/api/v1/sessions/search",
    "/api/v1/auth/token",
    "/api/v1/auth/apikey/me",
}
KEYLESS = {"/api/v1/healthz", "/api/v1/downloads/{name}"}


def _routes() -> list[APIRoute]:
    from tinsmith_api import app

    class Stub:
        settings = None

    return [r for r in app.make_app(Stub()).routes if isinstance(r, APIRoute)]  # type: ignore[arg-type]


@pytest.mark.parametrize("each", _routes(), ids=lambda r: f"{'+'.join(sorted(r.methods))} {r.path}")
def test_every_route_says_who_may_call_it(each: APIRoute) -> None:
    from tinsmith_api.owner import administering_owner_of, changing_owner_of, owner_of

    asked = {d.call for d in each.dependant.dependencies}
    if each.path in KEYLESS:
        assert not asked & {owner_of, changing_owner_of, administering_owner_of}
    elif each.path.startswith(("/api/v1/audit", "/api/v1/billing")):
        assert administering_owner_of in asked
    elif each.methods <= {"GET", "HEAD"} or each.path in READING:
        assert owner_of in asked
    else:
        assert changing_owner_of in asked


def test_a_viewer_reads_what_a_member_makes_and_changes_nothing(new_wire: Callable[..., Wire]) -> None:
    member = new_wire(member="ann@lab")
    viewer = new_wire(member="vi@lab", role="viewer")
    run = Run(member)
    path = run.save("state")
    seen = viewer.get(f"/training_runs/{run.id}", access_scope="accessible")
    assert seen["training_run_id"] == run.id
    assert viewer.post("/weights_info", tinker_path=path)["base_model"] == MODEL
    assert viewer.get("/training_runs", access_scope="accessible")["cursor"]["total_count"] == 1
    for attempt in (
        lambda: viewer.post("/create_session", tags=[]),
        lambda: viewer.optim(run.id, run.seq + 1),
        lambda: viewer.submit(run.id, run.seq + 1, datum([1, 2])),
        lambda: viewer.delete(route(path)),
        lambda: viewer.post(route(path, "publish")),
        lambda: viewer.post("/copy_weights", source_path=path, destination_project_id="default"),
        lambda: viewer.get("/audit"),
    ):
        refused = attempt()
        assert (viewer.status, "vi@lab is a viewer" in refused["detail"]) == (403, True), refused
    member.get("/audit")
    assert member.status == 403
    assert run.call("optim_step", adam_params={})["metrics"], "nothing of this consumed a number"


@pytest.mark.parametrize("null_service", ["embedded"], indirect=True)
def test_a_role_changes_and_a_member_leaves(
    null_service: RunningService, tenant: str, new_wire: Callable[..., Wire]
) -> None:
    new_wire(member="ann@lab", role="viewer")
    null_service.admin("members", "set", tenant, "ann@lab", "admin")
    assert f"{tenant}  ann@lab  admin" in null_service.admin("members", "list").splitlines()
    fresh = new_wire(member="ann@lab")
    assert fresh.session()
    null_service.admin("members", "remove", tenant, "ann@lab")
    events = [e["event"] for e in new_wire().get("/audit", event_type="teams")["entries"]]
    assert events.count("member_set") == 3
    assert "member_removed" in events
    listed = null_service.admin("keys", "list").splitlines()
    assert sum(f" {tenant} " in line and "revoked" in line for line in listed) == 2


def test_the_description_of_the_api_names_every_route_and_its_errors() -> None:
    from tinsmith_api import app

    class Stub:
        settings = None

    described = app.make_app(Stub()).openapi()  # type: ignore[arg-type]
    assert set(described["paths"]) == {route.path_format for route in _routes()}
    bodiless = {"/publish", "/client/config", "/client/dynamic_config", "/telemetry", "/auth/token"}
    for path, methods in described["paths"].items():
        for method in methods.keys() & {"post", "put"}:
            if not path.endswith(tuple(bodiless)):
                assert "requestBody" in methods[method], (method, path)
    assert "$defs" not in str(described)
    errors = described["paths"]["/api/v1/copy_weights"]["post"]["responses"]
    assert {"400", "401", "403", "404", "429"} <= set(errors)
    assert "detail" in str(errors["404"])


# -- keys ------------------------------------------------------------------------------------------------


def test_a_key_says_whose_it_is_and_revokes_itself(
    null_service: RunningService, tenant: str, new_wire: Callable[..., Wire], tmp_path: Path
) -> None:
    wire = new_wire(member="ann@lab", name="laptop")
    me = wire.get("/auth/apikey/me")
    assert (me["name"], type(me["key_id"])) == ("laptop", int)
    assert me["details"] == {"org_details": {"name": tenant}, "user_details": {"email": "ann@lab"}}
    key = wire.http.headers["x-api-key"]
    assert cli(null_service, tmp_path, "auth", "status", key=key).returncode == 0
    assert wire.http.delete("/auth/apikey/me").status_code == 204
    wire.get("/auth/apikey/me")
    assert wire.status == 401
    assert f"{me['key_id']} {tenant} laptop revoked" in null_service.admin("keys", "list")


def test_calls_per_minute_are_limited_by_key_and_told_when_to_come_back(
    new_wire: Callable[..., Wire],
) -> None:
    wire, other = new_wire(limits={"requests_per_minute": 5}), new_wire()
    while time.time() % 60 > 50:
        time.sleep(0.5)  # all of it within one minute
    answers = [wire.http.get("/sessions") for _ in range(8)]
    assert [a.status_code for a in answers] == [200] * 5 + [429] * 3
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert "5 calls a minute" in answers[-1].json()["detail"]
    assert wire.http.post("/telemetry", json={}).status_code == 200
    assert wire.http.get("/tokenizers/of/telemetry").status_code == 429, "what is only called so counts"
    assert other.http.get("/sessions").status_code == 200


def test_a_fleet_s_processes_count_calls_together(
    null_service: RunningFleet, new_wire: Callable[..., Wire]
) -> None:
    urls = getattr(null_service, "urls", [null_service.url])
    wires = [
        Wire(url, new_wire(limits={"requests_per_minute": 6}).http.headers["x-api-key"]) for url in urls[:1]
    ]
    wires += [Wire(url, wires[0].http.headers["x-api-key"]) for url in urls[1:]]
    while time.time() % 60 > 50:
        time.sleep(0.5)
    codes = [wires[i % len(wires)].http.get("/sessions").status_code for i in range(10)]
    assert codes == [200] * 6 + [429] * 4


def test_tokens_a_day_are_limited(new_wire: Callable[..., Wire]) -> None:
    wire = new_wire(limits={"tokens_per_day": 30})
    session = sampling_session(wire)
    wire.sampled(sample(wire, session, 0))  # 4 read and 8 sampled
    wire.sampled(sample(wire, session, 1))
    refused = sample(wire, session, 2)
    assert (wire.status, "30 tokens in 24 hours" in str(refused["detail"])) == (429, True), refused
    wire.sampled(sample(wire, session, 3, tokens=1))


def test_samples_at_once_are_limited(new_wire: Callable[..., Wire], null_service: RunningService) -> None:
    wire = new_wire(limits={"concurrent_samples": 2})
    session = sampling_session(wire)
    with _workers_stand_still(null_service):
        under_way = [sample(wire, session, number) for number in range(2)]
        refused = sample(wire, session, 2)
        assert (wire.status, "it may have 2" in str(refused["detail"])) == (429, True), refused
    for future in under_way:
        wire.sampled(future)
    for number in range(3, 13):  # one after the other, however fast
        wire.sampled(sample(wire, session, number))


@contextlib.contextmanager
def _workers_stand_still(service: RunningService | RunningFleet) -> Iterator[None]:
    """For less than a lease."""
    if isinstance(service, RunningFleet):
        pids = [process.pid for name, process in service.processes.items() if name.startswith("worker")]
    else:
        pids = [service.worker_pid()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


# -- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["tenant", "project"])
def test_a_budget_stops_what_costs_tokens_and_nothing_else(
    of: str, null_service: RunningService, tenant: str, new_wire: Callable[..., Wire]
) -> None:
    wire = new_wire()

    def budget(tokens: int) -> None:
        if of == "tenant":
            null_service.admin("tenants", "set", tenant, "--token-budget", str(tokens))
        else:
            null_service.admin("projects", "set", tenant, "default", "--token-budget", str(tokens))
        time.sleep(1.1)  # looked up once a second

    budget(10)
    run = Run(wire)
    for seq in (1, 2):
        wire.output(wire.submit(run.id, seq, datum([1, 2, 3, 4, 5])))
    refused = wire.submit(run.id, 3, datum([1, 2, 3, 4, 5]))
    assert (wire.status, "budget" in refused["detail"]) == (402, True), refused
    run.seq = 2
    assert run.call("optim_step", adam_params={})["metrics"]
    assert run.save("what-there-is")
    budget(100)
    wire.output(wire.submit(run.id, run.seq + 1, datum([1, 2, 3, 4, 5])))
    others = null_service.new_key(f"{tenant}-other")
    other = Run(Wire(null_service.url, others))
    other.step()


# -- tokens ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jwt_service(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("jwt")
    given = ("--engine", "null", "--model", MODEL)
    prices = '[prices."base/null"]\ntraining = 2.0\nsample = 10.0\nprefill = 1.0\n'
    running = RunningService(
        folder, *given, config=f"jwt_auth = true\nprice_per_gigabyte_month = 0.5\n{prices}"
    )
    yield running
    assert running.stop() == 0, running.log_text()


def test_the_sdk_exchanges_its_key_and_knows_who_it_is(jwt_service: RunningService, tmp_path: Path) -> None:
    key = jwt_service.admin("keys", "create", "lab", "--member", "ann@lab.org")
    client = tinker.RestClient(base_url=jwt_service.url, api_key=key)
    who = client.whoami().result()
    assert who.email == "ann@lab.org"
    assert who.user_urn.startswith("tml:user:")
    assert who.org_urn.startswith("tml:organization:")
    with tinker.ServiceClient(base_url=jwt_service.url, api_key=key) as service:
        training = service.create_lora_training_client(MODEL, rank=4).result()
        assert training.save_state("s").result().path
    done = cli(jwt_service, tmp_path, "-f", "json", "auth", "whoami", key=key)
    assert done.returncode == 0, done.stderr
    assert "ann@lab.org" in done.stdout
    unknown = cli(jwt_service, tmp_path, "model", "list", "nothing-like-this", key=key)
    assert f"{who.org_urn}" in unknown.stdout + unknown.stderr, "it says for whom it looked"


def test_the_command_line_logs_in_with_a_key_and_out(jwt_service: RunningService, tmp_path: Path) -> None:
    key = jwt_service.admin("keys", "create", "lab", "--member", "bo@lab.org", "--name", "pasted")
    said = cli(jwt_service, tmp_path, "auth", "login", key="", given=f"{key}\n")
    assert "Logged in as bo@lab.org (lab)" in said.stdout, said
    assert "bo@lab.org" in cli(jwt_service, tmp_path, "auth", "whoami", key="").stdout
    assert cli(jwt_service, tmp_path, "auth", "status", key="").returncode == 0
    assert "Removed credential 'pasted'" in cli(jwt_service, tmp_path, "auth", "logout", key="").stdout
    wrong = cli(jwt_service, tmp_path, "auth", "login", key="", given="tml-wrong\n")
    assert "unknown or revoked" in wrong.stdout + wrong.stderr


def test_the_sdk_waits_while_a_budget_is_spent_and_goes_on_when_it_is_raised(
    jwt_service: RunningService,
) -> None:
    key = jwt_service.new_key("frugal")
    jwt_service.admin("tenants", "set", "frugal", "--token-budget", "4")
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )
    with tinker.ServiceClient(base_url=jwt_service.url, api_key=key) as service:
        training = service.create_lora_training_client(MODEL, rank=4).result()
        training.forward_backward([datum], "cross_entropy").result()
        waiting = training.forward_backward([datum], "cross_entropy")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=2)
        jwt_service.admin("tenants", "set", "frugal", "--token-budget", "100")
        assert waiting.result(timeout=30).metrics["loss:sum"] == 0


def test_the_sdk_takes_turns_when_a_key_may_have_few_samples_at_once(jwt_service: RunningService) -> None:
    key = jwt_service.admin("keys", "create", "narrow", "--concurrent-samples", "1")
    with tinker.ServiceClient(base_url=jwt_service.url, api_key=key) as service:
        sampler = service.create_sampling_client(base_model=MODEL)
        prompt, params = types.ModelInput.from_ints([1, 2]), types.SamplingParams(max_tokens=4)
        futures = [sampler.sample(prompt, 1, params) for _ in range(4)]
        assert [len(f.result(timeout=60).sequences) for f in futures] == [1] * 4


def test_what_was_granted_signed_and_counted_survives_a_restart(jwt_service: RunningService) -> None:
    key = jwt_service.admin("keys", "create", "keeper", "--member", "v@lab.org", "--role", "viewer")
    owner, viewer = (Wire(jwt_service.url, k) for k in (jwt_service.new_key("keeper"), key))
    run = Run(owner)
    run.step()
    path = run.save("shown", "save_weights_external")
    owner.post(route(path, "publish"))
    url = owner.get(route(path, "external_weights_urls"))["urls"]["adapter_config.json"]
    token = owner.post("/auth/token")["jwt"]
    cost = owner.get(f"/training_runs/{run.id}/cost")
    assert jwt_service.stop() == 0
    jwt_service.restart()
    assert httpx.get(url).status_code == 200
    assert Wire(jwt_service.url, token).get(f"/training_runs/{run.id}/cost") == cost
    assert viewer.get(f"/training_runs/{run.id}/checkpoints")["checkpoints"][0]["public"]
    viewer.post("/create_session", tags=[])
    assert viewer.status == 403
    assert owner.get("/audit", event_type="checkpoints")["entries"][-1]["event"] == "checkpoint_read"


def test_tokens_that_are_not_good_are_said_to_be_so(jwt_service: RunningService) -> None:
    key = jwt_service.new_key("leaver")
    wire = Wire(jwt_service.url, key)
    token = wire.post("/auth/token")["jwt"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] > claims["iat"]
    header = jwt.get_unverified_header(token)
    (secret,) = jwt_service.sql("select secret from signing_keys where id = ?", header["kid"])[0]
    now = int(time.time())

    def forged(**changes: object) -> str:
        said = {
            "sub": "x",
            "key": claims["key"],
            "aud": claims["aud"],
            "iat": now,
            "exp": now + 60,
            **changes,
        }
        return jwt.encode(said, secret, algorithm="HS256", headers={"kid": header["kid"]})

    def none() -> str:
        body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        return f"eyJhbGciOiJub25lIn0.{body}."

    asked = Wire(jwt_service.url, token)
    assert asked.session()
    assert Wire(jwt_service.url, forged()).session(), "this is how they are made"
    assert Wire(jwt_service.url, forged(iat=now + 5)).session(), "the clock of who signed it may be ahead"
    bad = {
        "expired": forged(exp=now - 1),
        "for a download": forged(aud="tinsmith:download"),
        "no end": jwt.encode({"key": 1, "aud": claims["aud"]}, secret, headers={"kid": header["kid"]}),
        "no signature": none(),
        "another secret": jwt.encode(claims, b"x" * 32, headers={"kid": header["kid"]}),
        "unknown key": jwt.encode(claims, secret, headers={"kid": "0" * 32}),
        "nonsense": "eyJ",
        "more nonsense": "eyJ.eyJ.eyJ",
    }
    for why, token in bad.items():
        wire = Wire(jwt_service.url, token)
        answer = wire.http.get("/sessions")
        assert answer.status_code == 401, why
        assert 'error="invalid_token"' in answer.headers["www-authenticate"], why
    assert asked.http.post("/auth/token").status_code == 401, "a token is no key"
    wire = Wire(jwt_service.url, key)
    wire.http.delete("/auth/apikey/me")
    assert asked.http.get("/sessions").status_code == 401, "nor does it outlive its key"


def test_keys_change_and_what_the_last_one_signed_stays_good(jwt_service: RunningService) -> None:
    from tinsmith_api.journal import signing

    journal = Store(f"sqlite:///{jwt_service.folder / 'journal.db'}")
    try:
        before = journal.write(signing.current).result()
        assert journal.write(signing.current).result() == before
        old = {"created_at": time.time() - signing.ROTATION_SECONDS - 1}
        journal.write(lambda c: c.execute(sa.update(signing.signing_keys).values(old))).result()
        after = journal.write(signing.current).result()
        assert after != before
        journal.write(signing.forget).result()
        assert journal.read(lambda c: signing.find(c, before[0])).result() == before[1]
        older = {"created_at": time.time() - signing.ROTATION_SECONDS - 86401}
        one = signing.signing_keys.c.id == before[0]
        journal.write(lambda c: c.execute(sa.update(signing.signing_keys).where(one).values(older))).result()
        journal.write(signing.forget).result()
        assert journal.read(lambda c: signing.find(c, before[0])).result() is None
        assert journal.read(lambda c: signing.find(c, after[0])).result() == after[1]
    finally:
        journal.close()


def test_without_the_setting_there_are_no_tokens(
    null_service: RunningService, new_wire: Callable[..., Wire]
) -> None:
    wire = new_wire()
    assert wire.post("/client/config")["pjwt_auth_enabled"] is False
    wire.post("/auth/token")
    assert wire.status == 404


# -- the audit log ---------------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what_and_cannot_be_changed(
    null_service: RunningService, tenant: str, new_wire: Callable[..., Wire]
) -> None:
    wire = new_wire()
    run = Run(wire)
    path = run.save("state")
    wire.post(route(path, "publish"))
    wire.http.put(route(path, "ttl"), json={"ttl_seconds": 7200})
    wire.delete(route(path))
    admin = tinker.AdminClient(base_url=null_service.url, api_key=wire.http.headers["x-api-key"])
    entries = admin.get_audit_log().result().entries
    assert [e.event for e in entries] == [
        "project_created",
        "member_set",
        "key_created",
        "checkpoint_saved",
        "checkpoint_published",
        "checkpoint_ttl_set",
        "checkpoint_deleted",
    ]
    assert [e.event_details["by"] for e in entries] == ["operator"] * 3 + ["owner"] * 4
    assert {(e.tinker_path, e.model_id) for e in entries[3:]} == {(path, run.id)}
    assert [e.event for e in admin.get_audit_log("projects").result().entries] == ["project_created"]
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    assert admin.get_audit_log(day=yesterday).result().entries == []
    for bad in ({"day": "yesterday"}, {"event_type": "weather"}):
        wire.get("/audit", **bad)
        assert wire.status == 422
    for statement in ("update audit set event = 'x'", "delete from audit"):
        with pytest.raises(Exception, match="append-only"):
            null_service.sql(statement)


# -- bills -----------------------------------------------------------------------------------------------


def _window() -> tuple[datetime.datetime, datetime.datetime]:
    now = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    return now - datetime.timedelta(hours=1), now + datetime.timedelta(hours=1)


def test_bills_count_what_was_trained_read_sampled_and_saved(
    null_service: RunningService, new_wire: Callable[..., Wire], tmp_path: Path
) -> None:
    wire = new_wire()
    session = wire.post("/create_session", user_metadata={"purpose": "a bill"})["session_id"]
    run = wire.run(MODEL, session=session)
    wire.output(wire.submit(run, 1, datum([1, 2, 3, 4])))
    wire.output(wire.submit(run, 2, datum([1, 2, 3, 4]), forward_only=True))
    wire.result(wire.optim(run, 3))
    wire.result(wire.post("/save_weights", model_id=run, seq_id=4, path="s"))
    wire.post("/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL)
    wire.sampled(sample(wire, session, 0))
    admin = tinker.AdminClient(base_url=null_service.url, api_key=wire.http.headers["x-api-key"])
    usage = admin.get_billing_usage(*_window()).result()
    counted = {
        (
            e.event_info.type,
            getattr(e.event_info, "token_count", None) or getattr(e.event_info, "count", None),
        )
        for e in usage.data
    }
    assert counted == {("training", 6), ("sampling_prefill", 4), ("sampling_sample", 8), ("checkpoint", 1)}
    assert {e.session_id for e in usage.data} == {session}
    assert usage.sessions[session].user_metadata == {"purpose": "a bill"}
    (stored,) = admin.get_current_checkpoint_storage_usage().result().data
    (kept,) = wire.get(f"/training_runs/{run}/checkpoints")["checkpoints"]
    assert (stored.checkpoint_count, stored.size_bytes) == (1, kept["size_bytes"])
    key = wire.http.headers["x-api-key"]
    start, end = (t.isoformat() for t in _window())
    commands = (("billing", "usage", start, end), ("billing", "checkpoint-storage"))
    for words in () if isinstance(null_service, RunningFleet) else commands:  # it asks for the same as above
        done = cli(null_service, tmp_path, "-f", "json", *words, key=key)
        assert (done.returncode, "training" in done.stdout or "size" in done.stdout) == (0, True), done


def test_a_run_has_a_curve_and_a_cost(jwt_service: RunningService) -> None:
    wire = Wire(jwt_service.url, jwt_service.new_key("payer"))
    run = Run(wire)
    for _ in range(3):
        run.step()
    unnamed = run.call("save_weights_for_sampler", sampling_session_seq_id=0)["sampling_session_id"]
    wire.sampled(wire.sample(unnamed, 0, [1, 2, 3, 4]))
    curve = wire.get(f"/training_runs/{run.id}/metrics")
    assert [(r["seq_id"], r["kind"]) for r in curve["rows"]] == [
        (n, "forward_backward" if n % 2 else "optim_step") for n in range(1, 7)
    ]
    assert [r.get("loss:sum", r.get("optimizer_step")) for r in curve["rows"]] == [0, 1, 0, 2, 0, 3]
    assert curve["next"] is None
    assert all(r["compute_seconds"] >= 0 and r["queue_seconds"] >= 0 for r in curve["rows"])
    pages, after = [], 0
    while after is not None:
        page = wire.get(f"/training_runs/{run.id}/metrics", after=after, limit=2)
        pages += page["rows"]
        after = page["next"]
    assert pages == curve["rows"]
    cost = wire.get(f"/training_runs/{run.id}/cost")
    assert (cost["tokens"], cost["calls"], cost["steps"]) == (6, 3, 3)
    assert cost["usage"] == {"forward_backward": 6, "prefill": 4, "sample": 8}
    assert cost["estimated_cost_usd"] == pytest.approx((6 * 2 + 4 * 1 + 8 * 10) / 1e6)
    assert cost["storage_bytes"] > 0
    assert cost["compute_seconds"] > 0
    from tinsmith import runs
    from tinsmith.connection import Connection

    with contextlib.closing(Connection(jwt_service.url, wire.http.headers["x-api-key"])) as connection:
        assert runs.metrics(connection, run.id).column("seq_id") == [1, 2, 3, 4, 5, 6]
        assert runs.cost(connection, run.id).usage == cost["usage"]
    other = Wire(jwt_service.url, jwt_service.new_key("stranger"))
    for what in ("metrics", "cost"):
        other.get(f"/training_runs/{run.id}/{what}")
        assert other.status == 404


@pytest.mark.parametrize(
    "window",
    [
        {"starting_on": "2026-01-01T00:30:00Z", "ending_before": "2026-01-01T02:00:00Z"},
        {"starting_on": "2026-01-02T00:00:00Z", "ending_before": "2026-01-01T00:00:00Z"},
        {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-03-01T00:00:00Z"},
        {"starting_on": "2999-01-01T00:00:00Z", "ending_before": "2999-01-02T00:00:00Z"},
        {"starting_on": "9999-12-31T00:00:00Z", "ending_before": "9999-12-31T23:00:00Z"},
        {"starting_on": "2026-01-01T00:00:00", "ending_before": "2026-01-02T00:00:00"},
        {},
    ],
)
def test_bills_of_no_time_are_refused(null_service: RunningService, window: dict[str, str]) -> None:
    wire = Wire(null_service.url, null_service.key)
    refused = wire.get("/billing/usage/events", **window)
    assert wire.status in (400, 422)
    assert refused["detail"]
