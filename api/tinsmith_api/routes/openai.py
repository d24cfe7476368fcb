"""The endpoints that OpenAI's clients know: models, completions, chat completions.

A model is the name of a base model, or the tinker:// address of a checkpoint. Each call becomes samples like
any other: the same keys, limits, budgets and bills, and a killed worker costs it time only.
"""

import asyncio
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from tinsmith.errors import NotFound
from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import chat
from tinsmith_api.bodies import reply, takes
from tinsmith_api.chat import Choice, Refused, Token
from tinsmith_api.journal import checkpoints
from tinsmith_api.owner import Mine, MineToChange, Owner, check_usable
from tinsmith_api.routes.openai_requests import Chat, Completion, read
from tinsmith_api.routes.openai_samples import Answers, Samples, Weights, submit
from tinsmith_api.routes.openai_stream import stream

router = APIRouter(prefix="/v1")

Json = dict[str, Any]

_COMPLETION_TOKENS = 16  # without max_tokens; OpenAI's default
_LISTED = 1000
_TEXT = {"type": ["string", "null"]}
_MEMBERS = {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT}
_INNER = {"type": "object", "properties": _MEMBERS, "required": list(_MEMBERS)}
_SHAPE = {"type": "object", "properties": {"error": _INNER}, "required": ["error"]}
ERROR: Json = {"content": {"application/json": {"schema": _SHAPE}}}
"""How the routes here describe their errors."""


class NoModel(NotFound):
    param, code = "model", "model_not_found"


# -- models ------------------------------------------------------------------------------------------------


@router.get("/models")
async def list_models(mine: Mine) -> Response:
    """The base models, and the newest of the caller's saved weights."""
    bases = [_described(name) for name in sorted(await mine.service.pools())]
    saved, _ = await mine.service.read_apart(lambda c: checkpoints.listing(c, mine.tenant_id, limit=_LISTED))
    usable = [row for row in saved if row.kind != "external_weights"]
    return reply({"object": "list", "data": bases + [_described(row.path, row.created_at) for row in usable]})


@router.get("/models/{model:path}")
async def get_model(mine: Mine, model: str) -> Response:
    await _weights(mine, model)
    return reply(_described(model))


def _described(name: str, created_at: float = 0) -> Json:
    return {"id": name, "object": "model", "created": int(created_at), "owned_by": "tinsmith"}


async def _weights(mine: Owner, model: str) -> Weights:
    """NoModel if there is none, or it is another's."""
    if not model.startswith("tinker://"):
        if model not in await mine.service.pools():
            raise NoModel(f"no model {model!r} here: GET /v1/models lists those there are")
        return Weights(model)
    try:
        checkpoint = await mine.readable_checkpoint(model)
    except NotFound as error:
        raise NoModel(str(error)) from None
    check_usable(checkpoint)
    return Weights(checkpoint.base_model, checkpoint.path, checkpoint.object_prefix)


async def _tokenizer(mine: Owner, base_model: str) -> Tokenizer:
    service = mine.service
    where = (await service.facts(base_model)).tokenizer_files
    if not where:
        raise Refused(f"{base_model} has no tokenizer here: it can be sampled by tokens, by asample", "model")
    known = service.open_tokenizers.get(where)
    if known is None:

        def read() -> Tokenizer:
            files = service.objects.get(where)
            return Tokenizer({name: body.decode() for name, body in files.items()}, base_model)

        known = service.open_tokenizers.put(where, await asyncio.to_thread(read))
    return known


# -- completions -------------------------------------------------------------------------------------------

_ANSWERS: dict[int | str, Json] = {
    200: {"content": {"text/event-stream": {}}},
    500: {"description": "Sampling failed, by no fault of the request", **ERROR},
}


@router.post("/completions", openapi_extra=takes(Completion), responses=_ANSWERS)
async def complete(mine: MineToChange, request: Request) -> Response:
    body = await read(mine, request, Completion)
    weights = await _weights(mine, body.model)
    tokenizer = await _tokenizer(mine, weights.base_model)
    room = await _room(mine, weights)
    prompts = await asyncio.to_thread(
        lambda: [
            chat.encode(tokenizer, one, room, "prompt") if isinstance(one, str) else one
            for one in body.prompts
        ]
    )
    asked: Json = {"topk_sample_logprobs": body.logprobs or 0}
    if body.echo and body.logprobs is not None:
        asked |= {"prompt_logprobs": True, "topk_prompt_logprobs": body.logprobs}
    most = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    # What is said about the prompt comes with the whole.
    are_streamed = bool(body.stream) and not (body.echo and body.logprobs is not None)
    samples = await submit(mine, request, body, weights, prompts, most, asked, are_streamed=are_streamed)

    def echoed(prompt: Sequence[int], answer: pb.SampleResponse) -> list[Token]:
        return chat.prompt_tokens(tokenizer, prompt, answer) if body.echo else []

    def choices_of(answers: Answers) -> list[Choice]:
        choices = []
        for prompt, answer in zip(prompts, answers, strict=True):
            begin = echoed(prompt, answer)
            for sequence in answer.sequences:
                choice = chat.choice_of(tokenizer, sequence, body.stops)
                choices.append(replace(choice, tokens=begin + choice.tokens))
        return choices

    kind = "text_completion"
    if body.stream:
        count = body.n or 1
        writings = [
            TextWriting(body, place * count + index, functools.partial(echoed, prompt))
            for place, prompt in enumerate(prompts)
            for index in range(count)
        ]
        return stream(body, samples, kind, tokenizer, writings)
    return await _answer(request, samples, kind, lambda answers: _texts(body, choices_of(answers)))


