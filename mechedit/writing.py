"""How text is written: where a space stands between a prompt and its answer, and where a name is found in a text.

English puts a space between words, Chinese, Japanese or Thai none, and after an opening quotation mark, a hyphen or a line
break nobody does. `seam` knows; every prompt that meets a target goes through it. Names are found whichever way their letters
are composed (`é` is one character or two), and never inside a letter. Nothing here knows a model.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

__all__ = ["JOINS", "ended", "find", "folded", "goes_on", "is_spaceless", "joined", "lone_surrogate", "same", "seam"]

JOINS = ("auto", "space", "none")
"""How a prompt and its target are joined: as the writing has it, by one space always, or letter by letter as they are."""

# Scripts written without spaces between words: class SA of Unicode's line breaking (UAX 14), and Tibetan. Those of East
# Asia, whose letters are wide, are known by that.
_SPACELESS = ("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI LUE ", "AHOM ", "BALINESE ", "JAVANESE ", "HALFWIDTH ")  # fmt: skip
_UNSEEN = "\u200b\u200c\u200d\u2060\ufe0e\ufe0f"  # joiners, non-joiners and variation selectors
_LEFT = {"»": "«", "›": "‹", "”": "“„"}  # marks that close, or open where no partner stands before them
_JOINING = "/\\_=&"  # like hyphens: a word follows at once where nothing stands before them, else a space
_CONTRACTED = re.compile(r"(['’](s|t|re|ve|m|ll|d)|n['’]t)\b", re.IGNORECASE)
_FINAL = re.compile(r"""[.:!?…%‰°]+["”’»]*(\s|$)""")


def seam(prompt: str, target: str, join: str = "auto") -> tuple[str, str]:
    """The prompt as it is read, and the text that follows it: the target behind the space that joins them, if there is one.

    `auto` removes spaces at the prompt's end, and puts one before the target unless the script has none between words, the
    prompt ends in a line break or in what no space follows (`(`, `“`, `-`, `l'`), or the target begins with what follows a
    word at once (`,`, `'s`). `space` puts one in any case; `none` takes both as they are.
    """
    target = target.strip()
    if join == "none" or not target:
        return prompt, target
    prompt = ended(prompt)
    return prompt, " " + target if join == "space" or _apart(prompt, target) else target


def joined(prompt: str, target: str, join: str = "auto") -> str:
    """How a prompt meets this target: `space` or `none`."""
    return "space" if seam(prompt, target, join)[1].startswith(" ") else "none"


def ended(prompt: str) -> str:
    """A prompt without the spaces at its end; a line break there is kept."""
    return re.sub(r"[^\S\r\n]+\Z", "", prompt) if prompt[-1:].isspace() else prompt


def is_spaceless(letter: str) -> bool:
    """Whether the words of a letter's script are written without spaces between them (Korean has spaces)."""
    name = unicodedata.name(letter, "")
    if "HANGUL" in name:
        return False
    wide = unicodedata.east_asian_width(letter) in "WF" and unicodedata.category(letter) not in ("So", "Sk")  # emoji
    return wide or name.startswith(_SPACELESS)


def goes_on(letter: str) -> bool:
    """Whether a letter would lengthen the word before it, so that a word cannot end between them."""
    return letter.isalnum() and not is_spaceless(letter)


def _apart(prompt: str, target: str) -> bool:
    """Whether a space stands between them."""
    prompt = prompt.rstrip(_UNSEEN)
    if not prompt or prompt[-1].isspace() or is_spaceless(prompt[-1]):
        return False
    if _continues(target) or _opens(prompt) or (prompt[-1] in "$£€¥" and target[0].isdigit()):
        return False
    if prompt[-1] == "°" and re.match(r"[CFKR]\b", target):
        return False
    if re.search(r"\d[.,:]\Z", prompt) and target[0].isdigit():  # 3.14
        return False
    return not (is_spaceless(target[0]) and any(map(is_spaceless, prompt.split()[-1])))


def _continues(target: str) -> bool:
    """Whether a target follows the word before it at once."""
    kind = unicodedata.category(target[0])
    return (
        kind == "Pe"
        or target[0] in ",;"
        or (kind == "Po" and is_spaceless(target[0]))
        or bool(_FINAL.match(target) or _CONTRACTED.match(target))
    )


def _opens(prompt: str) -> bool:
    """Whether a prompt ends in what a word follows at once."""
    last = prompt[-1]
    before = prompt.rstrip(last)
    run, kind = prompt[len(before) :], unicodedata.category(last)
    begins = not before or before[-1].isspace()
    if kind == "Ps" or last in "¿¡" or re.search(r"<[^<>\s][^<>]*>\Z", prompt):  # a tag: the turn of a chat, say
        return True
    if last in "#°":
        return begins
    if last == "@":
        return True
    if kind == "Pd" or last in _JOINING:
        return not begins
    if last in "'’":
        return _elides(before, prompt.count(last))
    if last in '"`*':
        return prompt.count(run) % 2 == 1 and not goes_on(before[-1:] or " ")
    if kind == "Pi":  # “ closes in German
        return begins or not (goes_on(before[-1]) or before[-1] in ".,!?…")
    return last in _LEFT and begins and sum(map(prompt.count, _LEFT[last])) < prompt.count(last)


def _elides(before: str, marks: int) -> bool:
    """Whether an apostrophe at the end, behind this, opens a quotation (`is '`) or has left a vowel out (`dell'`)."""
    if not before or not goes_on(before[-1]):
        return not before or not (before[-1] in ".!?…)" and marks > 1)
    opened, closed = len(re.findall(r"(?<!\w)['‘](?=\w)", before)), len(re.findall(r"(?<=\w)['’](?!\w)", before))
    is_possessive = re.search(r"\w[sxz]\Z", before, re.IGNORECASE)  # the boys'
    return opened <= closed and not is_possessive


def folded(text: str) -> str:
    """A text for comparisons that mind neither case nor how letters are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def same(first: str | None, second: str | None) -> bool:
    """Whether two texts are the same letters, however composed."""
    if first is None or second is None:
        return first is second
    return unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)


def find(text: str, name: str) -> list[tuple[int, int]]:
    """Where a name stands in a text: the characters [begin, end) of each place, in order.

    Letters are compared however they are composed (canonical equivalence), and a place begins and ends between letters:
    `Jose` is not in `José`, though `José` may be written with an accent of its own.
    """
    if not name:
        return []
    cuts = [at for at in range(len(text) + 1) if _is_between(text, at)]
    whole, places = "", {0: 0}
    for begin, end in pairwise(cuts):
        whole += unicodedata.normalize("NFC", text[begin:end])
        places[len(whole)] = end
    name = unicodedata.normalize("NFC", name)
    begins = [at for at in places if whole.startswith(name, at) and at + len(name) in places]
    return [(places[at], places[at + len(name)]) for at in begins]


def _is_between(text: str, at: int) -> bool:
    """Whether a letter ends before this character: it is no mark on the one before, and no part of it."""
    if at in (0, len(text)) or text[at].isascii():
        return True
    if unicodedata.category(text[at]).startswith("M"):
        return False
    before = text[max(0, at - 3) : at]
    joined = unicodedata.normalize("NFC", before + text[at])
    return joined == unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", text[at])


def lone_surrogate(text: str) -> int | None:
    """The first character that is half of a pair, which no text in UTF-8 has; None where there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
