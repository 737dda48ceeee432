"""What every class of settings is made of: knobs, each with its sentence, and checks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from typing import Any, TypeVar

from mechedit.errors import MecheditError

__all__ = ["Settings", "SettingsError", "check_each", "filled", "from_json", "given", "knob", "knobs", "require"]

Of = TypeVar("Of")


class SettingsError(MecheditError, ValueError):
    """A setting that cannot be meant."""


class Settings:
    """What every class of settings derives from: a field that it does not have is an error that says whose it is."""

    def __new__(cls, *args: Any, **named: Any) -> Any:
        own = {each.name for each in fields(cls)}  # type: ignore[arg-type]
        if unknown := [name for name in named if name not in own]:
            raise SettingsError(f"{cls.__name__} has no field {unknown[0]!r}; {_advice(cls, unknown[0], sorted(own))}")
        return super().__new__(cls)


def _advice(settings: type, name: str, own: list[str]) -> str:
    kinds = [each for each in _below(Settings) if name in getattr(each, "__dataclass_fields__", ())]
    others = [each.__name__ for each in kinds if not any(base in kinds for base in each.__bases__)]
    close = difflib.get_close_matches(name, own, 1)
    if close and not others:
        return f"did you mean {close[0]!r}?"
    return (
        f"{' and '.join(others)} {'have' if len(others) > 1 else 'has'} it." if others else f"it has {', '.join(own)}."
    )


def _below(settings: type) -> Iterator[type]:
    each: type
    for each in settings.__subclasses__():
        yield each
        yield from _below(each)


class _Default:
    """Mixed into the default of a field: whoever made the settings gave no value, so that a model's preset may speak."""


class _Float(_Default, float): ...


class _Int(_Default, int): ...


class _Str(_Default, str): ...


class _Tuple(_Default, tuple): ...  # type: ignore[type-arg]


_MARKED: dict[type, type] = {float: _Float, int: _Int, str: _Str, tuple: _Tuple}


def knob(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the sentence that documents it here and on the command line, and what it, or each of it, may be.

    Whether a field was given stays known (`given`), through `replace` too. Of None, True and False it is not: the default's
    own counts as not given.
    """
    mark = _MARKED.get(type(default))
    about = {"help": help, "choices": choices, "default": default}
    return field(default=mark(default) if mark else default, metadata=about)


def given(settings: Any) -> dict[str, Any]:
    """The fields that were given a value by whoever made the settings, the default's own among them."""
    values = {each: getattr(settings, each.name) for each in fields(settings)}
    return {
        each.name: value for each, value in values.items() if not (value is each.default or isinstance(value, _Default))
    }


def filled(settings: Of, preset: Any) -> Of:
    """The settings with each field that was not given as the preset has it, where that has such a field; all count as given."""
    own = given(settings)
    values = {
        each.name: own.get(each.name, getattr(preset, each.name, getattr(settings, each.name)))
        for each in fields(settings)  # type: ignore[arg-type]
    }
    return replace(settings, **{name: _unmarked(value) for name, value in values.items()})  # type: ignore[type-var]


def _unmarked(value: Any) -> Any:
    plain = next((kind for kind, mark in _MARKED.items() if isinstance(value, mark)), None)
    return plain(value) if plain else value


def knobs(settings: type) -> list[tuple[str, Any, str]]:
    """Name, default and help sentence of each field, in order."""
    return [(each.name, each.metadata["default"], each.metadata["help"]) for each in fields(settings)]


def require(holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(message)


def check_each(settings: Any) -> None:
    """Raise where a field holds another type than its default does, or none of its choices.

    Lists, as JSON has them, become tuples, and numbers of NumPy and torch Python's.
    """
    for each in fields(settings):
        default = each.metadata["default"]
        wanted: Any = type(default)
        value = _plain(getattr(settings, each.name), wanted)
        object.__setattr__(settings, each.name, value)
        if default is None or wanted is bool:
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


def _plain(value: Any, wanted: type) -> Any:
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        value = value.tolist()
    if isinstance(value, list) or type(value) is tuple:
        return _tuples(value)
    return float(value) if wanted is float and type(value) is int and abs(value) < 1 << 53 else value


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
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        value = value.tolist()
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
