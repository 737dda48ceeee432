"""Edit many facts, each alone on the unedited model, into a folder, resumably."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path

from mechedit import edits, keys, moments, provenance
from mechedit.editors import rome
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.rank_one import RankOneError
from mechedit.runs.engines import Engine, Local
from mechedit.runs.store import Store
from mechedit.runs.tracing import unit
from mechedit.settings import MomentSettings, RomeSettings

__all__ = ["attempt", "edit_facts"]


def edit_facts(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> list[Edit]:
    """The edit of each fact, from `folder` where it is there, found (by `engine`, here by default) and saved otherwise.

    A fact that cannot be edited does not end the run: its result has no changes, and the reason. The model is left as it is.

    Raises:
        RunError: the folder holds a run of other settings, or another process works in it.
    """
    settings = rome.resolve(model, settings)
    moment = moment or moments.estimate(
        model, settings.layer, settings=MomentSettings(prepend_bos=settings.prepend_bos), progress=progress
    )
    rome.check_moment(model, moment, settings)
    what = {
        "settings": asdict(settings),
        "moment": moment.hash,
        "model": provenance.identity(model),
    }
    by_unit = {unit(fact): fact for fact in facts}
    # a unit's bytes depend on what it is alone, so that a resumed run ends with the same files
    store: Store[Edit] = Store(
        folder, what, edits.load, lambda edit, path: edits.save(replace(edit, seconds=nan), path), "edits"
    )

    task = _Editing(by_unit, settings, moment, keys.prefixes(model, settings))
    return store.run([unit(fact) for fact in facts], task, engine or Local(model), progress)


@dataclass(frozen=True)
class _Editing:
    """The edit of a unit's fact, or one without changes that says why not."""

    by_unit: dict[str, Fact]
    settings: RomeSettings
    moment: Moment
    prefixes: tuple[str, ...]  # sampled once, not by each worker

    def __call__(self, model: HookedModel, name: str) -> Edit:
        return attempt(model, self.by_unit[name], self.settings, self.moment, self.prefixes)


def attempt(
    model: HookedModel, fact: Fact, settings: RomeSettings, moment: Moment, prefixes: Sequence[str] | None = None
) -> Edit:
    """The edit of a fact, or one without changes that says why not. What is out of its bands is in its reasons, and no warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rome.EditWarning)
            return rome.edit(model, fact, settings, moment, prefixes=prefixes)
    except (EditError, FactError, RankOneError) as error:
        return _refused(model, fact, settings, str(error))


def _refused(model: HookedModel, fact: Fact, settings: RomeSettings, reason: str) -> Edit:
    """An edit without changes, which says why; nothing is measured."""
    return Edit(
        method="rome",
        changes=(),
        fact=asdict(fact) | {"prompt": fact.prompt},
        report={},
        before={},
        after={},
        origin=provenance.origin(model),
        settings=asdict(settings),
        versions=provenance.versions(),
        seconds=nan,
        reasons=(reason,),
    )
