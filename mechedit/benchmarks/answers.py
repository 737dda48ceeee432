"""Whether what a model says to a question holds the answer that is wanted.

A model is asked the question alone, and goes on greedily for at most `TOKENS` tokens, up to the end of its sentence. Two rules:

sentence    text up to the first sentence's end that is none of an abbreviation, initial or number, or to a line's end; right where it
            holds the target as whole words, both in lower case, without punctuation and superfluous spaces; or is the target with
            another article before it, or none.
published   text up to the first "." or line break; right where the two are equal, normalised so and without articles ("The Mirage of
            Model Editing", arXiv 2502.11177, without its judge). It cuts "St. Louis" and "J. K. Rowling" before they are said.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from mechedit.settings import SettingsError
from mechedit.writing import folded, goes_on, is_spaceless

__all__ = ["RULES", "TOKENS", "Judge", "cut", "is_answered", "is_over", "judge_key", "normalised"]

Judge: TypeAlias = Callable[[str, str, str], bool]
"""Of a question, what was said to it, and the answer that is wanted: whether the two agree. What is kept of a run names it by `judge_key`."""

RULES = ("sentence", "published")
TOKENS = 50

_ENDS = re.compile(r"[。！？｡]+|[.!?…]+[\"'”’»)\]]*(?=\s)")
_TITLES = re.compile(
    r"st|ste|dr|mr|mrs|ms|mx|mme|mlle|messrs|prof|rev|fr|msgr|hon|adm|gen|brig|col|capt|cpt|lt|sgt|cpl|maj|cmdr|gov|sen|rep|pres|wm|geo|"
    r"thos|chas|jas|mt|ft|vs|cf|fig|dept|approx|ca"
)  # before a name
_BEHIND = re.compile(r"bros|jr|sr|blvd|ave|univ")  # which a name can go on after, or a sentence end with
_BEGINS = re.compile(r"(?:he|she|it|they|we|i|you|his|her|its|their|the|this|that|these|an?|in|on|at|as|but|and|there|who|what)(?=[\s,])", re.I)  # fmt: skip
_ARTICLES = ("a", "an", "the")
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
    if _BEHIND.fullmatch(word):
        return not _BEGINS.match(after)
    return after[0].isdigit() and bool(_SHORT.fullmatch(word))


def is_answered(said: str, target: str, rule: str = "sentence") -> bool:
    """Whether the part of a text that answers (`cut`) is the target, or holds it as whole words."""
    words, wanted = normalised(said), normalised(target)
    if rule == "published":
        return _bare(words, every=True) == _bare(wanted, every=True)
    if not wanted or wanted in _ARTICLES or _bare(words) == _bare(wanted):
        return bool(wanted) and _bare(words) == _bare(wanted)
    at = words.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        begins = at == 0 or is_spaceless(wanted[0]) or not goes_on(words[at - 1])
        if begins and (
            end == len(words) or is_spaceless(wanted[-1]) or not (goes_on(words[end]) or words[end] in "+#")
        ):
            return True
        at = words.find(wanted, at + 1)
    return False


def normalised(text: str) -> str:
    """A text in lower case, however its letters are composed, without possessive 's, punctuation and superfluous spaces.

    Dashes and what else sets words apart are spaces; full stops and apostrophes are nothing (`U.S.` is `us`), and `#` stays behind a letter
    (`C#`).
    """
    plain = re.sub(r"['’]s\b", "", folded(unicodedata.normalize("NFKC", text)))
    plain = re.sub(r"(?<![^\W_])#", " ", plain)
    letters = [
        "" if each in ".'’" else " " if each != "#" and unicodedata.category(each)[0] in "PZ" else each
        for each in plain
    ]
    return " ".join("".join(letters).split())


def _bare(words: str, *, every: bool = False) -> str:
    """A normalised text without the article that it begins with, or without every one; one of nothing but articles as it is."""
    own = words.split()
    if every:
        return " ".join([each for each in own if each not in _ARTICLES] or own).replace("#", "")
    return " ".join(own[1:] if own[1:] and own[0] in _ARTICLES else own)


def judge_key(judge: Judge) -> str:
    """What tells a judge from others: its attribute `key`, a text that whoever writes it changes with it; of a function without one, a digest
    of its code, its defaults, and what it and the functions inside it close over.

    Raises:
        SettingsError: it is no function (an object, a `functools.partial`), or closes over more than plain values, and has no `key`.
    """
    key = getattr(judge, "key", None)
    if isinstance(key, str) and key:
        return key
    if isinstance(judge, FunctionType):
        with suppress(TypeError, ValueError):  # of a value that is no JSON, or a variable that has none yet
            cells = [cell.cell_contents for cell in judge.__closure__ or ()]
            values = json.dumps([judge.__defaults__, judge.__kwdefaults__, cells], allow_nan=False)
            code = json.dumps([_of_code(judge.__code__), values])
            return f"{judge.__module__}.{judge.__qualname__} {hashlib.sha256(code.encode()).hexdigest()[:16]}"
    raise SettingsError(
        f"a judge must be a function of question, answer and target, alone or with plain values, or have an attribute key, a text by which its "
        f"scores are kept and which changes when it does (judge.key = 'exact, 1'); found {judge!r}."
    )


def _of_code(code: CodeType) -> list[Any]:
    """What a function does, as JSON values: instructions, names, constants, and the functions inside it."""
    inner = [_of_code(each) if isinstance(each, CodeType) else _of_constant(each) for each in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, inner]


def _of_constant(value: Any) -> str:
    """Its `repr`, with sets in an order that is the same in every process."""
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(sorted(map(_of_constant, value)))}}})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_of_constant, value))}{',' * (len(value) == 1)})"
    return repr(value)
