"""The common base of what mechedit raises for a caller's mistake."""

from __future__ import annotations

__all__ = ["FactError", "MecheditError"]


class MecheditError(Exception):
    """Says what must hold, what was found, and what to do. The command line prints it without a traceback."""


class FactError(MecheditError, ValueError):
    """A fact, or a file of facts, that cannot be used as it is."""
