"""What every class of settings is made of: knobs, each with its sentence, and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from mechedit.errors import MecheditError

__all__ = ["SettingsError", "check_each", "from_json", "knob", "knobs", "require"]

Of = TypeVar("Of")


class SettingsError(MecheditError, ValueError):
    """A setting that cannot be meant."""


def knob(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the sentence that documents it here and on the command line, and what it, or each of it, may be."""
    return field(default=default, metadata={"help": help, "choices": choices})


def knobs(settings: type) -> list[tuple[str, Any, str]]:
    """Name, default and help sentence of each field, in order."""
    return [(each.name, each.default, each.metadata["help"]) for each in fields(settings)]


def require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def check_each(settings: Any) -> None:
    """Raise where a field holds another type than its default does, or none of its choices."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        wanted: Any = type(each.default)
        if each.default is None or wanted is bool:
            holds, name = value is None or isinstance(value, bool), "True, False or None"
        elif wanted in (int, float):
            numbers = (int, float) if wanted is float else (int,)
            holds, name = isinstance(value, numbers) and not isinstance(value, bool), wanted.__name__
        else:
            holds, name = isinstance(value, wanted), wanted.__name__
        require(holds, f"{each.name} must be of type {name}; found {value!r}.")
        for own in value if isinstance(value, tuple) else (value,):
            require(not isinstance(own, float) or math.isfinite(own), f"{each.name} must be finite; found {own}.")
        require(each.name != "seed" or value >= 0, f"seed must be 0 or more; found {value}.")
        if choices := each.metadata["choices"]:
            for own in value if isinstance(value, tuple) else (value,):
                require(own in choices, f"{each.name} must be one of {', '.join(choices)}; found {own!r}.")


def from_json(settings: type[Of], record: Mapping[str, Any]) -> Of:
    """The settings whose `dataclasses.asdict` this is, through JSON or not.

    Raises:
        SettingsError: a field that these settings do not have, or a value that cannot be meant.
    """
    names = {each.name for each in fields(settings)}  # type: ignore[arg-type]
    if unknown := sorted(record.keys() - names):
        raise SettingsError(f"{settings.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}.")
    return settings(**{name: _tuples(value) for name, value in record.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
