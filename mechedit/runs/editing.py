"""Edit many facts, each alone on the unedited model, into a folder, resumably."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from mechedit import cache, editing, edits, provenance
from mechedit.editing import Editor, EditWarning, Prepared, State
from mechedit.editors import named
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import MomentError
from mechedit.progress import Progress, silent
from mechedit.rank_one import RankOneError
from mechedit.runs.engines import Done, Engine, Local
from mechedit.runs.store import Kept, Store, check_plain
from mechedit.runs.tracing import unit

__all__ = ["Made", "attempt", "edit_facts", "edit_store", "making"]

EDIT_NUMBERS = ("relative_norm", "divisor_share", "essence_kl")


def edit_facts(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    editor: str | Editor = "rome",
    settings: Any = None,
    prepared: Prepared | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Kept[Edit]:
    """The edit of each fact, from `folder` where it is there, found (by `engine`, here by default) and saved otherwise.

    Edits are read from the disk as they are used; `runs.units.export` writes them as files. A fact that cannot be edited, whatever it
    raises, does not end the run: its result has no changes, and the reason. The model is left as it is.

    Raises:
        RunError: the folder holds a run of other settings, another process works in it, or there are hooks on the model.
        EditError: what was prepared does not belong to the model or the settings.
    """
    check_plain(model)
    editor = named(editor)
    settings = editor.resolve(model, settings)
    if prepared is None:
        prepared = editing.make_ready(model, editor, settings, progress=progress)
    else:
        editor.check(model, (), settings, prepared)
    by_unit = {unit(fact): fact for fact in facts}
    store = edit_store(folder, provenance.kept_under(model) | making(editor, settings, prepared))
    task = _Editing(by_unit, editor, settings, prepared)

    def failed(done: Done[Any]) -> Edit:
        return editing.refused(model, [by_unit[done.unit]], editor, settings, done.error)

    return store.run([unit(fact) for fact in facts], task, engine or Local(model), progress, failed=failed)


def edit_store(folder: str | Path, what: dict[str, Any]) -> Store[Edit]:
    """Where edits are kept. A unit's bytes depend on what it is alone, so that a resumed run ends with the same files."""
    return Store(folder, what, edits.load, _save, "edits", note=lambda edit: asdict(Made.of(edit)))


def _save(edit: Edit, path: Any) -> None:
    edits.save(replace(edit, seconds=nan), path)


@dataclass(frozen=True)
class Made:
    """What is known of a kept edit without reading it: for tables, and for the names of its scores. JSON values."""

    digest: str
    edited: bool
    numbers: dict[str, float | None]
    reasons: list[str]
    notes: list[str]
    cond_C: dict[str, float]
    scored: list[dict[str, Any]] | None  # in a sequence, each of its records right after it

    @classmethod
    def of(cls, edit: Edit) -> Made:
        """Of an edit."""
        numbers = {name: float(edit.report.get(name, nan)) for name in EDIT_NUMBERS}
        cond = {str(edit.layer): edit.report["cond_C"]} if "cond_C" in edit.report else {}
        return cls(
            edit.digest,
            not edit.is_empty,
            cache.plain(numbers),
            list(edit.reasons),
            list(edit.doubts),
            cache.plain(cond),
            cache.plain(edit.details.get("scored")),
        )

    @property
    def row(self) -> dict[str, float]:
        """What the edit itself measured; whether there is one."""
        found = {name: nan if value is None else value for name, value in self.numbers.items()}
        return found | {"edited": float(self.edited)}


def making(editor: Editor, settings: Any, prepared: Prepared | None) -> dict[str, Any]:
    """What edits depend on, beside the model."""
    return editor.key | {"edit": asdict(settings), "prepared": prepared.key if prepared is not None else ""}


@dataclass(frozen=True)
class _Editing:
    """The edit of a unit's fact, or one without changes that says why not."""

    by_unit: dict[str, Fact]
    editor: Editor
    settings: Any
    prepared: Prepared | None  # made once, not by each worker

    def __call__(self, model: HookedModel, name: str) -> Edit:
        return attempt(model, [self.by_unit[name]], self.editor, self.settings, self.prepared)


def attempt(
    model: HookedModel,
    facts: Sequence[Fact],
    editor: Editor,
    settings: Any,
    prepared: Prepared | None,
    state: State | None = None,
) -> Edit:
    """The edit of facts, or one without changes that says why not. What is out of its bands is in its reasons, and no warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)
            return editing.edit(model, facts, editor, settings, prepared=prepared, state=state)
    except (EditError, FactError, RankOneError, MomentError) as error:
        return editing.refused(model, facts, editor, settings, str(error))
