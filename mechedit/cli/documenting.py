"""The command docs: the project's docs as a site, in a browser."""

from __future__ import annotations

import argparse
import webbrowser
from importlib import metadata
from pathlib import Path
from typing import Any

from mechedit.cli.options import add_command
from mechedit.cli.terminal import UsageError, console_of, has_display
from mechedit.wording import visible

__all__ = ["add_documenting"]


def add_documenting(commands: Any) -> None:
    """docs"""
    docs = add_command(commands, "docs", _docs, "open the docs in a browser, where they are built; else say how to build them")  # fmt: skip
    docs.add_argument("--no-open", dest="open", action="store_false", help="say where they are, and open nothing")


def _docs(arguments: argparse.Namespace) -> None:
    place = _place(Path(__file__).parents[2])
    console_of(arguments).print(visible(place), soft_wrap=True, markup=False, highlight=False)
    if arguments.open and has_display():
        webbrowser.open(place)


def _place(project: Path) -> str:
    """The address of the site that was built in the project's folder, or of the project's page where only the package is installed."""
    site = project / "site" / "index.html"
    if site.is_file():
        return site.as_uri()
    if (project / "mkdocs.yml").is_file():
        raise UsageError(f"the docs are not built: run `make docs` in {project}, or read {project / 'docs'}.")
    addresses = _addresses()
    if not addresses:
        raise UsageError("the docs are not a part of the installed package: they are in the project's folder, in docs/, and `make docs` builds them there.")  # fmt: skip
    return next((addresses[name] for name in ("documentation", "homepage", "repository") if name in addresses), next(iter(addresses.values())))  # fmt: skip


def _addresses() -> dict[str, str]:
    """The project's addresses that the package names, by what they are."""
    try:
        found = metadata.metadata("mechedit").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return {}
    pairs = (each.partition(", ") for each in found)
    return {name.lower(): address for name, _, address in pairs}
