"""Options generated from the settings that Python uses, so that both have the same words and defaults."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from mechedit.settings import PREFIXES, Bands, SettingsError, knobs, read_bands
from mechedit.wording import meant, visible
from mechedit.writing import JOINS

__all__ = [
    "DEFAULT_MODEL",
    "PRESET",
    "Parser",
    "a_number",
    "a_path",
    "add_command",
    "add_json",
    "add_prompt",
    "add_settings",
    "add_text",
    "an_integer",
    "check_texts",
    "given_settings",
    "options_of",
]

DEFAULT_MODEL = "gemma-3-270m"
SHARED = ("seed",)  # an option of this name stands for a field of two settings of one command
PRESET = "A model with a preset (`mechedit models`) has the preset's {} instead of the defaults below."


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, and takes no option by a part of its name."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **named})

    def error(self, message: str) -> NoReturn:
        self.exit(2, visible(f"{self.prog}: {message}. `{self.prog} --help` lists the options.") + "\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            every = ", ".join(map(str, action.choices))
            near = meant(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {every}){near}")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The options that a command has."""
    return list(parser._option_string_actions)


def check_texts(arguments: argparse.Namespace) -> None:
    """End the command, in a line, where an argument that is text was given in bytes that are no UTF-8. A file may be called so."""
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                arguments.parser.error(f"{name.replace('_', '-')} must be text in UTF-8; found {text!r}")


def a_path(text: str) -> Path:
    """A path as an option gives it: something, without NUL."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names no file or folder")
    return Path(text)


def a_number(text: str) -> float:
    """A number as an option gives it: finite."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return found


def an_integer(text: str) -> int:
    """A whole number as an option gives it, of a size that counts something."""
    try:
        found = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if abs(found) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is larger than any number that counts something here")
    return found


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    *,
    model: bool = False,
    note: str = "",
) -> argparse.ArgumentParser:
    described = f"{help[0].upper()}{help[1:]}. {note}".strip()
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=described)
    parser.set_defaults(run=run, parser=parser)
    if model:
        parser.add_argument(
            "--model",
            default=DEFAULT_MODEL,
            help=f"local folder, packaged model or hub name (default: {DEFAULT_MODEL})",
        )
        parser.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            default="float32",
            help="number format of the weights (default: float32)",
        )
    return parser


def add_prompt(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs=None if required else "?",
        help="the whole prompt, which contains the subject",
    )
    parser.add_argument("--subject", required=required, help="the subject, letter for letter as in the prompt")
    parser.add_argument(
        "--occurrence", type=an_integer, help="which appearance of the subject, from 0, where there are several"
    )
    parser.add_argument(
        "--join",
        choices=JOINS,
        help="how the prompt meets an answer: auto, as its writing has it (a space in English, none in Chinese or after an "
        "opening quotation mark); space, always one; none, as they are (default: auto)",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=a_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files to estimate C on (default: text sampled from the model)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=a_path, metavar="FILE", help="write the result as JSON there; - for standard output"
    )


def add_settings(parser: argparse.ArgumentParser, settings: type, without: Sequence[str] = ()) -> None:
    """An option for each field of a settings dataclass, with its default and its sentence. An option not given is None.

    Raises:
        SettingsError: a field has the name of an option that the command has already.
    """
    taken = {action.dest for action in parser._actions}
    for each in fields(settings):
        name, text, choices = each.name, each.metadata["help"], each.metadata["choices"]
        flag = "--" + name.replace("_", "-")
        if name in without or (name in taken and name in SHARED):
            continue
        if name in taken:
            raise SettingsError(
                f"{settings.__name__} must have no field {name!r}, as {flag} is an option of `{parser.prog}` already; give it another name."
            )
        default = each.metadata["default"]
        shown = "" if default in (None, "") else f" (default: {_shown(default)})"
        if default is None or isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(
                flag,
                type=_PARTS.get(str(each.type), _names),
                metavar=_shown(default)
                or ("FILE" if each.name == "bands" else "NAME,…" if each.type == "tuple[str, ...]" else "N,…"),
                help=text + (f"; of {', '.join(choices)}" if choices else "") + (shown if default else ""),
            )
        else:
            parser.add_argument(
                flag,
                type={int: an_integer, float: a_number}.get(type(default), type(default)),
                choices=choices or None,
                metavar=None if choices else type(default).__name__.upper()[:5],
                help=(text + shown).replace("%", "%%"),
            )


def given_settings(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {
        name: getattr(arguments, name) for name, _, _ in knobs(settings) if getattr(arguments, name, None) is not None
    }


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(a_number(part) for part in _names(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.5,1") from error


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(an_integer(part) for part in _names(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 3,4,5") from error


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    if text in PREFIXES:
        return PREFIXES[text]
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in _names(text)]
        return tuple((first, second) for first, second in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of TOKENSxHOWMANY such as 5x10,10x10, nor one of {', '.join(PREFIXES)}"
        ) from error


def _calibrated(text: str) -> Bands:
    try:
        return read_bands(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from error


_PARTS: dict[str, Callable[[str], Any]] = {
    "tuple[tuple[int, int], ...]": _pairs,
    "tuple[tuple[str, float, float], ...]": _calibrated,
    "tuple[float, ...]": _numbers,
    "tuple[int, ...]": _integers,
}
