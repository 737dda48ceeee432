"""Which layer and which options of an editor suit a model: found by tracing some facts, then editing others, kept as they come.

1. The facts that the model knows are traced at the editor's site: MLP windows at the subject's last token, or attention windows at
   the prompt's. The best layer of the average, and those `around` it, are the candidates.
2. Facts with new targets, apart from those that will be reported on, are edited at every candidate with every combination of the
   options that are tried, each alone; what is out of its bands is kept, so that the whole picture is seen.
3. The combination with the best S (harmonic mean of efficacy, paraphrase and neighbourhood success) is proposed, of those whose
   edits are within their bands, where there are any. Ties go to the smaller change. Nothing is proposed where even that
   combination does not reach half of the efficacy that the unedited model leaves to be won, or has no better S than it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mechedit import applying, cache, prompts, provenance, sites
from mechedit.benchmarks import counterfact
from mechedit.benchmarks.metrics import harmonic
from mechedit.editing import Editor
from mechedit.editors import named
from mechedit.edits import Edit
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs import tracing as runs
from mechedit.runs.editing import edit_facts
from mechedit.runs.results import check_kept, check_made, who
from mechedit.settings import SettingsError, TraceSettings, TuneSettings
from mechedit.sites import Site
from mechedit.tracing.averages import average

__all__ = ["Row", "Tuned", "tune"]

SET = ("layer", "guard")  # options that tuning chooses itself
SITES = {"early": ("mlp", "subject_last", sites.early), "late": ("attn", "last", sites.late)}  # by `Editor.site`
WON = 0.5  # share of the efficacy that the unedited model leaves to be won
MOSTLY = 0.9  # share of edits within the bands that makes a combination one to propose


@dataclass(frozen=True)
class Row:
    """What one combination did to the facts that were edited: success in percent, means of the edits' numbers, and the share
    of the edits that are within the bands. `layer` is -1 where the editor has none."""

    layer: int
    tried: dict[str, Any]
    ES: float
    PS: float
    NS: float
    S: float
    relative_norm: float
    perplexity_ratio: float
    within: float
    n: int


@dataclass(frozen=True)
class Tuned:
    """The best settings that were tried, a proposal only where they `worked`; the site they come from; the unedited model on the same
    facts; and every combination that was tried."""

    editor: str
    settings: Any
    site: Site
    unedited: Row
    rows: tuple[Row, ...]
    best: Row
    traced: int
    facts: tuple[dict[str, Any], ...]  # those that were traced, and those that were edited
    origin: dict[str, Any]
    versions: dict[str, str]

    @property
    def worked(self) -> bool:
        """Whether the best combination reaches half of the efficacy that the unedited model leaves to be won, and a better S."""
        first, best = self.unedited, self.best
        return best.S > first.S and best.ES - first.ES >= WON * (100 - first.ES)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values; no settings where nothing worked."""
        return asdict(self) | ({} if self.worked else {"settings": None})


