"""The command view: a result as a page that needs nothing else. No model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mechedit.cli.options import a_path, add_command
from mechedit.cli.terminal import check_places, console_of, has_display, show_files

__all__ = ["add_viewing"]


def add_viewing(commands: Any) -> None:
    """view"""
    view = add_command(commands, "view", _view, "make a result into one HTML file that works offline, and open it; no model is loaded")  # fmt: skip
    view.add_argument("result", type=a_path, metavar="RESULT", help="a trace, severed or edit file, average.json, sweep.json, or a folder of trace --facts, evaluate or sweep")  # fmt: skip
    view.add_argument("other", type=a_path, nargs="?", metavar="RESULT2", help="another evaluation, to stand beside the first")  # fmt: skip
    view.add_argument("--unit", metavar="NAME", help="of a folder of a run: one unit, by its name, its number, or the beginning of its name")  # fmt: skip
    view.add_argument("--out", type=a_path, metavar="FILE", help="the page (default: the result's name, ending in .html, here)")  # fmt: skip
    view.add_argument("--no-open", dest="open", action="store_false", help="do not open the page in a browser")


def _view(arguments: argparse.Namespace) -> None:
    from mechedit import viewer

    out = arguments.out or Path(_stem(arguments.result) + ".html")
    check_places(out)
    other = viewer.read(arguments.other) if arguments.other else None
    found = viewer.read(arguments.result, arguments.unit)
    names = [_stem(place) for place in (arguments.result, arguments.other)] if arguments.other else []
    written = viewer.save(found, out, other, names)
    show_files(console_of(arguments), [written])
    if arguments.open and has_display():
        import webbrowser

        webbrowser.open(written.resolve().as_uri())


def _stem(path: Path) -> str:
    """What a page of a result is called: after the folder of an evaluation, where the path names a file in it."""
    whole = Path(os.path.realpath(path))
    named = whole.parent if path.name in ("results.parquet", "summary.json") else whole
    return named.stem or "result"
