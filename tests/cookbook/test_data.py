"""Files become conversations, conversations batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinsmith import Tokenizer
from tinsmith_cookbook import data
from tinsmith_cookbook.data import BadData, Batches
from tinsmith_cookbook.renderers import Example, Renderer
from tinsmith_worker import tiny_base


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    folder = tiny_base.FOLDER
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return Renderer(Tokenizer({name: (folder / name).read_text() for name in files}))


def written(folder: Path, rows: list[Any], *, lines: bool = True) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return file


@pytest.mark.parametrize("lines", [True, False])
def test_alpaca(tmp_path: Path, lines: bool) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    first, second = data.read(written(tmp_path, rows, lines=lines))
    assert first.messages == [
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert second.messages[0]["content"] == "Say hi."


def test_sharegpt_with_a_tool(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = {
        "system": "Be brief.",
        "tools": json.dumps([{"name": "add"}]),
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"role": "assistant", "content": "2"},
        ],
    }
    (made,) = data.read(written(tmp_path, [row]))
    assert [m["role"] for m in made.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert made.messages[2]["tool_calls"] == [call]
    assert made.tools == [{"name": "add"}]


def test_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (made,) = data.read(written(tmp_path, [{"messages": messages}]))
    assert made.messages == messages


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in said]}


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"instruction": "Add.", "output": ""}, "line 2: 'output' is missing, empty or not text"),
        ({"instruction": "Add.", "input": 7, "output": "3"}, "'input' is not text"),
        (turns(("human", "hi"), ("robot", "yes")), "turn 2 is from 'robot': the roles are system, human"),
        (turns(("human", "hi")), "the last turn is not the assistant's"),
        (turns(("gpt", "hi")), "the first turn is the assistant's, not the user's"),
        (turns(("human", "a"), ("human", "b"), ("gpt", "c")), "turn 1 is the user's and no answer"),
        (turns(("human", "a"), ("gpt", "b"), ("gpt", "c")), "turns 2 and 3 are both the assistant's"),
        (turns(("human", "a"), ("system", "b"), ("gpt", "c")), "a system message comes after"),
        (turns(("human", "a"), ("function", "add(1)")), "turn 2 is a function call but not"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no text"),
        ({"conversations": []}, "'conversations' is missing, empty"),
        ({"messages": [{"role": "human", "content": "hi"}]}, "message 1 has no role among"),
        ("text", "missing"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path: Path, row: Any, sentence: str) -> None:
    good: dict[str, Any] = {"instruction": "Add.", "output": "3"}
    if isinstance(row, dict) and "conversations" in row:
        good = turns(("human", "hi"), ("gpt", "ho"))
    if isinstance(row, dict) and "messages" in row:
        good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = written(tmp_path, [good, row])
    with pytest.raises(BadData, match="1 of 2 rows are bad") as error:
        data.read(file)
    assert sentence in str(error.value)
    bad: list[str] = []
    assert len(data.read(file, bad=bad)) == 1
    assert len(bad) == 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "has no rows"),
        ('{"prompt": "x"}', "neither Alpaca nor ShareGPT nor chat"),
        ('{"instruction": "a", "output": "b"}\n{', "line 2 is not JSON"),
        ("[{", "is not JSON"),
    ],
)
def test_a_file_that_is_none_says_so(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    with pytest.raises(BadData, match=sentence):
        data.read(file)


def example(length: int, weight: float = 1.0) -> Example:
    return Example(list(range(length)), [0.0] + [weight] * (length - 1))


def test_a_datum_shifts_by_one_and_counts_the_answer_alone(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    (made,) = renderer.examples(messages)
    datum = data.datum(made)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    assert datum.model_input.to_ints() == made.tokens[:-1]
    assert targets.tolist() == made.tokens[1:]
    assert renderer.decode(targets[weights == 1].tolist()) == "4<|im_end|>"
    assert data.datum(made, normalize=True).loss_fn_inputs["weights"].to_numpy().sum() == pytest.approx(1)


def test_an_example_that_is_too_long_is_refused(renderer: Renderer) -> None:
    rows = [
        data.Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 50}])
    ]
    with pytest.raises(BadData, match="longer than 20 tokens"):
        data.examples(rows, renderer, longest=20)


def test_packing_keeps_every_weighted_token_and_none_that_crosses_examples() -> None:
    made = [example(n) for n in (5, 60, 30, 33, 2, 64)]
    packed = data.pack(made, 64)
    assert all(len(p.tokens) <= 64 for p in packed)
    assert sum(len(p.tokens) for p in packed) == sum(len(e.tokens) for e in made)
    assert sum(sum(p.weights) for p in packed) == sum(sum(e.weights) for e in made)
    assert len(packed) == 4  # 64; 60 + 2; 33 + 30; 5
    with pytest.raises(BadData, match="more than a sequence"):
        data.pack(made, 63)


def test_batches_by_tokens_keep_the_order_and_the_bound() -> None:
    made = [example(n) for n in (5, 6, 7, 30, 4)]
    batches = data.by_tokens(made, 18)
    assert [[len(e.tokens) for e in b] for b in batches] == [[5, 6, 7], [30], [4]]
    assert data.by_tokens([], 18) == []


def test_a_split_is_drawn_by_its_seed_and_loses_nothing() -> None:
    rows = list(range(100))
    train, held = data.split(rows, 0.1, seed=1)
    assert len(held) == 10
    assert sorted(train + held) == rows
    assert data.split(rows, 0.1, seed=1) == (train, held)
    assert data.split(rows, 10, seed=2)[1] != held
    assert data.split(rows, 0, seed=2) == (rows, [])
    with pytest.raises(BadData, match="at least one must be left"):
        data.split(rows, 100, seed=0)


def test_a_resumed_run_goes_on_with_the_next_batch_and_replays_none() -> None:
    batches = Batches(range(10), batch=4, steps=10, seed=3)
    whole = list(batches)
    resumed = Batches(range(10), batch=4, steps=10, seed=3)
    assert [resumed[step] for step in range(5, 10)] == whole[5:]
    seen = [row for batch in whole for row in batch]
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert list(Batches(range(10), batch=4, steps=10, seed=4)) != whole
    assert batches.epoch(5) == 2.0


def test_weights_of_any_batch_are_plain_sums() -> None:
    """The service sums; what is normalized is normalized here, once for each example."""
    long, short = data.datum(example(50), normalize=True), data.datum(example(5), normalize=True)
    sums = [float(np.sum(d.loss_fn_inputs["weights"].to_numpy())) for d in (long, short)]
    assert sums == pytest.approx([1, 1])
