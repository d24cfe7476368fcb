"""OpenAI's client against the real routes and journal; a stand-in for the worker decides what is sampled."""

import asyncio
import base64
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from starlette.background import BackgroundTask

from tests import servers
from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.app import make_app
from tinsmith_api.journal import identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Pool
from tinsmith_api.limits import TooMany
from tinsmith_api.routes.openai_stream import Events
from tinsmith_api.service import Service
from tinsmith_api.settings import Settings

MODEL = "tinsmith/tiny"
FILES = Path(__file__).parent.parent.parent / "worker/tinsmith_worker/tiny_base/model"
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADD = [{"role": "user", "content": "What is 12 + 7?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>'


class StandIn:
    """A doorbell that answers: with the text that `says` is, or the failure, or not at all."""

    ready = True

    def __init__(self, service: Service, tokenizer: Tokenizer) -> None:
        self.service = service
        self.tokenizer = tokenizer
        self.says: str | dict[str, str] | None = ""
        self.tasks: list[pb.SampleTask] = []
        self.asked: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def stop(self) -> None: ...

    def ring(self, worker_id: str, request_id: str) -> None:
        (operation,) = self.service.journal.read(lambda c: ops.fetch(c, [request_id])).result()
        if operation.state != ops.QUEUED:
            return
        self.tasks.append(pb.SampleTask.FromString(operation.payload or b""))
        self.asked.put((worker_id, request_id))
        if self.says is not None:
            self.finish(self.says)

    def finish(self, says: str | dict[str, str]) -> None:
        """What was asked for last: what it is answered with."""
        worker_id, request_id = self.asked.get(timeout=10)
        outcome: dict[str, Any] = {"error": says}
        if isinstance(says, str):
            outcome = {"body": self._sampled(says, self.tasks[-1].num_samples)}
        given = {"run_id": None, "worker_id": worker_id, "epoch": 0, **outcome}
        self.service.journal.write(lambda c: ops.finish(c, request_id, **given)).result()
        self.loop.call_soon_threadsafe(self.service.wakeups.wake, request_id)

    def _sampled(self, text: str, count: int) -> bytes:
        tokens = np.array(self.tokenizer.encode(text), "<i4")
        reason = pb.STOP_REASON_STOP if text.endswith("<|im_end|>") else pb.STOP_REASON_LENGTH
        one = pb.SampledSequence(
            stop_reason=reason, tokens=tokens.tobytes(), logprobs=np.zeros(len(tokens), "<f4").tobytes()
        )
        return pb.SampleResponse(sequences=[one] * count).SerializeToString()


class Running:
    def __init__(self, folder: Path) -> None:
        settings = Settings(data_dir=folder)
        files = {name: (FILES / name).read_bytes() for name in NAMES}
        tokenizer = Tokenizer({name: body.decode() for name, body in files.items()}, MODEL)
        self.service = Service(settings)
        self.worker = StandIn(self.service, tokenizer)
        self.service.doorbell = self.worker
        self.service.objects.put("tokenizers/tiny", files)
        facts = {
            "vocab_size": 4096,
            "max_context_length": 4096,
            "max_rank": 64,
            "architecture": "qwen3",
            "tokenizer": "tiny",
            "tokenizer_files": "tokenizers/tiny",
        }
        self.service._pools.seconds = 3600
        self.service._pools.put("", {MODEL: Pool(MODEL, facts, ("w",))})
        self.key = self.new_key("lab")
        port = servers.free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self.server = uvicorn.Server(
            uvicorn.Config(make_app(self.service), port=port, log_level="warning", access_log=False)
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.http = httpx.Client(timeout=60)
        self.client = self.client_of(self.key)

    def new_key(self, tenant: str, **given: Any) -> str:
        return self.service.journal.write(lambda c: identities.create_key(c, tenant, **given)).result()

    def client_of(self, key: str, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, http_client=self.http, max_retries=0, **options)

    def outcomes(self) -> list[str]:
        """What became of the samples."""
        found = ops.operations.select().order_by(ops.operations.c.submitted_at)
        rows = self.service.journal.read(lambda c: c.execute(found).all()).result()
        return [row.error["error"] if row.error else row.state for row in rows]

    def comes_true(self, what: Callable[[], bool], seconds: float = 10) -> bool:
        deadline = time.monotonic() + seconds
        while not what() and time.monotonic() < deadline:
            time.sleep(0.02)
        return what()

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("openai"))
    yield made
    made.stop()


def say(running: Running, text: str, **asked: Any) -> Any:
    running.worker.says = text
    return running.client.chat.completions.create(model=MODEL, messages=ADD, **asked)


def test_calls_of_tools_that_were_offered_are_taken_out_of_the_text(running: Running) -> None:
    other = CALL.replace("weather", "other")
    cases = [
        (f"{CALL}<|im_end|>", None, 1, "tool_calls"),
        (f"Let me look.\n{CALL}\n{CALL}<|im_end|>", "Let me look.", 2, "tool_calls"),
        (f"{CALL}\n<tool_call>\n{{", "<tool_call>\n{", 1, "length"),
        (f"{other}<|im_end|>", other, 0, "stop"),
        ("<tool_call>{nothing}</tool_call><|im_end|>", "<tool_call>{nothing}</tool_call>", 0, "stop"),
        ("It is 19.<|im_end|>", "It is 19.", 0, "stop"),
    ]
    for text, content, calls, reason in cases:
        (choice,) = say(running, text, tools=[WEATHER]).choices
        found = choice.message.tool_calls or []
        assert (choice.message.content, len(found), choice.finish_reason) == (content, calls, reason), text
        assert [json.loads(call.function.arguments) for call in found] == [{"town": "Bonn"}] * calls
        assert len({call.id for call in found}) == calls
        events = list(say(running, text, tools=[WEATHER], stream=True))
        assert "".join(e.choices[0].delta.content or "" for e in events) == (content or "")
        assert sum(len(e.choices[0].delta.tool_calls or []) for e in events) == calls
        assert events[-1].choices[0].finish_reason == reason
    (untold,) = say(running, f"{CALL}<|im_end|>").choices
    assert (untold.message.content, untold.finish_reason) == (CALL, "stop")


def test_characters_of_several_tokens_are_whole_in_a_stream(running: Running) -> None:
    text = "naïve 東京 🙂🙂 <think>no</think>"
    events = list(say(running, f"{text}<|im_end|>", stream=True, logprobs=True))
    pieces = [e.choices[0].delta.content or "" for e in events]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(running.worker.tokenizer.encode(text)) + 2  # the role, and the end


class Streamed:
    """A stream that was begun, and the worker's end of it."""

    def __init__(self, running: Running, **asked: Any) -> None:
        while not running.worker.asked.empty():
            running.worker.asked.get()
        running.worker.says = None
        self.running = running
        self.events = running.client.completions.create(
            model=MODEL, prompt="x", stream=True, max_tokens=4000, **asked
        )
        self.worker_id, self.request_id = running.worker.asked.get(timeout=10)
        self.task = running.worker.tasks[-1]

    def put(self, text: list[int], start: int, stop: int, *, ends: bool = False, index: int = 0) -> None:
        """Tokens [start, stop) of `text`, as a worker sends them."""
        message = self.message(text, start, stop, ends=ends, index=index)
        self.running.worker.loop.call_soon_threadsafe(
            self.running.service.streams.put, self.request_id, message
        )

    def message(self, text: list[int], start: int, stop: int, *, ends: bool = False, index: int = 0) -> str:
        tokens = np.array(text[start:stop], "<i4")
        sequence = pb.SampledSequence(tokens=tokens.tobytes(), logprobs=bytes(4 * len(tokens)))
        piece = pb.SampledPiece(index=index, start=start, sequence=sequence, ends=ends)
        return base64.b64encode(pb.SampledPieces(pieces=[piece]).SerializeToString()).decode()

    def finish(self, says: str | dict[str, str]) -> None:
        self.running.worker.asked.put((self.worker_id, self.request_id))
        self.running.worker.finish(says)

    def text(self, tokens: int) -> str:
        """What the next so many tokens say."""
        return "".join(next(self.events).choices[0].text for _ in range(tokens))

    def rest(self) -> str:
        return "".join(event.choices[0].text for event in self.events)


@pytest.fixture(scope="module")
def fable(running: Running) -> tuple[str, list[int]]:
    text = "The cat sat on the mat, and the dog sat on the cat. " * 3
    return text, running.worker.tokenizer.encode(text)


def test_a_reader_that_takes_nothing_is_given_up() -> None:
    """What is kept for it would lie there for as long as it pleases."""
    let_go = []

    class Impatient(Events):
        patience_seconds = 0.2

    async def read() -> None:
        async def never(*_: Any) -> Any:
            await asyncio.Event().wait()

        async def words() -> AsyncIterator[bytes]:
            while True:
                yield b"data: more"

        response = Impatient(words(), background=BackgroundTask(lambda: let_go.append("its samples")))
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        async with asyncio.timeout(10):
            await response(scope, receive=never, send=never)

    asyncio.run(read())
    assert let_go == ["its samples"]


def test_tokens_are_read_when_they_are_sampled(running: Running, fable: tuple[str, list[int]]) -> None:
    text, ids = fable
    stream = Streamed(running)
    assert stream.task.stream_to == running.service.streams.name
    said = ""
    for place in range(8):
        stream.put(ids, place, place + 1)
        said += stream.text(1)
    assert said == running.worker.tokenizer.decode(ids[:8])
    assert running.outcomes()[-1] == ops.QUEUED
    stream.finish(text)
    assert said + stream.rest() == text


def test_what_comes_again_is_not_said_again_and_what_was_lost_comes_with_the_result(
    running: Running, fable: tuple[str, list[int]]
) -> None:
    text, ids = fable
    stream = Streamed(running)
    stream.put(ids, 0, 5)
    said = stream.text(5)
    # The worker died, and another begins anew.
    for start, stop in ((0, 3), (3, 4), (2, 9)):
        stream.put(ids, start, stop)
    said += stream.text(4)
    stream.put(ids, 10, 12)  # the one before was lost
    stream.put(ids, 12, 14)
    stream.finish(text)
    assert said == running.worker.tokenizer.decode(ids[:9])
    assert said + stream.rest() == text


def test_two_choices_end_when_they_end(running: Running, fable: tuple[str, list[int]]) -> None:
    text, ids = fable
    stream = Streamed(running, n=2)
    stream.put(ids, 0, len(ids), ends=True, index=1)
    events = [next(stream.events) for _ in range(len(ids) + 1)]
    assert {event.choices[0].index for event in events} == {1}
    assert events[-1].choices[0].finish_reason is not None
    stream.put(ids, 0, len(ids), ends=True, index=1)
    stream.finish(text)
    others = [event.choices[0] for event in stream.events]
    assert {choice.index for choice in others} == {0}
    assert "".join(choice.text for choice in others) == text


@pytest.mark.parametrize("when", ["as it comes", "at the end", "shorter"])
def test_a_sample_that_came_out_otherwise_ends_its_stream_with_a_sentence(
    running: Running, fable: tuple[str, list[int]], when: str
) -> None:
    _, ids = fable
    stream = Streamed(running)
    stream.put(ids, 0, 5)
    stream.text(5)
    other = [*ids[:4], ids[4] + 1, *ids[5:]]
    if when == "as it comes":
        stream.put(other, 0, 7)
    else:
        stream.finish(running.worker.tokenizer.decode(ids[:3] if when == "shorter" else other))
    with pytest.raises(openai.APIError, match="ask again"):
        stream.rest()


def test_a_slow_reader_holds_no_more_than_its_room_and_gets_everything(
    running: Running, fable: tuple[str, list[int]]
) -> None:
    text = fable[0] * 200
    ids = running.worker.tokenizer.encode(text)
    stream = Streamed(running)
    pieces = running.service.streams._readers[stream.request_id]
    messages = [stream.message(ids, place, place + 1) for place in range(len(ids))]
    assert sum(map(len, messages)) > 256 << 10

    async def all_at_once() -> int:
        for message in messages:
            running.service.streams.put(stream.request_id, message)
        return pieces._bytes

    waiting = asyncio.run_coroutine_threadsafe(all_at_once(), running.worker.loop).result(30)
    assert (250 << 10) < waiting <= 256 << 10, "so some had no room"
    stream.finish(text)
    assert stream.rest() == text


def test_nobody_is_known_as_a_reader_who_is_gone(running: Running, fable: tuple[str, list[int]]) -> None:
    stream = Streamed(running)
    stream.put(fable[1], 0, 2)
    stream.text(2)
    assert list(running.service.streams._readers) == [stream.request_id]
    stream.events.close()
    assert running.comes_true(lambda: not running.service.streams._readers)
    assert running.comes_true(lambda: running.outcomes()[-1] == "cancelled by its client")


def test_what_a_stream_says_about_its_prompt_comes_first(
    running: Running, fable: tuple[str, list[int]]
) -> None:
    text, ids = fable
    stream = Streamed(running, echo=True)
    assert stream.text(1) == "x"
    stream.put(ids, 0, 1)
    assert text.startswith(stream.text(1))
    stream.finish(text)
    stream.rest()
    scored = Streamed(running, echo=True, logprobs=0)
    assert not scored.task.stream_to, "its logprobs are part of the result"
    scored.finish(text)
    assert scored.rest() == f"x{text}"


def test_what_is_asked_reaches_the_sampler(running: Running) -> None:
    say(
        running,
        "x",
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        n=3,
        stop=["a", "b"],
        max_tokens=7,
        logprobs=True,
        top_logprobs=4,
        extra_body={"top_k": 9, "chat_template_kwargs": {"enable_thinking": False}},
    )
    task = running.worker.tasks[-1]
    assert (task.temperature, task.top_p, task.top_k, task.seed) == (0.5, 0.25, 9, 2**64 - 1)
    assert (task.num_samples, task.max_tokens, task.topk_sample_logprobs) == (3, 7, 4)
    assert (list(task.stop_strings), task.default_stop) == (["a", "b"], True)
    text = running.worker.tokenizer.decode(np.frombuffer(task.prompt, "<i4").tolist())
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    say(running, "x")
    task = running.worker.tasks[-1]
    assert (task.temperature, task.top_p, task.top_k, task.num_samples) == (1, 1, -1, 1)
    assert len(task.prompt) // 4 + task.max_tokens == 4096


@pytest.mark.parametrize(
    ("category", "raised"), [("user", openai.BadRequestError), ("server", openai.InternalServerError)]
)
def test_a_sample_that_fails_says_whose_fault_it_was(
    running: Running, category: str, raised: type[openai.APIStatusError]
) -> None:
    def ask(**options: Any) -> Any:
        running.worker.says = {"error": "no memory", "category": category}
        return running.client.completions.create(model=MODEL, prompt="x", **options)

    with pytest.raises(raised, match="no memory"):
        ask()
    with pytest.raises(openai.APIError, match="no memory"):
        list(ask(stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_gives_every_sample_up(running: Running, stream: bool) -> None:
    running.worker.says = None
    before = len(running.outcomes())
    body = {"model": MODEL, "prompt": ["x", "y"], "stream": stream}
    headers = {"authorization": f"Bearer {running.key}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/completions", json=body, headers=headers, timeout=0.5)
    deadline = time.monotonic() + 10
    while "queued" in running.outcomes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.outcomes()[before:] == ["cancelled by its client"] * 2


def test_all_prompts_are_sampled_or_none(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.worker.says = None
    submit, calls = running.service.submit, [0]

    async def third_is_too_many(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise TooMany("wait", 1)
        return await submit(*given)

    monkeypatch.setattr(running.service, "submit", third_is_too_many)
    before = len(running.outcomes())
    with pytest.raises(openai.RateLimitError):
        running.client.completions.create(model=MODEL, prompt=["x", "y", "z"])
    assert running.outcomes()[before:] == ["cancelled by its client"] * 2


def test_a_key_opens_what_its_role_and_its_limits_let_it(running: Running) -> None:
    running.worker.says = "x"
    asked: dict[str, Any] = {"model": MODEL, "prompt": "x"}
    viewer = running.client_of(running.new_key("lab", member="v", role="viewer"))
    assert viewer.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.PermissionDeniedError, match="viewer"):
        viewer.completions.create(**asked)
    with pytest.raises(openai.AuthenticationError) as unknown:
        running.client_of("tml-none").completions.create(**asked)
    assert unknown.value.code == "invalid_api_key"
    limited = running.client_of(running.new_key("limited", limits={"requests_per_minute": 1}))
    limited.models.list()
    with pytest.raises(openai.RateLimitError) as refused:
        limited.completions.create(**asked)
    assert refused.value.code == "rate_limit_exceeded"
    assert int(refused.value.response.headers["retry-after"]) > 0
    with pytest.raises(openai.NotFoundError, match="no project 'none'"):
        running.client_of(running.key, project="none").completions.create(**asked)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/embeddings", 404),
        ("GET", "", 404),
        ("GET", "/", 404),
        ("GET", "/models/../files/x", 404),
        ("GET", "/chat/completions", 405),
    ],
)
def test_what_there_is_not_is_answered_in_the_clients_form(
    running: Running, method: str, path: str, status: int
) -> None:
    answer = running.http.request(method, f"{running.url}{path}")
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "unknown_url")
    assert "/openapi.json" in error["message"]
    assert ("allow" in answer.headers) == (status == 405)


def test_a_client_that_asks_for_what_there_is_not_reads_a_sentence(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings") as unknown:
        running.client.embeddings.create(model=MODEL, input="x")
    assert unknown.value.code == "unknown_url"
    other = running.http.get(running.url.removesuffix("/v1") + "/api/v1/nothing")
    assert (other.status_code, set(other.json())) == (404, {"detail"})


LONG = "x, " * 5000


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {}, "prompt", "required"),
        ("completions", {"prompt": ""}, None, "prompt is empty"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": [[10**9]]}, None, "outside the vocabulary"),
        ("completions", {"prompt": [[-1]]}, "prompt.0.0", "greater than or equal to 0"),
        ("completions", {"prompt": LONG}, "prompt", "context is 4096 tokens"),
        ("completions", {"prompt": LONG * 20}, "prompt", "context is 4096 tokens"),
        ("completions", {"prompt": "x", "max_tokens": 4096}, "prompt", "context is 4096 tokens"),
        ("completions", {"prompt": ["x"] * 300, "n": 2, "max_tokens": 4000}, "max_tokens", "a request"),
        ("completions", {"prompt": ["x"] * 10**4}, "prompt", "List should have at most"),
        ("completions", {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty", "equal to 0"),
        ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "at most 0"),
        ("completions", {"prompt": "x", "best_of": 4}, "best_of", "best_of must be n"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", "suffix"),
        ("completions", {"prompt": "x", "user": "me"}, "user", "not known here"),
        ("completions", {"prompt": "x", "stop": ["y"] * 10**4}, "stop", "at most 64"),
        ("completions", {"prompt": "x", "stop": [""]}, "stop.0", "at least 1"),
        ("completions", {"prompt": "x", "n": 10**4}, "n", "less than or equal to 128"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs", "equal to 20"),
        ("completions", {"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": ADD, "max_tokens": 0}, "max_tokens", "equal to 1"),
        ("chat/completions", {"messages": ADD, "max_tokens": 9000}, "messages", "context is 4096 tokens"),
        (
            "chat/completions",
            {"messages": ADD, "max_tokens": 1, "max_completion_tokens": 1},
            "max_tokens",
            "give one",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages", "context is"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "needs a content"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'user'"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]},
            "messages.0.tool_call_id",
            "answers no call",
        ),
        (
            "chat/completions",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1"}}
                        ],
                    }
                ]
            },
            "messages.0.tool_calls",
            "must be a JSON object",
        ),
        ("chat/completions", {"messages": ADD, "tool_choice": "required"}, "tool_choice", "'auto' or 'none'"),
        (
            "chat/completions",
            {"messages": ADD, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tool_choice",
            "'auto' or 'none'",
        ),
        (
            "chat/completions",
            {"messages": ADD, "response_format": {"type": "json_object"}},
            "response_format.type",
            "'text'",
        ),
        ("chat/completions", {"messages": ADD, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (
            "chat/completions",
            {"messages": ADD, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs.chat_template",
            "not known here",
        ),
        ("chat/completions", {"messages": ADD, "model": "gpt"}, "model", "no model 'gpt'"),
        ("chat/completions", {"messages": ADD, "model": "tinker://a/weights/b"}, "model", "no checkpoint"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_sentence(
    running: Running, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    answer = running.http.post(
        f"{running.url}/{path}",
        json={"model": MODEL, **body},
        headers={"authorization": f"Bearer {running.key}"},
    )
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert says in error["message"], error
    if "context is" in says:
        assert error["code"] == "context_length_exceeded"
