"""OpenAI's client against the real routes and journal; a stand-in for the worker decides what is sampled."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from tests import servers
from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.app import make_app
from tinsmith_api.journal import identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.leases import Pool
from tinsmith_api.limits import TooMany
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

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def ring(self, worker_id: str, request_id: str) -> None:
        (operation,) = self.service.journal.read(lambda c: ops.fetch(c, [request_id])).result()
        if operation.state != ops.QUEUED or self.says is None:
            return
        self.tasks.append(pb.SampleTask.FromString(operation.payload or b""))
        outcome: dict[str, Any] = {"error": self.says}
        if isinstance(self.says, str):
            outcome = {"body": self._sampled(self.says, self.tasks[-1].num_samples)}
        given = {"run_id": None, "worker_id": worker_id, "epoch": 0, **outcome}
        self.service.journal.write(lambda c: ops.finish(c, request_id, **given)).result()
        self.service.wakeups.wake(request_id)

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
