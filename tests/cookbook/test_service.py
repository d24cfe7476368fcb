"""A recipe finds the service in the environment, or starts its own and stops it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.stub import Stub
from tinsmith_cookbook import service


def test_a_service_that_cannot_start_is_shown_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match="did not start"), service.embedded(tmp_path):
        pass


def test_the_service_in_the_environment_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TINKER_API_KEY", "tml-key")
    with service.connect(tmp_path / "unused") as client:
        assert client is not None
    assert not (tmp_path / "unused").exists()


def test_a_recipe_that_ends_finishes_its_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a shared service keeps its runs until the session has been silent for a day."""
    stub = Stub()
    monkeypatch.setenv("TINSMITH_BASE_URL", stub.url)
    monkeypatch.setenv("TINSMITH_API_KEY", "tml-key")
    with service.connect(tmp_path) as client:
        client.create_lora_training_client("m").result(10)
    assert [one.json["reason"] for one in stub.of("sessions/s1/finish")] == [{"type": "success"}]
    stub.close()


@pytest.mark.parametrize("name", ["tinsmith", "tinker"])
def test_the_client_is_chosen_in_one_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_SDK", name)
    script = "from tinsmith_cookbook.sdk import tinker; print(tinker.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name
