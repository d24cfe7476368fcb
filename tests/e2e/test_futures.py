"""Waiting for many samples at once, making room for large results, giving samples up; with the official SDK."""

import asyncio
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tinker
from tinker import types

from tests.conftest import RunningFleet, RunningService
from tests.e2e.wire import Wire, datum

MODEL = "tinsmith/tiny"
NULL = "base/null"
PROMPT = types.ModelInput.from_ints([5, 6, 7])


@pytest.fixture(scope="module")
def polled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service whose clients wait for all samples of a sampler with one call."""
    running = RunningService(
        tmp_path_factory.mktemp("polled"),
        *("--engine", "null", "--model", NULL),
        config="poll_by_sampler = true\n",
    )
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="module")
def wire(null_service: RunningService) -> Wire:
    return Wire(null_service.url, null_service.key)


def sampler_of(wire: Wire) -> str:
    made = wire.post(
        "/create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model=NULL
    )
    return made["sampling_session_id"]


def poll(wire: Wire, sampler: str, cursor: int = 0, *, clone: int = 0, timeout: float | None = None) -> dict:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    given = {} if timeout is None else {"timeout": timeout}
    return wire.post("/retrieve_futures", target=target, prev_cursor=cursor, **given)


def test_the_sdk_waits_for_a_thousand_samples_with_one_poller(polled: RunningService) -> None:
    with tinker.ServiceClient(base_url=polled.url, api_key=polled.key) as client:
        sampler = client.create_sampling_client(base_model=NULL).result()
        params = types.SamplingParams(max_tokens=3)
        futures = [sampler.sample(PROMPT, num_samples=1, sampling_params=params) for _ in range(1000)]
        found = [future.result(timeout=120) for future in futures]
    assert all(len(answer.sequences[0].tokens) == 3 for answer in found)
    assert len({answer.sequences[0].sequence_id for answer in found}) == 1000
    rows = polled.sql("select count(*), count(retrieved_at) from operations where kind = 'sample'")
    assert rows[0][0] == 1000


def test_a_sampler_sent_to_another_process_is_a_clone_with_numbers_of_its_own(polled: RunningService) -> None:
    with tinker.ServiceClient(base_url=polled.url, api_key=polled.key) as client:
        original = client.create_sampling_client(base_model=NULL).result()
        params = types.SamplingParams(max_tokens=2)
        clones = [pickle.loads(pickle.dumps(original)) for _ in range(2)]
        for one in (original, *clones):
            assert len(one.sample(PROMPT, num_samples=1, sampling_params=params).result().sequences) == 1
    rows = polled.sql(
        "select seq_id from operations where kind = 'sample' order by submitted_at desc limit 3"
    )
    assert sorted(row[0] for row in rows) == [0, 10**9, 2 * 10**9]


def test_completions_come_once_in_order_and_again_for_an_older_cursor(wire: Wire) -> None:
    sampler = sampler_of(wire)
    assert poll(wire, sampler, timeout=0) == {"completions": [], "cursor": 0}
    futures = [wire.sample(sampler, number, [1, 2]) for number in range(3)]
    for future in futures:
        wire.sampled(future)
    everything = poll(wire, sampler)
    assert {one["request_id"] for one in everything["completions"]} == {f["request_id"] for f in futures}
    assert all(one["state"] == "finished" for one in everything["completions"])
    size = everything["completions"][0]["response_payload_uncompressed_size"]
    assert size == wire.sampled(futures[0]).ByteSize()
    assert poll(wire, sampler, everything["cursor"], timeout=0)["completions"] == []
    assert poll(wire, sampler, everything["cursor"] - 1)["completions"] == everything["completions"][-1:]
    assert poll(wire, sampler, clone=1, timeout=0)["completions"] == []


def test_a_poll_is_woken_by_the_next_completion(wire: Wire, null_service: RunningService) -> None:
    sampler = sampler_of(wire)
    other = Wire(null_service.url, null_service.key)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(poll, other, sampler)
        time.sleep(0.3)
        assert not waiting.done()
        future = wire.sample(sampler, 0, [1, 2])
        started = time.monotonic()
        assert waiting.result()["completions"][0]["request_id"] == future["request_id"]
        assert time.monotonic() - started < 1.0
    started = time.monotonic()
    assert poll(wire, sampler, 1)["completions"] == []
    assert time.monotonic() - started > 1.5, "it did not wait"


def test_joining_gives_every_clone_a_number_of_its_own(wire: Wire) -> None:
    sampler = sampler_of(wire)
    joined = [wire.post("/join_sampling_session", sampling_session_id=sampler) for _ in range(3)]
    assert [one["client_counter"] for one in joined] == [1, 2, 3]


def test_a_large_result_says_its_size_first_to_who_asks(wire: Wire) -> None:
    sampler = sampler_of(wire)
    large = wire.sample(sampler, 0, [1, 2], num_samples=64, params={"max_tokens": 4096})
    whole = wire.sampled(large)
    asked = wire.post("/retrieve_future", **large, allow_metadata_only=True)
    assert asked == {"status": "complete_metadata", "response_payload_size": whole.ByteSize()}
    small = wire.sample(sampler, 1, [1, 2])
    wire.sampled(small)
    assert "sequences" in wire.post("/retrieve_future", **small, allow_metadata_only=True)


def test_the_sdk_makes_room_for_large_results(polled: RunningService) -> None:
    with tinker.ServiceClient(base_url=polled.url, api_key=polled.key) as client:
        sampler = client.create_sampling_client(base_model=NULL).result()
        params = types.SamplingParams(max_tokens=4096)
        futures = [sampler.sample(PROMPT, num_samples=64, sampling_params=params) for _ in range(3)]
        assert [len(future.result(timeout=120).sequences) for future in futures] == [64] * 3


def test_a_sample_that_is_given_up_stops_and_its_neighbours_go_on(
    service: RunningService | RunningFleet,
) -> None:
    wire = Wire(service.url, service.key)
    session = wire.session()
    made = wire.post(
        "/create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model=MODEL
    )
    sampler = made["sampling_session_id"]
    long = wire.sample(sampler, 0, [5, 6], params={"max_tokens": 4000, "stop": []})
    short = wire.sample(sampler, 1, [5, 6], params={"max_tokens": 4})
    assert len(wire.sampled(short).sequences) == 1
    wire.post("/cancel_future", request_id=long["request_id"])
    assert wire.status == 204
    failed = wire.result(long)
    assert failed == {"error": "cancelled by its client", "category": "user"}
    # It left the worker as well: nothing else is sampled now, so the next one is alone.
    started = time.monotonic()
    wire.sampled(wire.sample(sampler, 2, [5, 6], params={"max_tokens": 4}))
    assert time.monotonic() - started < 5.0
    wire.post("/cancel_future", request_id=short["request_id"])
    assert wire.status == 204
    assert len(wire.sampled(short).sequences) == 1
    gone = poll(wire, sampler)["completions"]
    assert {one["request_id"]: one["state"] for one in gone}[long["request_id"]] == "failed"


def test_only_samples_are_cancelled_and_only_one_s_own(wire: Wire, null_service: RunningService) -> None:
    run = wire.run(NULL)
    future = wire.submit(run, 1, datum([1, 2, 3]))
    answer = wire.post("/cancel_future", request_id=future["request_id"])
    assert wire.status == 400
    assert "only samples" in answer["detail"]
    assert wire.output(future).metrics["tokens:sum"] == 2
    sampler = sampler_of(wire)
    sample = wire.sample(sampler, 0, [1, 2])
    stranger = Wire(null_service.url, null_service.new_key("passer-by"))
    for path, body in (
        ("/cancel_future", {"request_id": sample["request_id"]}),
        ("/join_sampling_session", {"sampling_session_id": sampler}),
        ("/retrieve_futures", {"target": {"sampling_session_id": sampler}}),
    ):
        stranger.post(path, **body)
        assert stranger.status == 404, path
    assert len(wire.sampled(sample).sequences) == 1


def test_the_sdk_cancels_what_it_stops_waiting_for(service: RunningService | RunningFleet) -> None:
    def cancelled() -> int:
        counted = "select count(*) from operations where cast(error as text) like ?"
        return service.sql(counted, "%cancelled by its client%")[0][0]

    before = cancelled()
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as client:
        sampler = client.create_sampling_client(base_model=MODEL).result()

        async def give_up() -> None:
            params = types.SamplingParams(max_tokens=4000, stop=[])
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(sampler.sample_async(PROMPT, 1, params), timeout=1.0)

        asyncio.run(give_up())
        deadline = time.monotonic() + 10
        while cancelled() == before and time.monotonic() < deadline:
            time.sleep(0.1)
    assert cancelled() == before + 1
