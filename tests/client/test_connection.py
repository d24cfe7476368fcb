"""Keys, tokens, pauses, heartbeats and limits: how a service that is no Tinsmith of one's own behaves."""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import tinsmith
from tests.client.stub import Answer, Request, Stub
from tests.client.test_training_client import answer_every_pass, datum, passes
from tinsmith import session


@pytest.fixture
def hosted(stub: Stub) -> Iterator[Stub]:
    """Says nothing of itself, so that everything is at the official SDK's defaults."""
    stub.answers["client/config"] = lambda request: Answer(body={})
    return stub


def jwt(number: int, life: float, age: float = 0.0) -> str:
    now = time.time()
    claims = {"iat": now - age, "exp": now - age + life, "sub": "tml:user:7", "org_id": "o1", "n": number}
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{payload}.sig"


def exchanging(stub: Stub, tokens: list[str]) -> None:
    stub.answers["client/config"] = lambda request: Answer(body={"pjwt_auth_enabled": True})
    stub.answers["auth/token"] = lambda request: Answer(body={"jwt": tokens.pop(0)})
    stub.answers["get_server_capabilities"] = lambda request: Answer(body={"supported_models": []})


def rest(stub: Stub) -> tinsmith.RestClient:
    return tinsmith.RestClient(base_url=stub.url, api_key="tml-raw")


def test_a_key_is_exchanged_for_a_token_where_the_service_wants_it(stub: Stub) -> None:
    first = jwt(1, 3600)
    exchanging(stub, [first])
    client = rest(stub)
    for _ in range(3):
        client.get_server_capabilities().result(10)
    sent = [(r.path, r.headers["x-api-key"]) for r in stub.requests]
    assert sent[:2] == [("client/config", "tml-raw"), ("auth/token", "tml-raw")]
    assert sent[2:] == [("get_server_capabilities", first)] * 3
    assert client.whoami().result(10).user_urn == "tml:user:7"
    assert client.whoami().result(10).org_urn == "tml:organization:o1"


def test_a_token_is_renewed_at_half_its_life(stub: Stub) -> None:
    tokens = [jwt(1, 3600, age=1700), jwt(2, 3600)]
    exchanging(stub, list(tokens))
    client = rest(stub)
    client.get_server_capabilities().result(10)
    client._connection.key.claims["iat"] -= 200
    client._connection.key.claims["exp"] -= 200
    client.get_server_capabilities().result(10)
    assert [r.headers["x-api-key"] for r in stub.of("get_server_capabilities")] == tokens


def test_a_token_that_the_service_no_longer_likes_is_replaced_once(stub: Stub) -> None:
    tokens = [jwt(number, 3600) for number in (1, 2, 3)]
    exchanging(stub, list(tokens))
    bad = {tokens[0]}

    def answer(request: Request) -> Answer:
        if request.headers["x-api-key"] in bad:
            return Answer(401, {"detail": "expired"}, {"WWW-Authenticate": 'Bearer error="invalid_token"'})
        return Answer(body={"supported_models": []})

    stub.answers["get_server_capabilities"] = answer
    client = rest(stub)
    client.get_server_capabilities().result(10)
    assert [r.headers["x-api-key"] for r in stub.of("get_server_capabilities")] == tokens[:2]
    bad.update(tokens)
    with pytest.raises(tinsmith.AuthenticationError, match="expired"):
        client.get_server_capabilities().result(10)


def test_a_key_that_gets_no_token_is_told_so(stub: Stub) -> None:
    exchanging(stub, [])
    stub.answers["auth/token"] = lambda request: Answer(401, {"detail": "this key is revoked"})
    with pytest.raises(tinsmith.AuthenticationError, match="revoked"):
        rest(stub).get_server_capabilities().result(10)


def test_an_account_out_of_order_pauses_calls_and_refuses_new_runs(hosted: Stub) -> None:
    limit = {"billing_exception_max_pause_duration_sec": 1}
    hosted.answers["client/config"] = lambda request: Answer(body=limit)
    hosted.answers["optim_step"] = lambda request: Answer(402, {"detail": "add a card"})
    client = tinsmith.ServiceClient(base_url=hosted.url, api_key="tml-test")
    training = client.create_lora_training_client("m").result(10)
    # A pause of five seconds would be longer than the limit of one.
    with pytest.raises(tinsmith.BillingError, match="add a card"):
        training.optim_step().result(10)
    hosted.answers["create_model"] = hosted.answers["optim_step"]
    limit["billing_exception_max_pause_duration_sec"] = 3600
    with pytest.raises(tinsmith.BillingError, match="add a card"):
        client.create_lora_training_client("m").result(2)
    client.close().result(10)


