"""Order, retries and gaps, by hand on the wire. The null engine is enough: its optimizer counts steps."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import RunningService
from tests.e2e.wire import Wire, datum

MODEL = "base/null"


@pytest.fixture
def wire(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.key)


def test_an_id_is_accepted_before_the_ones_in_front_of_it(wire: Wire) -> None:
    run = wire.run(MODEL)
    third = wire.optim(run, 3)
    second = wire.submit(run, 2, datum([1, 2, 3]))
    assert wire.status == 200
    first = wire.optim(run, 1)
    assert wire.result(first)["metrics"]["optimizer_step"] == 1
    assert wire.output(second).metrics["loss:sum"] == 0
    assert wire.result(third)["metrics"]["optimizer_step"] == 2


def test_chunk_1_arriving_last_comes_first(wire: Wire) -> None:
    run = wire.run(MODEL)
    later = [wire.optim(run, seq) for seq in (5, 3, 4, 2)]
    first = wire.optim(run, 1)
    steps = {
        seq: wire.result(f)["metrics"]["optimizer_step"]
        for seq, f in zip((5, 3, 4, 2, 1), [*later, first], strict=True)
    }
    assert steps == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}


def test_every_verb_sent_twice_is_applied_once(wire: Wire) -> None:
    session = wire.session()

    def twice(path: str, /, **body: object) -> dict:
        one, two = wire.post(path, **body), wire.post(path, **body)
        assert one == two
        assert wire.status == 200
        return wire.result(one)

    lora = {"rank": 4, "seed": 1}
    run = twice("/create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora)[
        "model_id"
    ]
    assert wire.submit(run, 1, datum([1, 2])) == wire.submit(run, 1, datum([1, 2]))
    assert twice("/optim_step", model_id=run, seq_id=2, adam_params={})["metrics"]["optimizer_step"] == 1
    assert twice("/optim_step", model_id=run, seq_id=3, adam_params={})["metrics"]["optimizer_step"] == 2
    saved = twice("/save_weights", model_id=run, seq_id=4, path="a")["path"]
    sampler_path = twice("/save_weights_for_sampler", model_id=run, seq_id=5, path="b")["path"]
    unnamed = twice("/save_weights_for_sampler", model_id=run, seq_id=6, sampling_session_seq_id=0)
    assert twice("/load_weights", model_id=run, seq_id=7, path=saved, optimizer=True)["path"] == saved
    loaded = twice("/load_weights", session_id=session, model_seq_id=1, path=saved, optimizer=True)
    assert loaded["model_id"] == f"{session}:train:1"
    body = {"session_id": session, "sampling_session_seq_id": 1, "model_path": sampler_path}
    assert wire.post("/create_sampling_session", **body) == wire.post("/create_sampling_session", **body)
    sampler = unnamed["sampling_session_id"]
    one, two = wire.sample(sampler, 0, [1, 2], num_samples=3), wire.sample(sampler, 0, [1, 2], num_samples=3)
    assert one == two
    assert len(set(one["sample_sequence_ids"])) == 3


def test_a_result_can_be_read_twice(wire: Wire) -> None:
    run = wire.run(MODEL)
    future = wire.submit(run, 1, datum([1, 2, 3]))
    assert wire.output(future) == wire.output(future)


def test_a_refused_call_consumes_its_number(wire: Wire) -> None:
    run = wire.run(MODEL)
    refused = wire.submit(run, 1, datum([1, 2]), loss="no_such_loss")
    assert "no_such_loss" in wire.result(refused)["error"]
    # Refused at the door, not in a future: the number counts all the same.
    wire.post("/optim_step", model_id=run, seq_id=2, adam_params={"beta1": 2})
    assert wire.status == 400
    assert wire.result(wire.optim(run, 3))["metrics"]["optimizer_step"] == 1


def test_a_gap_that_never_closes_fails_what_is_behind_it_and_the_run_goes_on(wire: Wire) -> None:
    run = wire.run(MODEL)
    behind = [wire.optim(run, 3), wire.optim(run, 4)]
    started = time.monotonic()
    for future in behind:
        failure = wire.result(future)
        assert failure["category"] == "user"
        assert "1 to 2 did not all arrive" in failure["error"]
    assert time.monotonic() - started < 10
    assert wire.result(wire.optim(run, 5))["metrics"]["optimizer_step"] == 1
    assert "given up" in wire.result(wire.optim(run, 1))["error"]


def test_retrieve_future_waits_and_then_says_try_again(wire: Wire) -> None:
    run = wire.run(MODEL)
    waiting = wire.optim(run, 2)  # its number 1 is not there
    started = time.monotonic()
    answer = wire.http.post("/retrieve_future", json=waiting)
    held = time.monotonic() - started
    assert answer.status_code in (200, 408)
    assert held > 1.5, "answered at once: clients would poll without a pause"


def test_many_waiters_on_one_future_all_wake(wire: Wire) -> None:
    run = wire.run(MODEL)
    waiting = wire.optim(run, 2)
    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(wire.result, waiting) for _ in range(8)]
        time.sleep(0.2)
        wire.optim(run, 1)
        assert {r.result()["metrics"]["optimizer_step"] for r in results} == {2}


def test_a_failed_save_leaves_its_name_free(tmp_path: Path) -> None:
    """As a full disk would make it fail."""
    serving = RunningService(
        tmp_path, "--engine", "null", "--model", MODEL, config="storage_patience_seconds = 0.2\n"
    )
    wire = Wire(serving.url, serving.key)
    run = wire.run(MODEL)
    assert wire.result(wire.post("/save_weights", model_id=wire.run(MODEL), seq_id=1))["path"]
    (saved,) = (tmp_path / "objects").glob("*/checkpoints")
    folder = saved / run
    folder.write_text("in the way")  # a file where the store needs a folder
    failure = wire.result(wire.post("/save_weights", model_id=run, seq_id=1, path="mine"))
    assert failure["category"] == "server"
    folder.unlink()
    assert wire.result(wire.post("/save_weights", model_id=run, seq_id=2, path="mine"))["path"].endswith(
        "/mine"
    )
    assert serving.stop() == 0


def test_a_finished_session_takes_no_calls(wire: Wire) -> None:
    session = wire.session()
    run = wire.run(MODEL, session=session)
    wire.post(f"/sessions/{session}/finish", reason={"type": "success"}, detail=None)
    assert wire.status == 200
    wire.post("/session_heartbeat", session_id=session)
    assert wire.status == 410
    wire.optim(run, 1)
    assert wire.status == 410
    assert wire.get(f"/training_runs/{run}")["training_run_id"] == run


def test_two_unnamed_samplers_under_one_number_are_never_mixed_up(wire: Wire) -> None:
    session = wire.session()
    runs = [wire.run(MODEL, session=session, number=n) for n in (0, 1)]
    # Both are submitted before either is executed: they wait for number 1 of their runs.
    waiting = [
        wire.post("/save_weights_for_sampler", model_id=run, seq_id=2, sampling_session_seq_id=0)
        for run in runs
    ]
    for run in runs:
        wire.optim(run, 1)
    answers = [wire.result(future) for future in waiting]
    assert sorted("error" in a for a in answers) == [False, True]
    failed = next(a for a in answers if "error" in a)
    assert failed["category"] == "user"
    assert "use the next number" in failed["error"]
