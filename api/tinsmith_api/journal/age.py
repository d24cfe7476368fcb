"""Files encrypted to age recipients (https://age-encryption.org), so that nobody here can read them back."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyrage

from tinsmith.errors import InvalidInput
from tinsmith_api.journal.objects import Body

SUFFIX = ".age"


def read_recipients(texts: Sequence[str]) -> list[Any]:
    """`age1…` keys and SSH public keys; InvalidInput names the one that is neither."""
    return [_read(text) for text in texts]


def encrypt(files: Mapping[str, Body], recipients: Sequence[Any]) -> dict[str, Body]:
    return {name + SUFFIX: pyrage.encrypt(bytes(body), list(recipients)) for name, body in files.items()}


def _read(text: str) -> Any:
    kind = pyrage.x25519 if text.startswith("age1") else pyrage.ssh
    try:
        return kind.Recipient.from_str(text)
    except BaseException as error:
        # A key that is spoiled in its middle makes the library panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidInput(
            f"age_encryption_recipients: {text[:80]!r} is neither an age1… key nor an SSH public key: {error}"
        ) from None