def _texts(body: Completion, choices: Sequence[Choice]) -> list[Json]:
    return [_text(body, index, choice.tokens, choice.finish_reason) for index, choice in enumerate(choices)]


@dataclass
class TextWriting:
    """One choice of a stream of completions. `echoed`: what it begins with."""

    body: Completion
    index: int
    echoed: Callable[[pb.SampleResponse], Sequence[Token]]
    offset: int = 0

    def begin(self, answer: pb.SampleResponse) -> Iterator[Json]:
        return self.write(self.echoed(answer))

    def write(self, tokens: Sequence[Token]) -> Iterator[Json]:
        for token in tokens:
            yield _text(self.body, self.index, [token], None, self.offset)
            self.offset += len(token.text)

    def end(self, tokens: Sequence[Token], finish_reason: str) -> Iterator[Json]:
        yield from self.write(tokens)
        yield _text(self.body, self.index, [], finish_reason, self.offset)


def _text(
    body: Completion, index: int, tokens: Sequence[Token], finish_reason: str | None, offset: int = 0
) -> Json:
    return {
        "index": index,
        "text": "".join(token.text for token in tokens),
        "logprobs": None if body.logprobs is None else chat.text_logprobs(tokens, offset),
        "finish_reason": finish_reason,
    }


@router.post("/chat/completions", openapi_extra=takes(Chat), responses=_ANSWERS)
async def complete_chat(mine: MineToChange, request: Request) -> Response:
    body = await read(mine, request, Chat)
    weights = await _weights(mine, body.model)
    tokenizer = await _tokenizer(mine, weights.base_model)
    room = await _room(mine, weights)
    variables = body.chat_template_kwargs.model_dump(exclude_none=True) if body.chat_template_kwargs else {}

    def prompt_of() -> list[int]:
        messages = [message.model_dump() for message in body.messages]
        text = chat.render(tokenizer, messages, body.offered, variables)
        return chat.encode(tokenizer, text, room, "messages", add_special_tokens=False)

    prompt = await asyncio.to_thread(prompt_of)
    asked = {"topk_sample_logprobs": body.top_logprobs or 0}
    most = body.max_completion_tokens or body.max_tokens
    samples = await submit(
        mine, request, body, weights, [prompt], most, asked, are_streamed=bool(body.stream)
    )

    def choices_of(answers: Answers) -> list[Choice]:
        return [chat.choice_of(tokenizer, sequence, body.stops) for sequence in answers[0].sequences]

    if body.stream:
        writings = [ChatWriting(body, index) for index in range(body.n or 1)]
        return stream(body, samples, "chat.completion.chunk", tokenizer, writings)
    return await _answer(
        request, samples, "chat.completion", lambda answers: _messages(body, choices_of(answers))
    )


def _messages(body: Chat, choices: Sequence[Choice]) -> list[Json]:
    found: list[Json] = []
    for index, choice in enumerate(choices):
        text, calls = chat.calls_of(choice.text, body.offered)
        message: Json = {"role": "assistant", "content": text or (None if calls else "")}
        found.append(
            {
                "index": index,
                "message": {**message, "tool_calls": calls} if calls else message,
                "logprobs": chat.chat_logprobs(choice.tokens) if body.logprobs else None,
                "finish_reason": _reason(choice.finish_reason, calls),
            }
        )
    return found


@dataclass
class ChatWriting:
    """One choice of a stream of a conversation. Where tools may be called, what may be a call waits for the
    end."""

    body: Chat
    index: int
    said: str = ""

    def __post_init__(self) -> None:
        self._text = chat.before_calls() if self.body.offered else None

    def begin(self, answer: pb.SampleResponse) -> Iterator[Json]:
        yield _delta(self.index, {"role": "assistant", "content": ""})

    def write(self, tokens: Sequence[Token]) -> Iterator[Json]:
        for token in tokens if self._text is None else self._text.pass_on(tokens):
            self.said += token.text
            yield self._content(token.text, [token])

    def end(self, tokens: Sequence[Token], finish_reason: str) -> Iterator[Json]:
        yield from self.write(tokens)
        held = [] if self._text is None else self._text.held
        text, calls = chat.calls_of(self.said + chat.text_of(held), self.body.offered)
        if calls:
            yield self._content(text[len(self.said) :], held)
        else:
            yield from (self._content(token.text, [token]) for token in held)
        for number, call in enumerate(calls):
            yield _delta(self.index, {"tool_calls": [{"index": number, **call}]})
        yield _delta(self.index, {}, finish_reason=_reason(finish_reason, calls))

    def _content(self, text: str, tokens: Sequence[Token]) -> Json:
        return _delta(
            self.index, {"content": text}, chat.chat_logprobs(tokens) if self.body.logprobs else None
        )


def _delta(index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _reason(finish_reason: str, calls: Sequence[Json]) -> str:
    return "tool_calls" if calls and finish_reason == "stop" else finish_reason


async def _room(mine: Owner, weights: Weights) -> int:
    return (await mine.service.facts(weights.base_model)).max_context_length


# -- answers -----------------------------------------------------------------------------------------------


async def _answer(
    request: Request, samples: Samples, kind: str, read: Callable[[Answers], list[Json]]
) -> Response:
    """In one piece. A client that hangs up meanwhile gives its samples up."""
    answers = asyncio.ensure_future(samples.answers())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answers, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            return Response(status_code=499)  # which nobody reads
        found = answers.result()
        choices = await asyncio.to_thread(read, found)
        return reply({**samples.head(kind), "choices": choices, "usage": samples.usage(found)})
    finally:
        gone.cancel()
        answers.cancel()
        await samples.let_go()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
