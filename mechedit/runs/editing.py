"""Edit many facts, each alone on the unedited model, into a folder, resumably."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

from mechedit import editing, edits, provenance
from mechedit.editing import Editor, EditWarning, Prepared, State
from mechedit.editors import named
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import MomentError
from mechedit.progress import Progress, silent
from mechedit.rank_one import RankOneError
from mechedit.runs.engines import Engine, Local
from mechedit.runs.store import Store, check_plain
from mechedit.runs.tracing import unit

__all__ = ["attempt", "edit_facts", "edit_store", "making"]


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
) -> list[Edit]:
    """The edit of each fact, from `folder` where it is there, found (by `engine`, here by default) and saved otherwise.

    A fact that cannot be edited does not end the run: its result has no changes, and the reason. The model is left as it is.

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
    return store.run([unit(fact) for fact in facts], task, engine or Local(model), progress)


def edit_store(folder: str | Path, what: dict[str, Any]) -> Store[Edit]:
    """Where edits are kept. A unit's bytes depend on what it is alone, so that a resumed run ends with the same files."""
    return Store(folder, what, edits.load, lambda edit, path: edits.save(replace(edit, seconds=nan), path), "edits")


def making(editor: Editor, settings: Any, prepared: Prepared | None) -> dict[str, Any]:
    """What edits depend on, beside the model."""
    return {"editor": editor.name, "edit": asdict(settings), "prepared": prepared.key if prepared is not None else ""}


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
