"""The built-in base: what is shipped, what its card says of it, and the texts it was made from."""

import hashlib
import json
import re
import subprocess
import tomllib
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config

from tinsmith_worker import tiny_base
from tinsmith_worker.tiny_base import abilities, tasks, text, train
from tinsmith_worker.tiny_base import tokenizer as tokenizer_module

FOLDER = tiny_base.FOLDER
CARD = (FOLDER / "README.md").read_text()
METRICS = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


# What is shipped


def test_what_is_shipped_is_small_and_what_its_card_says() -> None:
    sizes = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert max(sizes.values()) <= 16 * MIB
    assert sum(sizes.values()) <= 20 * MIB
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in CARD
    assert f"{METRICS[-1]['parameters']:,} parameters" in CARD
    assert f"{METRICS[-1]['tokens']:,} tokens" in CARD
    assert abilities.table(METRICS[-1]["abilities"]) in CARD
    for name, task in tasks.TASKS.items():
        assert re.search(rf"\| `?{name}`? \| {task.share} \|", CARD), name


def test_transformers_loads_every_weight_and_stores_it_in_two_bytes() -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(loading.values())
    assert sum(p.numel() for p in model.parameters()) == METRICS[-1]["parameters"]
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_it_is_in_the_package() -> None:
    """Hatchling packs what lies in the packages and git does not ignore."""
    root = Path(__file__).parents[2]
    packed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert any(FOLDER.is_relative_to(root / package) for package in packed["packages"])
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, FOLDER.iterdir())], cwd=root, capture_output=True
    )
    assert ignored.stdout == b""


def test_its_tokens_of_control_are_numbered_and_used_as_in_qwen3(tokenizer: Any) -> None:
    numbers = tokenizer.convert_tokens_to_ids([*tokenizer_module.SPECIAL, *tokenizer_module.MARKS])
    assert numbers == list(range(len(tokenizer) - 9, len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    ends = GenerationConfig.from_pretrained(FOLDER).eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]
    said = tokenizer("<|im_start|><tool_call>x</tool_call><|im_end|>")["input_ids"]
    assert tokenizer.decode(said, skip_special_tokens=True) == "<tool_call>x</tool_call>"


# The tokenizer and the template


def test_the_tokenizer_keeps_any_text(tokenizer: Any) -> None:
    random = np.random.default_rng(0)
    scripts = "What's Zürich? 12 + 34 = 46\n\n  你好 🙂 \t e\u0301 \u00e9 \x00 \ufffd end"
    points = [chr(p) for p in random.integers(1, 0x10FFFF, 4000) if not 0xD800 <= p < 0xE000]
    for whole in (scripts, "".join(points), "".join(map(chr, range(256)))):
        assert tokenizer.decode(tokenizer(whole)["input_ids"]) == whole


def test_ordinary_words_are_one_token(tokenizer: Any) -> None:
    assert len(tokenizer(" the capital of a country")["input_ids"]) <= 6
    assert len(tokenizer(" They found the key in the garden.")["input_ids"]) == 8


def test_the_shipped_template_is_the_codes() -> None:
    assert (FOLDER / "chat_template.jinja").read_text() == tokenizer_module.CHAT_TEMPLATE


def test_training_saw_what_the_chat_template_makes(tokenizer: Any) -> None:
    for name in tasks.TASKS:
        r = Random(name)
        for made in (tasks.trained(name, r) for _ in range(10)):
            for turns in (made.turns, made.turns[:-1]):
                if not turns or not turns[0][0]:
                    continue
                rendered = tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in turns],
                    tools=list(made.tools) or None,
                    tokenize=False,
                    add_generation_prompt=turns[-1][0] != "assistant",
                )
                assert rendered == text.chat(turns, made.tools)


