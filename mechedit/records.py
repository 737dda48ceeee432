"""Records of a JSON file, or of JSON Lines. What is wrong with them is gathered, so that all of it is told at once; so are the
fields that nobody reads, and the records that are left out."""

from __future__ import annotations

import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mechedit import parsing, writing
from mechedit.errors import FactError, ManyMistakes

__all__ = ["NEEDED", "Part", "RecordWarning", "listed", "load", "make", "unwritable"]

Made = TypeVar("Made")
NEEDED = ", which is needed to score an edit"  # of what may be missing elsewhere
SHOWN = 20  # mistakes, before the rest is counted
MOST_NAMED = 8  # fields that are not read


class RecordWarning(UserWarning):
    """Of a file of records, something is not read."""


class Part:
    """An object of a file, whose parts are taken by name. A part that is missing or mistaken is None, and noted.

    `need` names what may be missing elsewhere, and may not here. `left_out` says why a record makes nothing, where it does not.
    """

    def __init__(self, value: Any, mistakes: list[str], need: Sequence[str] = (), at: str = "") -> None:
        self.is_object = isinstance(value, dict)
        self.value: dict[str, Any] = value if self.is_object else {}
        self.mistakes, self.own_id, self.left_out = mistakes, "", ""
        self.need, self._at = need, at
        self._asked, self._parts = set[str](), list[Part]()
        if not self.is_object and value is not None:
            mistakes.append(f"{at.rstrip('.') or 'it'} must be an object; found {reprlib.repr(value)}")

    def text(self, name: str, *, blank: bool = False) -> str | None:
        """A word or more; with `blank`, or none."""
        return None if self._lacks(name) else self._text(name, self.value[name], blank=blank)

    def optional(self, name: str) -> str | None:
        """A word or more, if there is one."""
        if name in self.need:
            return self.text(name)
        return None if self._find(name) is None else self.text(name, blank=True) or None

    def texts(self, name: str, *, needed: bool = False) -> tuple[str, ...]:
        """A list of them."""
        texts = self._find(name)
        if texts is None and (not needed or self._lacks(name)):
            return ()
        if isinstance(texts, list) and (texts or not needed) and all(isinstance(each, str) and each.strip() for each in texts):  # fmt: skip
            return tuple(found for each in texts if (found := self._text(name, each)) is not None)
        self.mistakes.append(f"{self._at}{name} must be a list of texts; found {reprlib.repr(texts)}")
        return ()

    def several(self, name: str) -> tuple[str, ...]:
        """The texts of one, or of a list; of a list in its place (one text by several names) the first. Blank ones stay."""
        found = self._find(name)
        every = found if isinstance(found, list) else [] if found is None else [found]
        texts = [self._text(name, each[0] if isinstance(each, list) and each else each, blank=True) for each in every]
        return tuple(text for text in texts if text is not None)

    def part(self, name: str) -> Part:
        """The object of this name."""
        self._lacks(name)
        self._parts.append(Part(self.value.get(name), self.mistakes, (), f"{self._at}{name}."))
        return self._parts[-1]

    def id(self, name: str, otherwise: int) -> str:
        """What names the record: a text or a whole number, else its own number."""
        found = self._find(name)
        if found is not None and type(found) not in (str, int):
            self.mistakes.append(f"{name} must be a text or a whole number; found {reprlib.repr(found)}")
        else:
            self.own_id = str(otherwise if found is None else found)
        return self.own_id

    def aside(self, *names: str) -> None:
        """Fields that may be there, and say nothing that is needed."""
        self._asked.update(names)

    def unread(self) -> list[str]:
        """Fields that are there and were not asked for."""
        own = [self._at + name for name in self.value if name not in self._asked]
        return own + [name for part in self._parts for name in part.unread()]

    def _find(self, name: str) -> Any:
        self._asked.add(name)
        return self.value.get(name)

    def _text(self, name: str, text: Any, *, blank: bool = False) -> str | None:
        if not isinstance(text, str) or not (blank or text.strip()):
            self.mistakes.append(f"{self._at}{name} must be a word or more; found {reprlib.repr(text)}")
            return None
        wrong = unwritable(text)
        self.mistakes += [f"{self._at}{name} {what}" for what in wrong]
        return None if wrong else text

    def _lacks(self, name: str) -> bool:
        """Whether nothing of this name is there. It is noted, unless all of the object is missing, which is."""
        if self.is_object and self._find(name) is None:
            self.mistakes.append(f"it lacks {self._at}{name}" + NEEDED * (name in self.need))
        return self.value.get(name) is None


