"""Every supported version of the official SDK, each in an environment of its own, against one service.

Asked for by name (`make test-versions`), for it builds those environments the first time.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compatibility import page
from tests.compatibility.recorder import ITS_OWN_FAULT, WORKS
from tests.conftest import RunningService
from tests.versions import environments

MODEL = "tinsmith/tiny"
PROJECT = "a-project-of-the-matrix"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service"), "--deterministic")
    running.admin("projects", "create", "local", PROJECT)
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="module")
def jwt_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("jwt")
    running = RunningService(folder, "--engine", "null", "--model", "base/null", config="jwt_auth = true\n")
    yield running
    assert running.stop() == 0, running.log_text()


@pytest.fixture(scope="module")
def drives() -> dict[str, dict[str, Any]]:
    """What came of each version, as they are driven."""
    return {}


# The newest first: it is what the main suite drives, and the others are compared with it.
@pytest.mark.parametrize("version", environments.VERSIONS[::-1])
@pytest.mark.timeout(1200)
def test_a_version_trains_resumes_samples_and_keeps_its_records(
    version: str,
    service: RunningService,
    jwt_service: RunningService,
    drives: dict[str, dict[str, Any]],
) -> None:
    key = jwt_service.admin("keys", "create", f"lab-{version}", "--member", "ann@lab.org")
    python = environments.sdk(version)
    given = (service.url, service.key, MODEL, jwt_service.url, key, PROJECT)
    done = subprocess.run(
        [str(python), "-m", "tests.versions.drive", *given],
        cwd=environments.ROOT,
        env={**_without_ours(), "TINKER_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    drives[version] = found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == version
    # The same seeds give every version the same numbers, whether it speaks JSON or protobuf.
    first = next(iter(drives.values()))
    assert found["numbers"] == first["numbers"]
    driven = {f"tests/versions/drive.py::{scene}": its for scene, its in found["driven"].items()}
    refused = {name: says for its in driven.values() for name, says in its.items() if says != WORKS}
    assert [says for says in refused.values() if ITS_OWN_FAULT not in says] == []
    assert set(found["has"]) - {name for its in driven.values() for name in its} <= page.OUT_OF_REACH
    if os.environ.get("TINSMITH_RECORD_COMPATIBILITY"):
        page.note(version, found["has"], driven)
    assert page.stale(version, found["has"], driven) == [], "run `make compatibility`"


def _without_ours() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("TINKER_")}