def tune(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: TuneSettings | None = None,
    editor: str | Editor = "rome",
    base: Any = None,
    *,
    progress: Progress = silent,
) -> Tuned:
    """Propose settings of an editor for a model: `base` with another layer and other options. Everything is kept in `folder`.

    Of `facts`, the first that the model knows are traced, and the first others with paraphrases and neighbours are edited.

    Raises:
        FactError: too few facts are known, or can be edited and scored.
        SettingsError: an option to try that the editor does not have.
        RunError: the folder holds a run of other settings, or a `tuned.json` of another editor, or of facts or combinations that are not
            among those here.
    """
    settings, folder, way = settings or TuneSettings(), Path(folder), named(editor)
    given = base if base is not None else way.settings()
    tries = _combinations(way, given, settings)
    bos = prompts.resolve_bos(model, given.prepend_bos)
    known, scored = _chosen(model, facts, settings, bos, progress)
    check_kept(folder / "tuned.json", [*known, *scored])
    _check_tried(folder / "tuned.json", way.name, tries)
    kind, role, best_of = SITES[way.site]
    wanted = TraceSettings(kinds=(kind,), roles=(role,), draws=settings.draws, seed=settings.seed, prepend_bos=bos)
    site = best_of(average(runs.trace_facts(model, known, folder / "traces", wanted, progress=progress)))
    around = range(max(0, site.layer - settings.around), min(int(model.cfg.n_layers), site.layer + settings.around + 1))
    _check_tried(folder / "tuned.json", way.name, tries, around)
    has_layer = hasattr(given, "layer") and not getattr(
        given, "layers", ()
    )  # of several, those that are given are kept
    if has_layer:
        way.ahead(model, replace(given, prepend_bos=bos), list(around), progress=progress)
    rows = []
    for layer in around if has_layer else (-1,):
        for tried in tries:
            there = {"layer": layer} if layer != -1 else {}
            chosen = way.resolve(model, replace(given, **there, **tried, guard="warn"))
            name = "-".join([*(f"{key}{value}" for key, value in there.items()), *(f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}" for key, value in tried.items())])  # fmt: skip
            found = edit_facts(model, scored, folder / name.replace("/", "_"), way, chosen, progress=progress)
            rows.append(replace(_row(model, scored, found, bos, tried), layer=layer))
    unedited = replace(
        _row(model, scored, [None] * len(scored), bos, {}), relative_norm=0.0, perplexity_ratio=1.0, within=1.0
    )
    best = max(rows, key=lambda row: (row.within >= MOSTLY, round(row.S, 6), -row.relative_norm))
    proposed = way.resolve(model, replace(given, **best.tried, **({"layer": best.layer} if best.layer != -1 else {})))
    origin, versions = provenance.origin(model), provenance.versions()
    return Tuned(
        way.name,
        proposed,
        site,
        unedited,
        tuple(rows),
        best,
        len(known),
        tuple(who([*known, *scored])),
        origin,
        versions,
    )


def _combinations(editor: Editor, given: Any, settings: TuneSettings) -> list[dict[str, Any]]:
    """Every combination of the options that are tried, checked."""
    grid: dict[str, Sequence[Any]] = {**dict(settings.grid)} or {**editor.grid}
    names = {each.name for each in fields(given)} - {*SET}
    if unknown := sorted(grid.keys() - names):
        raise SettingsError(
            f"the editor {editor.name} has no option {', '.join(unknown)} to try; it has {', '.join(sorted(names))}."
        )
    found = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for tried in found:
        replace(given, **tried)  # raises what cannot be meant
    return found


def _check_tried(path: Path, editor: str, tries: Sequence[dict[str, Any]], layers: Sequence[int] | None = None) -> None:
    """Raise where the table of these would take the place of one that has more; of layers, as soon as they are known."""
    now = cache.plain(list(tries))

    def unmade(row: Mapping[str, Any]) -> str:
        is_made = row["tried"] in now and (not layers or row["layer"] in (-1, *layers))
        return "" if is_made else f"layer {row['layer']}, {row['tried']}"

    check_made(path, editor, "rows", unmade)


def _chosen(
    model: HookedModel, facts: Sequence[Fact], settings: TuneSettings, bos: bool, progress: Progress
) -> tuple[list[Fact], list[Fact]]:
    """The facts that are traced, and those that are edited."""
    known = _first_known(model, facts, settings.traced, bos, progress)
    if len(known) < 2:
        raise FactError(
            f"tuning averages traces of facts that the model knows, two at least; {model.cfg.model_name} knows {len(known)} of these {len(facts)}. "
            "Give more facts, or others; a fact can be known only where it has a target_true."
        )
    complete = [fact for fact in facts if fact.target_new and fact.target_true and fact.paraphrases and fact.neighbours]
    scored = [fact for fact in complete if fact not in known][: settings.edited]
    if len(scored) < settings.edited:
        raise FactError(
            f"tuning edits {settings.edited} facts with a new target, paraphrases and neighbours, apart from the {len(known)} that are "
            f"traced; there are {len(scored)}."
        )
    return known, scored


def _first_known(model: HookedModel, facts: Sequence[Fact], n: int, bos: bool, progress: Progress) -> list[Fact]:
    """The first `n` facts that the model knows, without asking for more than it takes."""
    found: list[Fact] = []
    for begin in range(0, len(facts), 4 * n):
        if len(found) < n:
            found += runs.known(model, facts[begin : begin + 4 * n], prepend_bos=bos, progress=progress)
    return found[:n]


def _row(
    model: HookedModel, facts: Sequence[Fact], found: Sequence[Edit | None], bos: bool, tried: dict[str, Any]
) -> Row:
    """Of facts, each on the model with its edit, or on the model as it is."""
    scores = []
    for fact, edit in zip(facts, found, strict=True):
        with applying.edited(model, *([edit] if edit else [])):
            scores += counterfact.scores(model, [fact], prepend_bos=bos)
    means = {name: 100 * float(np.mean([score[name] for score in scores])) for name in ("ES", "PS", "NS")}
    done = [edit.report for edit in found if edit and not edit.is_empty]
    return Row(
        -1,
        tried,
        **means,
        S=harmonic(*means.values()),
        relative_norm=float(np.mean([report["relative_norm"] for report in done])) if done else float("nan"),
        perplexity_ratio=float(np.mean([report["perplexity_ratio"] for report in done])) if done else float("nan"),
        within=float(np.mean([bool(edit and not edit.is_empty and not edit.reasons) for edit in found])),
        n=len(scores),
    )
