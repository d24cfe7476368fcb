"""Between OpenAI's forms and tokens: conversations in, texts with their log probabilities and calls of tools
out."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from pydantic_core import from_json, to_json

from tinsmith.errors import InvalidInput
from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb

Json = dict[str, Any]

# How Qwen's, Hermes' and this project's own models write the call of a tool: JSON between these.
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
# A character takes at most four tokens; what is none after twice as many never will be.
_TOKENS_OF_A_CHARACTER = 8
_NO_CHARACTER = "\ufffd"
_EMPTY_LOGPROB = -99999.0
# No text of any use has fewer tokens for its length.
_CHARACTERS_OF_A_TOKEN = 32


class Refused(InvalidInput):
    """With what OpenAI's clients are told beside the sentence: the parameter that is wrong, and a code."""

    def __init__(self, sentence: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param
        self.code = code


# -- conversations -----------------------------------------------------------------------------------------


def render(tokenizer: Tokenizer, messages: Sequence[Json], tools: Sequence[Json], variables: Json) -> str:
    """The conversation as the model's own template writes it, up to where the assistant begins."""
    model = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise Refused(f"{model} has no chat template: it takes no conversations, but completions", "model")
    for name in (*variables, *(["tools"] if tools else [])):
        if name not in tokenizer.chat_template:
            raise Refused(f"the chat template of {model} knows no {name}: leave it out", name)
    try:
        text: str = tokenizer.apply_chat_template(
            _conversation(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **variables,
        )
    except (TemplateError, TypeError) as error:
        raise Refused(
            f"the model's chat template does not take these messages: {error}", "messages"
        ) from None
    return text


def encode(
    tokenizer: Tokenizer, text: str, room: int, param: str, *, add_special_tokens: bool = True
) -> list[int]:
    if len(text) > room * _CHARACTERS_OF_A_TOKEN:
        raise too_long(f"{param} has {len(text)} characters", room, param)
    return tokenizer.encode(text, add_special_tokens)


def too_long(what: str, room: int, param: str) -> Refused:
    return Refused(f"{what}: the model's context is {room} tokens", param, "context_length_exceeded")


def _conversation(messages: Sequence[Json]) -> list[Json]:
    """As templates expect it: every content a text, and the arguments of calls objects."""
    written: list[Json] = []
    asked: set[str] = set()
    for place, message in enumerate(messages):
        param = f"messages.{place}"
        role, content, calls = message["role"], message["content"], message["tool_calls"] or []
        if content is None and not calls:
            raise Refused(f"{param} needs a content", f"{param}.content")
        if calls and role != "assistant":
            raise Refused(f"{param}: only an assistant calls tools", f"{param}.tool_calls")
        if role == "tool" and message["tool_call_id"] not in asked:
            raise Refused(f"{param} answers no call of a message before it", f"{param}.tool_call_id")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        given: Json = {"role": "system" if role == "developer" else role, "content": content or ""}
        if calls:
            given["tool_calls"] = [_with_arguments(call, f"{param}.tool_calls") for call in calls]
            asked.update(call["id"] for call in calls)
        written.append(given)
    return written


def _with_arguments(call: Json, param: str) -> Json:
    function = call["function"]
    arguments = _object(function["arguments"])
    if arguments is None:
        raise Refused(f"{param}: the arguments of {function['name']} must be a JSON object", param)
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: str) -> Json | None:
    """What `text` is the JSON of, if that is an object."""
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# -- texts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """`text` is what it adds to the text before it, and `name` how it is written when it stands alone;
    `logprob` is None of what nothing comes before. `top`: the likeliest at its place, best first."""

    text: str
    name: str
    logprob: float | None
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Choice:
    """What was sampled, without the stop that ended it."""

    tokens: list[Token]
    stopped: bool

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.stopped else "length"


def choice_of(tokenizer: Tokenizer, sequence: pb.SampledSequence, stops: Sequence[str]) -> Choice:
    ids = np.frombuffer(sequence.tokens, "<i4").tolist()
    logprobs = np.frombuffer(sequence.logprobs, "<f4").tolist()
    tokens = _tokens(tokenizer, ids, logprobs, sequence.topk_sampled_logprobs)
    stopped = sequence.stop_reason == pb.STOP_REASON_STOP
    if stopped and ids[-1] in tokenizer.all_special_ids:
        tokens.pop()
    return Choice(_cut(tokens, stops), stopped)


def prompt_tokens(tokenizer: Tokenizer, prompt: Sequence[int], answer: pb.SampleResponse) -> list[Token]:
    """The prompt as completions with `echo` give it back; logprobs where they were asked for."""
    found = np.frombuffer(answer.prompt_logprobs, "<f4").tolist() or [None] * len(prompt)
    return _tokens(tokenizer, prompt, [None, *found[1:]], answer.topk_prompt_logprobs)


def _tokens(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float | None], top: pb.TopkLogprobs
) -> list[Token]:
    texts = _pieces(tokenizer, ids)
    shape = (top.length, top.k)
    top_ids = np.frombuffer(top.token_ids, "<i4").reshape(shape).tolist() or [[]] * len(ids)
    top_logprobs = np.frombuffer(top.logprobs, "<f4").reshape(shape).tolist() or [[]] * len(ids)
    return [
        Token(text, text or tokenizer.decode(number), logprob, _likeliest(tokenizer, *best))
        for number, text, logprob, best in zip(
            ids, texts, logprobs, zip(top_ids, top_logprobs, strict=True), strict=True
        )
    ]


def _likeliest(tokenizer: Tokenizer, ids: list[int], logprobs: list[float]) -> list[tuple[str, float]]:
    return [
        (tokenizer.decode(number), logprob)
        for number, logprob in zip(ids, logprobs, strict=True)
        if logprob > _EMPTY_LOGPROB
    ]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; nothing while a character is incomplete. A few tokens are decoded
    together with those before them: some decoders write the first otherwise than the next."""
    pieces: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:read], skip_special_tokens=True)
        text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        may_go_on = end < len(ids) and end - read < _TOKENS_OF_A_CHARACTER
        if text.endswith(_NO_CHARACTER) and may_go_on:
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        start, read = read, end
    return pieces


