"""How far a long step is: a callback that the command line draws as a bar and that Python users may ignore."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, of)."""


def silent(what: str, done: int, of: int) -> None:
    """Say nothing."""
