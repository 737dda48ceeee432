"""Data of a page in few characters, which the page's script unpacks: bytes compressed, and text word by word.

`packed` compresses bytes and writes them with 85 letters that JSON and HTML leave as they are, four bytes in five letters (base64: three in
four). `Words` codes text before that: the page has each word that it says several times once, and texts hold its number, in one byte the
192 most frequent ones, in two the next 16,128. What is left is written out. Compression that looks back 32 kB then sees three times the
text: of texts in English it takes a third less than of the letters.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["LETTERS", "Words", "packed"]

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;.=/?@^_`{|}~"
_SAFE = bytes.maketrans(b"&<>", b":./")  # what base64.b85encode has in the place of LETTERS' three
_WORD = re.compile(r" ?[^\W\d_]{1,60}|.", re.DOTALL)
SHORT = 192  # codes of one byte
LONG = 255  # from SHORT to it: the first of two bytes; itself: so many bytes of text follow
SEVERAL = 3  # a word said less often is cheaper as it stands


def packed(data: bytes) -> str:
    """Bytes as text, compressed; the same bytes give the same text."""
    return base64.b85encode(gzip.compress(data, 9, mtime=0)).translate(_SAFE).decode()


class Words:
    """The words that texts say most often, and any text in their numbers."""

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_WORD.findall(text))
        several = sorted((word for word, n in counts.items() if n >= SEVERAL), key=lambda word: (-counts[word], word))
        self.words: Sequence[str] = several[: SHORT + (LONG - SHORT) * 256]
        self._codes = _Codes((word, _code(number)) for number, word in enumerate(self.words))

    def coded(self, text: str) -> bytes:
        """The text in codes of one or two bytes, and what is no word of these behind its length."""
        return b"".join(map(self._codes.__getitem__, _WORD.findall(text)))

    def packed(self) -> str:
        """The words themselves."""
        return packed(json.dumps(self.words, ensure_ascii=False, separators=(",", ":")).encode())


def _code(number: int) -> bytes:
    if number < SHORT:
        return bytes([number])
    first, second = divmod(number - SHORT, 256)
    return bytes([SHORT + first, second])


class _Codes(dict[str, bytes]):
    """Codes of words; one that has none is spelt."""

    def __missing__(self, word: str) -> bytes:
        written = word.encode()
        return bytes([LONG, len(written)]) + written
