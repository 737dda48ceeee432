"""Whether what a model says to a question holds the answer that is wanted.

A model is asked the question alone, and goes on greedily for at most `TOKENS` tokens, up to the end of its sentence. Two rules:

sentence    text up to the first sentence's end that is none of an abbreviation, initial or number, or to a line's end; right where it
            holds the target as whole words, both in lower case, without punctuation, articles and superfluous spaces.
published   text up to the first "." or line break; right where the two are equal, normalised so ("The Mirage of Model Editing",
            arXiv 2502.11177, without its judge). It cuts "St. Louis" and "J. K. Rowling" before they are said.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TypeAlias

from mechedit.writing import folded, goes_on, is_spaceless

__all__ = ["RULES", "TOKENS", "Judge", "cut", "is_answered", "is_over", "normalised"]

Judge: TypeAlias = Callable[[str, str, str], bool]
"""Of a question, what was said to it, and the answer that is wanted: whether the two agree."""

RULES = ("sentence", "published")
TOKENS = 50

_ENDS = re.compile(r"[。！？｡]+|[.!?…]+[\"'”’»)\]]*(?=\s)")
_TITLES = re.compile(
    r"st|dr|mr|mrs|ms|mx|prof|rev|hon|gen|col|capt|lt|sgt|maj|cmdr|gov|sen|rep|pres|mt|ft|messrs|vs|cf|fig|dept|approx|ca"
)
_SHORT = re.compile(r"jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|vol|pp?|ed|no|nos|nr|op|ch|art")  # before a number
_INITIALS = re.compile(r"\b[^\W\d_](?:\.-?[^\W\d_])*\.\Z")  # "J.", "U.S.", "J.-P."


def cut(text: str, rule: str = "sentence") -> str:
    """The part of a text that answers, without white space around it."""
    if rule == "published":
        return re.split(r"[.\n]", text, maxsplit=1)[0].strip()
    text = text.lstrip()
    end = _end(text)
    return (text if end is None else text[:end]).strip()


def is_over(text: str, rule: str = "sentence") -> bool:
    """Whether the answer ends within a text, whatever follows."""
    return bool(re.search(r"[.\n]", text)) if rule == "published" else _end(text.lstrip()) is not None


def _end(text: str) -> int | None:
    """Where the first sentence or line ends; None where that lies behind the text, or depends on what follows it."""
    line = re.search(r"[\r\n\u2028\u2029]", text)
    first = text[: line.start()] if line else text
    for mark in _ENDS.finditer(first + (" " if line else "")):
        before, after = first[: mark.end()], first[mark.end() :].lstrip()
        if mark[0][0] in "。！？｡" or (after and not _goes_on(before.rstrip("\"'”’»)]"), after)):
            return mark.end()
    return line.start() if line else None


def _goes_on(before: str, after: str) -> bool:
    """Whether the mark that `before` ends in is no sentence's end, by what follows."""
    if after[0].islower():
        return True
    if not before.endswith(".") or before.endswith(".."):
        return False
    word = re.split(r"[\s(\[\"“'‘-]", before[:-1])[-1].casefold()
    if _TITLES.fullmatch(word) or _INITIALS.search(before):
        return True
    return after[0].isdigit() and bool(_SHORT.fullmatch(word))


def is_answered(said: str, target: str, rule: str = "sentence") -> bool:
    """Whether the part of a text that answers (`cut`) is the target, or holds it as whole words."""
    if rule == "published":
        return normalised(said) == normalised(target)
    words, wanted = normalised(said), normalised(target)
    if not wanted:
        return False
    at = words.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        begins = at == 0 or is_spaceless(wanted[0]) or not goes_on(words[at - 1])
        if begins and (end == len(words) or is_spaceless(wanted[-1]) or not goes_on(words[end])):
            return True
        at = words.find(wanted, at + 1)
    return False


def normalised(text: str) -> str:
    """A text in lower case, however its letters are composed, without possessive 's, punctuation, articles and superfluous spaces.

    Dashes and what else sets words apart are spaces; full stops and apostrophes are nothing (`U.S.` is `us`).
    """
    plain = re.sub(r"['’]s\b", "", folded(unicodedata.normalize("NFKC", text)))
    letters = ["" if each in ".'’" else " " if unicodedata.category(each)[0] in "PZ" else each for each in plain]
    words = "".join(letters).split()
    return " ".join([each for each in words if each not in ("a", "an", "the")] or words)
