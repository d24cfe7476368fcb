"""What a person at a terminal sees while calls take long."""

import time

import pytest

import tinsmith
from tests.client.stub import Answer, Request, Stub


def wait(stub: Stub, progress: bool | None) -> None:
    """One call whose result comes at the third poll."""
    pending = [
        Answer(408, {"type": "try_again", "queue_state_reason": "no worker of m is ready"}),
        Answer(408, {"type": "try_again", "queue_state_reason": "no worker of m is ready"}),
    ]

    def poll(request: Request) -> Answer:
        time.sleep(0.15)
        return pending.pop() if pending and request.json["request_id"] == "slow" else Answer()

    with tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", progress=progress) as client:
        training = client.create_lora_training_client("m").result(10)
        stub.answers["optim_step"] = lambda request: Answer(body={"request_id": "slow"})
        stub.answers["retrieve_future"] = poll
        training.optim_step().result(10)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.progress._SECONDS_UNTIL_SHOWN", 0.01)
    monkeypatch.delenv("TINSMITH_PROGRESS", raising=False)


def test_a_long_wait_says_how_long_and_why(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    wait(stub, True)
    shown = capsys.readouterr().err
    assert "tinsmith" in shown
    assert "no worker of m is ready" in shown
    assert "0/1" in shown


@pytest.mark.parametrize("progress, said", [(False, ""), (None, ""), (None, "0")])
def test_it_can_be_switched_off_and_is_where_no_terminal_is(
    stub: Stub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool | None,
    said: str,
) -> None:
    monkeypatch.setenv("TINSMITH_PROGRESS", said)
    wait(stub, progress)
    assert capsys.readouterr().err == ""


def test_the_environment_switches_it_on(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINSMITH_PROGRESS", "1")
    wait(stub, None)
    assert "tinsmith" in capsys.readouterr().err
