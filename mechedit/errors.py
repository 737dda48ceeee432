"""The common base of what mechedit raises for a caller's mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechedit.wording import visible

__all__ = ["FactError", "ListError", "ManyMistakes", "MecheditError", "check_list"]


class MecheditError(Exception):
    """Says what must hold, what was found, and what to do. The command line prints it without a traceback."""


class FactError(MecheditError, ValueError):
    """A fact, or a file of facts, that cannot be used as it is."""


class ManyMistakes(FactError):
    """Mistakes of a file, a line each; what they quote cannot begin one."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(map(visible, lines)))


class ListError(MecheditError, TypeError):
    """One text where a list of them is taken."""


def check_list(name: str, value: object) -> None:
    """Raise for a single text or path, whose letters would be taken for a list.

    Raises:
        ListError: it is one.
    """
    if isinstance(value, (str, bytes, Path)):
        raise ListError(f"{name} must be a list; found {value!r}. Give [{value!r}] for a list of one.")
