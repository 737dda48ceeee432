"""The command tune."""

from __future__ import annotations

import argparse
from typing import Any

from mechedit.cli.choosing import DEFAULT_EDITOR, chosen_editor, settings_of
from mechedit.cli.options import a_path, add_command, add_json, add_settings, an_integer, given_settings
from mechedit.cli.terminal import (
    UsageError,
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_table,
    write_json,
)
from mechedit.settings import TuneSettings, knobs

__all__ = ["add_tuning"]


def add_tuning(commands: Any, editor: str) -> None:
    """tune"""
    tune = add_command(commands, "tune", _tune, "propose a layer and options of an editor for a model", model=True)
    tune.add_argument("--facts", metavar="FILE", default="built-in", help="facts with new targets (default: built-in)")
    tune.add_argument("--begin", type=an_integer, default=0, metavar="N", help="leave the first N out, to report on")
    tune.add_argument(
        "--editor", default=DEFAULT_EDITOR, metavar="NAME", help=f"whose options are tried (default: {DEFAULT_EDITOR})"
    )
    tune.add_argument(
        "--try",
        dest="tries",
        action="append",
        default=[],
        metavar="OPTION=VALUE,…",
        help="an option of the editor and the values tried; may be given more than once (default: the editor's own)",
    )
    add_settings(tune, TuneSettings, without=("grid",))
    tune.set_defaults(edit_settings=settings_of(editor))
    tune.add_argument("--out", type=a_path, required=True, metavar="DIR", help="every trace and edit is kept there")
    add_json(tune)


def _tune(arguments: argparse.Namespace) -> None:
    from mechedit import sources, tuning
    from mechedit.edits import EditError

    given = given_settings(arguments, TuneSettings)
    settings = TuneSettings(**given, grid=_grid(arguments))
    editor = chosen_editor(arguments)
    if arguments.begin < 0:
        raise UsageError(f"--begin must be 0 or more; found {arguments.begin}.")
    chosen = sources.named(arguments.facts)
    if arguments.begin >= len(chosen):
        raise UsageError(f"--begin {arguments.begin} leaves no fact of the {len(chosen)} in {arguments.facts}.")
    check_places(arguments.json, arguments.out / "tuned.json")
    model = load_model(arguments)
    with keeping(f"finished traces and edits are kept in {arguments.out}"), progress_bars() as progress:
        found = tuning.tune(model, chosen[arguments.begin :], arguments.out, settings, editor, progress=progress)
    written = write_json(arguments.out / "tuned.json", found.to_json()) + write_json(arguments.json, found.to_json())
    console = console_of(arguments)
    console.print(f"traced {found.traced} facts; {editor.site} site: {found.site}")
    names = ("ES", "PS", "NS", "S", "relative_norm", "perplexity_ratio", "within")
    tried = list(found.rows[0].tried)
    rows = [
        (str(row.layer), *(_said(row.tried[name]) for name in tried), *(f"{getattr(row, name):.3g}" for name in names))
        for row in found.rows
    ]
    rows.insert(0, ("none", *("" for _ in tried), *(f"{getattr(found.unedited, name):.3g}" for name in names)))
    show_table(console, ("layer", *(name.replace("_", " ") for name in (*tried, *names))), rows)
    options = ["layer"] * hasattr(found.settings, "layer") + tried
    if found.worked:
        options_of = (f"--{name.replace('_', '-')} {_said(getattr(found.settings, name))}" for name in options)
        console.print(f"proposed: {' '.join(options_of)}")
    show_files(console, written)
    if not found.worked:
        raise EditError(
            f"nothing is proposed: the best edits that were tried have ES {found.best.ES:.3g} and S {found.best.S:.3g}, the model as it is "
            f"{found.unedited.ES:.3g} and {found.unedited.S:.3g}. Try other values (--try), or more layers (--around)."
        )


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grid(arguments: argparse.Namespace) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """The options of --try with their values, read as the editor's own options are."""
    from mechedit import tuning

    defaults: dict[str, Any] = {
        name: default
        for name, default, _ in knobs(arguments.edit_settings)
        if name not in tuning.SET and type(default) in (int, float, str)
    }
    grid = {}
    for text in arguments.tries:
        written, equals, values = text.partition("=")
        name = written.strip().replace("-", "_")
        if name not in defaults or not equals:
            known = ", ".join(defaults)
            raise UsageError(f"--try takes OPTION=VALUE,VALUE with an option of the editor ({known}); found {text!r}.")
        try:
            found = tuple(type(defaults[name])(part) for part in values.split(","))
        except ValueError as error:
            raise UsageError(f"--try {text!r}: {error}.") from error
        for value in found:
            arguments.edit_settings(**{name: value})  # raises what cannot be meant
        grid[name] = found
    return tuple(grid.items())
