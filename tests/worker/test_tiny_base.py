from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinsmith_worker import tiny_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base.create(tmp_path_factory.mktemp("bases") / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_creation_gives_the_same_bytes_even_in_a_race(folder: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as racers:
        made = list(racers.map(tiny_base.create, [tmp_path / "again"] * 2))
    assert made[0] == made[1]
    assert contents(made[0]) == contents(folder)
    assert list(tmp_path.iterdir()) == [made[0]], "nothing half-made is left"


def test_a_folder_that_exists_is_left_as_it_is(folder: Path) -> None:
    before = (folder / "config.json").stat().st_mtime_ns
    assert tiny_base.create(folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_it_never_overwrites_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("Dear reader")
    with pytest.raises(FileExistsError, match="holds no model"):
        tiny_base.create(tmp_path / "letters")
    assert [file.name for file in (tmp_path / "letters").iterdir()] == ["dear.txt"]


def test_transformers_loads_every_weight(folder: Path) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert not any(loading.values())
    assert model.generation_config.eos_token_id == [2, 0]
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 5e6


def test_the_tokenizer_keeps_any_text_and_speaks_chatml(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "What's the capital of Zürich? 12 + 34 = 46\n\n  你好 🙂 \t end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == tiny_base.VOCAB_SIZE
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(chat)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert tokenizer.eos_token == "<|im_end|>"


def test_ordinary_words_are_one_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(" the capital of a country")["input_ids"]) == 5
