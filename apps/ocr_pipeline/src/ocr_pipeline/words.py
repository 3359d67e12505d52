"""Text as it is compared: accents folded, upper case, and how far two words are apart."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SYMBOLS = str.maketrans(
    {"º": "O", "°": "O", "ª": "A", "№": "N"}
    | dict.fromkeys("\u2013\u2014\u2212", "-")  # dashes, the minus sign
    | {"\u2019": "'", "\uff1a": ":"}
)
_DIGITS_FOR = str.maketrans(
    {"O": "0", "Q": "0", "D": "0", "I": "1", "L": "1", "|": "1", "Z": "2", "S": "5", "B": "8"}
)


@lru_cache(maxsize=8192)
def fold(text: str) -> str:
    """Upper case without accents; ordinal signs are the letter O, dashes are hyphens."""
    flat = unicodedata.normalize("NFD", text.translate(_SYMBOLS))
    return "".join(sign for sign in flat if not unicodedata.combining(sign)).upper()


def squeezed(text: str) -> str:
    """Only letters and digits, folded: what a value is looked for in."""
    return re.sub(r"[^0-9A-Z]", "", fold(text))


def as_digits(text: str) -> str:
    """Letters that an OCR engine mistakes for digits, as digits: only for values that are numbers."""
    return text.translate(_DIGITS_FOR)


@lru_cache(maxsize=65536)
def distance(one: str, other: str, limit: int = 3) -> int:
    """Edit distance, or `limit` + 1 when it is larger than that."""
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    row = list(range(len(other) + 1))
    for at, sign in enumerate(one, 1):
        before, row[0] = row[0], at
        for to, target in enumerate(other, 1):
            before, row[to] = row[to], min(row[to] + 1, row[to - 1] + 1, before + (sign != target))
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def alike(read: str, expected: str) -> bool:
    """Whether `read` is `expected` with as many mistakes as an OCR engine makes in a word of its length."""
    allowed = 0 if len(expected) < 5 else 1 if len(expected) < 9 else 2
    return read == expected or (allowed > 0 and distance(read, expected, allowed) <= allowed)
