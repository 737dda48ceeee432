"""One HTML file of a result: its data as JSON that no text in it can leave, one style sheet and one script of our own.

The page's policy names the hashes of these two and allows nothing else: no request, no form, no other script. Text of models and
people stands in the data alone, and the script writes it as text (`textContent`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from mechedit.cache import WriteError, atomic_write, plain
from mechedit.viewer.contents import Viewable, ViewError, contents
from mechedit.wording import visible

__all__ = ["ViewError", "page", "save"]

SCRIPTS = ("base.js", "drawing.js", "plots.js", "grids.js", "pages.js")
OF_RECORDS = "records.js"  # of evaluations alone
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws its data with a script of its own, which this browser does not run.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def page(result: Viewable, other: Viewable | None = None, names: Sequence[str] = ()) -> str:
    """The whole file as text; of two evaluations, both side by side, each called by its editor, or by `names` where that is the same.

    Raises:
        ViewError: nothing that has a page, or two that have none together.
    """
    data = contents(result, other, names)
    style, script = _style(), _script(data["kind"] == "evaluation")
    return PAGE.format(
        policy=_policy(style, script), title=escape(visible(data["title"])), style=style, script=script, data=embedded(data)
    )  # fmt: skip


def save(result: Viewable, path: str | Path, other: Viewable | None = None, names: Sequence[str] = ()) -> Path:
    """Write the page, whole or not at all; the path.

    Raises:
        ViewError: as in `page`.
        WriteError: the path is a folder, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise WriteError(f"{path} is a folder; name a file in it.")
    text = page(result, other, names)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: it has no `<`, and nothing that ends a line of JavaScript; half a surrogate pair is
    JSON's own escape of it."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _script(records: bool) -> str:
    """The parts of the script, in a scope of their own."""
    names = (*SCRIPTS[:-1], OF_RECORDS, SCRIPTS[-1]) if records else SCRIPTS
    return "(() => {'use strict';\n" + "".join(map(_asset, names)) + "})();"


@cache
def _style() -> str:
    return _asset("view.css")


def _asset(name: str) -> str:
    text = resources.files("mechedit.viewer").joinpath(name).read_text(encoding="utf-8")
    assert "</s" not in text.lower()  # it would end its element
    return text


def _policy(style: str, script: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    return (
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data: blob:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    ).format(*hashes)
