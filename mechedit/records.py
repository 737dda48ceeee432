"""Records of a JSON file. What is wrong with them is gathered, so that all of it is told at once."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mechedit import writing
from mechedit.errors import FactError, ManyMistakes

__all__ = ["Part", "listed", "load", "make", "unwritable"]

Made = TypeVar("Made")
SHOWN = 20  # mistakes, before the rest is counted


class Part:
    """An object of a file, whose parts are taken by name. A part that is missing or mistaken is None, and noted.

    `need` names what may be missing elsewhere, and may not here.
    """

    def __init__(self, value: Any, mistakes: list[str], need: Sequence[str] = (), at: str = "") -> None:
        self.is_object = isinstance(value, dict)
        self.value: dict[str, Any] = value if self.is_object else {}
        self.mistakes, self.own_id = mistakes, ""
        self._need, self._at = need, at
        if not self.is_object and value is not None:
            mistakes.append(f"{at.rstrip('.') or 'it'} must be an object; found {reprlib.repr(value)}")

    def text(self, name: str, *, blank: bool = False) -> str | None:
        """A word or more; with `blank`, or none."""
        if self._lacks(name):
            return None
        text = self.value[name]
        if isinstance(text, str) and (blank or text.strip()):
            return text
        self.mistakes.append(f"{self._at}{name} must be a word or more; found {reprlib.repr(text)}")
        return None

    def optional(self, name: str) -> str | None:
        """A word or more, if there is one."""
        if name in self._need:
            return self.text(name)
        return None if self.value.get(name) is None else self.text(name, blank=True) or None

    def texts(self, name: str, *, needed: bool = False) -> tuple[str, ...]:
        """A list of them."""
        texts = self.value.get(name)
        if texts is None and (not needed or self._lacks(name)):
            return ()
        if isinstance(texts, list) and (texts or not needed) and all(isinstance(each, str) and each.strip() for each in texts):  # fmt: skip
            return tuple(texts)
        self.mistakes.append(f"{self._at}{name} must be a list of texts; found {reprlib.repr(texts)}")
        return ()

    def part(self, name: str) -> Part:
        """The object of this name."""
        self._lacks(name)
        return Part(self.value.get(name), self.mistakes, (), f"{self._at}{name}.")

    def id(self, name: str, otherwise: int) -> str:
        """What names the record: a text or a whole number, else its own number."""
        found = self.value.get(name)
        if found is not None and type(found) not in (str, int):
            self.mistakes.append(f"{name} must be a text or a whole number; found {reprlib.repr(found)}")
        else:
            self.own_id = str(otherwise if found is None else found)
        return self.own_id

    def _lacks(self, name: str) -> bool:
        """Whether nothing of this name is there. It is noted, unless all of the object is missing, which is."""
        if self.is_object and self.value.get(name) is None:
            self.mistakes.append(f"it lacks {self._at}{name}")
        return self.value.get(name) is None


def load(path: str | Path) -> list[Any]:
    """What a JSON file lists; one object or more are among it.

    Raises:
        FactError: the file is missing, or holds something else.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a device may never end, a pipe never begin
            raise FactError(f"{path} cannot be read: it is no file but a folder, a device or a pipe.")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not JSON: it is no text in UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, list) or not any(isinstance(each, dict) for each in found):
        raise FactError(f"{path} must hold a list of one or more records, each an object.")
    return found


def make(
    found: Sequence[Any],
    maker: Callable[[Part, int], Made | None],
    path: str | Path,
    hint: str = "",
    need: Sequence[str] = (),
) -> tuple[Made, ...]:
    """What the maker makes of each record, but None.

    Raises:
        FactError: some have mistakes: all of them, and `hint`.
    """
    every: list[Made] = []
    wrong: list[str] = []
    first_with: dict[str, int] = {}
    for index, record in enumerate(found):
        mistakes: list[str] = [] if record is not None else ["it must be an object; found None"]
        part = Part(record, mistakes, need)
        if part.is_object:
            made = maker(part, index)
            every += [made] if made is not None else []
            if part.own_id and (first := first_with.setdefault(part.own_id, index)) != index:
                mistakes.append(f"its id {part.own_id!r} is that of record {first}")
        if mistakes:
            wrong.append(f"record {index}: {'; '.join(mistakes)}.")
    if wrong:
        counted = f"{path} has mistakes in {len(wrong)} of {len(found)} records, which are numbered from 0:"
        raise ManyMistakes([counted, *listed(wrong), *([hint] if hint else [])])
    return tuple(every)


def unwritable(text: str | None) -> list[str]:
    """What is wrong with a text that cannot be encoded, if it cannot."""
    at = None if text is None else writing.lone_surrogate(text)
    return [] if at is None else [f"must be text that UTF-8 can write; character {at} of {text!r} is half of one"]


def listed(lines: Sequence[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]
