"""Messages to tokens and back, by the model's own chat template.

A message is a dict: role (system, user, assistant, tool), content, and where there are any
reasoning_content and tool_calls ([{"name", "arguments"}]). The template decides how they look; nothing here
knows a model's format but `parse`, which reads what Qwen and Hermes models write.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]


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
    """Renders with `template` (Jinja, as in tokenizer_config.json) through `tokenizer`: one of the tokenizers
    library, of transformers, or anything with their encode and decode."""

    def __init__(
        self, tokenizer: Any, template: str, special: Mapping[str, str], stop: Sequence[int] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._special = dict(special)
        self._template = _compile(template)
        self.end_of_turn = self._special["eos_token"]
        self.stop = list(stop) if stop is not None else self.encode(self.end_of_turn)

    @classmethod
    def of(cls, client: Any) -> "Renderer":
        """The renderer of the model that a training client trains."""
        tokenizer_id = client.get_info().model_data.tokenizer_id
        if tokenizer_id and (Path(tokenizer_id) / "tokenizer.json").exists():
            return cls.from_folder(Path(tokenizer_id))
        return cls.from_tokenizer(client.get_tokenizer())

    @classmethod
    def from_folder(cls, folder: Path) -> "Renderer":
        """Of a model's folder in Hugging Face format, without transformers."""
        from tokenizers import Tokenizer

        config = json.loads((folder / "tokenizer_config.json").read_text())
        file = folder / "chat_template.jinja"
        template = file.read_text() if file.exists() else config.get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{folder} has no chat template: pass one to Renderer(tokenizer, template, …)")
        special = {
            name: _content(config[name])
            for name in ("bos_token", "eos_token", "pad_token")
            if config.get(name)
        }
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), template, special)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Renderer":
        """Of a transformers tokenizer."""
        special = {
            name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        return cls(tokenizer, tokenizer.chat_template, special)

    # -- text and tokens ----------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Special tokens where the text has them, and none added: templates write their own."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids if hasattr(encoded, "ids") else encoded)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    # -- messages to tokens -------------------------------------------------------------------------------

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
        return self._template.render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=for_reply,
            **self._special,
            **options,
        )

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

    # -- tokens to messages -------------------------------------------------------------------------------

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


# -- templates, as transformers runs them -------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's words in some templates: rendered as they
    are."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _refuse(sentence: str) -> None:
    raise ValueError(f"the chat template refuses this conversation: {sentence}")


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _content(token: Any) -> str:
    return token if isinstance(token, str) else str(token["content"])
