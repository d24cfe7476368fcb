"""What only a fleet can do: workers that come and go, processes and servers that are lost beside them."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import RunningFleet
from tests.e2e.wire import Wire, datum
from tests.servers import wait_until

MODEL = "tinsmith/tiny"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """Two workers and two API processes, with the settings an operator gets without asking."""
    running = RunningFleet(tmp_path_factory.mktemp("fleet"), workers=2, apis=2, deterministic="true")
    yield running
    assert running.stop() == 0, running.log_text()


def _worker_of(fleet: RunningFleet, run: str) -> str:
    ((worker_id,),) = fleet.sql("select worker_id from runs where id = ?", run)
    return str(worker_id)


def _process_of(fleet: RunningFleet, worker_id: str) -> str:
    """The name of the process that is this worker: it says its id when others give it up, and beats under it."""
    order = [
        row[0] for row in fleet.sql("select id from workers where stopped_at is null order by started_at")
    ]
    names = [name for name in fleet.commands if name.startswith("worker")]
    if order == [worker_id]:
        return next(name for name in names if fleet.processes[name].poll() is None)
    for name in names:  # stop one for a moment, and see whose heartbeat stays behind
        pid = fleet.processes[name].pid
        os.kill(pid, signal.SIGSTOP)
        before = fleet.sql("select heartbeat_at from workers where id = ?", worker_id)
        time.sleep(2.5)
        silent = fleet.sql("select heartbeat_at from workers where id = ?", worker_id) == before
        os.kill(pid, signal.SIGCONT)
        if silent:
            return name
    raise AssertionError(f"no process is {worker_id}")


@pytest.mark.slow
def test_a_dead_worker_s_run_goes_on_elsewhere_within_fifteen_seconds(fleet: RunningFleet) -> None:
    wire, other = (Wire(url, fleet.key) for url in fleet.urls)
    run = wire.run(MODEL)
    wire.output(wire.submit(run, 1, datum([1, 2, 3, 4])))
    holder = _process_of(fleet, _worker_of(fleet, run))
    before = _worker_of(fleet, run)
    fleet.paused.add(holder)  # its machine is gone
    fleet.processes[holder].kill()
    started = time.monotonic()
    # Submitted through one API process, fetched through another.
    assert other.result(wire.optim(run, 2))["metrics"]["optimizer_step"] == 1
    assert time.monotonic() - started < 15.0
    assert _worker_of(fleet, run) != before
    fleet.paused.remove(holder)
    wait_until(lambda: len(fleet.ready_workers()) == 2, 60, "the worker's return")


@pytest.mark.slow
def test_a_sample_whose_worker_dies_is_sampled_elsewhere_with_its_seed_and_answered_once(
    fleet: RunningFleet,
) -> None:
    wire = Wire(fleet.url, fleet.key)
    wait_until(lambda: len(fleet.ready_workers()) == 2, 120, "the second worker")
    time.sleep(1.5)  # pools are looked up once a second
    sampler = wire.post(
        "/create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model=MODEL
    )["sampling_session_id"]
    params = {"max_tokens": 400, "seed": 8, "temperature": 2, "stop": []}
    row = "select worker_id, state from operations where request_id = ?"
    started = time.monotonic()
    first = wire.sample(sampler, 0, [5, 6, 7], params=params, num_samples=4)
    calm = wire.sampled(first)
    seconds = time.monotonic() - started
    ((holder, _),) = fleet.sql(row, first["request_id"])  # of whatever this sampler is asked
    process = _process_of(fleet, holder)

    future = wire.sample(sampler, 1, [5, 6, 7], params=params, num_samples=4)
    time.sleep(0.4 * seconds)
    fleet.paused.add(process)  # its machine is gone
    fleet.processes[process].kill()
    assert fleet.sql(row, future["request_id"]) == [(holder, "queued")], "in the middle"
    answer = wire.sampled(future)
    assert [s.tokens for s in answer.sequences] == [s.tokens for s in calm.sequences]
    ((elsewhere, state),) = fleet.sql(row, future["request_id"])
    assert (elsewhere != holder, state) == (True, "done")
    assert wire.sampled(future) == answer, "a result does not change"
    sampled = "select sum(amount) from usage where kind = 'sample' and subject = ?"
    assert fleet.sql(sampled, sampler) == [(2 * 4 * 400,)], "counted once"
    fleet.paused.remove(process)
    wait_until(lambda: len(fleet.ready_workers()) == 2, 60, "the worker's return")


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_when_all_workers_are_killed(fleet: RunningFleet) -> None:
    """Read through the second API process: the workers' tokens reach the one that is asked."""
    client = openai.OpenAI(base_url=f"{fleet.urls[1]}/v1", api_key=fleet.key, max_retries=0, timeout=120)
    asked: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "temperature": 50, "seed": 3}
    calm = client.completions.create(**asked, max_tokens=300).choices[0].text
    said, count = "", 0
    for event in client.completions.create(**asked, max_tokens=300, stream=True):
        said += event.choices[0].text
        count += 1
        if count == 30:
            assert fleet.sql("select state from operations where request_id = ?", event.id) == [("queued",)]
            fleet.kill_worker()
    assert count > 100
    assert said == calm
    wait_until(lambda: len(fleet.ready_workers()) == 2, 60, "the workers' return")


