"""One participant's form: an HTML file that needs nothing else and asks nothing of the network.

Script and style stand in it, and its content security policy allows these two by their hashes, and nothing more. What others wrote is data: JSON in
which no tag can begin, written to the page with `textContent` alone. What cannot be seen in it, or would turn the order of letters round, is
written out (`wording.visible`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

from mechedit.wording import visible

__all__ = ["ITEMS", "QUESTIONS", "SCALE", "html"]

QUESTIONS = {"consistency": "consistent", "fluency": "fluent"}
"""What texts are ranked by."""
SCALE = 7
ITEMS = {
    "new_fact_main": "The first passage says or assumes that the new fact is true.",
    "new_fact_related": "The second passage says or assumes that the new fact is true.",
    "main_old_facts": "Apart from the new fact, what the first passage says of its subject is right.",
    "related_old_facts": "Apart from the new fact, what the second passage says of its subject is right.",
    "main_consistency": "The first passage does not contradict itself.",
    "related_consistency": "The second passage does not contradict itself.",
    "cross_consistency": "The two passages do not contradict each other.",
    "topicality": "Both passages stay with their subjects.",
    "fluency": "Both passages read as natural, fluent text.",
}
"""The nine items of long-form evaluation (Rosati et al. 2024), in words of this project."""


def html(shown: dict[str, Any]) -> str:
    """The form of this data: `study`, `form`, `token`, `contact`, `pages` and `long_form`."""
    page, style, script = (_part(f"form.{kind}") for kind in ("html", "css", "js"))
    data = shown | {"items": ITEMS, "scale": SCALE, "contact": visible(shown["contact"])} | {name: [_harmless(each) for each in shown[name]] for name in ("pages", "long_form")}  # fmt: skip
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": _json(data)}
    first, *rest = page.split("{{")
    return first + "".join(parts[name] + after for name, _, after in (each.partition("}}") for each in rest))


def _part(name: str) -> str:
    return resources.files("mechedit.study").joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """JSON in ASCII without the characters of tags."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _harmless(page: dict[str, Any]) -> dict[str, Any]:
    """A page's texts with what cannot be seen written out, line ends aside."""
    return {"statement": visible(page["statement"]), "texts": ["\n".join(map(visible, text.expandtabs(4).split("\n"))) for text in page["texts"]]}  # fmt: skip
