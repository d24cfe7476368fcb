"""Checks of generated data: near duplicates, personal data, form, balance. They find what rules can find; a
sample read by people is still worth it.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Row = TypeVar("Row")
Check = Callable[[Row], str | None]
"""What is wrong with a row, in a word or two; None if nothing is."""


def sift(rows: Iterable[Row], checks: Sequence[Check[Row]]) -> tuple[list[Row], Counter[str]]:
    """The rows that pass every check, and how many fell to which: each counts for the first it fails."""
    kept: list[Row] = []
    fallen: Counter[str] = Counter()
    for row in rows:
        wrong = next((found for check in checks if (found := check(row))), None)
        if wrong:
            fallen[wrong] += 1
        else:
            kept.append(row)
    return kept, fallen


# -- near duplicates --------------------------------------------------------------------------------------

_HASHES, _BANDS = 64, 16
_PRIME = (1 << 31) - 1
_RANDOM = np.random.default_rng(1)
_FACTORS = _RANDOM.integers(1, _PRIME, _HASHES, np.int64)
_SHIFTS = _RANDOM.integers(0, _PRIME, _HASHES, np.int64)


def shingles(text: str, size: int = 5) -> set[str]:
    """All runs of `size` characters; case, spacing and punctuation do not count."""
    plain = " ".join(re.findall(r"\w+", text.lower()))
    return {plain[i : i + size] for i in range(max(1, len(plain) - size + 1))}


def similarity(a: set[str], b: set[str]) -> float:
    """Jaccard: what both have, of what either has."""
    return len(a & b) / len(a | b)


def duplicates(texts: Sequence[str], *, at_least: float = 0.8) -> set[int]:
    """The places of texts that are at least so similar to an earlier one that is kept.

    MinHash in bands finds the candidates (Broder 1997), exact similarity decides. Pairs of similarity 0.8
    are found with 99.98 % probability, of 0.6 with 89 %.
    """
    sets = [shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    found: set[int] = set()
    for place, own in enumerate(sets):
        keys = [(band, part.tobytes()) for band, part in enumerate(np.split(_signature(own), _BANDS))]
        candidates = {other for key in keys for other in buckets[key]}
        if any(similarity(own, sets[other]) >= at_least for other in sorted(candidates)):
            found.add(place)
            continue
        for key in keys:
            buckets[key].append(place)
    return found


def _signature(own: set[str]) -> npt.NDArray[np.int64]:
    hashed = np.asarray([zlib.crc32(piece.encode()) % _PRIME for piece in own], np.int64)
    # Products of two numbers below 2^31 fit in 63 bits.
    signature: npt.NDArray[np.int64] = ((hashed[:, None] * _FACTORS + _SHIFTS) % _PRIME).min(axis=0)
    return signature


# -- personal data ----------------------------------------------------------------------------------------

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_ADDRESS = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_DIGITS = re.compile(r"(?<![\w.])\+?\d(?:[ \-./()]{0,2}\d){8,18}(?!\w)")


def personal(text: str) -> str | None:
    """The first kind of personal data that is found: e-mail, IP address, IBAN, card number, phone number."""
    if _EMAIL.search(text):
        return "e-mail"
    if any(_is_iban(found[0]) for found in _IBAN.finditer(text)):
        return "IBAN"
    if _ADDRESS.search(text):
        return "IP address"
    for found in _DIGITS.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if len(digits) >= 13:
            if _is_card(digits):
                return "card number"
        elif digits != found[0] or found[0].startswith("0"):  # plain long numbers are mostly no telephones
            return "phone number"
    return None


def _is_card(digits: str) -> bool:
    """Luhn's check digit."""
    doubled = [int(d) if i % 2 == 0 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: moved round and read as a number, the remainder by 97 is 1."""
    text = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


# -- balance ----------------------------------------------------------------------------------------------


def balanced(rows: Sequence[Row], kind: Callable[[Row], Hashable], *, most: float) -> list[Row]:
    """The first rows of each kind, so that no kind has more than the share `most` of what is left."""
    counts = Counter(kind(row) for row in rows)
    if not 0 < most <= 1 or most * len(counts) < 1 - 1e-9:
        raise ValueError(f"{len(counts)} kinds cannot all stay within a share of {most}")
    # Cutting the largest shrinks the whole, so that the next may be too large: down to a fixed point.
    limit = max(counts.values(), default=0)
    while limit > 1 and limit > most * sum(min(count, limit) for count in counts.values()):
        limit -= 1
    seen: Counter[Hashable] = Counter()
    kept = []
    for row in rows:
        seen[kind(row)] += 1
        if seen[kind(row)] <= limit:
            kept.append(row)
    return kept
