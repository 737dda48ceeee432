"""Random choices that are the same on every machine and every version of Python: SHA-256 of a seed and a counter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Draws"]

Item = TypeVar("Item")


class Draws:
    """A stream of choices named by `parts`; other parts, another stream."""

    def __init__(self, *parts: object) -> None:
        self._name = "/".join(map(str, parts)).encode()
        self._counter = 0

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1; of 2^128 values, so that no one is favoured by as much as anyone could see."""
        digest = hashlib.sha256(self._name + b"#%d" % self._counter).digest()
        self._counter += 1
        return int.from_bytes(digest[:16], "big") % n

    def choice(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All of the items, in random order (Fisher and Yates)."""
        found = list(items)
        for end in range(len(found) - 1, 0, -1):
            other = self.below(end + 1)
            found[end], found[other] = found[other], found[end]
        return found

    def some(self, items: Sequence[Item], n: int) -> list[Item]:
        """`n` different items."""
        return self.shuffled(items)[:n]
