"""Killing things. Nothing that was acknowledged is lost, nothing is applied twice, the numbers are the same."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from safetensors.numpy import load
from tinker import types

from tests.conftest import FORMS, RunningFleet, RunningService
from tests.e2e.wire import Wire, datum, logprobs

MODEL = "tinsmith/tiny"
STEPS = 30


Fragile = RunningService | RunningFleet


@pytest.fixture(scope="module", params=FORMS)
def fragile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fragile]:
    """A service of its own to kill; snapshots every half second, so that runs restart from them too."""
    folder = tmp_path_factory.mktemp("fragile")
    running: Fragile
    if request.param == "embedded":
        running = RunningService(folder, config="snapshot_seconds = 0.5\ndeterministic = true\n")
    else:
        running = RunningFleet(
            folder, workers=2, apis=1, snapshot_seconds=0.5, deterministic="true", lease_seconds=2
        )
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


def _batch(step: int) -> list[types.Datum]:
    random_of_step = np.random.default_rng(step)
    data = []
    for length in (9, 33, 20):
        tokens = random_of_step.integers(0, 1000, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={k: tinker.TensorData.from_numpy(v) for k, v in inputs.items()},
            )
        )
    return data


def _train(
    service: Fragile, name: str, taken: list[int] | None = None
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """30 pipelined steps of the official SDK: every logprob it got, and the weights at the end. `taken`: gets a step when
    it was answered."""
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as client:
        run = client.create_lora_training_client(MODEL, rank=8, seed=3).result()
        steps = []
        for step in range(STEPS):
            passed = run.forward_backward(_batch(step), "cross_entropy")
            stepped = run.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
            steps.append((passed, stepped))
            if step >= 2:
                steps[step - 2][1].result()
                if taken is not None:
                    taken.append(step - 2)
        seen = [out["logprobs"].to_numpy() for passed, _ in steps for out in passed.result().loss_fn_outputs]
        counted = [stepped.result().metrics["optimizer_step"] for _, stepped in steps]
        assert counted == list(range(1, STEPS + 1))
        path = run.save_state(name).result().path
    (prefix,) = service.sql("select object_prefix from checkpoints where path = ?", path)[0]
    return seen, load(service.objects().get(prefix)["adapter_model.safetensors"])


@pytest.mark.slow
def test_a_worker_killed_at_random_moments_changes_nothing(fragile: Fragile) -> None:
    calm_logprobs, calm_weights = _train(fragile, "calm")
    finished = threading.Event()
    kills: list[int] = []
    steps: list[int] = []

    def kill_now_and_then() -> None:
        moments = random.Random(7)
        while not finished.wait(moments.uniform(0.3, 2.5)) and len(kills) < 6:
            fragile.wait_ready()
            if len(kills) % 3 == 0:
                # A call that has cost four workers is given up, and on a slow machine all six might be one call's.
                before = len(steps)
                while len(steps) == before and not finished.wait(0.05):
                    pass
            if finished.wait(moments.uniform(0.0, 0.7)):
                return
            fragile.kill_worker()
            kills.append(1)

    def neighbour() -> None:
        """Another tenant, whose tokens share the passes."""
        wire = Wire(fragile.url, fragile.new_key("neighbour"))
        run = wire.run(MODEL, rank=4)
        for step in range(40):
            if finished.is_set():
                return
            wire.fetch(wire.submit(run, 2 * step + 1, datum([step, 5, 6, 7, 8] * 6)))
            wire.fetch(wire.optim(run, 2 * step + 2))

    threads = [threading.Thread(target=t) for t in (kill_now_and_then, neighbour)]
    for thread in threads:
        thread.start()
    try:
        logprobs_seen, weights = _train(fragile, "shot-at", steps)
    finally:
        finished.set()
        for thread in threads:
            thread.join()
    assert len(kills) >= 3, "too few kills to show anything"
    assert len(logprobs_seen) == len(calm_logprobs) == 3 * STEPS
    for calm, seen in zip(calm_logprobs, logprobs_seen, strict=True):
        np.testing.assert_array_equal(calm, seen)
    assert calm_weights.keys() == weights.keys()
    for name, calm in calm_weights.items():
        np.testing.assert_array_equal(calm, weights[name], err_msg=name)


@pytest.mark.slow
def test_killing_everything_and_starting_again_goes_on(fragile: Fragile) -> None:
    wire = Wire(fragile.url, fragile.key)
    run = wire.run(MODEL)
    before = logprobs(wire.output(wire.submit(run, 1, datum([1, 2, 3, 4]))))
    futures = [wire.optim(run, 2), wire.submit(run, 3, datum([1, 2, 3, 4]))]
    futures += [wire.post("/save_weights", model_id=run, seq_id=4, path="kept"), wire.optim(run, 5)]
    sampling = wire.post("/save_weights_for_sampler", model_id=run, seq_id=6, sampling_session_seq_id=0)
    fragile.kill()
    fragile.restart()
    wire = Wire(fragile.url, fragile.key)
    assert wire.result(futures[0])["metrics"]["optimizer_step"] == 1
    after = logprobs(wire.output(futures[1]))
    assert not np.array_equal(before, after), "the step was lost"
    path = wire.result(futures[2])["path"]
    assert wire.result(futures[3])["metrics"]["optimizer_step"] == 2
    sampler = wire.result(sampling)["sampling_session_id"]
    one = wire.sampled(wire.sample(sampler, 0, [1, 2, 3]))
    fragile.kill()
    fragile.restart()
    wire = Wire(fragile.url, fragile.key)
    assert wire.sampled(wire.sample(sampler, 1, [1, 2, 3])).sequences[0].tokens == one.sequences[0].tokens
    assert wire.get("/checkpoints")["checkpoints"][0]["tinker_path"] == path
    loaded = wire.post("/load_weights", session_id=wire.session(), model_seq_id=0, path=path, optimizer=True)
    copy = wire.result(loaded)["model_id"]
    # Saved after one step; the run itself is one step further.
    np.testing.assert_array_equal(logprobs(wire.output(wire.submit(copy, 1, datum([1, 2, 3, 4])))), after)


@pytest.mark.slow
def test_an_accumulated_gradient_survives_the_worker(fragile: Fragile) -> None:
    """Killed between a forward_backward and its optim_step: the step is taken with the whole gradient."""
    wire = Wire(fragile.url, fragile.key)
    norms = []
    for kill in (False, True):
        run = wire.run(MODEL)
        wire.output(wire.submit(run, 1, datum([1, 2, 3, 4, 5])))
        wire.output(wire.submit(run, 2, datum([9, 8, 7])))
        if kill:
            fragile.kill_worker()
        norms.append(wire.result(wire.optim(run, 3))["metrics"]["grad_norm"])
    assert norms[0] == norms[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_a_sampler_whose_checkpoint_is_deleted_finishes_what_it_has(fragile: Fragile, kill: bool) -> None:
    """Even where its worker is killed after that, and the next has to read the weights from their files."""
    wire = Wire(fragile.url, fragile.key)
    run = wire.run(MODEL)
    wire.output(wire.submit(run, 1, datum([1, 2, 3, 4, 5])))
    wire.result(wire.optim(run, 2, learning_rate=0.05))
    path = wire.result(wire.post("/save_weights_for_sampler", model_id=run, seq_id=3, path="a"))["path"]
    session = wire.session()
    opened = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=0, model_path=path
    )
    sampler = opened["sampling_session_id"]
    params = {"max_tokens": 300, "seed": 8, "temperature": 2, "stop": []}
    calm = wire.sampled(wire.sample(sampler, 0, [5, 6, 7], params=params, num_samples=4))
    base = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=1, base_model=MODEL
    )
    other = wire.sampled(wire.sample(base["sampling_session_id"], 0, [5, 6, 7], params=params))
    assert other.sequences[0].tokens != calm.sequences[0].tokens, "the weights are its own"

    future = wire.sample(sampler, 1, [5, 6, 7], params=params, num_samples=4)
    wire.delete(f"/training_runs/{run}/checkpoints/sampler_weights/a")
    assert wire.status in (200, 204)
    if kill:
        fragile.kill_worker()
    state = "select state from operations where request_id = ?"
    assert fragile.sql(state, future["request_id"]) == [("queued",)], "in the middle"
    answer = wire.sampled(future)
    assert [s.tokens for s in answer.sequences] == [s.tokens for s in calm.sequences]
    # Nobody opens it any more.
    wire.post("/create_sampling_session", session_id=session, sampling_session_seq_id=2, model_path=path)
    assert wire.status == 404


@pytest.mark.slow
@pytest.mark.parametrize("fragile", ["embedded"], indirect=True)  # a fleet's own test is in test_fleet.py
def test_a_worker_asked_to_leave_hands_over_without_replay(fragile: RunningService) -> None:
    wire = Wire(fragile.url, fragile.key)
    run = wire.run(MODEL)
    for step in range(3):
        wire.submit(run, 2 * step + 1, datum([1, 2, 3, 4, 5]))
        wire.result(wire.optim(run, 2 * step + 2))
    leaving = fragile.worker_pid()
    os.kill(leaving, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while fragile.worker_pid() == leaving and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "ended with code 0" in fragile.log_text()
    ((covered,),) = fragile.sql("select snapshot_seq from runs where id = ?", run)
    assert covered == 6, "the last operation is not in the snapshot"
    assert wire.result(wire.optim(run, 7))["metrics"]["optimizer_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("fragile", ["embedded"], indirect=True)
def test_a_control_plane_killed_alone_takes_its_worker_with_it_and_comes_back(
    fragile: RunningService,
) -> None:
    wire = Wire(fragile.url, fragile.key)
    run = wire.run(MODEL)
    orphan = fragile.worker_pid()
    fragile.process.kill()
    fragile.restart()
    wire = Wire(fragile.url, fragile.key)
    future = wire.submit(run, 1, datum([1, 2, 3]))
    assert wire.output(future).metrics["loss:sum"] > 0
    assert wire.result(wire.optim(run, 2))["metrics"]["optimizer_step"] == 1
    assert fragile.worker_pid() != orphan
    assert not Path(f"/proc/{orphan}").exists() or "Z" in Path(f"/proc/{orphan}/stat").read_text().split()[2]
