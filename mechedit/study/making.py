"""The folder of a study: its texts, the key that says whose they are, and a form for each participant.

texts.json    the scenarios, by editor
key.json      which editor's text stands where in each form, and the secret that forms' codes come from: not for participants
study.json    what the study is; says nothing of whose text is whose
forms/        an HTML file a participant

Made again with the same texts and settings, it is the same study with the same forms. Another study in its folder is refused, since forms may be out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mechedit import cache, parsing, provenance
from mechedit.runs.store import claim
from mechedit.settings import StudySettings, from_json
from mechedit.study import design, forms
from mechedit.study.texts import Scenario, StudyError, check_scenarios

__all__ = ["Form", "Study", "StudyError", "load", "make", "signed"]

STUDY, KEY, TEXTS, FORMS = "study.json", "key.json", "texts.json", "forms"
LETTERS = "ABCDEF"
KEY_FORM = {
    "study": str,
    "secret": str,
    "forms": [{"form": str, "pages": [{"scenario": int, "order": [str]}], "long_form": [{"scenario": int, "editor": str}]}],
}  # fmt: skip
FORMAT = 1


@dataclass(frozen=True)
class Form:
    """One participant's pages: (scenario, the editors in the order of their texts); and those of long-form evaluation, (scenario, editor)."""

    name: str
    pages: tuple[tuple[int, tuple[str, ...]], ...]
    long_form: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Study:
    """A study with its key."""

    folder: Path
    name: str
    settings: StudySettings
    forms: tuple[Form, ...]
    secret: str
    about: dict[str, Any]  # the model and versions

    @property
    def editors(self) -> tuple[str, ...]:
        """Whose texts are ranked."""
        return self.settings.editors

    @property
    def letters(self) -> str:
        """What the texts of a page are called, in order."""
        return LETTERS[: len(self.editors)]

    def token(self, form: str) -> str:
        """The code that a form signs its response with."""
        return _digest(self.secret, f"form {form}")

    def files(self) -> list[Path]:
        """The forms' files, in order."""
        return [self.folder / FORMS / f"form-{number:02}-{form.name}.html" for number, form in enumerate(self.forms, 1)]


def signed(token: str, body: str) -> str:
    """What a response says that only who has its form could have made: HMAC-SHA256 by the form's code, in hexadecimal."""
    return _digest(token, body)


def _digest(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def make(
    scenarios: Sequence[Scenario],
    folder: str | Path,
    settings: StudySettings | None = None,
    about: dict[str, Any] | None = None,
) -> Study:
    """Lay out a study of these texts in `folder`, with balanced, blinded forms; how many scenarios and whose texts is theirs to say.

    Raises:
        StudyError: the scenarios cannot be ranked side by side, or long-form evaluation lacks second passages.
        SettingsError: they do not make whole people.
        RunError: the folder holds another study.
        WriteError: the folder cannot be written.
    """
    check_scenarios(scenarios)
    folder = Path(folder)
    settings = replace(settings or StudySettings(), scenarios=len(scenarios), editors=tuple(scenarios[0].texts))
    if settings.long_form and (lacking := [each for each in scenarios if each.related.keys() != each.texts.keys()]):
        raise StudyError(
            f"long-form evaluation needs a second passage by each editor (`related`), and the scenario {lacking[0].statement!r} lacks one."
        )
    claim(folder, {"kind": "study", "settings": asdict(settings), "texts": cache.content_key([asdict(each) for each in scenarios])})  # fmt: skip
    secret = _read_key(folder)["secret"] if (folder / KEY).is_file() else secrets.token_hex(16)
    study = Study(folder, _digest(secret, "study")[:12], settings, _forms(settings, secret), secret, about or {})
    _write(folder / TEXTS, {"kind": "study texts", "about": study.about, "scenarios": [asdict(each) for each in scenarios]})  # fmt: skip
    _write(folder / KEY, {"kind": "study key", "study": study.name, "secret": secret, "forms": list(map(_keyed, study.forms))})  # fmt: skip
    for form, path in zip(study.forms, study.files(), strict=True):
        with cache.atomic_write(path) as temporary:
            temporary.write_text(forms.html(_shown(study, form, scenarios)), encoding="utf-8")
    said = {"kind": "study", "format": FORMAT, "study": study.name, "settings": asdict(settings), "about": study.about}
    _write(folder / STUDY, said | {"forms": [path.name for path in study.files()], "versions": provenance.versions()})
    return study


def _forms(settings: StudySettings, secret: str) -> tuple[Form, ...]:
    laid = design.plan(settings.scenarios, settings.raters, settings.pages, len(settings.editors), settings.long_form, settings.seed)  # fmt: skip
    names = settings.editors
    return tuple(
        Form(
            _digest(secret, f"person {person}")[:8],
            tuple((page.fact, tuple(names[each] for each in page.order)) for page in own),
            tuple((fact, names[editor]) for fact, editor in further),
        )
        for person, (own, further) in enumerate(zip(laid.people, laid.long_form, strict=True))
    )


def _keyed(form: Form) -> dict[str, Any]:
    pages = [{"scenario": scenario, "order": list(order)} for scenario, order in form.pages]
    return {"form": form.name, "pages": pages, "long_form": [{"scenario": scenario, "editor": editor} for scenario, editor in form.long_form]}  # fmt: skip


def _shown(study: Study, form: Form, scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """What a form holds: texts by place, and nothing of whose they are."""
    pages = [{"statement": scenarios[at].statement, "texts": [scenarios[at].texts[name] for name in order]} for at, order in form.pages]  # fmt: skip
    further = [{"statement": scenarios[at].statement, "texts": [scenarios[at].texts[name], scenarios[at].related[name]]} for at, name in form.long_form]  # fmt: skip
    return {
        "study": study.name,
        "form": form.name,
        "token": study.token(form.name),
        "contact": study.settings.contact,
        "pages": pages,
        "long_form": further,
    }


def load(folder: str | Path) -> Study:
    """The study in a folder, with its key.

    Raises:
        StudyError: there is none, its key is missing, or one of the files was changed.
    """
    folder = Path(folder)
    try:
        said = parsing.from_file(folder / STUDY, unique=True)
        parsing.check(said, {"study": str, "format": int, "settings": {}, "about": {}})
    except parsing.ParseError as error:
        raise StudyError(
            f"{folder} holds no study that can be read ({STUDY}: {error}). `mechedit study make` makes one."
        ) from error
    if said["format"] > FORMAT:
        raise StudyError(f"{folder} holds a study of format {said['format']}; this version of mechedit knows up to {FORMAT}. Update mechedit.")  # fmt: skip
    key, settings = _read_key(folder), from_json(StudySettings, said["settings"])
    made = _forms(settings, key["secret"])
    if key["study"] != said["study"] or key["forms"] != list(map(_keyed, made)):
        raise StudyError(
            f"{folder / KEY} is not the key of the study in {folder / STUDY}. Put back the files that `mechedit study make` wrote."
        )
    return Study(folder, said["study"], settings, made, key["secret"], said["about"])


def _read_key(folder: Path) -> dict[str, Any]:
    try:
        key = parsing.from_file(folder / KEY, unique=True)
        parsing.check(key, KEY_FORM)
    except parsing.ParseError as error:
        raise StudyError(f"{folder / KEY}, which says whose text is whose, cannot be read: {error}.") from error
    return dict(key)


def _write(path: Path, record: dict[str, Any]) -> None:
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
