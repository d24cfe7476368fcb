"""The renderer says what the tokenizer's own template says, and reads back what was rendered."""

from pathlib import Path
from typing import Any

import pytest

from tinsmith import Tokenizer
from tinsmith_cookbook.renderers import Message, Renderer
from tinsmith_worker import tiny_base

# How the templates of Qwen3 and its kin treat what a simple one does not: tools in the system turn, calls as
# JSON in <tool_call>, results as a user's <tool_response>, and reasoning that only the last turns keep.
REASONING_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Sum two", "parameters": {"type": "object", "properties": {}}},
}
SYSTEM: Message = {"role": "system", "content": "You are brief. Ünïcode ✓"}
ASK: Message = {"role": "user", "content": "What is 2 + 3?"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}],
}
FOUND: Message = {"role": "tool", "content": "5"}
TELL: Message = {"role": "assistant", "content": "It is 5.", "reasoning_content": "The tool said 5."}
AGAIN: Message = {"role": "user", "content": "And doubled?\n"}
LAST: Message = {"role": "assistant", "content": "10", "reasoning_content": "5 twice"}

CONVERSATIONS: dict[str, tuple[list[Message], list[Any] | None]] = {
    "one turn": ([ASK, {"role": "assistant", "content": "5"}], None),
    "system": ([SYSTEM, ASK, {"role": "assistant", "content": "5"}], None),
    "multi-turn": (
        [ASK, {"role": "assistant", "content": "5"}, AGAIN, {"role": "assistant", "content": "10"}],
        None,
    ),
    "tools": ([SYSTEM, ASK, CALL, FOUND, TELL], [TOOL]),
    "tools, multi-turn, reasoning": ([ASK, CALL, FOUND, TELL, AGAIN, LAST], [TOOL]),
}


@pytest.fixture(scope="session")
def folder() -> Path:
    return tiny_base.FOLDER


@pytest.fixture(scope="session")
def library(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["the base's own", "reasoning"])
def template(request: pytest.FixtureRequest, library: Any) -> str:
    return library.chat_template if request.param == "the base's own" else REASONING_TEMPLATE


@pytest.fixture(scope="session")
def ours(folder: Path) -> Tokenizer:
    """The client's own, made of the files that a service sends."""
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return Tokenizer({name: (folder / name).read_text() for name in files})


@pytest.fixture(params=["ours", "library"])
def renderer(request: pytest.FixtureRequest, template: str) -> Renderer:
    """Of the client's tokenizer, and of transformers', which the official SDK gives."""
    return Renderer(request.getfixturevalue(request.param), template=template)


@pytest.fixture(params=["ours", "library"])
def reasoning(request: pytest.FixtureRequest) -> Renderer:
    return Renderer(request.getfixturevalue(request.param), template=REASONING_TEMPLATE)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_and_prompt_are_the_templates_own(
    name: str, renderer: Renderer, library: Any, template: str
) -> None:
    messages, tools = CONVERSATIONS[name]
    said = {"tools": tools, "chat_template": template}
    assert renderer.text(messages, tools) == library.apply_chat_template(messages, tokenize=False, **said)
    prompt = library.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False, **said)
    assert renderer.prompt(messages[:-1], tools) == prompt


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_an_example_is_what_the_template_says_and_counts_what_the_assistant_says(
    name: str, renderer: Renderer, library: Any, template: str
) -> None:
    """transformers marks the assistant's tokens itself where a template has {% generation %}."""
    messages, tools = CONVERSATIONS[name]
    examples = renderer.examples(messages, tools)
    whole = library.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
    assert examples[-1].tokens == whole
    if "endgeneration" in template and len(examples) == 1:
        marked = library.apply_chat_template(
            messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert examples[0].weights == marked["assistant_masks"]
    trained = "".join(
        renderer.decode([t for t, w in zip(e.tokens, e.weights, strict=True) if w]) for e in examples
    )
    answers = [m for m in messages if m["role"] == "assistant"]
    assert trained.count("<|im_end|>") >= len(answers)
    assert "user" not in trained
    assert all(answer["content"] in trained for answer in answers)


def test_a_template_that_rewrites_history_makes_an_example_of_each_turn_it_rewrites(
    reasoning: Renderer,
) -> None:
    renderer = reasoning
    messages, tools = CONVERSATIONS["tools, multi-turn, reasoning"]
    first, last = renderer.examples(messages, tools)
    for example, until in ((first, 4), (last, 6)):
        prompt = renderer.prompt(messages[: until - 1], tools)
        assert example.tokens[: len(prompt)] == prompt  # each turn is met as it will be when it is sampled
        assert example.weights[len(prompt)] == 1
    assert "The tool said 5." in renderer.decode(first.tokens)
    assert "The tool said 5." not in renderer.decode(last.tokens)
    assert sum(last.weights) == len(renderer.encode("<think>\n5 twice\n</think>\n\n10<|im_end|>"))  # fmt: skip


def test_training_on_the_last_turn_alone(renderer: Renderer) -> None:
    messages, _ = CONVERSATIONS["multi-turn"]
    (example,) = renderer.examples(messages, train_on="last")
    assert (
        renderer.decode([t for t, w in zip(example.tokens, example.weights, strict=True) if w])
        == "10<|im_end|>"
    )


def test_what_was_rendered_is_read_back(reasoning: Renderer) -> None:
    renderer = reasoning
    for message in (CALL, TELL, LAST, {"role": "assistant", "content": "Just words, 1 < 2."}):
        (example,) = renderer.examples([ASK, message])
        answered = [t for t, w in zip(example.tokens, example.weights, strict=True) if w]
        response = renderer.parse(answered)
        assert response.message == message
        assert response.is_complete
        assert response.errors == []


def test_a_broken_tool_call_is_an_error_and_stays_readable(reasoning: Renderer) -> None:
    renderer = reasoning
    response = renderer.parse(renderer.encode('Well. <tool_call>\n{"name": "add", "arg'))
    assert not response.is_complete
    assert len(response.errors) == 1
    assert response.message["content"] == 'Well. <tool_call>\n{"name": "add", "arg'
    assert "tool_calls" not in response.message
    both = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>[]</tool_call>'
    response = renderer.parse(renderer.encode(both + "<|im_end|>"))
    assert response.message["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    assert len(response.errors) == 1
    assert response.is_complete


def test_a_conversation_without_an_answer_is_refused(renderer: Renderer) -> None:
    with pytest.raises(ValueError, match="no assistant turn"):
        renderer.examples([ASK])
