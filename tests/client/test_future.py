"""One future, which blocks and awaits; calls from event loops and from many threads."""

import asyncio
import concurrent.futures
import gc
import pickle
import queue
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import tinsmith
from tests.client.stub import Answer, Request, Stub
from tests.client.test_training_client import answer_every_pass, datum, passes
from tinsmith.threads import Threads
from tinsmith.types import ModelInput, SamplingParams
from tinsmith.wire import tinsmith_pb2 as pb

DATA = [datum([1, 2])]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("tinsmith")}


def test_the_simple_case_needs_no_thread_and_no_event_loop(stub: Stub) -> None:
    before = threads()
    answer_every_pass(stub)
    with tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test") as client:
        training = client.create_lora_training_client("m").result(10)
        passed, stepped = training.forward_backward(DATA, "cross_entropy"), training.optim_step()
        passed.result(10)
        stepped.result(10)
        assert threads() == before


def test_calls_to_a_service_that_answers_slowly_are_under_way_together(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in a plain loop waits for two answers one after the other, and not for four."""
    answer_every_pass(stub)
    seconds, promise = 0.1, stub.promise

    def far(answer: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
        def later(request: Request) -> Answer:
            time.sleep(seconds)
            return answer(request)

        return later

    stub.answers = {path: far(answer) for path, answer in stub.answers.items()}
    monkeypatch.setattr(stub, "promise", far(promise))
    with tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test") as client:
        training = client.create_lora_training_client("m").result(10)
        taken = []
        for _ in range(6):
            started = time.perf_counter()
            passed, stepped = training.forward_backward(DATA, "cross_entropy"), training.optim_step()
            submitted = time.perf_counter() - started
            passed.result(10)
            stepped.result(10)
            taken.append((submitted, time.perf_counter() - started))
    assert min(submitted for submitted, _ in taken) < seconds / 2
    assert 2.9 * seconds < min(whole for _, whole in taken) < 3.9 * seconds
    assert [p.seq_id for p in sorted(passes(stub), key=lambda p: p.seq_id)] == [1, 3, 5, 7, 9, 11]


def test_two_functions_lie_between_a_call_and_the_library_that_sends_it(
    training: tinsmith.TrainingClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inspect

    import httpx

    answer_every_pass(stub)
    seen: list[list[str]] = []
    request = httpx.Client.request

    def note(self: httpx.Client, *args: Any, **kwargs: Any) -> httpx.Response:
        frames = [frame for frame in inspect.stack() if "/tinsmith/" in frame.filename]
        seen.append([frame.function for frame in frames])
        return request(self, *args, **kwargs)

    monkeypatch.setattr(httpx.Client, "request", note)
    training.forward_backward(DATA, "cross_entropy")
    training.optim_step()
    training.save_state("x")
    assert seen == [["send", "forward_backward"], ["send", "optim_step"], ["send", "save_state"]]


def test_calls_in_an_event_loop_do_not_hold_it_up(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    promise = stub.answers["forward_backward"]

    def slow(request: Request) -> Answer:
        time.sleep(0.3)
        return promise(request)

    stub.answers["forward_backward"] = slow

    async def steps() -> tuple[float, float]:
        started = time.perf_counter()
        passed = training.forward_backward(DATA, "cross_entropy")
        stepped = await training.optim_step_async()
        submitted = time.perf_counter() - started
        await passed
        await stepped
        return submitted, time.perf_counter() - started

    submitted, done = asyncio.run(steps())
    assert submitted < 0.2
    assert done > 0.3
    # Sent side by side, numbered as they were made.
    assert (passes(stub)[0].seq_id, stub.of("optim_step")[0].json["seq_id"]) == (1, 2)


def test_clients_made_in_an_event_loop_are_awaited(stub: Stub) -> None:
    answer_every_pass(stub)

    async def program() -> tuple[str, str, float]:
        client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")
        one = await client.create_lora_training_client_async("m")
        two = await client.create_lora_training_client("m")
        output = await (await two.forward_backward_async(DATA, "cross_entropy")).result_async(10)
        await client.close()
        return one.model_id, two.model_id, output.metrics["loss:sum"]

    assert asyncio.run(program()) == ("s1:train:0", "s1:train:1", 1.0)


def test_the_promise_of_a_client_is_used_as_the_client(stub: Stub, client: tinsmith.ServiceClient) -> None:
    answer_every_pass(stub)
    training = client.create_lora_training_client("m")
    assert isinstance(training, tinsmith.TrainingClient)
    assert training.forward_backward(DATA, "cross_entropy").result(10).metrics == {"loss:sum": 1.0}
    assert training.model_id == "s1:train:0"
    # Both are the same run: its calls are counted once.
    training.result(10).forward_backward(DATA, "cross_entropy").result(10)
    assert [p.seq_id for p in passes(stub)] == [1, 2]
    sampler = client.create_sampling_client(base_model="m")
    assert (sampler.sampling_session_id, sampler.get_base_model()) == ("s1:sample:0", "m")
    assert client.create_sampling_client(base_model="m").result(10).get_base_model() == "m"


def test_a_creation_that_fails_says_so_wherever_it_is_used(
    stub: Stub, client: tinsmith.ServiceClient
) -> None:
    stub.answers["create_model"] = lambda request: Answer(400, {"detail": "unknown base_model"})
    training = client.create_lora_training_client("no/such")
    for _ in range(2):
        with pytest.raises(tinsmith.InvalidInput, match="unknown base_model"):
            training.forward_backward(DATA, "cross_entropy")
    with pytest.raises(tinsmith.InvalidInput, match="unknown base_model"):
        asyncio.run(training.result_async(10))


def test_a_result_is_fetched_once_however_often_it_is_asked_for(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    fetched = []

    def slow(request: Request) -> Answer:
        fetched.append(request)
        time.sleep(0.1)
        return Answer(body={"metrics": {"a": 1.0}})

    stub.answers["retrieve_future"] = slow
    future = training.optim_step()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: future.result(10), range(4)))

    async def twice() -> list[Any]:
        return [await future, await future.result_async(5), await asyncio.create_task(future.coroutine())]

    assert len({id(result) for result in results + asyncio.run(twice())}) == 1
    assert future.future().result(5) is results[0]
    assert len(fetched) == 1


def test_the_standard_library_waits_for_futures_too(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    futures = [training.forward(DATA, "cross_entropy").future() for _ in range(5)]
    done, late = concurrent.futures.wait(futures, timeout=10)
    assert (len(done), len(late)) == (5, 0)


def test_calls_of_eight_threads_are_numbered_without_gaps_and_each_in_its_order(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    answer_every_pass(stub)

    def work(thread: int) -> None:
        for _ in range(10):
            training.forward_backward([datum([thread])], "cross_entropy")
            training.optim_step(tinsmith.AdamParams(learning_rate=float(thread))).result(20)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    passed = [(p.seq_id, p.data[0].model_input[0].encoded_text.tokens[0]) for p in passes(stub)]
    stepped = [(r.json["seq_id"], r.json["adam_params"]["learning_rate"]) for r in stub.of("optim_step")]
    assert sorted(number for number, _ in passed + stepped) == list(range(1, 161))
    for thread in range(8):
        own = [sorted(number for number, of in calls if of == thread) for calls in (passed, stepped)]
        assert all(a < b for a, b in zip(*own, strict=True))
        assert all(b < a for a, b in zip(own[0][1:], own[1][:-1], strict=True))


def sampled(stub: Stub) -> None:
    """Each sample answers with its own seq_id as its token."""

    def promise(request: Request) -> Answer:
        seq_id = request.json["seq_id"]
        message = pb.SampleResponse()
        message.sequences.add(tokens=seq_id.to_bytes(8, "little")[:4], logprobs=b"\0\0\0\0")
        stub.results[f"q{seq_id}"] = Answer(body=message.SerializeToString())
        return Answer(body={"request_id": f"q{seq_id}", "sample_sequence_ids": [f"n{seq_id}"]})

    stub.answers["asample"] = promise


def test_four_hundred_samples_at_once(stub: Stub, client: tinsmith.ServiceClient) -> None:
    sampled(stub)
    sampler = client.create_sampling_client(base_model="m").result(10)
    prompt, params = ModelInput.from_ints([1]), SamplingParams(max_tokens=1)

    async def gathered() -> list[int]:
        found = await asyncio.gather(*(sampler.sample(prompt, 1, params) for _ in range(400)))
        return [one.sequences[0].tokens[0] for one in found]

    assert asyncio.run(gathered()) == list(range(400))


def test_training_is_awaited_while_more_samples_are_under_way_than_there_are_threads(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.connection._SAMPLE_WAITERS", 4)
    sampled(stub)
    fetch, held = stub.answers["retrieve_future"], threading.Event()

    def hold_samples(request: Request) -> Answer:
        if request.json["request_id"].startswith("q"):
            held.wait(10)
        return fetch(request)

    async def program(client: tinsmith.ServiceClient) -> float:
        training = await client.create_lora_training_client("m")
        sampler = await client.create_sampling_client(base_model="m")
        stub.answers["retrieve_future"] = hold_samples
        prompt = ModelInput.from_ints([1])
        samples = [sampler.sample(prompt, 1, SamplingParams(max_tokens=1)) for _ in range(12)]
        waiting = [asyncio.ensure_future(sample.coroutine()) for sample in samples]
        await asyncio.sleep(0.2)
        started = time.perf_counter()
        await training.optim_step()
        took = time.perf_counter() - started
        assert not any(one.done() for one in waiting)
        held.set()
        await asyncio.gather(*waiting)
        return took

    with tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test") as client:
        assert asyncio.run(program(client)) < 5


def test_a_dropped_promise_of_a_sample_is_asked_for_anew(stub: Stub, client: tinsmith.ServiceClient) -> None:
    sampled(stub)
    promise = stub.answers["asample"]

    def lose_the_first(request: Request) -> Answer:
        answer = promise(request)
        if request.json["seq_id"] == 0:
            stub.results["q0"] = Answer(410, {"detail": "gone"})
        return answer

    stub.answers["asample"] = lose_the_first
    sampler = client.create_sampling_client(base_model="m").result(10)
    response = sampler.sample(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1)).result(10)
    assert response.sequences[0].tokens == [1]


def test_copies_of_a_sampler_number_their_calls_apart(
    stub: Stub, client: tinsmith.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled(stub)
    monkeypatch.setenv("TINSMITH_API_KEY", "tml-of-this-process")
    sampler = client.create_sampling_client(base_model="m").result(10)
    handle = sampler.get_sampler_handle()
    copies = [
        sampler,
        pickle.loads(pickle.dumps(sampler)),
        tinsmith.SamplingClient.from_sampler_handle(handle),
    ]
    for copy in copies:
        copy.sample(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1)).result(10)
    sent = stub.of("asample")
    assert len({request.json["seq_id"] // 10**9 for request in sent}) == 3
    assert {request.json["sampling_session_id"] for request in sent} == {"s1:sample:0"}
    keys = [request.headers["x-api-key"] for request in sent]
    assert keys == ["tml-test", "tml-test", "tml-of-this-process"]
    assert "tml-test" not in handle


def test_closing_ends_what_is_awaited(stub: Stub) -> None:
    stub.answers["optim_step"] = lambda request: Answer(body={"request_id": "slow"})
    held = threading.Event()

    def hold(request: Request) -> Answer:
        held.wait(5)
        return Answer(408, {"type": "try_again"})

    async def program() -> float:
        client = tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test")
        training = await client.create_lora_training_client("m")
        stub.answers["retrieve_future"] = hold
        waiting = asyncio.ensure_future(training.optim_step().coroutine())
        await asyncio.sleep(0.2)
        started = time.perf_counter()
        await client.close()
        with pytest.raises(tinsmith.TinsmithError, match="closed"):
            await waiting
        return time.perf_counter() - started

    took = asyncio.run(program())
    held.set()
    assert took < 2


def held_bytes(root: object) -> int:
    """The largest bytes that can be reached from `root`."""
    seen, stack, largest = set[int](), [root], 0
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, bytes):
            largest = max(largest, len(one))
        # Not into what a function sees of its module.
        stack += [r for r in gc.get_referents(one) if r is not getattr(one, "__globals__", None)]
    return largest


def test_a_future_that_is_kept_keeps_no_request(stub: Stub, training: tinsmith.TrainingClient) -> None:
    """A program may collect the futures of a whole training."""
    answer_every_pass(stub)
    future = training.forward_backward([datum(list(range(50_000)))], "cross_entropy")
    assert held_bytes(future) > 200_000
    future.result(10)
    assert held_bytes(future) < 10_000


class Queue(queue.SimpleQueue[Any]):
    """Tells when a thread found it empty, before it waits. All threads but the first take their time."""

    def __init__(self) -> None:
        super().__init__()
        self.when_empty: Callable[[], object] = int
        self.first: threading.Thread | None = None

    def get_nowait(self) -> Any:
        self.first = self.first or threading.current_thread()
        if threading.current_thread() is not self.first:
            time.sleep(0.2)
        try:
            return super().get_nowait()
        except queue.Empty:
            then, self.when_empty = self.when_empty, int
            then()
            raise


def test_no_work_waits_for_a_thread_that_has_other_work() -> None:
    """Handed in just when a thread finds nothing to do: it is not free a second time."""
    pool, release = Threads(8), threading.Event()
    pool._work = work = Queue()

    def hand_in() -> None:
        one = threading.Thread(target=pool.run, args=(release.wait,))
        one.start()
        one.join(0.1)

    work.when_empty = hand_in
    pool.run(int).result(5)
    time.sleep(0.5)  # until whoever is free waits
    blocking = [pool.run(release.wait) for _ in range(2)]
    try:
        assert pool.run(lambda: "done").result(2) == "done"
    finally:
        release.set()
    assert all(one.result(5) for one in blocking)
    pool.close(RuntimeError())


def test_a_thread_without_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.threads._IDLE_SECONDS", 0.1)
    pool = Threads(4)
    for _ in range(2):
        found = [pool.run(lambda: time.sleep(0.05) or threading.current_thread()) for _ in range(4)]
        assert len({one.result(5) for one in found}) == 4
        for one in found:
            one.result().join(5)
            assert not one.result().is_alive()


def test_whoever_hears_of_the_end_may_hand_in_work() -> None:
    pool, release = Threads(2), threading.Event()
    heard: list[Any] = []
    waiting = pool.run(release.wait)
    waiting.add_done_callback(lambda _: heard.append(pool.run(int)))
    closing = threading.Thread(target=pool.close, args=(RuntimeError("closed"),), daemon=True)
    closing.start()
    closing.join(2)
    release.set()
    assert heard
    assert not closing.is_alive()
