"""What is done with checkpoints: exported, downloaded, published, copied, kept for a while. With the official
SDK and its command line, against both forms."""

import datetime
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyrage
import pytest
import tinker
from safetensors.numpy import load_file

from tests.compatibility.recorder import RECORDER
from tests.conftest import RunningService
from tests.e2e.wire import Json, Wire, datum

MODEL = "base/null"
PEFT = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def wire(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.key)


@pytest.fixture(scope="module")
def other_key(null_service: RunningService) -> str:
    return null_service.new_key("reader")


@pytest.fixture(scope="module")
def other(null_service: RunningService, other_key: str) -> Wire:
    return Wire(null_service.url, other_key)


@pytest.fixture(scope="module")
def rest(null_service: RunningService) -> tinker.RestClient:
    return tinker.RestClient(base_url=null_service.url, api_key=null_service.key)


class Run:
    """A run, with its calls numbered."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.seq, self.id = wire, 0, wire.run(MODEL)

    def call(self, verb: str, **fields: Any) -> Json:
        self.seq += 1
        return self.wire.result(self.wire.post(f"/{verb}", model_id=self.id, seq_id=self.seq, **fields))

    def save(self, name: str, verb: str = "save_weights", **fields: Any) -> str:
        return self.call(verb, path=name, **fields)["path"]

    def step(self) -> None:
        self.seq += 1
        self.wire.output(self.wire.submit(self.id, self.seq, datum([1, 2, 3])))
        assert self.call("optim_step", adam_params={})["metrics"]


@pytest.fixture
def run(wire: Wire) -> Run:
    made = Run(wire)
    made.step()
    return made


def route(path: str, verb: str = "") -> str:
    run_id, rest = path.removeprefix("tinker://").split("/", 1)
    return f"/training_runs/{run_id}/checkpoints/{rest}" + (f"/{verb}" if verb else "")


def cli(
    service: RunningService, home: Path, *words: str, key: str | None = None, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """The official command line, as its user calls it; key "": the one it has stored."""
    variables = {
        **os.environ,
        "HOME": str(home),
        "TINKER_BASE_URL": service.url,
        "TINKER_API_KEY": service.key if key is None else key,
    }
    command = [str(Path(sys.executable).parent / "tinker"), *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, input=given)
    if done.returncode == -signal.SIGABRT and done.stdout:
        # It was seen once to abort as it ended, after it had said everything; why is not known.
        done.returncode = 0
    RECORDER.command(words, done.returncode, done.stdout + done.stderr)
    return done


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


# -- exports ---------------------------------------------------------------------------------------------


def test_an_export_is_downloaded_in_peft_s_form_without_a_key(run: Run, rest: tinker.RestClient) -> None:
    path = run.save("out", "save_weights_external")
    assert path == f"tinker://{run.id}/external_weights/out"
    found = rest.get_external_weights_urls(path).result()
    assert set(found.urls) == PEFT
    assert found.expires > datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=50)
    files = {name: read(url) for name, url in found.urls.items()}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    (listed,) = rest.list_checkpoints(run.id).result().checkpoints
    assert (listed.checkpoint_type, listed.size_bytes) == ("external", sum(map(len, files.values())))


def test_clients_that_know_no_exports_are_shown_none(run: Run, wire: Wire) -> None:
    """They would refuse the whole page."""
    kept, export = run.save("state"), run.save("out", "save_weights_external")
    shown = {}
    for version in ("0.16.1", "0.25.0", "0.30.4", "1.0.0", "", "0." + "9" * 5000):
        headers = {"x-stainless-package-version": version}
        for path in (f"/training_runs/{run.id}/checkpoints", "/checkpoints?limit=1000"):
            listed = wire.http.get(path, headers=headers).json()["checkpoints"]
            shown[version, path[:4]] = {c["tinker_path"] for c in listed} & {kept, export}
    assert {key for key, paths in shown.items() if paths == {kept}} == {
        (version, path) for version in ("0.16.1", "0.25.0") for path in ("/tra", "/che")
    }
    assert all(paths in ({kept}, {kept, export}) for paths in shown.values())


def test_an_encrypted_export_is_opened_by_its_recipients_only(run: Run, rest: tinker.RestClient) -> None:
    alice, bob, eve = (pyrage.x25519.Identity.generate() for _ in range(3))
    recipients = [str(alice.to_public()), str(bob.to_public())]
    path = run.save("sealed", "save_weights_external", age_encryption_recipients=recipients)
    urls = rest.get_external_weights_urls(path).result().urls
    assert set(urls) == {f"{name}.age" for name in PEFT}
    sealed = read(urls["adapter_config.json.age"])
    for identity in (alice, bob):
        assert json.loads(pyrage.decrypt(sealed, [identity]))["peft_type"] == "LORA"
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(sealed, [eve])


@pytest.mark.parametrize(
    ("recipients", "says"),
    [
        (["age1nonsense"], "age1nonsense"),
        (["ssh-rsa nonsense"], "SSH public key"),
        ([""], "neither"),
        (["ssh-rsa AAAAB3NzaC1yc2EAAAABAAAAAAEA"], "SSH public key"),  # its exponent is empty
    ],
)
def test_recipients_that_are_none_fail_the_call_alone(run: Run, recipients: list[str], says: str) -> None:
    failed = run.call("save_weights_external", path="x", age_encryption_recipients=recipients)
    assert (failed["category"], says in failed["error"]) == ("user", True), failed
    assert run.save("x", "save_weights_external")


def test_eleven_recipients_are_refused(run: Run, wire: Wire) -> None:
    keys = [str(pyrage.x25519.Identity.generate().to_public())] * 11
    refused = wire.post(
        "/save_weights_external", model_id=run.id, seq_id=3, path="x", age_encryption_recipients=keys
    )
    assert (wire.status, "10 items" in refused["detail"]) == (400, True), refused
    run.seq = 3
    assert run.save("x", "save_weights_external")


def test_an_export_is_neither_loaded_nor_sampled(run: Run, wire: Wire) -> None:
    path = run.save("out", "save_weights_external")
    failed = run.call("load_weights", path=path, optimizer=False)
    assert "was saved to be downloaded" in failed["error"]
    session = wire.session()
    for verb, fields in (
        ("load_weights", {"model_seq_id": 0, "path": path, "optimizer": False}),
        ("create_sampling_session", {"sampling_session_seq_id": 0, "model_path": path}),
    ):
        refused = wire.post(f"/{verb}", session_id=session, **fields)
        assert (wire.status, "was saved to be downloaded" in refused["detail"]) == (400, True), refused


def test_an_address_that_was_changed_or_is_old_opens_nothing(
    run: Run, wire: Wire, null_service: RunningService, request: pytest.FixtureRequest
) -> None:
    path = run.save("out", "save_weights_external")
    urls = wire.get(route(path, "external_weights_urls"))["urls"]
    good = urls["adapter_config.json"]
    assert httpx.get(good).status_code == 200
    if not good.startswith(null_service.url):
        return  # the object store's own addresses are its own matter
    address, token = good.split("?token=")
    header, claims, signature = token.split(".")
    swapped = address.replace("adapter_config.json", "adapter_model.safetensors")
    assert httpx.get(f"{swapped}?token={token}").status_code == 404
    assert httpx.get(address).status_code == 422
    for bad in ("", "x", "eyJ.eyJ.x", f"{header}.{claims}.{signature[:-4]}AAAA", f"{header}.{claims}."):
        answer = httpx.get(address, params={"token": bad})
        assert (answer.status_code, "ask for a new one" in answer.text) == (403, True), (bad, answer.text)
    for name in ("../../journal.db", "..%2f..%2fjournal.db", "%2e%2e/journal.db"):
        assert httpx.get(f"{null_service.url}/api/v1/downloads/{name}?token={token}").status_code == 404


def test_the_command_line_downloads_exports_and_training_checkpoints(
    run: Run, null_service: RunningService, tmp_path: Path
) -> None:
    paths = {"export": run.save("out", "save_weights_external"), "training": run.save("state")}
    for name, path in paths.items():
        done = cli(null_service, tmp_path, "checkpoint", "download", path, "-o", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        (folder,) = {file.parent for file in (tmp_path / name).rglob("adapter_config.json")}
        assert {file.name for file in folder.iterdir()} == PEFT
        assert load_file(folder / "adapter_model.safetensors")["null"] == [1.0]
    kept = run.wire.get(f"/training_runs/{run.id}/checkpoints")["checkpoints"]
    assert {c["tinker_path"] for c in kept} == set(paths.values())
    everything = run.wire.get("/checkpoints", limit=1000)["checkpoints"]
    assert not [c for c in everything if c["checkpoint_id"] == "external_weights/download"], (
        "a temporary export"
    )


# -- archives --------------------------------------------------------------------------------------------


def test_older_clients_get_a_tar(run: Run, wire: Wire) -> None:
    for path in (run.save("state"), run.save("sampler", "save_weights_for_sampler")):
        answer = wire.http.get(route(path, "archive"))
        assert answer.status_code == 302, answer.text
        with tarfile.open(fileobj=io.BytesIO(read(answer.headers["location"]))) as tar:
            assert set(tar.getnames()) == PEFT
        assert answer.headers["expires"].endswith("GMT")


# -- publishing ------------------------------------------------------------------------------------------


def test_what_is_published_can_be_read_by_others_until_it_is_not(
    run: Run, wire: Wire, other: Wire, rest: tinker.RestClient
) -> None:
    path, private = run.save("shown"), run.save("hidden")

    def attempts() -> list[int]:
        session = other.session()
        statuses = []
        for verb, fields in (
            ("weights_info", {"tinker_path": path}),
            (
                "load_weights",
                {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True},
            ),
            (
                "create_sampling_session",
                {"session_id": session, "sampling_session_seq_id": 0, "model_path": path},
            ),
        ):
            other.post(f"/{verb}", **fields)
            statuses.append(other.status)
        for at in (f"/training_runs/{run.id}", f"/training_runs/{run.id}/checkpoints"):
            other.get(at)
            statuses.append(other.status)
        return statuses

    assert attempts() == [404] * 5
    for _ in range(2):  # twice is as good as once
        rest.publish_checkpoint_from_tinker_path(path).result()
    assert attempts() == [200] * 5
    shown = other.get(f"/training_runs/{run.id}/checkpoints")["checkpoints"]
    assert [(c["tinker_path"], c["public"]) for c in shown] == [(path, True)]
    assert other.get(f"/training_runs/{run.id}")["user_metadata"] == {}
    for verb in ("publish", "ttl", ""):
        assert other.http.request("DELETE", route(path, verb)).status_code in (404, 405)
    assert other.http.put(route(path, "ttl"), json={"ttl_seconds": None}).status_code == 404
    other.get(route(private, "archive"))
    assert other.status == 404
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert attempts() == [404] * 5


def test_others_train_on_from_what_was_published(run: Run, other: Wire, wire: Wire) -> None:
    path = run.save("shown")
    assert wire.http.post(route(path, "publish")).status_code == 204
    session = other.session()
    made = other.post("/load_weights", session_id=session, model_seq_id=0, path=path, optimizer=True)
    assert other.result(made)["path"] == path
    assert other.result(other.optim(made["model_id"], 1))["metrics"]["optimizer_step"] == 2


def test_new_weights_under_a_published_name_are_not_published(run: Run, wire: Wire, other: Wire) -> None:
    path = run.save("shown")
    wire.http.post(route(path, "publish"))
    run.save("shown", overwrite=True)
    other.post("/weights_info", tinker_path=path)
    assert other.status == 404


# -- keeping ---------------------------------------------------------------------------------------------


def test_a_ttl_is_set_and_taken_away_and_kept_to(
    run: Run, wire: Wire, rest: tinker.RestClient, null_service: RunningService
) -> None:
    path = run.save("short")

    def expires() -> datetime.datetime | None:
        return rest.list_checkpoints(run.id).result().checkpoints[0].expires_at

    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert abs(expires().timestamp() - time.time() - 7200) < 60  # type: ignore[union-attr]
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert expires() is None
    for bad in (3599, 10**9, "long", 0):
        refused = wire.http.put(route(path, "ttl"), json={"ttl_seconds": bad})
        assert refused.status_code == 400, refused.text
    assert wire.http.put(route(path, "ttl"), json={}).status_code == 400
    wire.http.put(route(path, "ttl"), json={"ttl_seconds": 3600})
    _as_if_an_hour_had_passed(null_service, path)
    wire.post("/weights_info", tinker_path=path)
    assert wire.status == 404
    assert rest.list_checkpoints(run.id).result().checkpoints == []


def _as_if_an_hour_had_passed(service: RunningService, path: str) -> None:
    if hasattr(service, "postgres"):
        service.sql("update checkpoints set expires_at = 1 where path = ?", path)
        return
    import sqlite3

    with sqlite3.connect(service.folder / "journal.db", timeout=30) as connection:
        connection.execute("update checkpoints set expires_at = 1 where path = ?", (path,))


# -- copies ----------------------------------------------------------------------------------------------


def test_a_copy_lives_on_when_its_source_is_deleted(
    run: Run, wire: Wire, other: Wire, other_key: str, null_service: RunningService
) -> None:
    path = run.save("state")
    null_service.admin("projects", "create", "reader", "archive")
    client = tinker.RestClient(base_url=null_service.url, api_key=other_key)
    with pytest.raises(tinker.NotFoundError):
        client.copy_weights(path, "archive").result()
    copied = client.copy_weights(path, "archive", weights_access_token=null_service.key).result()
    assert copied.endswith("/weights/state")
    assert wire.http.delete(route(path)).status_code == 204
    session = other.session()
    made = other.post("/load_weights", session_id=session, model_seq_id=0, path=copied, optimizer=True)
    assert other.result(made)["path"] == copied
    run_id = copied.removeprefix("tinker://").split("/")[0]
    other.optim(run_id, 1)
    assert other.status == 410, "the session that holds a copy is finished"
    wire.post("/weights_info", tinker_path=copied)
    assert wire.status == 404


def test_a_copy_asked_for_again_or_twice_at_once_is_the_same_one(
    run: Run, wire: Wire, null_service: RunningService
) -> None:
    path = run.save("state")
    asked = {"source_path": path, "destination_project_id": "default"}
    headers = {"x-idempotency-key": f"once-{run.id}"}
    wires = [Wire(url, null_service.key) for url in getattr(null_service, "urls", [null_service.url])]

    def ask(number: int) -> str:
        answer = wires[number % len(wires)].http.post("/copy_weights", json=asked, headers=headers)
        return answer.json()["tinker_path"]

    with ThreadPoolExecutor(8) as threads:
        copies = set(threads.map(ask, range(8)))
    assert copies == {ask(0)}
    kept = wire.get("/checkpoints", limit=1000)["checkpoints"]
    assert sum(c["tinker_path"] in copies for c in kept) == 1
    different = wire.http.post("/copy_weights", json={**asked, "ttl_seconds": 3600}, headers=headers)
    assert (different.status_code, "another copy" in different.text) == (400, True), different.text
    again = wire.http.post("/copy_weights", json=asked).json()["tinker_path"]
    assert again not in copies


def test_a_copy_into_a_session_takes_its_number(run: Run, wire: Wire) -> None:
    path = run.save("state")
    session = wire.session()
    asked = {"source_path": path, "session_id": session, "model_seq_id": 3, "ttl_seconds": 3600}
    assert wire.post("/copy_weights", **asked)["tinker_path"] == f"tinker://{session}:train:3/weights/state"
    failed = wire.result(wire.optim(f"{session}:train:3", 1))
    assert (failed["category"], "was not created" in failed["error"]) == ("user", True), failed
    wire.post("/copy_weights", **asked)  # without a key of its own the number says that it is the same
    wire.run(MODEL, session=session, number=4)
    refused = wire.post("/copy_weights", **{**asked, "model_seq_id": 4})
    assert (wire.status, "next model_seq_id" in refused["detail"]) == (400, True), refused
    for missing in ({"source_path": path}, {"source_path": path, "session_id": session}):
        wire.post("/copy_weights", **missing)
        assert wire.status == 400


def test_an_access_token_that_is_none_is_refused_and_not_repeated(run: Run, other: Wire) -> None:
    path = run.save("state")
    refused = other.http.post(
        "/copy_weights",
        json={"source_path": path, "destination_project_id": "default"},
        headers={"x-tinker-weights-access-token": "tml-a-secret-of-somebody"},
    )
    assert refused.status_code == 400
    assert "secret" not in refused.text
    made = other.post(
        "/load_weights",
        session_id=other.session(),
        model_seq_id=0,
        path=path,
        optimizer=False,
        weights_access_token=run.wire.http.headers["x-api-key"],
    )
    assert other.result(made)["path"] == path


# -- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("null_service", ["embedded"], indirect=True)
def test_the_command_line_lists_publishes_keeps_and_deletes(
    run: Run, null_service: RunningService, tmp_path: Path
) -> None:
    path = run.save("state")

    def said(*words: str) -> Any:
        done = cli(null_service, tmp_path, "-f", "json", *words)
        assert done.returncode == 0, (words, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else None

    assert said("run", "info", run.id)["training_run_id"] == run.id
    assert run.id in json.dumps(said("run", "list", "--limit", "0"))
    said("checkpoint", "publish", path)
    said("checkpoint", "set-ttl", path, "--ttl", "7200")
    info = said("checkpoint", "info", path)
    assert (info["public"], bool(info["expires_at"])) == (True, True), info
    said("checkpoint", "unpublish", path)
    assert path in json.dumps(said("checkpoint", "list", "--run-id", run.id))
    assert path in json.dumps(said("checkpoint", "list", "--limit", "0"))
    for number in range(3):
        run.save(f"more-{number}")
    said("checkpoint", "delete", path, "-y")
    assert path not in json.dumps(said("checkpoint", "list", "--run-id", run.id))
    said("checkpoint", "delete", "--run-id", run.id, "-y")
    assert said("checkpoint", "list", "--run-id", run.id)["checkpoints"] == []
    gone = cli(null_service, tmp_path, "checkpoint", "info", path)
    assert gone.returncode != 0
