"""OpenAI's own client, unchanged: models, completions, conversations, tools, streams."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import RunningFleet, RunningService
from tests.e2e.wire import Wire
from tinsmith.tokenizer import Tokenizer

MODEL = "tinsmith/tiny"
ADD = [{"role": "user", "content": "What is 12 + 7?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how the weather is in a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}
# Many tokens are as likely as the next, at 50 all: four sequences do not all end early.
LASTING: dict[str, Any] = {"model": MODEL, "n": 4, "temperature": 2, "seed": 3}
ASKED = [{"role": "user", "content": "How is the weather in Liwa?"}]

Service = RunningService | RunningFleet


def open_client(service: Service, key: str = "", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{service.url}/v1",
        api_key=key or service.key,
        **{"max_retries": 0, "timeout": 120, **options},
    )


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with open_client(service) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(service: Service) -> Tokenizer:
    url = f"{service.url}/api/v1/tokenizers/{MODEL}"
    return Tokenizer(httpx.get(url, headers={"x-api-key": service.key}).json()["files"], MODEL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service whose worker may be killed."""
    running = RunningService(tmp_path_factory.mktemp("alone"))
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


def sampled_tokens(service: Service, wire: Wire, sampler: str, prompt: list[int], **params: Any) -> list[int]:
    return wire.result(wire.sample(sampler, time.time_ns(), prompt, params=params))["sequences"][0]["tokens"]


def cancelled(service: Service) -> int:
    statement = "select count(*) from operations where cast(error as text) like ?"
    return int(service.sql(statement, "%cancelled by its client%")[0][0])


def comes_true(what: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


# -- what is asked is what is sampled ----------------------------------------------------------------------


def test_a_conversation_is_sampled_as_the_tinker_api_would(
    service: Service, client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    """The same tokens go in and come out, whichever way they are asked for."""
    answer = client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, max_tokens=64)
    (choice,) = answer.choices
    wire = Wire(service.url, service.key)
    sampler = wire.post(
        "/create_sampling_session", session_id=wire.session(), sampling_session_seq_id=0, base_model=MODEL
    )["sampling_session_id"]
    prompt = tokenizer.apply_chat_template(ADD, add_generation_prompt=True)
    params = {"temperature": 0, "max_tokens": 64, "stop": None}
    tokens = sampled_tokens(service, wire, sampler, prompt, **params)
    assert choice.message.content == tokenizer.decode(tokens, skip_special_tokens=True) != ""
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.total_tokens == len(prompt) + len(tokens)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    parts = [{"role": "user", "content": [{"type": "text", "text": ADD[0]["content"]}]}]
    same = client.chat.completions.create(model=MODEL, messages=parts, temperature=0, max_tokens=64)
    assert same.choices[0].message.content == choice.message.content


def test_the_asynchronous_client_asks_many_at_once(service: Service) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key) as client:
            calls = [
                client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, max_tokens=32)
                for _ in range(16)
            ]
            streams = [
                client.chat.completions.create(
                    model=MODEL, messages=ADD, temperature=0, max_tokens=32, stream=True
                )
                for _ in range(2)
            ]
            texts = [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]
            for stream in await asyncio.gather(*streams):
                texts.append("".join([e.choices[0].delta.content or "" async for e in stream]))
            return texts

    texts = asyncio.run(ask())
    assert len(texts) == 18
    assert len(set(texts)) == 1


def test_seed_n_and_length_are_honoured(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=ADD, n=8, seed=seed, temperature=2, max_tokens=6
        )
        assert [choice.index for choice in answer.choices] == list(range(8))
        return [choice.message.content for choice in answer.choices]

    first = draw(3)
    assert first == draw(3)
    assert len(set(first)) > 2
    assert first != draw(4)
    narrow = client.chat.completions.create(
        model=MODEL, messages=ADD, n=2, top_p=1e-9, temperature=2, max_tokens=6
    )
    greedy = client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, max_tokens=6)
    assert {c.message.content for c in narrow.choices} == {greedy.choices[0].message.content}
    cut = client.chat.completions.create(model=MODEL, messages=ADD, max_completion_tokens=1, temperature=0)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 1