def test_a_call_goes_on_when_the_account_is_in_order_again(
    hosted: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tinsmith.ServiceClient(base_url=hosted.url, api_key="tml-test")
    training = client.create_lora_training_client("m").result(10)
    troubles = [Answer(402, {"detail": "add a card"}, {"Retry-After": "0.1"})]
    hosted.answers["optim_step"] = lambda request: (
        troubles.pop() if troubles else Answer(body={"request_id": "done"})
    )
    started = time.monotonic()
    training.optim_step().result(20)
    assert 4 < time.monotonic() - started < 8
    assert len({request.body for request in hosted.of("optim_step")}) == 1
    client.close().result(10)


def test_a_400_without_a_body_comes_from_a_proxy_and_is_repeated(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    answers = [Answer(400, b""), Answer(body={"request_id": "done"})]
    stub.answers["optim_step"] = lambda request: answers.pop(0)
    training.optim_step().result(10)
    assert len(stub.of("optim_step")) == 2


@pytest.mark.parametrize(
    "config, wanted, beats",
    [
        ({}, None, True),  # not a Tinsmith, as far as it says
        ({"session_seconds": 86400}, None, False),
        ({"session_seconds": 60}, None, True),
        ({"session_seconds": 86400}, True, True),
        ({}, False, False),
    ],
)
def test_heartbeats_where_silence_would_end_the_session(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], wanted: bool | None, beats: bool
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_SECONDS", 0.05)
    stub.answers["client/config"] = lambda request: Answer(body=config)
    client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", heartbeat=wanted)
    client.create_lora_training_client("m").result(10)
    time.sleep(0.4)
    client.close().result(10)
    assert bool(stub.of("session_heartbeat")) == beats
    sent = len(stub.of("session_heartbeat"))
    time.sleep(0.2)
    assert len(stub.of("session_heartbeat")) <= sent + 1


def test_the_service_says_how_large_a_call_may_be(hosted: Stub) -> None:
    hosted.answers["client/config"] = lambda request: Answer(body={"fwdbwd_max_chunk_len": 2})
    answer_every_pass(hosted)
    with tinsmith.ServiceClient(base_url=hosted.url, api_key="tml-test") as client:
        training = client.create_lora_training_client("m").result(10)
        data = [datum([i]) for i in range(5)]
        assert training.forward_backward(data, "cross_entropy").result(10).metrics == {"loss:sum": 5.0}
    assert [len(p.data) for p in passes(hosted)] == [2, 2, 1]


def test_a_service_may_live_under_a_path(stub: Stub) -> None:
    """And needs no client/config."""
    prefixed = {f"/tenant/a/api/v1/{path}": answer for path, answer in stub.answers.items()}
    stub.answers.update(prefixed)
    stub.answers["/tenant/a/api/v1/client/config"] = lambda request: Answer(404, {"detail": "no"})
    client = tinsmith.ServiceClient(base_url=f"{stub.url}/tenant/a/", api_key="tml-test")
    assert client.create_lora_training_client("m").result(10).model_id == "s1:train:0"
    assert all(request.path.startswith("/tenant/a/api/v1/") for request in stub.requests)


def test_sessions_say_what_the_environment_and_the_caller_say(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_PROJECT_ID", "p1")
    monkeypatch.setenv("TINKER_TAGS", "a,b")
    client = tinsmith.ServiceClient(
        {"who": "me"},
        display_name="nightly",
        base_url=stub.url,
        api_key="tml-test",
        default_headers_overrides={"CF-Access-Client-Id": "x"},
    )
    client.create_lora_training_client("m").result(10)
    (opened,) = stub.of("create_session")
    assert opened.json == {
        "tags": ["a", "b"],
        "user_metadata": {"who": "me"},
        "sdk_version": "0.38.0",
        "project_id": "p1",
        "display_name": "nightly",
    }
    assert opened.headers["cf-access-client-id"] == "x"
    client.close("interrupted", "stopped by hand").result(10)
    assert stub.of("sessions/s1/finish")[0].json == {
        "reason": {"type": "interrupted"},
        "detail": "stopped by hand",
    }


def test_sparse_targets_travel_sparse(stub: Stub, training: tinsmith.TrainingClient) -> None:
    import numpy as np

    answer_every_pass(stub)
    weights = np.zeros((4, 20), np.float32)
    weights[0, 3] = 0.5
    data = replace(
        datum([1, 2, 3, 4]), loss_fn_inputs={"target_tokens": weights.astype(int), "weights": weights}
    )
    training.forward(([data]), "cross_entropy").result(10)
    sent = passes(stub)[0].data[0].loss_fn_inputs["weights"]
    assert np.frombuffer(sent.sparse_csr.crow_indices, "<i8").tolist() == [0, 1, 1, 1, 1]
    assert np.frombuffer(sent.sparse_csr.col_indices, "<i8").tolist() == [3]
    assert list(sent.shape) == [4, 20]