@pytest.mark.slow
def test_a_worker_that_is_drained_hands_over_leaves_with_0_and_nobody_notices(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.key)
    run = wire.run(MODEL)
    for step in range(3):
        wire.submit(run, 2 * step + 1, datum([1, 2, 3, 4, 5]))
        wire.result(wire.optim(run, 2 * step + 2))
    leaving = _worker_of(fleet, run)
    name = _process_of(fleet, leaving)
    process = fleet.processes[name]
    assert leaving in fleet.admin("workers", "list")
    fleet.admin("workers", "drain", leaving)
    assert wire.result(wire.optim(run, 7))["metrics"]["optimizer_step"] == 4
    assert process.wait(timeout=30) == 0
    ((covered,),) = fleet.sql("select snapshot_seq from runs where id = ?", run)
    assert covered in (6, 7), "its last call is not in the snapshot"
    assert wire.result(wire.optim(run, 8))["metrics"]["optimizer_step"] == 5
    assert _worker_of(fleet, run) != leaving
    wait_until(lambda: len(fleet.ready_workers()) == 2, 60, "another in its place")


@pytest.mark.slow
def test_a_worker_that_joins_takes_runs_over_and_no_number_changes(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.key)
    wait_until(lambda: len(fleet.ready_workers()) == 2, 60, "both workers")
    name = _process_of(fleet, fleet.ready_workers()[0])
    fleet.paused.add(name)
    fleet.processes[name].terminate()
    assert fleet.processes[name].wait(timeout=60) == 0
    copies = [wire.run(MODEL) for _ in range(4)]  # the same weights and data
    fleet.paused.clear()

    step = 0
    while len({_worker_of(fleet, run) for run in copies} - {"None"}) < 2 or step < 5:
        step += 1
        assert step < 200
        futures = [(wire.submit(r, 2 * step - 1, datum([1, 2, 3])), wire.optim(r, 2 * step)) for r in copies]
        losses = {wire.output(passed).metrics["loss:sum"] for passed, _ in futures}
        assert len(losses) == 1
        assert {wire.result(done)["metrics"]["optimizer_step"] for _, done in futures} == {step}


@pytest.mark.slow
def test_without_workers_clients_are_told_so_and_nothing_is_lost(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.key)
    run = wire.run(MODEL)
    workers = [name for name in fleet.commands if name.startswith("worker")]
    fleet.paused.update(workers)
    for name in workers:
        fleet.processes[name].terminate()
    for name in workers:
        assert fleet.processes[name].wait(timeout=60) == 0
    future = wire.submit(run, 1, datum([1, 2, 3, 4]))
    answer = wire.http.post("/retrieve_future", json=future)
    assert answer.status_code == 408
    assert answer.json()["queue_state"] == "paused_capacity"
    assert MODEL in answer.json()["queue_state_reason"]
    assert wire.get("/get_server_capabilities")["supported_models"][0]["model_name"] == MODEL
    fleet.paused.clear()
    assert wire.output(future).metrics["loss:sum"] > 0


