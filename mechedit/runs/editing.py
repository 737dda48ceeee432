"""Edit many facts, each alone on the unedited model, into a folder, resumably."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mechedit import edits, moments, provenance, scoring
from mechedit.editors import rome
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.runs.store import Store
from mechedit.runs.tracing import unit
from mechedit.settings import MomentSettings, RomeSettings

__all__ = ["edit_facts"]


def edit_facts(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    progress: Progress = silent,
) -> list[Edit]:
    """The edit of each fact, from `folder` where it is there, found and saved there otherwise. The model is left as it is.

    A fact that cannot be edited does not end the run: its result has no changes, and the reason.

    Raises:
        RunError: the folder holds a run of other settings, or another process works in it.
    """
    settings = rome.resolve(model, settings)
    moment = moment or moments.estimate(
        model, settings.layer, settings=MomentSettings(prepend_bos=settings.prepend_bos), progress=progress
    )
    origin = provenance.origin(model)
    what = {
        "settings": asdict(settings),
        "moment": moment.hash,
        "model": {key: origin[key] for key in ("name", "weight_hash", "dtype")},
    }
    by_unit = {unit(fact): fact for fact in facts}
    # a unit's bytes depend on what it is alone, so that a resumed run ends with the same files
    store: Store[Edit] = Store(
        folder, what, edits.load, lambda edit, path: edits.save(replace(edit, seconds=0.0), path)
    )

    def compute(name: str) -> Edit:
        try:
            return rome.edit(model, by_unit[name], settings, moment)
        except (EditError, FactError) as error:
            return _refused(model, by_unit[name], settings, str(error))

    return list(store.run(list(by_unit), compute, progress))


def _refused(model: HookedModel, fact: Fact, settings: RomeSettings, reason: str) -> Edit:
    """An edit without changes, which says why."""
    targets = [target for target in (fact.target_new, fact.target_true) if target]
    scores = scoring.score(model, [(fact.prompt, target) for target in targets], prepend_bos=settings.prepend_bos)
    p = (
        dict(zip(("p_new", "p_true"), (score.p for score in scores), strict=False))
        if fact.target_new
        else {"p_new": 0.0}
    )
    return Edit(
        method="rome",
        changes=(),
        fact=asdict(fact) | {"prompt": fact.prompt},
        report={"divisor": 0.0, "update_norm": 0.0, "relative_norm": 0.0},
        before=p,
        after=p,
        origin=provenance.origin(model),
        settings=asdict(settings),
        versions=provenance.versions(),
        seconds=0.0,
        reasons=(reason,),
    )
