"""The common base of what mechedit raises for a caller's mistake."""

from __future__ import annotations

__all__ = ["MecheditError"]


class MecheditError(Exception):
    """Says what must hold, what was found, and what to do. The command line prints it without a traceback."""
