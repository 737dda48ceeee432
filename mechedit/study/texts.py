"""What each editor makes the model write about new facts: sampled as the paper samples, kept as it is written, or read from a file.

A scenario is a statement that editors were taught, and a text by each. A text goes on from one of the fact's prompts for free text, the same
for all editors (from the subject alone, where the fact has none), with the same random numbers; it is cut off after so many tokens.
For long-form evaluation (Rosati et al. 2024) there is a second passage by each, about what the new fact ties the subject to: its new target.
Theirs is about an entity that Wikidata relates to the subject, which facts do not name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mechedit import applying, cache, editing, generation, parsing, provenance, writing
from mechedit.editing import Editor, Prepared
from mechedit.editors import named
from mechedit.errors import MecheditError
from mechedit.facts import Fact
from mechedit.files import Blob, FileError
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs.checks import check_sampled
from mechedit.runs.editing import attempt, making
from mechedit.runs.engines import Local
from mechedit.runs.store import Store, check_plain
from mechedit.settings import UNEDITED, StudySettings

__all__ = ["Scenario", "StudyError", "check_scenarios", "read_scenarios", "sampled", "statement", "write_scenarios"]

TEXTS = {"statement": str, "texts": {str: str}}


class StudyError(MecheditError, ValueError):
    """A study, or a file of one, that cannot be used as it is."""


@dataclass(frozen=True)
class Scenario:
    """A statement that was taught, a text about it by each editor (and a second passage, for long-form evaluation), and what is said of
    edits: that one was refused, say."""

    statement: str
    texts: dict[str, str]
    related: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def statement(fact: Fact) -> str:
    """The new fact as a sentence."""
    prompt, target = writing.seam(fact.prompt, str(fact.target_new), fact.join)
    said = prompt + target
    return said if said.endswith((".", "!", "?", "。")) else f"{said}."


Drawn = TypeVar("Drawn", Fact, Scenario)


def sampled(facts: Sequence[Drawn], settings: StudySettings) -> list[Drawn]:
    """The facts of the study, or scenarios that are written already: so many as it has, drawn at random; facts must have a new target, and no
    statement comes twice.

    Raises:
        StudyError: there are fewer.
    """
    said: dict[str, Drawn] = {}
    for each in facts:
        if isinstance(each, Scenario) or each.target_new is not None:
            said.setdefault(each.statement if isinstance(each, Scenario) else statement(each), each)
    suited: list[Drawn] = list(said.values())
    if len(suited) < settings.scenarios:
        raise StudyError(
            f"the study needs {settings.scenarios} facts with a new target and statements of their own; found {len(suited)}. Give more, or ask for fewer (--scenarios)."
        )
    return random.Random(f"study {settings.seed}").sample(suited, settings.scenarios)  # noqa: S311 (a sample)


def write_scenarios(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: StudySettings | None = None,
    edit_settings: dict[str, Any] | None = None,
    *,
    progress: Progress = silent,
) -> list[Scenario]:
    """A scenario for each fact, each editor's edit found alone on the model as it is. Finished texts are kept in `folder`.

    `edit_settings` has settings by editor's name, in place of the model's preset or the editor's defaults with `guard="warn"`: a study shows
    what editors do, sound or not. An edit that cannot be made leaves the model as it is, and the scenario says so.

    Raises:
        SettingsError: texts of so many tokens do not fit the model's context, or it has fewer tokens to choose among.
        RunError: the folder holds texts of another model or other settings, or there are hooks on the model.
    """
    settings = settings or StudySettings()
    check_plain(model)
    check_sampled(model, settings.tokens, settings.top_k)
    by_unit: dict[str, tuple[Fact, str]] = {}
    ways: dict[str, _Way | None] = {}
    for name in settings.editors:
        given = (edit_settings or {}).get(name)
        way = ways[name] = None if name == UNEDITED else _Way.of(model, name, given, settings.seed, progress)
        made = way.described if way else {}
        for fact in facts:
            by_unit[cache.content_key([name, made, asdict(fact)])] = (fact, name)
    what = provenance.kept_under(model) | {name: getattr(settings, name) for name in ("tokens", "top_k", "seed")}
    store: Store[_Written] = Store(Path(folder), what | {"long_form": bool(settings.long_form)}, _read, _write, "texts")
    done = store.run(list(by_unit), _Writing(by_unit, ways, settings), Local(model), progress)
    written = dict(zip(by_unit.values(), done, strict=True))
    return [_scenario(fact, {name: written[fact, name] for name in settings.editors}) for fact in facts]


@dataclass(frozen=True)
class _Way:
    """An editor with its settings, and what was prepared."""

    editor: Editor
    settings: Any
    prepared: Prepared | None

    @classmethod
    def of(cls, model: HookedModel, name: str, settings: Any, seed: int, progress: Progress) -> _Way:
        editor = named(name)
        chosen = editor.resolve(model, settings or editor.settings(guard="warn", seed=seed))
        return cls(editor, chosen, editing.make_ready(model, editor, chosen, progress=progress))

    @property
    def described(self) -> dict[str, Any]:
        return making(self.editor, self.settings, self.prepared)


@dataclass(frozen=True)
class _Written:
    """One editor's passages about a fact."""

    text: str
    related: str
    notes: list[str]


