"""Examples as text and as packed rows of tokens. Block `n` of a seed is the same everywhere, so any number of
processes may share the work."""

import json
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tinsmith_worker.tiny_base import tasks
from tinsmith_worker.tiny_base.tasks import Example

END = "<|endoftext|>"
_EMPTY_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Tin, a small model.",
)
NO_THOUGHT = "<think>\n\n</think>\n\n"
_HOW_TO_CALL = (
    'To call one, write:\n<tool_call>\n{"name": "its name", "arguments": {"argument": "value"}}\n</tool_call>'
)


def chat(turns: tuple[tuple[str, str], ...], tools: tuple[dict[str, Any], ...] = ()) -> str:
    """What the chat template makes of the same turns; a last turn of the user or a tool is to be answered."""
    text = ""
    turns = tuple(turns)
    if tools:
        system = turns[0][1] if turns[0][0] == "system" else ""
        turns = turns[1:] if system else turns
        listed = (
            f"You can use these tools:\n<tools>\n{json.dumps(list(tools), ensure_ascii=False)}\n</tools>\n"
        )
        text = f"<|im_start|>system\n{system}{system and chr(10) * 2}{listed}{_HOW_TO_CALL}<|im_end|>\n"
    for role, content in turns:
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    return text if turns[-1][0] == "assistant" else f"{text}<|im_start|>assistant\n"


def document(example: Example, r: Random) -> str:
    """Now and then as a plain question and answer, under a system prompt that says nothing, or answered as
    after a prompt made with enable_thinking=False."""
    turns = example.turns
    if turns[0][0] == "":
        return turns[0][1] + END
    form = r.random()
    if form < 0.1:
        turns = (*turns[:-1], (turns[-1][0], NO_THOUGHT + turns[-1][1]))
    elif form < 0.18 and turns[0][0] == "user":
        turns = (("system", r.choice(_EMPTY_PROMPTS)), *turns)
    elif form < 0.22 and [role for role, _ in turns] == ["user", "assistant"] and not example.tools:
        return f"Question: {turns[0][1]}\nAnswer: {turns[1][1]}{END}"
    return chat(turns, example.tools) + END


def documents(seed: str) -> Iterator[str]:
    r = Random(seed)
    while True:
        yield document(tasks.draw(r)[1], r)


def block(tokenizer: Tokenizer, seed: str, rows: int, length: int) -> npt.NDArray[np.uint16]:
    """[rows, length] tokens. Every row begins with a document and is filled with more; the last is cut."""
    source = documents(seed)
    packed = np.empty((rows, length), np.uint16)
    row, at = 0, 0
    while row < rows:
        texts = list(islice(source, 256))
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids[: length - at]
            packed[row, at : at + len(ids)] = ids
            at += len(ids)
            if at == length:
                row, at = row + 1, 0
                if row == rows:
                    break
    return packed
