"""JSON of others, read with care: what is not JSON, is nested too deep, or has other types than it must is one kind of error."""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechedit.errors import MecheditError

__all__ = ["ParseError", "check", "from_file", "from_text", "number", "text_of"]

DEEPEST = 100  # lists and objects in each other; what mechedit writes has fewer than ten


class ParseError(MecheditError, ValueError):
    """Text that is no JSON, or JSON that is not what it must be."""


class number:
    """In a form: a number, which Python can hold as float, and no truth value."""


def from_text(text: str | bytes, *, unique: bool = False, shallow: bool = True) -> Any:
    """The value of a JSON text; a byte-order mark before it is passed over.

    With `unique`, no object may have a name twice. With `shallow`, nothing is nested so deep that recursion would end in it.

    Raises:
        ParseError: it is no JSON, or too deep.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        found = json.loads(decoded, object_pairs_hook=_once if unique else None)
    except RecursionError as error:
        raise ParseError(f"it is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise error if isinstance(error, ParseError) else ParseError(str(error)) from error
    if shallow:
        _check_depth(found)
    return found


def from_file(path: str | Path, *, unique: bool = False, shallow: bool = True) -> Any:
    """The value of a JSON file; errors as in `from_text` and `text_of`."""
    return from_text(_content(Path(path)), unique=unique, shallow=shallow)


def text_of(path: str | Path) -> str:
    """The text of a file in UTF-8, without its byte-order mark.

    Raises:
        ParseError: it is no file (a folder, a device, a pipe), cannot be read, or is in another encoding.
    """
    try:
        return _content(Path(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParseError(f"it is no text in UTF-8 ({error})") from error


def _content(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ParseError("it is no file but a folder, a device or a pipe")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        if isinstance(error, ParseError):
            raise
        raise ParseError(getattr(error, "strerror", None) or str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ParseError("an object in it has a name twice")
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ParseError(f"it is nested deeper than {DEEPEST} levels")
        inner: list[Any] = []
        for each in level:
            parts = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            inner += [part for part in parts if isinstance(part, (dict, list))]
        level, depth = inner, depth + 1


def check(value: Any, form: Any, at: str = "it") -> None:
    """Raise unless a JSON value has a form: a type, `number`, None, a list [form], an object {str: form} of any names or
    {"name": form} of these and others, a tuple of forms of which one must fit; `object` is anything.

    Raises:
        ParseError: it has not; the message names the place.
    """
    if isinstance(form, tuple):
        if not any(_fits(value, each) for each in form):
            raise ParseError(f"{at} must be {' or '.join(map(_called, form))}; found {reprlib.repr(value)}")
        return
    outer = type(form) if isinstance(form, (list, dict)) else form
    if not _is(value, outer):
        raise ParseError(f"{at} must be {_called(form)}; found {reprlib.repr(value)}")
    if isinstance(form, list):
        for index, each in enumerate(value):
            check(each, form[0], f"{at}[{index}]")
    elif isinstance(form, Mapping):
        every = form.get(str)
        for name, own in [(name, every) for name in value] if every is not None else list(form.items()):
            if name not in value:
                raise ParseError(f"{at} lacks {name}")
            check(value[name], own, f"{at}.{name}" if at != "it" else name)


def _fits(value: Any, form: Any) -> bool:
    try:
        check(value, form)
    except ParseError:
        return False
    return True


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is number:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _holds(value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _holds(value: float) -> bool:
    try:
        return math.isfinite(float(value)) or isinstance(value, float)  # NaN is a number that was not measured
    except OverflowError:
        return False


def _called(form: Any) -> str:
    names = {str: "a text", int: "a whole number", number: "a number", bool: "true or false", None: "null"}
    return (
        "a list"
        if isinstance(form, list)
        else "an object"
        if isinstance(form, Mapping)
        else names.get(form, "anything")
    )