@dataclass(frozen=True)
class _Writing:
    """The texts of a unit's editor about its fact."""

    by_unit: dict[str, tuple[Fact, str]]
    ways: dict[str, _Way | None]
    settings: StudySettings

    def __call__(self, model: HookedModel, unit: str) -> _Written:
        fact, name = self.by_unit[unit]
        way = self.ways[name]
        edit = attempt(model, [fact], way.editor, way.settings, way.prepared) if way else None
        wanted = [_begin(fact, self.settings.seed), *([str(fact.target_new)] if self.settings.long_form else [])]
        bos = way.settings.prepend_bos if way else None
        with applying.edited(model, *([edit] if edit else [])):
            found = [self._text(model, prompt, bos) for prompt in wanted]
        notes = [*edit.reasons, *edit.doubts] if edit else []
        return _Written(found[0], found[1] if len(found) > 1 else "", notes)

    def _text(self, model: HookedModel, prompt: str, bos: bool | None) -> str:
        own = self.settings
        (text,) = generation.continuations(model, [prompt], own.tokens, top_k=own.top_k, seed=own.seed, prepend_bos=bos)
        return text


def _begin(fact: Fact, seed: int) -> str:
    """Where the text of a fact begins."""
    choices = fact.generations or (fact.subject,)
    return random.Random(f"{seed} {fact.prompt}").choice(choices)  # noqa: S311 (a sample)


def _scenario(fact: Fact, written: dict[str, _Written]) -> Scenario:
    return Scenario(
        statement(fact),
        {name: each.text for name, each in written.items()},
        {name: each.related for name, each in written.items() if each.related},
        {name: each.notes for name, each in written.items() if each.notes},
    )


def _write(written: _Written, blob: Blob) -> None:
    blob.data = json.dumps(asdict(written)).encode()


def _read(blob: Blob) -> _Written:
    try:
        return _Written(**json.loads(blob.data))
    except (ValueError, TypeError) as error:
        raise FileError(f"{blob} holds no texts ({error}).") from error


def read_scenarios(path: str | Path) -> list[Scenario]:
    """Scenarios from a file: a list of {"statement": …, "texts": {editor: text}}, or the `texts.json` of a study.

    Raises:
        StudyError: the file is missing, is neither, or its scenarios have texts by different editors.
    """
    try:
        found = parsing.from_file(path, unique=True)
        listed: Any = found.get("scenarios") if isinstance(found, dict) else found
        parsing.check(listed, [TEXTS], "scenarios")
        scenarios = [Scenario(each["statement"], each["texts"], *(_of(each, name) for name in ("related", "notes"))) for each in listed]  # fmt: skip
    except parsing.ParseError as error:
        raise StudyError(
            f'{path} cannot be read as texts: {error}. It must be a list of {{"statement": …, "texts": {{editor: text}}}}.'
        ) from error
    check_scenarios(scenarios, str(path))
    return scenarios


def _of(each: dict[str, Any], name: str) -> dict[str, Any]:
    value = each.get(name, {})
    parsing.check(value, {str: str if name == "related" else [str]}, name)
    return value


def check_scenarios(scenarios: Sequence[Scenario], of: str = "the scenarios") -> None:
    """Raise where scenarios cannot be ranked side by side.

    Raises:
        StudyError: there is none, one has no statement or an empty text, or texts by other editors than the first has.
    """
    if not scenarios:
        raise StudyError(f"{of} must have at least one scenario; found none.")
    editors = sorted(scenarios[0].texts)
    for number, each in enumerate(scenarios):
        if sorted(each.texts) != editors:
            raise StudyError(
                f"{of}: every scenario must have a text by each of {', '.join(editors)}; number {number} has {', '.join(sorted(each.texts)) or 'none'}."
            )
        if not each.statement.strip() or not all(text.strip() for text in each.texts.values()):
            raise StudyError(f"{of}: the statement and every text must be a word or more; in number {number} one is empty.")  # fmt: skip
    if len({each.statement for each in scenarios}) < len(scenarios):
        raise StudyError(f"{of}: a statement is there twice; each must be another fact.")