def _cut(tokens: list[Token], stops: Sequence[str]) -> list[Token]:
    """Without the first stop and what follows."""
    text = "".join(token.text for token in tokens)
    left = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text) + 1)
    kept = []
    for token in tokens:
        if left <= 0:
            break
        kept.append(replace(token, text=token.text[:left]))
        left -= len(token.text)
    return kept


def calls_of(text: str, tools: Sequence[Json]) -> tuple[str, list[Json]]:
    """(the text without the calls of these tools that are written in it, the calls). What cannot be read as
    one, or calls another tool, stays text."""
    names = {tool["function"]["name"] for tool in tools}
    said, *written = text.split(_CALL)
    calls: list[Json] = []
    for part in written:
        inside, _, behind = part.partition(_CALL_END)
        call = _object(inside) or {}
        name, arguments = call.get("name"), call.get("arguments", {})
        if name not in names or not isinstance(arguments, dict):
            said += _CALL + part
            continue
        function = {"name": name, "arguments": to_json(arguments).decode()}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        said += behind
    return (said.strip() if calls else said), calls


# -- log probabilities -------------------------------------------------------------------------------------


def chat_logprobs(tokens: Sequence[Token]) -> Json:
    def described(name: str, logprob: float | None) -> Json:
        # A part of a character has bytes, too, but no tokenizer says which.
        known = None if _NO_CHARACTER in name else list(name.encode())
        return {"token": name, "logprob": logprob, "bytes": known}

    content = [
        {**described(token.name, token.logprob), "top_logprobs": [described(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Token], offset: int = 0) -> Json:
    """As completions have them, of tokens whose text begins at `offset`."""
    offsets = np.cumsum([offset, *(len(token.text) for token in tokens)])[:-1].tolist()
    return {
        "tokens": [token.name for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # Of several that are written alike the likeliest.
        "top_logprobs": [dict(reversed(token.top)) or None for token in tokens],
        "text_offset": offsets,
    }
