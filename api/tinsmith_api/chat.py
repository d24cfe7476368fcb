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


# The likeliest tokens at one place, and their logprobs.
Top = tuple[Sequence[int], Sequence[float]]


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
        return text_of(self.tokens)

    @property
    def finish_reason(self) -> str:
        return finish_reason(self.stopped)


def finish_reason(stopped: bool) -> str:
    return "stop" if stopped else "length"


def choice_of(tokenizer: Tokenizer, sequence: pb.SampledSequence, stops: Sequence[str]) -> Choice:
    stopped = sequence.stop_reason == pb.STOP_REASON_STOP
    reader = Reader(tokenizer, stops)
    ids = np.frombuffer(sequence.tokens, "<i4").tolist()
    return Choice([*reader.read(ids, logprobs_of(sequence), top_of(sequence)), *reader.end(stopped)], stopped)


def prompt_tokens(tokenizer: Tokenizer, prompt: Sequence[int], answer: pb.SampleResponse) -> list[Token]:
    """The prompt as completions with `echo` give it back; logprobs where they were asked for."""
    reader = Reader(tokenizer, ())
    logprobs = np.frombuffer(answer.prompt_logprobs, "<f4").tolist() or [None] * len(prompt)
    top = _table(answer.topk_prompt_logprobs, len(prompt))
    return [*reader.read(prompt, [None, *logprobs[1:]], top), *reader.end(stopped=False)]


def logprobs_of(sequence: pb.SampledSequence) -> list[float]:
    found: list[float] = np.frombuffer(sequence.logprobs, "<f4").tolist()
    return found


def top_of(sequence: pb.SampledSequence) -> list[Top]:
    return _table(sequence.topk_sampled_logprobs, len(sequence.tokens) // 4)


def _table(top: pb.TopkLogprobs, length: int) -> list[Top]:
    shape = (top.length, top.k)
    ids = np.frombuffer(top.token_ids, "<i4").reshape(shape).tolist() or [[]] * length
    logprobs = np.frombuffer(top.logprobs, "<f4").reshape(shape).tolist() or [[]] * length
    return list(zip(ids, logprobs, strict=True))


class Reader:
    """Reads what was sampled as the text of a choice, in as many parts as it comes, without the stop that
    ended it. What only later tokens can tell is held back: whether a character goes on, whether a special
    token was the end, whether a stop begins."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = Watch(stops)
        # Tokens are decoded together with those before them: some decoders write the first otherwise than the
        # next. `_known` of `_window` have their text.
        self._window: list[int] = []
        self._known = 0
        # The last token, if what it says is open: what it is if another follows, if none does, and whether it
        # is a special one.
        self._undecided: tuple[Token, Token, bool] | None = None

    def read(self, ids: Sequence[int], logprobs: Sequence[float | None], top: Sequence[Top]) -> list[Token]:
        tokens = []
        for number, logprob, best in zip(ids, logprobs, top, strict=True):
            if self._undecided is not None:
                tokens.append(self._undecided[0])
            tokens += self._next(number, logprob, best)
        return self._until_a_stop(tokens)

    def end(self, stopped: bool) -> list[Token]:
        """What was held back. `stopped`: by a stop, which may be the last token."""
        rest = []
        if self._undecided is not None:
            _, last, is_special = self._undecided
            rest = [] if stopped and is_special else [last]
        rest = self._until_a_stop(rest)
        return rest if self._stops.place is not None else [*rest, *self._stops.held]

    def _next(self, number: int, logprob: float | None, best: Top) -> list[Token]:
        decode = self._tokenizer.decode
        before = decode(self._window[: self._known], skip_special_tokens=True)
        self._window.append(number)
        piece = decode(self._window, skip_special_tokens=True)[len(before) :]
        unknown = len(self._window) - self._known
        is_part = piece.endswith(_NO_CHARACTER) and unknown < _TOKENS_OF_A_CHARACTER
        if not is_part:
            self._window, self._known = self._window[self._known :], unknown
        token = Token(piece, piece or decode([number]), logprob, _likeliest(self._tokenizer, *best))
        is_special = number in self._tokenizer.all_special_ids
        if is_part or is_special:
            followed = replace(token, text="", name=decode([number])) if is_part else token
            self._undecided = (followed, token, is_special)
            return []
        self._undecided = None
        return [token]

    def _until_a_stop(self, tokens: Sequence[Token]) -> list[Token]:
        if self._stops.place is not None:
            return []
        passed = self._stops.pass_on(tokens)
        return passed if self._stops.place is None else [*passed, *_cut(self._stops.held, self._stops.place)]


def _cut(tokens: Sequence[Token], length: int) -> list[Token]:
    """Those that make up so much text, and no more."""
    kept = []
    for token in tokens:
        if length <= 0:
            break
        kept.append(replace(token, text=token.text[:length]))
        length -= len(token.text)
    return kept


class Watch:
    """Passes tokens on until one of `marks` is in their text, which is then at `place` in the text of those
    that are `held`. Before, those are held whose text may turn out to begin one; and, if `with_space`, the
    space before it."""

    def __init__(self, marks: Sequence[str], *, with_space: bool = False) -> None:
        self.held: list[Token] = []
        self.place: int | None = None
        self._marks = marks
        self._with_space = with_space
        self._longest = max(map(len, marks), default=1)

    def pass_on(self, tokens: Sequence[Token]) -> list[Token]:
        self.held += tokens
        if self.place is not None:
            return []
        text = text_of(self.held)
        self.place = min((at for mark in self._marks if (at := text.find(mark)) >= 0), default=None)
        certain = self._certain(text) if self.place is None else self.place
        if self._with_space:
            certain = len(text[:certain].rstrip())
        count = end = 0
        for token in self.held:
            if end + len(token.text) > certain:
                break
            count, end = count + 1, end + len(token.text)
        passed, self.held = self.held[:count], self.held[count:]
        if self.place is not None:
            self.place -= end
        return passed

    def _certain(self, text: str) -> int:
        """How much of it is before whatever may begin a mark."""
        start = max(0, len(text) + 1 - self._longest)
        while start < len(text) and not any(mark.startswith(text[start:]) for mark in self._marks):
            start += 1
        return start


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def _likeliest(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float]
) -> list[tuple[str, float]]:
    return [
        (tokenizer.decode([number]), logprob)
        for number, logprob in zip(ids, logprobs, strict=True)
        if logprob > _EMPTY_LOGPROB
    ]


def before_calls() -> "Watch":
    """Passes on what is text for certain, whatever is called later."""
    return Watch([_CALL], with_space=True)


def calls_of(text: str, tools: Sequence[Json]) -> tuple[str, list[Json]]:
    """(the text without the calls of these tools that are written in it, or space at its end, the calls).
    What cannot be read as one, or calls another tool, stays text."""
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
        said += behind if said else behind.lstrip()
    return (said.rstrip() if calls else said), calls


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
