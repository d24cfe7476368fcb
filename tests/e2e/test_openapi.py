"""The service answers whatever its own description allows with what it describes, and never with a fault of its own.

Examples are drawn by schemathesis from the OpenAPI document, with the ids of things that exist put into half of them.
A few per route here; `make fuzz` asks for 5,000.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests.conftest import RunningService
from tests.e2e.wire import Wire, datum
from tinsmith_api import app

MODEL = "base/null"
EXAMPLES = int(os.environ.get("TINSMITH_FUZZ_EXAMPLES", "0"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
# Of these an example may end what the others use.
ENDING = ("DELETE", "/finish", "/auth/apikey/me")


_STUB: Any = SimpleNamespace(settings=None)  # routes are described without a service


def _operations() -> dict[str, Any]:
    described = schemathesis.openapi.from_dict(app.make_app(_STUB).openapi())
    found = [result.ok() for result in described.get_all_operations()]
    named = {f"{operation.method.upper()} {operation.path}": operation for operation in found}
    return dict(sorted(named.items(), key=lambda item: any(word in item[0] for word in ENDING)))


OPERATIONS = _operations()
# Of the others one example is as good as all.
TAKING = [o for o in OPERATIONS.values() if list(o.path_parameters) or list(o.query) or list(o.body)]
SENT = [0]


@dataclass
class Known:
    """Things that exist, by the name of the field that asks for them."""

    service: RunningService
    key: str
    ids: dict[str, list[Any]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    running = RunningService(
        folder,
        *("--engine", "null", "--model", MODEL),
        config="gap_seconds = 1.0\npoll_seconds = 0.1\n",
    )
    wire = Wire(running.url, running.key)
    project = running.admin("projects", "create", "local", "examples")
    sessions = [wire.session() for _ in range(8)]
    made = [wire.run(MODEL, session=session) for session in sessions]
    futures, paths = [], []
    for run in made:
        futures.append(wire.submit(run, 1, datum([1, 2, 3])))
        for seq, verb in enumerate(
            ("save_weights", "save_weights_for_sampler", "save_weights_external"), start=2
        ):
            future = wire.post(f"/{verb}", model_id=run, seq_id=seq, path="kept")
            paths.append(wire.result(future)["path"])
            futures.append(future)
    samplers = [
        wire.post("/create_sampling_session", session_id=s, sampling_session_seq_id=0, base_model=MODEL)
        for s in sessions
    ]
    ids: dict[str, list[Any]] = {
        "session_id": sessions,
        "model_id": made,
        "run_id": made,
        "request_id": [future["request_id"] for future in futures],
        "sampling_session_id": [sampler["sampling_session_id"] for sampler in samplers],
        "base_model": [MODEL],
        "project_id": [project, "examples"],
        "kind": ["weights", "sampler_weights", "external_weights"],
        "name": ["kept"],
    }
    ids |= {"sampler_id": ids["sampling_session_id"], "destination_project_id": ids["project_id"]}
    ids |= dict.fromkeys(("path", "tinker_path", "source_path", "model_path"), paths)
    yield Known(running, running.key, ids)
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


def _with_what_exists(data: st.DataObject, part: Any, ids: dict[str, list[Any]]) -> Any:
    if not isinstance(part, dict):
        return part
    names = [name for name in ids if name in part]
    return {
        **part,
        **{name: data.draw(st.sampled_from(ids[name])) for name in names if data.draw(st.booleans())},
    }


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.timeout(3000)
def test_every_answer_is_one_that_is_described(name: str, known: Known) -> None:
    operation = OPERATIONS[name]
    modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]
    key = known.service.new_key("leaves") if name.endswith("DELETE /api/v1/auth/apikey/me") else known.key
    http = requests.Session()
    examples = -(-EXAMPLES // len(TAKING)) if EXAMPLES else 5

    @seed(1)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        case = data.draw(st.one_of(modes))
        case.path_parameters = _with_what_exists(data, case.path_parameters, known.ids)
        case.query = _with_what_exists(data, case.query, known.ids)
        case.body = _with_what_exists(data, case.body, known.ids)
        response = case.call(base_url=known.service.url, session=http, headers={"x-api-key": key}, timeout=60)
        SENT[0] += 1
        case.validate_response(response, checks=CHECKS)

    ask()


def test_as_many_examples_were_sent_as_were_asked_for(known: Known) -> None:
    assert SENT[0] >= EXAMPLES