def test_a_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "The cat", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[4:7]
    for stops in (stop, ["§", stop]):
        (short,) = client.completions.create(**asked, stop=stops, logprobs=0).choices
        assert short.text == whole[: whole.index(stop)]
        assert short.finish_reason == "stop"
        assert short.logprobs is not None
        assert len(short.logprobs.tokens or []) < 24
    # The model's own end is a reason, too.
    ended = client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, stop="§")
    assert ended.choices[0].finish_reason == "stop"


def test_several_prompts_of_texts_or_tokens(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 3}
    texts = client.completions.create(**asked, prompt=["The cat", "A dog"], n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text
    prompts = [tokenizer.encode("The cat"), tokenizer.encode("A dog")]
    tokens = client.completions.create(**asked, prompt=prompts)
    assert [choice.text for choice in tokens.choices] == [texts.choices[0].text, texts.choices[2].text]
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == sum(map(len, prompts))


def test_logprobs_of_what_was_said_and_of_the_prompt(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ADD, temperature=0, max_tokens=64, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens - 1, "the end of the turn is no text"
    assert bytes(b for token in content for b in token.bytes or []).decode() == choice.message.content
    for token in content:
        assert token.logprob <= 0
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    scored = client.completions.create(model=MODEL, prompt="The cat sat", max_tokens=0, echo=True, logprobs=2)
    (one,) = scored.choices
    assert one.text == "The cat sat"
    assert one.logprobs is not None
    first, *others = one.logprobs.token_logprobs or []
    assert first is None
    assert all(value < 0 for value in others)
    tokens, offsets = one.logprobs.tokens or [], one.logprobs.text_offset or []
    assert [one.text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    assert (one.logprobs.top_logprobs or [])[0] is None
    assert len((one.logprobs.top_logprobs or [])[1]) == 2


# -- streams -----------------------------------------------------------------------------------------------


def test_streams_bring_the_same_text_and_then_the_usage(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": ADD, "temperature": 0, "max_tokens": 48, "n": 2, "logprobs": True
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    events = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for index, choice in enumerate(whole.choices):
        own = [e.choices[0] for e in events if e.choices and e.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
        scored = [token for one in own if one.logprobs for token in one.logprobs.content or []]
        assert choice.logprobs is not None
        said = choice.logprobs.content or []
        assert [token.token for token in scored] == [token.token for token in said]
        assert [token.logprob for token in scored] == pytest.approx([t.logprob for t in said], abs=1e-4)
        assert len(own) == 1 + len(said) + 1, "a piece for every token, between the role and the end"
    assert events[-1].choices == []
    used, streamed = whole.usage, events[-1].usage
    assert used is not None
    assert streamed is not None
    assert (streamed.prompt_tokens, streamed.total_tokens) == (used.prompt_tokens, used.total_tokens)
    assert len({e.id for e in events}) == 1
    plain: dict[str, Any] = {"model": MODEL, "prompt": "The cat", "temperature": 0, "max_tokens": 24}
    pieces = list(client.completions.create(**plain, stream=True, echo=True, logprobs=1))
    (text,) = client.completions.create(**plain, echo=True, logprobs=1).choices
    assert "".join(e.choices[0].text for e in pieces) == text.text
    assert text.logprobs is not None
    offsets = [o for e in pieces if e.choices[0].logprobs for o in e.choices[0].logprobs.text_offset or []]
    assert offsets == text.logprobs.text_offset


@pytest.mark.parametrize("form", ["completions", "chat"])
def test_the_first_token_is_read_long_before_the_last_is_sampled(
    service: Service, client: openai.OpenAI, form: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 600, "temperature": 50, "seed": 4, "stream": True}
    if form == "chat":
        events = iter(client.chat.completions.create(**asked, messages=ADD))
        next(events)  # the role
    else:
        events = iter(client.completions.create(**asked, prompt="The cat"))
    started = time.monotonic()
    first = next(events)
    until_first = time.monotonic() - started
    state = "select state from operations where request_id = ?"
    assert service.sql(state, first.id) == [("queued",)], "it is still being sampled"
    count = 1
    for _ in events:
        count += 1
        if count == 100:
            assert service.sql(state, first.id) == [("queued",)], "and after a hundred tokens, too"
    assert count > 300
    whole = time.monotonic() - started
    assert until_first < whole / 3, (until_first, whole)


# -- tools -------------------------------------------------------------------------------------------------


def test_a_tool_is_called_and_its_answer_read(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_tokens": 64}
    (choice,) = client.chat.completions.create(**asked, messages=ASKED).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"town": "Liwa"})

    streamed = list(client.chat.completions.create(**asked, messages=ASKED, stream=True))
    (delta,) = [d for e in streamed for d in e.choices[0].delta.tool_calls or []]
    assert delta.function is not None
    assert (delta.function.name, delta.function.arguments) == ("weather", call.function.arguments)
    assert streamed[-1].choices[0].finish_reason == "tool_calls"
    assert not any(e.choices[0].delta.content for e in streamed)

    told = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(**asked, messages=told)
    assert answer.choices[0].finish_reason == "stop"
    assert "sunny" in (answer.choices[0].message.content or "")

    none = client.chat.completions.create(**asked, messages=ASKED, tool_choice="none")
    assert not none.choices[0].message.tool_calls
    without = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1)
    assert none.usage is not None
    assert without.usage is not None
    assert none.usage.prompt_tokens == without.usage.prompt_tokens, (
        "tools that may not be called are not told"
    )


# -- whose -------------------------------------------------------------------------------------------------


def test_saved_weights_are_a_model_of_their_owner_alone(service: Service, client: openai.OpenAI) -> None:
    wire = Wire(service.url, service.key)
    run = wire.run(MODEL)
    path = wire.result(wire.post("/save_weights_for_sampler", model_id=run, seq_id=1, path="chat"))["path"]
    state = wire.result(wire.post("/save_weights", model_id=run, seq_id=2, path="state"))["path"]
    base = client.chat.completions.create(model=MODEL, messages=ADD, temperature=0, max_tokens=16)
    for model in (path, state):
        answer = client.chat.completions.create(model=model, messages=ADD, temperature=0, max_tokens=16)
        assert answer.choices[0].message.content == base.choices[0].message.content, "B of a new adapter is 0"
        assert client.models.retrieve(model).id == model
    listed = [model.id for model in client.models.list()]
    assert listed[0] == MODEL
    assert {path, state} <= set(listed)

    stranger = open_client(service, service.new_key("openai-stranger"))
    assert [model.id for model in stranger.models.list()] == [MODEL]
    for attempt in (
        lambda: stranger.models.retrieve(path),
        lambda: stranger.completions.create(model=path, prompt="x"),
        lambda: stranger.chat.completions.create(model=path, messages=ADD),
        lambda: stranger.chat.completions.create(model=path, messages=ADD, stream=True),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            attempt()
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    # Its samples are its own.
    mine = stranger.chat.completions.create(model=MODEL, messages=ADD, max_tokens=1)
    wire.post("/retrieve_future", request_id=mine.id)
    assert wire.status == 404
    for key in ("tml-none", "nonsense"):
        with pytest.raises(openai.AuthenticationError):
            open_client(service, key).models.list()
    viewer = open_client(
        service, service.admin(*["keys", "create", "openai-stranger", "--role", "viewer", "--member", "v"])
    )
    assert viewer.models.list().data
    with pytest.raises(openai.PermissionDeniedError):
        viewer.completions.create(model=MODEL, prompt="x")


def test_calls_are_counted_in_the_callers_project_and_stopped_by_its_budget(service: Service) -> None:
    key = service.new_key("openai-frugal")
    service.admin("projects", "create", "openai-frugal", "chats")
    client = open_client(service, key, project="chats")
    answer = client.completions.create(model=MODEL, prompt=[[5, 6, 7]], max_tokens=4, temperature=0)
    spent = (
        "select coalesce(sum(u.amount), 0) from usage u join sessions s on s.id = u.session_id "
        "join projects p on p.id = s.project_id where p.name = 'chats'"
    )
    assert answer.usage is not None
    assert service.sql(spent)[0][0] == answer.usage.total_tokens > 3
    service.admin("projects", "set", "openai-frugal", "chats", "--token-budget", "20")
    time.sleep(1.1)  # looked up once a second
    with pytest.raises(openai.APIStatusError, match="budget") as refused:
        client.completions.create(model=MODEL, prompt=[[5, 6, 7]], max_tokens=100)
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")
    assert open_client(service, key).completions.create(model=MODEL, prompt="x", max_tokens=1).choices
    with pytest.raises(openai.NotFoundError, match="project"):
        open_client(service, key, project="none").completions.create(model=MODEL, prompt="x")
    sessions = "select count(*) from sessions where display_name like ? and tenant_id in "
    sessions += "(select id from tenants where name = ?)"
    for _ in range(3):
        client.completions.create(model=MODEL, prompt="x", max_tokens=1)
    assert service.sql(sessions, "OpenAI's API%", "openai-frugal")[0][0] == 2, "one for each project"


def test_too_many_at_once_are_told_to_wait_and_the_client_does(alone: RunningService) -> None:
    key = alone.admin("keys", "create", "crowd", "--concurrent-samples", "1")
    hasty, patient = open_client(alone, key), open_client(alone, key, max_retries=60)
    asked: dict[str, Any] = {**LASTING, "prompt": [5, 6, 7]}
    with ThreadedCall(lambda: hasty.completions.create(**asked, max_tokens=500)) as long:
        assert comes_true(lambda: queued(alone) == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            hasty.completions.create(**asked, max_tokens=1)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.code == "rate_limit_exceeded"
        assert patient.completions.create(**asked, max_tokens=1).choices
    assert len(long.result.choices) == 4
    # All prompts of a call, or none.
    with pytest.raises(openai.RateLimitError):
        hasty.completions.create(model=MODEL, prompt=["a", "b", "c"], max_tokens=3000)
    assert comes_true(lambda: queued(alone) == 0)


def queued(service: Service) -> int:
    return int(service.sql("select count(*) from operations where state = 'queued'")[0][0])


class ThreadedCall:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._thread = threading.Thread(target=lambda: setattr(self, "result", call()))

    def __enter__(self) -> "ThreadedCall":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


# -- what goes wrong ---------------------------------------------------------------------------------------


def test_a_killed_worker_costs_time_only(alone: RunningService) -> None:
    client = open_client(alone)
    asked: dict[str, Any] = {**LASTING, "prompt": [5, 6, 7], "max_tokens": 300}

    def ask() -> list[str]:
        return [choice.text for choice in client.completions.create(**asked).choices]

    calm = ask()
    with ThreadedCall(ask) as call:
        assert comes_true(lambda: queued(alone) == 1)
        alone.kill_worker()
    assert call.result == calm


def test_a_stream_whose_workers_are_killed_goes_on_where_it_was(alone: RunningService) -> None:
    """Twice: the third worker passes over what the first two said."""
    client = open_client(alone)
    asked: dict[str, Any] = {**LASTING, "temperature": 50, "prompt": [5, 6, 7], "max_tokens": 400}
    asked["logprobs"] = 1
    calm = client.completions.create(**asked).choices
    texts, tokens = ["", "", "", ""], [0, 0, 0, 0]
    kills = [40, 500]
    for event in client.completions.create(**asked, stream=True):
        (choice,) = event.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs is not None and len(choice.logprobs.tokens or [])
        if kills and sum(tokens) >= kills[0]:
            kills.pop(0)
            assert queued(alone) == 1, "in the middle"
            alone.kill_worker()
    assert not kills
    assert texts == [choice.text for choice in calm]
    assert tokens == [len(c.logprobs.tokens or []) for c in calm if c.logprobs is not None]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_gives_its_samples_up(service: Service, stream: bool) -> None:
    before, waiting = cancelled(service), queued(service)
    body = {**LASTING, "prompt": [[5, 6], [7, 8]], "temperature": 50, "max_tokens": 4000, "stream": stream}

    async def hang_up() -> None:
        headers = {"authorization": f"Bearer {service.key}"}
        async with httpx.AsyncClient(headers=headers, base_url=service.url) as http:
            if stream:
                async with http.stream("POST", "/v1/completions", json=body) as events:
                    await anext(events.aiter_lines())
            else:
                call = asyncio.create_task(http.post("/v1/completions", json=body))
                assert await asyncio.to_thread(comes_true, lambda: queued(service) == waiting + 2)
                call.cancel()

    asyncio.run(hang_up())
    assert comes_true(lambda: cancelled(service) == before + 2)
