"""A base model's tokenizer, put where the API finds it: in a fleet only workers have the model's folder."""

import hashlib
import logging
import tempfile
from pathlib import Path

from tinsmith_api.journal.objects import ObjectStore

log = logging.getLogger("tinsmith.worker")

# What a client needs of what transformers writes. The largest vocabularies take some 35 MB.
_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_MAX_BYTES = 64 << 20


def keep_tokenizer(objects: ObjectStore, tokenizer: str) -> str:
    """Where in the object store its files are now, named after what is in them; "" if there is none. It is no
    reason not to serve the model."""
    if not tokenizer:
        return ""
    files = _read(tokenizer)
    if "tokenizer.json" not in files or sum(map(len, files.values())) > _MAX_BYTES:
        log.warning("clients get no tokenizer from here: %s has none that they could read", tokenizer)
        return ""
    digest = hashlib.sha256(b"\0".join(name.encode() + files[name] for name in sorted(files)))
    prefix = f"tokenizers/{digest.hexdigest()}"
    try:
        objects.put(prefix, files)
    except OSError as error:
        log.warning("clients get no tokenizer from here: %s", error)
        return ""
    return prefix


def _read(tokenizer: str) -> dict[str, bytes]:
    """Written anew by transformers, so that each has a tokenizer.json, also one that came in older forms."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        return {name: file.read_bytes() for name in _NAMES if (file := Path(folder) / name).exists()}
