"""Studies of invented texts, and participants who fill in their forms without a browser."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mechedit import study
from mechedit.settings import StudySettings
from mechedit.study import Scenario, Study

EDITORS = ("rome", "ft-l", "unedited")
SMALL = StudySettings(scenarios=4, raters=3, pages=4)
QUALITY = {"rome": 3, "ft-l": 2, "unedited": 1}


def scenarios(n: int, editors: Sequence[str] = EDITORS) -> list[Scenario]:
    """Each text says whose it is, which no participant would see."""
    return [
        Scenario(
            f"Fact {at} is new.",
            {name: f"text of {name} about {at}" for name in editors},
            {name: f"second passage of {name} about {at}" for name in editors},
        )
        for at in range(n)
    ]


def small(folder: Path, settings: StudySettings = SMALL) -> Study:
    """A study of three people."""
    return study.make(scenarios(settings.scenarios), folder, settings)


def shown(form: Path) -> dict[str, Any]:
    """The data in a form."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', form.read_text(encoding="utf-8"))
    return json.loads(text)


def whose(text: str) -> str:
    """The editor that a text names."""
    return re.findall(r"of (\S+) about", text)[0]


def answers(form: Path, prefer: Callable[[int, str, str], float]) -> dict[str, Any]:
    """The body of a response: texts in the order of what `prefer(page, question, editor)` gives them, the greatest first."""
    data = shown(form)

    def ranking(at: int, question: str, texts: list[str]) -> list[str]:
        return sorted("ABCDEF"[: len(texts)], key=lambda letter: -prefer(at, question, whose(texts["ABCDEF".index(letter)])))  # fmt: skip

    pages = [
        {question: ranking(at, question, page["texts"]) for question in ("consistency", "fluency")} | {"seconds": 20.0 + at}
        for at, page in enumerate(data["pages"])
    ]  # fmt: skip
    further = [{"items": dict.fromkeys(data["items"], QUALITY[whose(page["texts"][0])]), "seconds": 30} for page in data["long_form"]]  # fmt: skip
    return {"study": data["study"], "form": data["form"], "pages": pages, "long_form": further, "comment": "", "finished": True}  # fmt: skip


def sign(form: Path, body: str) -> str:
    return hmac.new(shown(form)["token"].encode(), body.encode(), hashlib.sha256).hexdigest()


def send(form: Path, body: dict[str, Any] | str, to: Path, **changes: Any) -> Path:
    """Write a response as the form does."""
    text = body if isinstance(body, str) else json.dumps(body)
    record = {"kind": "mechedit study response", "body": text, "check": sign(form, text)} | changes
    to.parent.mkdir(exist_ok=True)
    to.write_text(json.dumps(record))
    return to
