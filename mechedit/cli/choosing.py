"""Which editor a command works with, and its options: they come from that editor's settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import add_settings, given_settings
from mechedit.settings import EDITOR_SETTINGS, EditSettings

if TYPE_CHECKING:
    from mechedit.editing import Editor
    from mechedit.models import HookedModel

__all__ = [
    "DEFAULT_EDITOR",
    "NONE",
    "add_editor",
    "chosen_editor",
    "given_edit_settings",
    "named_in",
    "resolved",
    "settings_of",
]

DEFAULT_EDITOR = "rome"
NONE = "none"


def named_in(argv: Sequence[str]) -> str:
    """The editor that a command line names, the last where there are several, as argparse has it: its options are known only then."""
    editor = DEFAULT_EDITOR
    for index, word in enumerate(argv):
        if word.startswith("--editor="):
            editor = word.partition("=")[2]
        elif word == "--editor" and index + 1 < len(argv):
            editor = argv[index + 1]
    return editor


def settings_of(editor: str) -> type[EditSettings]:
    """The settings of the editor of this name."""
    if editor == NONE:
        return EDITOR_SETTINGS[DEFAULT_EDITOR]  # so that options which mean nothing are told as such
    if editor in EDITOR_SETTINGS:
        return EDITOR_SETTINGS[editor]
    from mechedit.editors import named

    return named(editor).settings


def add_editor(
    parser: argparse.ArgumentParser, editor: str, *, none: bool = False, without: Sequence[str] = ()
) -> None:
    """--editor, and the options of the editor that this command line names."""
    settings = settings_of(editor)
    named = [*EDITOR_SETTINGS, *([NONE] if none else [])]
    parser.add_argument(
        "--editor",
        default=DEFAULT_EDITOR,
        metavar="NAME",
        help=f"{', '.join(named)}, or package.module:Class (default: {DEFAULT_EDITOR}); the options that follow are those of {editor}",
    )
    for option, choices in settings.bundles.items():
        if option not in without:
            parser.add_argument(
                f"--{option}", choices=tuple(choices), help=f"{', '.join(next(iter(choices.values())))} by a name"
            )
    add_settings(parser, settings, without)
    parser.set_defaults(edit_settings=settings, edit_without=tuple(without))


def given_edit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The editor's settings that were given: what a bundle stands for, then single fields. Mistakes are raised."""
    settings: type[EditSettings] = arguments.edit_settings
    given: dict[str, Any] = {}
    for option, choices in settings.bundles.items():
        given |= choices.get(str(getattr(arguments, option, None)), {})
    of_command = set(arguments.edit_without)  # an option of this name is the command's own
    given |= {name: value for name, value in given_settings(arguments, settings).items() if name not in of_command}
    settings(**given)
    return given


def chosen_editor(arguments: argparse.Namespace) -> Editor:
    """The editor; `none` is one for evaluations alone."""
    from mechedit.editors import named

    return named(arguments.editor)


def resolved(model: HookedModel, editor: Editor, given: dict[str, Any]) -> Any:
    """The preset of the model (else the defaults), with what was given in its place."""
    return editor.resolve(model, editor.settings(**given))
