"""The tokenizer that the service gives away, beside transformers' own of the same model."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

import tinsmith
from tests.conftest import RunningService

BASE = "tinsmith/tiny"
TEXTS = [
    "Hello, world!",
    "  two  spaces\n\nand lines\t",
    "naïve café, 東京, 🙂🙂, ﬁ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    "x = {'a': 1} # 3.14159, 1000000",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2 < 3 & 'so' on"},
        {"role": "user", "content": "And é?"},
    ],
]


@pytest.fixture
def client(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tinsmith.ServiceClient]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with tinsmith.ServiceClient(base_url=service.url, api_key=service.key) as client:
        yield client


def test_it_is_equal_to_the_models_own(client: tinsmith.ServiceClient, service: RunningService) -> None:
    training = client.create_lora_training_client(BASE, rank=4)
    ours = training.get_tokenizer()
    theirs = AutoTokenizer.from_pretrained(training.get_info().model_data.tokenizer_id)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert ours.tokenize(text) == theirs.tokenize(text)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "vocab_size", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)
    token = ours.convert_ids_to_tokens(7)
    assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token) == 7


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [False, True])
def test_conversations_are_written_as_the_models_own_template_has_them(
    client: tinsmith.ServiceClient, conversation: list[dict[str, str]], prompted: bool
) -> None:
    training = client.create_lora_training_client(BASE, rank=4)
    ours = training.get_tokenizer()
    theirs = AutoTokenizer.from_pretrained(training.get_info().model_data.tokenizer_id)
    text = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompted)
    assert ours.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompted) == text
    assert ours.apply_chat_template(conversation, add_generation_prompt=prompted) == theirs.encode(
        text, add_special_tokens=False
    )


def test_transformers_reads_what_came(client: tinsmith.ServiceClient) -> None:
    ours = client.create_sampling_client(base_model=BASE).get_tokenizer()
    theirs = ours.to_transformers()
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.apply_chat_template(CONVERSATIONS[2], tokenize=False) == ours.apply_chat_template(
        CONVERSATIONS[2], tokenize=False
    )


def test_it_travels_once_and_only_with_a_key(service: RunningService) -> None:
    url = f"{service.url}/api/v1/tokenizers/{BASE}"
    key = {"x-api-key": service.key}
    assert httpx.get(url).status_code == 401
    first = httpx.get(url, headers=key)
    assert first.headers["content-encoding"] == "gzip"
    assert set(first.json()["files"]) >= {"tokenizer.json", "tokenizer_config.json"}
    again = httpx.get(url, headers={**key, "if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    plain = httpx.get(url, headers={**key, "accept-encoding": "identity"})
    assert plain.json() == first.json()
    unknown = httpx.get(f"{service.url}/api/v1/tokenizers/no/such", headers=key)
    assert unknown.status_code == 400
    assert BASE in unknown.json()["detail"]