def load(path: str | Path) -> list[Any]:
    """What a JSON file lists, or the lines of a file of JSON Lines; one object or more are among it.

    Raises:
        FactError: the file is missing, or holds something else.
    """
    try:
        text = parsing.text_of(path)
    except parsing.ParseError as error:
        raise FactError(f"{path} cannot be read: {error}.") from error
    try:
        found = _parsed(text)
    except parsing.ParseError as error:
        raise FactError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, list) or not any(isinstance(each, dict) for each in found):
        raise FactError(f"{path} must hold a list of one or more records, each an object.")
    return found


def _parsed(text: str) -> Any:
    """The value of a JSON text, or the list of those of its lines."""
    try:
        found = parsing.from_text(text)
    except parsing.ParseError as error:
        if not str(error).startswith("Extra data"):
            raise
    else:
        return [found] if isinstance(found, dict) and found else found
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            lines += [parsing.from_text(line)] if line.strip() else []
        except parsing.ParseError as error:
            raise parsing.ParseError(f"line {number} is no record: {error}") from error
    return lines


def make(
    found: Sequence[Any],
    maker: Callable[[Part, int], Made | None],
    path: str | Path,
    hint: str = "",
    need: Sequence[str] = (),
) -> tuple[Made, ...]:
    """What the maker makes of each record, but None. Fields that are not read, and records left out, are a `RecordWarning`.

    Raises:
        FactError: some have mistakes: all of them, and `hint`.
    """
    every: list[Made] = []
    wrong: list[str] = []
    first_with: dict[str, int] = {}
    unread, left_out = Counter[str](), Counter[str]()
    for index, record in enumerate(found):
        mistakes: list[str] = [] if record is not None else ["it must be an object; found None"]
        part = Part(record, mistakes, need)
        if part.is_object:
            made = maker(part, index)
            every += [made] if made is not None else []
            unread.update(part.unread())
            left_out.update([part.left_out] if part.left_out else [])
            if part.own_id and (first := first_with.setdefault(part.own_id, index)) != index:
                mistakes.append(f"its id {part.own_id!r} is that of record {first}")
        if mistakes:
            own = f" (id {part.own_id!r})" if part.own_id not in ("", str(index)) else ""
            wrong.append(f"record {index}{own}: {'; '.join(mistakes)}.")
    if wrong:
        counted = f"{path} has mistakes in {len(wrong)} of {len(found)} records, which are numbered from 0:"
        raise ManyMistakes([counted, *listed(wrong), *([hint] if hint else [])])
    if told := [*_told("fields that are not read: ", unread), *_told("records that are left out: ", left_out)]:
        warnings.warn(f"{path}, {len(found)} records: {'; '.join(told)}.", RecordWarning, stacklevel=3)
    return tuple(every)


def _told(what: str, counts: Counter[str]) -> list[str]:
    """A sentence on what was counted, the most frequent first."""
    named = [f"{name} (in {n})" for name, n in counts.most_common(MOST_NAMED)]
    more = [f"{len(counts) - MOST_NAMED} more"] if len(counts) > MOST_NAMED else []
    return [what + ", ".join(named + more)] if named else []


def unwritable(text: str | None) -> list[str]:
    """What is wrong with a text that cannot be encoded, if it cannot."""
    at = None if text is None else writing.lone_surrogate(text)
    return [] if at is None else [f"must be text that UTF-8 can write; character {at} of {text!r} is half of one"]


def listed(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]
