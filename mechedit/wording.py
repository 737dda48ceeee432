"""Words as they are shown: text of others made harmless, and what a mistyped word may have meant.

A prompt, an answer, a file's name or what a file holds can carry characters that a terminal obeys (an escape sequence sets the
clipboard), that turn the order of letters round, or that begin a line which looks like ours. `visible` writes them out.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

__all__ = ["meant", "visible"]

_JOINERS = "\u200c\u200d"  # that Persian, Indian scripts and emoji need, and that move nothing


def visible(text: object) -> str:
    r"""Text in one line, with what cannot be seen written out: C0 and C1 controls, line ends, bidirectional and other marks of
    formatting, halves of surrogate pairs. Everything else, backslashes too, is as it was.

    >>> visible("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    found = str(text)
    return found if found.isprintable() else "".join(map(_seen, found))


def _seen(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return repr(character)[1:-1]
    return character  # spaces of other widths, and what this version of Python does not know yet


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the nearest of the known words; nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""
