"""Token roles: what a position is to the fact, so that prompts of different lengths can be averaged.

Each position has exactly one role. The subject's last token is `subject_last` even where it is also its first, or the
prompt's last; `subject_first` exists from two tokens up, `subject_middle` from three. After the subject, the prompt's last
token is `last`; the first of the others is `after_first`, the rest `after_further`. What stands before is `before`. (The
published notebook counts a one-token subject as first and last both, and likewise a one-token rest.)
"""

from __future__ import annotations

from mechedit.settings import ROLE_TITLES as TITLES
from mechedit.settings import ROLES

__all__ = ["ROLES", "TITLES", "positions", "roles"]


def roles(n_positions: int, subject: tuple[int, int]) -> tuple[str, ...]:
    """The role of each position of a prompt whose subject is the range [begin, end)."""
    begin, end = subject

    def role(position: int) -> str:
        if position < begin:
            return "before"
        if position == end - 1:
            return "subject_last"
        if position < end:
            return "subject_first" if position == begin else "subject_middle"
        if position == n_positions - 1:
            return "last"
        return "after_first" if position == end else "after_further"

    return tuple(role(position) for position in range(n_positions))


def positions(role: str, n_positions: int, subject: tuple[int, int]) -> list[int]:
    """The positions that have a role."""
    return [position for position, each in enumerate(roles(n_positions, subject)) if each == role]
