"""One deterministic service for the recipes under test."""

from collections.abc import Iterator

import pytest

from tests.conftest import RunningService


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(tmp_path_factory.mktemp("cookbook"), "--deterministic")
    yield service
    assert service.stop() == 0, service.log_text()
    assert "Traceback" not in service.log_text(), service.log_text()


@pytest.fixture
def in_environment(running: RunningService, monkeypatch: pytest.MonkeyPatch) -> RunningService:
    """Recipes find it, those in child processes too."""
    monkeypatch.setenv("TINSMITH_BASE_URL", running.url)
    monkeypatch.setenv("TINSMITH_API_KEY", running.key)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    return running
