"""Conversations from files, and batches of examples for a service."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from tinsmith_cookbook.renderers import Example, Message, Renderer
from tinsmith_cookbook.sdk import tinker

Row = TypeVar("Row")
Format = Literal["alpaca", "sharegpt", "chat"]


class BadData(ValueError):  # noqa: N818 - says what it is
    """A file whose rows are not what they should be; the message names the first few."""


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str


# -- files -----------------------------------------------------------------------------------------------


def read(file: Path, form: Format | None = None, *, bad: list[str] | None = None) -> list[Conversation]:
    """The conversations in a file: JSON Lines, or one JSON array. The form is guessed from the first row.

    alpaca     {"instruction", "input" (may be missing or empty), "output", "system" (optional)}
    sharegpt   {"conversations": [{"from": human|gpt|…, "value"}], "system", "tools" (optional)}
    chat       {"messages": [{"role", "content"}], "tools" (optional)}

    Raises BadData, which names up to five bad rows; give a list as `bad` to collect all sentences there and
    go on without those rows.
    """
    rows = _rows(file)
    if not rows:
        raise BadData(f"{file} has no rows")
    form = form or _guess(file, rows[0][1])
    good: list[Conversation] = []
    sentences: list[str] = []
    for place, row in rows:
        try:
            good.append(_READERS[form](row))
        except _Bad as error:
            sentences.append(f"{file.name}, {place}: {error}")
    if sentences and bad is None:
        more = f"\n… and {len(sentences) - 5} more" if len(sentences) > 5 else ""
        raise BadData(f"{len(sentences)} of {len(rows)} rows are bad:\n" + "\n".join(sentences[:5]) + more)
    if bad is not None:
        bad.extend(sentences)
    return good


def named(text: str) -> tuple[Path, Format | None]:
    """FILE or FORM:FILE, as a command line names data; for `read`."""
    for form in _READERS:
        if text.startswith(f"{form}:"):
            return Path(text.removeprefix(f"{form}:")), form
    return Path(text), None


def read_pairs(file: Path) -> list[Pair]:
    """Preferences, {"prompt", "chosen", "rejected"} a row; the prompt is text or a list of messages."""
    pairs = []
    for place, row in _rows(file):
        try:
            prompt = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(prompt, list):
                prompt = [{"role": "user", "content": _text(row, "prompt")}]
            pairs.append(Pair(prompt, _text(row, "chosen"), _text(row, "rejected")))
        except _Bad as error:
            raise BadData(f"{file.name}, {place}: {error}") from None
    if not pairs:
        raise BadData(f"{file} has no rows")
    return pairs


class _Bad(ValueError):  # noqa: N818
    pass


def _rows(file: Path) -> list[tuple[str, Any]]:
    text = file.read_text()
    if text.lstrip().startswith("["):
        try:
            return [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise BadData(f"{file.name} is not JSON: {error}") from None
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise BadData(f"{file.name}, line {number} is not JSON: {error}") from None
    return rows


def _guess(file: Path, row: Any) -> Format:
    keys: dict[str, Format] = {"instruction": "alpaca", "conversations": "sharegpt", "messages": "chat"}
    found = [form for key, form in keys.items() if isinstance(row, dict) and key in row]
    if not found:
        raise BadData(
            f"{file.name}: the first row has none of {', '.join(keys)}: "
            "it is neither Alpaca nor ShareGPT nor chat"
        )
    return found[0]


def _alpaca(row: Any) -> Conversation:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise _Bad("'input' is not text")
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    asked = f"{instruction}\n\n{more}" if more else instruction
    return Conversation(
        [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    )


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "function": "function",
}


def _sharegpt(row: Any) -> Conversation:
    turns = _list(row, "conversations")
    messages = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    for at, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise _Bad(f"turn {at} is not an object")
        said = turn.get("from", turn.get("role"))
        if said not in _SHAREGPT_ROLES:
            raise _Bad(f"turn {at} is from {said!r}: the roles are {', '.join(_SHAREGPT_ROLES)}")
        content = turn.get("value", turn.get("content"))
        if not isinstance(content, str):
            raise _Bad(f"turn {at} has no text under 'value' or 'content'")
        messages.append(
            _function(content, at)
            if said == "function"
            else {"role": _SHAREGPT_ROLES[said], "content": content}
        )
    _check_turns(messages)
    return Conversation(messages, _tools(row))


def _function(content: str, at: int) -> Message:
    """ShareGPT's function turns hold the call as JSON: {"name", "arguments"}."""
    try:
        call = json.loads(content)
        called = {"name": str(call["name"]), "arguments": dict(call["arguments"])}
    except (ValueError, KeyError, TypeError):
        raise _Bad(f'turn {at} is a function call but not {{"name": …, "arguments": {{…}}}}') from None
    return {"role": "assistant", "content": "", "tool_calls": [called]}


def _chat(row: Any) -> Conversation:
    messages = _list(row, "messages")
    for at, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in (
            "system",
            "user",
            "assistant",
            "tool",
        ):
            raise _Bad(f"message {at} has no role among system, user, assistant, tool")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise _Bad(f"message {at} has no text under 'content'")
    _check_turns(messages)
    return Conversation([{**m, "content": m.get("content") or ""} for m in messages], _tools(row))