@pytest.mark.slow
def test_a_lost_redis_costs_a_moment_and_no_call(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.key)
    run = wire.run(MODEL)
    fleet.redis.kill()
    futures = [wire.submit(run, 1, datum([1, 2, 3, 4])), wire.optim(run, 2)]
    assert wire.status == 200, "submissions need no Redis"
    started = time.monotonic()
    assert wire.result(futures[1])["metrics"]["optimizer_step"] == 1, "nor does their execution"
    fleet.redis.start()
    assert time.monotonic() - started < 30
    wire.submit(run, 3, datum([1, 2, 3, 4]))
    assert wire.result(wire.optim(run, 4))["metrics"]["optimizer_step"] == 2


@pytest.mark.slow
def test_background_jobs_are_done_by_celery_when_beat_says_so(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.key)
    run = wire.run(MODEL)
    path = wire.result(wire.post("/save_weights", model_id=run, seq_id=1, path="soon", ttl_seconds=3600))[
        "path"
    ]
    fleet.sql("update checkpoints set expires_at = 1 where path = ?", path)
    wait_until(lambda: not fleet.sql("select 1 from checkpoints where path = ?", path), 90, "expiry")


def test_limits_of_a_tenant_are_answered_with_what_to_do(fleet: RunningFleet) -> None:
    wire = Wire(fleet.url, fleet.new_key("limited"))
    fleet.admin("tenants", "set", "limited", "--max-runs", "1", "--max-queued", "3", "--weight", "2")
    listed = fleet.admin("tenants", "list")
    assert "limited  weight 2  priority 0  max-runs 1  max-queued 3  max-queued-bytes default" in listed
    run = wire.run(MODEL)
    time.sleep(1.1)  # what a tenant has is looked up once a second
    session = wire.session()
    more = wire.post(
        "/create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config={"rank": 4}
    )
    assert (wire.status, "the limit is 1" in more["detail"]) == (400, True)
    # They wait for number 1, which does not come.
    sent = {seq_id: wire.optim(run, seq_id)["request_id"] for seq_id in (3, 4, 5)}
    time.sleep(1.1)
    refused = wire.optim(run, 6)
    assert (wire.status, "the limit is 3" in refused["detail"]) == (429, True)
    assert {n: wire.optim(run, n)["request_id"] for n in sent} == sent, "what was let in may be sent again"
    fleet.admin("tenants", "set", "limited", "--max-queued", "0", "--max-queued-bytes", "1000")
    time.sleep(1.1)
    wire.submit(run, 6, datum(list(range(500))))
    assert wire.status == 429


def test_every_process_has_metrics(tmp_path: Path, fleet: RunningFleet) -> None:
    from tests.servers import free_port

    port = free_port()
    fleet.commands["measured"] = ["jobs"]
    told = fleet.environment
    fleet.environment = lambda name: {  # type: ignore[method-assign]
        **told(name),
        **({"TINSMITH_METRICS_PORT": str(port)} if name == "measured" else {}),
    }
    # Of two, one may be given every chore for minutes: the other one leaves.
    fleet.paused.add("jobs")
    fleet.processes["jobs"].terminate()
    assert fleet.processes["jobs"].wait(timeout=60) == 0
    fleet.start_one("measured")

    def counted() -> bool:
        assert fleet.processes["measured"].poll() is None, "it ended"
        try:
            return (
                f'tinsmith_workers{{base_model="{MODEL}",state="ready"}} 2.0'
                in httpx.get(f"http://127.0.0.1:{port}/metrics").text
            )
        except httpx.TransportError:
            return False

    wait_until(counted, 60, "counting the workers")
    fleet.paused.remove("jobs")
