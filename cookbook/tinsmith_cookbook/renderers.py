"""Messages to tokens and back, by the model's own chat template.

A message is a dict: role (system, user, assistant, tool), content, and where there are any
reasoning_content and tool_calls ([{"name", "arguments"}]). The template decides how they look; nothing here
knows a model's format but `parse`, which reads what Qwen and Hermes models write.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]


def chat(question: str, answer: str | None = None) -> list[Message]:
    """One question, and its answer if there is one already."""
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Example:
    """Tokens to train on; weights[i] says how much token i counts (0: it is only read)."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Response:
    """What a model answered. is_complete: it ended its turn itself. errors: tool calls that could not be
    read, left in the message's content as they were written."""

    message: Message
    is_complete: bool
    errors: list[str] = field(default_factory=list)


class Renderer:
    """Renders through `tokenizer`: what `get_tokenizer` gives, of our client or the official SDK, or one of
    transformers. The model's own template is in it; `template` stands in for it."""

    def __init__(self, tokenizer: Any, *, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._said = {"chat_template": template} if template else {}
        self.end_of_turn = str(tokenizer.eos_token)
        self.stop = self.encode(self.end_of_turn)

    @classmethod
    def of(cls, training: Any) -> "Renderer":
        """The renderer of the model that a training client trains."""
        return cls(training.get_tokenizer())

    # -- text and tokens -------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Special tokens where the text has them, and none added: templates write their own."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    # -- messages to tokens ----------------------------------------------------------------------------------

    def text(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        for_reply: bool = False,
        **options: Any,
    ) -> str:
        """The template's own output. for_reply: ends where the assistant begins. options: the template's own
        switches, e.g. enable_thinking."""
        text = self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=for_reply,
            tokenize=False,
            **self._said,
            **options,
        )
        return str(text)

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None, **options: Any) -> list[int]:
        """What to sample the assistant's next turn from."""
        return self.encode(self.text(messages, tools, for_reply=True, **options))

    def examples(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        train_on: Literal["all", "last"] = "all",
        **options: Any,
    ) -> list[Example]:
        """The assistant's turns as training examples; only what the assistant writes counts, its end of turn
        included.

        Usually one example for the whole conversation. Some templates render earlier turns differently once
        there are later ones (Qwen3 drops their reasoning): there the conversation becomes several examples,
        each what the model will see when it writes that turn. Tokens are cut where sampling would begin, so
        that they are the ones sampling meets.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ValueError("the conversation has no assistant turn to train on")
        made: list[Example] = []
        seen = ""
        for turn in turns if train_on == "all" else turns[-1:]:
            prompt = self.text(messages[:turn], tools, for_reply=True, **options)
            whole = self.text(messages[: turn + 1], tools, **options)
            if not whole.startswith(prompt):
                raise ValueError(
                    "the template's reply does not continue its prompt: nothing can be trained on"
                )
            if not (seen and prompt.startswith(seen)):
                made.append(Example([], []))
                seen = ""
            for text, weight in ((prompt[len(seen) :], 0.0), *self._reply(whole[len(prompt) :])):
                tokens = self.encode(text)
                made[-1].tokens.extend(tokens)
                made[-1].weights.extend([weight] * len(tokens))
            seen = whole
        return made

    def _reply(self, text: str) -> list[tuple[str, float]]:
        """The part that the assistant writes, and what the template adds behind its end of turn."""
        head, end, tail = text.rpartition(self.end_of_turn)
        return [(head + end, 1.0), (tail, 0.0)] if end else [(text, 1.0)]

    # -- tokens to messages ----------------------------------------------------------------------------------

    def parse(self, tokens: Sequence[int]) -> Response:
        """Read a sampled turn: its content, its reasoning (<think>…</think>) and its tool calls."""
        text = self.decode(tokens)
        body, ended, _ = text.partition(self.end_of_turn)
        message: Message = {"role": "assistant", "content": body}
        if "</think>" in body:
            thought, _, rest = body.partition("</think>")
            message = {"role": "assistant", "content": rest.lstrip("\n")}
            if thought := thought.rpartition("<think>")[2].strip("\n"):
                message["reasoning_content"] = thought
        calls, errors, said = _tool_calls(message["content"])
        if calls:
            message |= {"content": said.strip(), "tool_calls": calls}
        return Response(message, bool(ended), errors)


_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def _tool_calls(text: str) -> tuple[list[dict[str, Any]], list[str], str]:
    calls: list[dict[str, Any]] = []
    errors: list[str] = []

    def read(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            calls.append({"name": str(call["name"]), "arguments": dict(call["arguments"])})
        except (ValueError, KeyError, TypeError) as error:
            errors.append(f"{found[1].strip()!r} is not a tool call ({error!r})")
            return found[0]
        return ""

    said = _TOOL_CALL.sub(read, text)
    return calls, errors, said
