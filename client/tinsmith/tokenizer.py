"""The tokenizer of a base model, from the service that has it: no account at a hub is needed."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tinsmith.connection import Connection, read_json
from tinsmith.errors import InvalidInput, NotFound

Messages = Sequence[Mapping[str, Any]]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """What scripts use of transformers' tokenizers, and equal to them; `to_transformers` makes one.

    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    print(tokenizer.decode(tokens), tokenizer.eos_token_id)
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None

    def __init__(self, files: Mapping[str, str], name: str = "") -> None:
        """`files`: the texts of tokenizer.json, tokenizer_config.json and, if there is one,
        chat_template.jinja."""
        import tokenizers

        self.files = dict(files)
        self.name_or_path = name
        self.config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
        self.chat_template: str | None = files.get("chat_template.jinja", self.config.get("chat_template"))
        self.backend_tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        for kind in _SPECIAL:
            given = self.config.get(kind)
            token = given["content"] if isinstance(given, dict) else given
            setattr(self, kind, token)
            setattr(self, f"{kind}_id", None if token is None else self.backend_tokenizer.token_to_id(token))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`add_special_tokens`: those the model wants around every text, if any."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        text: str = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def batch_decode(self, batch: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(token_ids, skip_special_tokens) for token_ids in batch]

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        batch = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": batch, "attention_mask": [[1] * len(ids) for ids in batch]}

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = self.backend_tokenizer.encode(text, add_special_tokens=False).tokens
        return tokens

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(one)) for one in ids]

    def get_vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocab

    @property
    def vocab_size(self) -> int:
        """Without tokens that were added to it; `len()` has those too."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def all_special_ids(self) -> list[int]:
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return sorted(number for number, token in added.items() if token.special)

    @property
    def all_special_tokens(self) -> list[str]:
        return [self.convert_ids_to_tokens(number) for number in self.all_special_ids]

    def apply_chat_template(
        self,
        conversation: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> Any:
        """The conversation as the model's own template writes it: tokens, or with tokenize=False the text.
        `tools` are JSON schemas; `variables` are the template's own, e.g. enable_thinking=False."""
        template = chat_template or self.chat_template
        if not template:
            raise InvalidInput(f"{self.name_or_path} has no chat template: give chat_template=…")
        if any(not isinstance(tool, Mapping) for tool in tools or ()):
            raise InvalidInput("give each tool as its JSON schema, a dict")
        variables.pop("return_dict", None)
        special = {kind: token for kind in _SPECIAL if (token := getattr(self, kind)) is not None}
        text: str = _compiled(template).render(
            messages=conversation,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**special, **variables},
        )
        if continue_final_message:
            text = text[
                : text.rindex(conversation[-1]["content"].strip()) + len(conversation[-1]["content"].strip())
            ]
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")

    def to_transformers(self) -> Any:
        """The same as a tokenizer of transformers, which must be installed."""
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder)


def fetch_tokenizer(connection: Connection, base_model: str, tokenizer_id: str | None = None) -> Any:
    """The tokenizer of `base_model`, kept in ~/.cache/tinsmith. A service that does not give tokenizers away
    names one of the Hugging Face hub, which transformers then loads."""
    try:
        return _remembered(connection, base_model)
    except NotFound:
        name = tokenizer_id or base_model
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise NotFound(
            f"{connection.base_url} gives no tokenizer of {base_model}: pip install transformers, "
            f"which then looks for {name} on the Hugging Face hub"
        ) from None
    return AutoTokenizer.from_pretrained(name.partition(":")[0])


@functools.lru_cache(maxsize=8)
def _from(files: tuple[tuple[str, str], ...], name: str) -> Tokenizer:
    return Tokenizer(dict(files), name)


def _remembered(connection: Connection, base_model: str) -> Tokenizer:
    kept = (
        _cache() / f"{hashlib.sha256(f'{connection.base_url} {base_model}'.encode()).hexdigest()[:32]}.json"
    )
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    headers = {"If-None-Match": known["etag"]} if known else {}
    path = f"tokenizers/{quote(base_model, safe='/')}"
    response = connection.send("GET", path, headers=headers).result()
    if response.status_code != 304:
        known = {"etag": response.headers.get("ETag", ""), "files": read_json(response)["files"]}
        _keep(kept, json.dumps(known))
    return _from(tuple(sorted(known["files"].items())), base_model)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tinsmith" / "tokenizers"


def _keep(file: Path, text: str) -> None:
    """Whole or not at all; a laptop that cannot write it fetches it again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, written = tempfile.mkstemp(dir=file.parent)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(written, file)
    except OSError:
        pass


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """As transformers does it: templates are programs of whoever made the model, so they run in a sandbox."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model writes; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
