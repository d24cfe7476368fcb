"""Sampled tokens as text, in as many parts as they come."""

import random
from pathlib import Path

import numpy as np
import pytest

from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import chat
from tinsmith_api.chat import Reader, Token, Top

FILES = Path(__file__).parent.parent.parent / "worker/tinsmith_worker/tiny_base/model"
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NO_TOP: Top = ([], [])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer({name: (FILES / name).read_text() for name in NAMES}, "tiny")


def read(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], *, cuts: list[int], stopped: bool
) -> list[Token]:
    reader = Reader(tokenizer, stops)
    tokens = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        part = ids[start:stop]
        tokens += reader.read(part, [-float(n) for n in range(start, stop)], [NO_TOP] * len(part))
    return tokens + reader.end(stopped)


def test_in_whatever_parts_it_comes_the_text_is_the_same(tokenizer: Tokenizer) -> None:
    chance = random.Random(3)
    end = tokenizer.encode("<|im_end|>")
    texts = ["naïve 東京 🙂🙂 <think>no</think>", "abcabcabd, and on", "東", "", "  two  spaces "]
    for _ in range(300):
        ids = tokenizer.encode(chance.choice(texts) + chance.choice(texts))
        if chance.random() < 0.3:  # what no tokenizer would write: parts of characters, ends in the middle
            ids = [chance.randrange(len(tokenizer)) for _ in range(12)] + chance.choice([[], end]) + ids
        stopped = chance.random() < 0.5
        ids += end if stopped else []
        stops = chance.sample(["abd", "bc", "二", "🙂 <", "abcabcabx", "d, "], chance.randrange(4))
        cuts = sorted(chance.randrange(len(ids) + 1) for _ in range(chance.randrange(6)))
        parts = read(tokenizer, ids, stops, cuts=cuts, stopped=stopped)
        one_by_one = read(tokenizer, ids, stops, cuts=list(range(1, len(ids))), stopped=stopped)
        whole = chat.choice_of(
            tokenizer,
            pb.SampledSequence(
                stop_reason=pb.STOP_REASON_STOP if stopped else pb.STOP_REASON_LENGTH,
                tokens=np.array(ids, "<i4").tobytes(),
                logprobs=(-np.arange(len(ids))).astype("<f4").tobytes(),
            ),
            stops,
        ).tokens
        assert parts == one_by_one == whole
        text = tokenizer.decode(ids, skip_special_tokens=True)
        at = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
        if "\ufffd" not in text:
            assert chat.text_of(parts) == text[:at]


def test_a_token_waits_only_for_what_could_change_it(tokenizer: Tokenizer) -> None:
    reader = Reader(tokenizer, ["wxyz"])

    def say(text: str) -> str:
        ids = tokenizer.encode(text)
        return chat.text_of(reader.read(ids, [0.0] * len(ids), [NO_TOP] * len(ids)))

    assert say("It is ") == "It is "
    assert say("w") == ""
    assert say("x") == ""
    assert say("!") == "wx!"
    first, *others = tokenizer.encode("🙂")
    assert others, "a character of several tokens"
    assert reader.read([first], [0.0], [NO_TOP]) == []
    assert chat.text_of(reader.read(others, [0.0] * len(others), [NO_TOP] * len(others))) == "🙂"
    assert say("wx") == ""
    assert say("yz and on") == ""
    assert reader.end(stopped=True) == []


def test_long_stops_that_nearly_begin_again_and_again_do_not_take_long(tokenizer: Tokenizer) -> None:
    stops = ["a" * 990 + f"b{n}" for n in range(64)]
    ids = tokenizer.encode("a" * 4000)
    tokens = read(tokenizer, ids, stops, cuts=list(range(1, len(ids))), stopped=False)
    assert chat.text_of(tokens) == "a" * 4000