def _check_turns(messages: Sequence[Message]) -> None:
    """Human and observation speak, the assistant answers; a system message only comes first."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise _Bad("a system message comes after the first place")
    spoken = roles[roles[:1] == ["system"] :]
    if not spoken or spoken[-1] != "assistant":
        raise _Bad("the last turn is not the assistant's: there is nothing to learn from it")
    for at, (role, follows) in enumerate(zip(spoken, [*spoken[1:], ""], strict=True), 1):
        if at == 1 and role != "user":
            raise _Bad(f"the first turn is the {role}'s, not the user's")
        if role == "user" and follows != "assistant":
            raise _Bad(f"turn {at} is the user's and no answer of the assistant follows")
        if role == "assistant" and follows == "assistant":
            raise _Bad(f"turns {at} and {at + 1} are both the assistant's")


def _tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:  # ShareGPT files often hold them as JSON in a string
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise _Bad("'tools' is text but not JSON") from None
    if tools and not isinstance(tools, list):
        raise _Bad("'tools' is not a list")
    return tools or None


def _text(row: Any, name: str) -> str:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"'{name}' is missing, empty or not text")
    return value


def _list(row: Any, name: str) -> list[Any]:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, list) or not value:
        raise _Bad(f"'{name}' is missing, empty or not a list")
    return value


_READERS: dict[Format, Callable[[Any], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "chat": _chat,
}


# -- examples --------------------------------------------------------------------------------------------


def examples(
    conversations: Iterable[Conversation], renderer: Renderer, *, longest: int | None = None
) -> list[Example]:
    """All of them rendered. Raises BadData for one of more than `longest` tokens: it would be cut in the
    middle of an answer."""
    made = [e for c in conversations for e in renderer.examples(c.messages, c.tools)]
    if longest and (too_long := [len(e.tokens) for e in made if len(e.tokens) > longest]):
        raise BadData(
            f"{len(too_long)} examples are longer than {longest} tokens (the longest has {max(too_long)}): "
            "raise the limit, or leave them out"
        )
    return made


def datum(example: Example, *, normalize: bool = False) -> tinker.Datum:
    """Position i predicts token i + 1. normalize: an example's weights sum to 1, so that a batch's loss is a
    sum over examples and not over tokens; the service itself divides nothing."""
    weights = np.asarray(example.weights[1:], np.float32)
    if normalize and weights.sum() > 0:
        weights = weights / weights.sum()
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(example.tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.asarray(example.tokens[1:], np.int64)),
            "weights": tinker.TensorData.from_numpy(weights),
        },
    )


def counted(batch: Sequence[tinker.Datum]) -> float:
    """How many tokens are learnt from: what the service sums, divided by it, is a mean."""
    return sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in batch)


def pack(made: Sequence[Example], sequence_len: int) -> list[Example]:
    """Several examples in one sequence of at most `sequence_len` tokens, the longest placed first where they
    fit (first-fit decreasing). Later ones can see those before them.

    A service packs the datums of a call without padding and without letting them see each other: prefer
    `by_tokens` there. This is for a service that charges or limits by sequence.
    """
    bins: list[Example] = []
    for example in sorted(made, key=lambda e: -len(e.tokens)):
        if len(example.tokens) > sequence_len:
            raise BadData(
                f"an example has {len(example.tokens)} tokens, more than a sequence of {sequence_len}"
            )
        place = next((b for b in bins if len(b.tokens) + len(example.tokens) <= sequence_len), None)
        if place is None:
            bins.append(place := Example([], []))
        place.tokens.extend(example.tokens)
        # Nothing predicts the first token of an example from the end of the one before it.
        place.weights.extend([0.0, *example.weights[1:]])
    return bins


def by_tokens(made: Sequence[Example], most: int) -> list[list[Example]]:
    """Batches in the given order, each of at most `most` tokens (one longer example goes alone)."""
    batches: list[list[Example]] = [[]]
    room = most
    for example in made:
        if batches[-1] and len(example.tokens) > room:
            batches.append([])
            room = most
        batches[-1].append(example)
        room -= len(example.tokens)
    return batches if batches[0] else []


def split(rows: Sequence[Row], held_out: float | int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation): a share below 1, or a number of rows, drawn by the seed; both keep their
    order."""
    count = round(held_out * len(rows)) if isinstance(held_out, float) else held_out
    if not 0 <= count < len(rows):
        raise BadData(f"cannot hold out {count} of {len(rows)} rows: at least one must be left to train on")
    out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in out], [r for i, r in enumerate(rows) if i in out]


class Batches(Sequence[list[Row]]):
    """batches[step] for every step: each epoch is a new order, and what a step gets depends on the seed and
    the step alone. So a resumed run goes on with the next batch, neither repeating nor leaving out any.

    A batch may reach over the end of an epoch into the next.
    """

    def __init__(self, rows: Sequence[Row], batch: int, steps: int, seed: int) -> None:
        if not rows:
            raise BadData("there is nothing to make batches of")
        self.rows, self.batch, self.steps, self.seed = list(rows), batch, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self.rows[self._order(p // len(self.rows))[p % len(self.rows)]] for p in places]

    def epoch(self, step: int) -> float:
        """How many times all rows have been seen after `step` steps."""
        return step * self.batch / len(self.rows)

    def _order(self, epoch: int) -> Any:
        if getattr(self, "_kept", (None, None))[0] != epoch:
            self._kept = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)))
        return self._kept[1]
