"""Which pages of the cache are whose, and what they hold. No torch.

A page has room for the keys and values of `page_tokens` tokens. Sequences that begin alike share the full
pages of their beginning. A page that is full is found again by what it holds, also when nobody uses it any
more, until its room is needed.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
# What comes before (the scope, or the number of a page's text), and the page's tokens.
_Key = tuple[Hashable, bytes]


class Pages:
    """Pages 1 .. `count`; page 0 is nobody's: rows of padding write there.

    A `scope` is whatever keys and values depend on besides the tokens, and who may know of them: nothing is
    ever found in another one.
    """

    def __init__(self, count: int, page_tokens: int) -> None:
        self.count = count
        self.page_tokens = page_tokens
        self._free = list(range(count, 0, -1))
        self._users = [0] * (count + 1)
        self._found: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._text_of: dict[int, int] = {}  # a number that is never given twice
        self._texts = 0
        self._idle: dict[int, None] = {}  # remembered and used by nobody, the least recently used first

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """So many pages, of which `available` must say that they are there. What they held is forgotten."""
        assert count <= self.available, (count, self.available)
        return [self._take() for _ in range(count)]

    def share(self, pages: Sequence[int]) -> list[int]:
        """The same pages for one more user."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)
        return list(pages)

    def leave(self, pages: Sequence[int]) -> list[int]:
        """They have one user less; returns those that are free now. The last ones of a text are forgotten
        first: without its beginning they could not be found."""
        freed = []
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, page
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
                freed.append(page)
        return freed

    def find(self, scope: Hashable, tokens: Tokens) -> list[int]:
        """The pages that hold the beginning of `tokens`, full ones only; they are shared from now on."""
        found: list[int] = []
        before: Hashable = (scope,)  # never equal to a number of a text
        for start in range(0, len(tokens) - self.page_tokens + 1, self.page_tokens):
            page = self._found.get((before, tokens[start : start + self.page_tokens].tobytes()))
            if page is None:
                break
            found.append(page)
            before = self._text_of[page]
        return self.share(found)

    def remember(self, scope: Hashable, tokens: Tokens, pages: Sequence[int]) -> None:
        """`pages` hold the keys and values of `tokens`: let the full ones be found."""
        before: Hashable = (scope,)  # never equal to a number of a text
        for number in range(min(len(tokens) // self.page_tokens, len(pages))):
            start = number * self.page_tokens
            key = (before, tokens[start : start + self.page_tokens].tobytes())
            page = self._found.setdefault(key, pages[number])
            if page not in self._key_of:
                self._key_of[page] = key
                self._texts += 1
                self._text_of[page] = self._texts
            before = self._text_of[page]

    def forget(self, pages: Sequence[int]) -> None:
        """What these hold is not to be found by anybody any more."""
        for page in pages:
            if (key := self._key_of.pop(page, None)) is not None:
                del self._found[key], self._text_of[page]
                if page in self._idle:
                    del self._idle[page]
                    self._free.append(page)

    def _take(self) -> int:
        if not self._free:
            self.forget([next(iter(self._idle))])
        page = self._free.pop()
        self._users[page] = 1
        return page
