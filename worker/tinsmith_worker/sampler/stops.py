"""When a sequence ends before its length does. No torch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Decoder(Protocol):
    """The one thing asked of a tokenizer."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


# Some tokenizers treat the first tokens of a text otherwise (a leading space is dropped), or need those
# before to complete a character.
_MARGIN_TOKENS = 8


@dataclass(frozen=True)
class StopRule:
    """A sequence stops at a token of `token_ids`, or at the token that completes one of `strings`."""

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        assert self.decoder is not None or not self.strings, "stop strings need a tokenizer"

    def ends(self, tokens: npt.NDArray[np.int32]) -> bool:
        """Whether the last of `tokens`, all of which were sampled, ends the sequence."""
        if int(tokens[-1]) in self.token_ids:
            return True
        if self.decoder is None or not self.strings:
            return False
        # A token is at least a byte of text, so this tail holds every string the last token can complete;
        # a string that lay further back would have ended the sequence then.
        tail = tokens[-(self._longest_bytes + _MARGIN_TOKENS) :].tolist()
        text = self.decoder.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)

    @cached_property
    def _longest_bytes(self) -> int:
        return max(len(string.encode()) for string in self.strings)