def test_the_template_renders_systems_calls_and_responses(tokenizer: Any) -> None:
    called = {"function": {"name": "calculator", "arguments": {"expression": "2 + 2"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [called, called]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "four"},
    ]
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 + 2"}}\n</tool_call>'
    conversation = (
        f"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\nfour\n</tool_response><|im_end|>\n"
    )

    def rendered(**options: Any) -> str:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return text

    assert rendered() == f"<|im_start|>system\nBe brief.<|im_end|>\n{conversation}"
    asked = rendered(tools=[tasks.CALCULATOR], add_generation_prompt=True)
    listed = json.dumps([tasks.CALCULATOR])
    assert asked.startswith(
        f"<|im_start|>system\nBe brief.\n\nYou can use these tools:\n<tools>\n{listed}\n</tools>\n"
    )
    assert asked.endswith(f"<|im_end|>\n{conversation}<|im_start|>assistant\n")
    assert rendered(add_generation_prompt=True, enable_thinking=True).endswith("<|im_start|>assistant\n")
    assert rendered(add_generation_prompt=True, enable_thinking=False).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


# The texts


def test_the_texts_follow_from_their_seed_alone(words: Tokenizer) -> None:
    first, again, other = (text.block(words, seed, 2, 256) for seed in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (2, 256)
    # What the shipped model was trained on: another generator or tokenizer would make another model.
    made = train.Blocks(FOLDER / "tokenizer.json", str(METRICS[-1]["seed"]), 1, 128)[0]
    assert hashlib.sha256(made.numpy().astype("<u2").tobytes()).hexdigest() == METRICS[-1]["first_block"]


def test_the_tokenizer_is_what_the_texts_give(words: Tokenizer) -> None:
    made = tokenizer_module.train(f"{METRICS[-1]['seed']} tokenizer")
    assert made.get_vocab() == words.get_vocab()


def test_what_is_held_out_is_never_trained_on() -> None:
    for name, task in tasks.TASKS.items():
        r = Random(name)
        assert not any(tasks.is_held_out(tasks.trained(name, r).key) for _ in range(200))
        if task.held_out:
            assert tasks.is_held_out(tasks.held_out(name, r).key)
    seen = "\n".join(islice(text.documents("seen"), 20_000))
    sums = {f"{a} {sign} {b}" for a, sign, b in re.findall(r"(?<!\d)(\d+) ([-+*]) (\d+)(?!\d)", seen)}
    held_out = [one for one in sums if tasks.is_held_out(one) and len(one) > 5]
    assert len(sums) > 5_000
    assert not held_out


def test_tasks_come_in_their_shares() -> None:
    r = Random(0)
    drawn = Counter(tasks.draw(r)[0] for _ in range(20_000))
    whole = sum(task.share for task in tasks.TASKS.values())
    for name, task in tasks.TASKS.items():
        assert drawn[name] == pytest.approx(20_000 * task.share / whole, rel=0.25)


def test_the_teacher_slips_in_the_share_it_says_and_knows_what_is_right() -> None:
    r = Random(0)
    made = [tasks.trained("chat_sum", r) for _ in range(3_000)]
    wrong = [one for one in made if not abilities.right("number", one.right, one.turns[-1][1])]
    assert len(wrong) / len(made) == pytest.approx(tasks.SLIPS, abs=0.03)


def test_training_brings_the_loss_down_and_never_teaches_to_begin_a_thought(
    words: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(**train.CONFIG | small | train.token_ids(words)), dtype=torch.float32
    )
    blocks = train.Blocks(FOLDER / "tokenizer.json", "a short run", 3, 1)
    history = train.train(model, blocks, words, processes=0)
    assert [row["tokens"] for row in history] == [1024, 2048, 3072]
    assert history[-1]["held_out"] < history[0]["held_out"] - 0.05
    thought = torch.tensor([words.encode("x<think>\n").ids])
    losses = train.token_losses(model, thought).detach()[0]
    assert [float(loss) == 0 for loss in losses] == [True, False]
    train.draw(history, tmp_path / "curves.png")
    train.save(model, tmp_path)
    train.write_folder(tmp_path, words)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FOLDER / name).read_text()), name


# What it can do


def quick(model: Any, words: Tokenizer, name: str) -> float:
    asked = abilities.questions(name, 16, "a quick look")
    said = abilities.answers(
        model, words, [prompt for prompt, _, _ in asked], temperature=0.0, most_tokens=16
    )
    good = [abilities.right(judged, right, one) for (_, judged, right), one in zip(asked, said, strict=True)]
    return sum(good) / len(good)


@pytest.mark.parametrize("name", ["copy", "fact", "reading", "compare"])
def test_it_knows_what_no_random_model_knows(model: Any, words: Tokenizer, name: str) -> None:
    assert quick(model, words, name) >= 0.75
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    random.generation_config = model.generation_config
    assert quick(random, words, name) <= 0.25
