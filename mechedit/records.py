"""Records of a JSON file. What is wrong with them is gathered, so that all of it is told at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mechedit.errors import FactError

__all__ = ["Part", "listed", "read"]

Made = TypeVar("Made")
IDS = ("id", "case_id", "known_id")
SHOWN = 20  # mistakes, before the rest is counted


class Part:
    """An object of a file, whose parts are taken by name. A mistake is noted, and something harmless is given instead."""

    def __init__(self, value: Any, mistakes: list[str], at: str = "") -> None:
        self.value: dict[str, Any] = value if isinstance(value, dict) else {}
        self.mistakes, self._at = mistakes, at
        if not isinstance(value, dict):
            mistakes.append(f"{at.rstrip('.') or 'it'} must be an object; found {value!r}")

    def text(self, name: str) -> str:
        """A word or more."""
        if name in self.value:
            return self._text(name)
        if self.value or not self._at:  # else it is no object, which is noted
            self.mistakes.append(f"it lacks {self._at}{name}")
        return f"<{name}>"

    def optional(self, name: str) -> str | None:
        """A word or more, or nothing."""
        return None if self.value.get(name) is None else self._text(name)

    def _text(self, name: str) -> str:
        text = self.value[name]
        if isinstance(text, str) and text.strip():
            return text
        self.mistakes.append(f"{self._at}{name} must be a word or more; found {text!r}")
        return f"<{name}>"

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of them, empty where there is none."""
        texts = self.value.get(name, [])
        if isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts):
            return tuple(texts)
        self.mistakes.append(f"{self._at}{name} must be a list of texts; found {texts!r}")
        return ()

    def part(self, name: str) -> Part:
        """The object of this name."""
        if name not in self.value:
            self.mistakes.append(f"it lacks {self._at}{name}")
        return Part(self.value.get(name, {}), self.mistakes, f"{self._at}{name}.")

    def id(self, name: str, otherwise: int) -> str:
        """A name or number."""
        found = self.value.get(name, otherwise)
        if not isinstance(found, (str, int)):
            self.mistakes.append(f"{self._at}{name} must be a text or a number; found {found!r}")
        return str(found)


def read(
    path: str | Path, form: Callable[[list[dict[str, Any]]], Callable[[Part, int], Made | None]], hint: str = ""
) -> tuple[Made, ...]:
    """What each record of a file is made into, but None. `form` gives the maker for a file of such records.

    Raises:
        FactError: the file is missing, no list of records, or some have mistakes: all of them, and `hint`.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not JSON: it is no text in UTF-8.") from error
    except ValueError as error:
        raise FactError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list) or not records:
        raise FactError(f"{path} must hold a list of one or more records.")
    make = form([record for record in records if isinstance(record, dict)])
    found: list[Made] = []
    wrong: list[str] = []
    first_with: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        mistakes: list[str] = []
        part = Part(record, mistakes)
        if isinstance(record, dict):
            try:
                made = make(part, index)
            except FactError as error:
                mistakes.append(str(error).rstrip("."))
            else:
                found += [made] if made is not None else []
        for key in IDS:
            own = (key, repr(part.value.get(key)))
            if key in part.value and (first := first_with.setdefault(own, index)) != index:
                mistakes.append(f"it has the {key} {part.value[key]!r} of record {first}")
        if mistakes:
            wrong.append(f"record {index}: {'; '.join(dict.fromkeys(mistakes))}.")
    if wrong:
        counted = f"{path} has mistakes in {len(wrong)} of {len(records)} records (the first is record 0):"
        raise FactError("\n".join([counted, listed(wrong), *([hint] if hint else [])]))
    return tuple(found)


def listed(lines: Sequence[str]) -> str:
    """The first of many lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])
