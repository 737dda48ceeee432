"""What sound and broken edits of a model look like in the numbers that guards read, and the bands between them.

Facts are edited in ways that may be sound (the settings, at several layers and strengths) and in ways that should break the model
(edits multiplied, random changes of their norm, what the editor itself names as harmful). What each does is judged by what no guard
looks at: the fact's prompt, its neighbours, and a text that guards do not read.

    sound    the prompt takes, of the neighbours that were right at most a tenth is lost (less those that become right), and the text's perplexity is at most 1.1 times
    broken   half of those neighbours or more are lost, or the text's perplexity is 1.5 times or more

What is between the two, does nothing, or was made to harm and did not, is no evidence. The edge of a band is halfway, in
logarithms, between the 99th percentile of sound edits and the tenth percentile of the broken ones beyond it; a number by which fewer
than half of the broken edits would be found tells too little, and has no edge.
Rates are of bands set on every second fact and tried on the others, a fact's edits together: false alarms among sound edits, misses
among broken ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechedit import applying, cache, editing, guards, provenance, scoring, statistics
from mechedit.benchmarks import counterfact
from mechedit.cache import plain
from mechedit.changes import Change, Dense, by_weight, norm, total
from mechedit.corruption import generator
from mechedit.editing import Editor, Prepared
from mechedit.editors import named
from mechedit.errors import MecheditError
from mechedit.facts import Fact, FactError
from mechedit.guards import Band, Health
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs.editing import attempt, making
from mechedit.runs.engines import Local
from mechedit.runs.results import check_kept, check_made, who
from mechedit.runs.scored import Scored, score_store
from mechedit.runs.tracing import unit
from mechedit.settings import NO_EDGE, Bands, CalibrateSettings
from mechedit.statistics import Mean

__all__ = ["Calibrated", "Calibration", "CalibrationError", "calibrate", "edges", "judged"]

KEPT, LOST = 0.1, 0.5  # share of the right neighbours: lost at most, of a sound edit; at least, of a broken one
SOUND_TEXT, BROKEN_TEXT = 1.1, 1.5  # perplexity on a text that guards do not read, over the unedited model's
PERCENTILE = 99.0  # of sound edits
FOUND = 0.5  # share of the broken edits that a band must find to be one
BEYOND = 10.0  # of broken edits beyond that
FEWEST = 5  # edits of a kind
SMALLEST = 1e-6  # below which numbers are alike


class CalibrationError(MecheditError, ValueError):
    """Bands that cannot be set from these edits."""


@dataclass(frozen=True)
class Calibrated:
    """The band of one number: `sound` is the 99th percentile of sound edits on the edge's side, `broken` the tenth of the broken ones beyond it
    (nan where there is none)."""

    name: str
    low: float
    high: float
    sound: float
    broken: float
    false_alarms: Mean
    misses: Mean


@dataclass(frozen=True, repr=False)
class Calibration:
    """Bands with their evidence: `edits` has the numbers of each edit of `facts`, the way it was made, and what it was judged to be."""

    editor: str
    found: tuple[Calibrated, ...]
    false_alarms: Mean
    misses: Mean
    edits: tuple[dict[str, Any], ...]
    origin: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    facts: tuple[dict[str, Any], ...] = ()

    @property
    def bands(self) -> Bands:
        """For the settings of an editor."""
        return tuple((each.name, each.low, each.high) for each in self.found)

    @property
    def judged(self) -> dict[str, int]:
        """How many edits were sound, broken, and neither."""
        verdicts = [each["verdict"] for each in self.edits]
        return {verdict: verdicts.count(verdict) for verdict in ("sound", "broken", "neither")}

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        found: dict[str, Any] = plain(
            {
                "editor": self.editor,
                "model": self.origin["name"],
                "rule": " ".join(str(__doc__).split("\n\n", 1)[1].split()),
                "bands": [asdict(each) for each in self.found],
                "together": {"false_alarms": asdict(self.false_alarms), "misses": asdict(self.misses)},
                "judged": self.judged,
                "edits": [
                    {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
                    for row in self.edits
                ],
                "origin": self.origin,
                "settings": self.settings,
                "versions": self.versions,
                "facts": self.facts,
            }
        )
        return found

    def save(self, path: str | Path) -> Path:
        """Write the file that `--bands` and `settings.read_bands` read.

        Raises:
            WriteError: the path cannot be written.
        """
        with cache.atomic_write(Path(path)) as temporary:
            temporary.write_text(json.dumps(self.to_json(), allow_nan=False) + "\n")
        return Path(path)


def calibrate(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: CalibrateSettings | None = None,
    editor: str | Editor = "rome",
    edit_settings: Any = None,
    *,
    progress: Progress = silent,
) -> Calibration:
    """Edit the first facts that can be edited and scored in every way, and set the editor's bands. Everything is kept in `folder`.

    Raises:
        FactError: too few facts have both targets, paraphrases and neighbours, and can be edited.
        CalibrationError: hardly any edit was sound.
        RunError: the folder holds a run of other settings, or a `bands.json` of facts or ways that are not among these, or of another editor.
    """
    settings, way = settings or CalibrateSettings(), named(editor)
    own = replace(way.resolve(model, edit_settings), guard="warn")
    chosen = _chosen(model, facts, settings.facts, way, own)
    check_kept(Path(folder) / "bands.json", chosen)
    probes = [_Probing(model, way, each, chosen, settings) for each in _ways(model, way, own, settings)]
    names = {f"{probe.way.name}{variant}" for probe in probes for variant in probe.way.variants}
    check_made(Path(folder) / "bands.json", way.name, "edits", lambda row: "" if row["way"] in names else row["way"])
    rows: list[dict[str, Any]] = []
    for done, probe in enumerate(probes):
        progress("ways to edit", done, len(probes))
        rows += probe.rows(Path(folder), progress)
    progress("ways to edit", len(probes), len(probes))
    origin, versions = provenance.origin(model), provenance.versions()
    record = {"calibrate": asdict(settings), "edit": asdict(own)}
    return replace(_set(way.name, way.bands, rows, settings.seed, origin, record, versions), facts=tuple(who(chosen)))


def _chosen(model: HookedModel, facts: Sequence[Fact], n: int, editor: Editor, settings: Any) -> list[Fact]:
    found: dict[str, Fact] = {}
    for fact in facts:
        whole = fact.target_new and fact.target_true and fact.paraphrases and fact.neighbours
        if whole and len(found) < n and unit(fact) not in found and not editing.refusal(model, fact, editor, settings):
            found[unit(fact)] = fact
    if len(found) < n:
        raise FactError(
            f"calibration edits {n} facts with both targets, paraphrases and neighbours whose new target the model does not say yet; of "
            f"these {len(facts)} there are {len(found)}."
        )
    return [*found.values()]


@dataclass(frozen=True)
class _Ways:
    """Finding an edit in one way, and what is made of it: each a name and a factor; `random` takes another direction of its norm."""

    name: str
    editor: Editor
    settings: Any
    times: tuple[float, ...] = (1.0,)
    random: tuple[float, ...] = ()
    harmful: bool = False

    @property
    def variants(self) -> dict[str, tuple[float, bool]]:
        """What follows the name, with the factor, and whether the direction is drawn."""
        made = {"" if times == 1 else f", times {times:g}": (times, False) for times in self.times}
        return made | {f", random of its norm times {times:g}": (times, True) for times in self.random}


def _ways(model: HookedModel, editor: Editor, own: Any, settings: CalibrateSettings) -> list[_Ways]:
    """At each layer: every strength, each multiplied; and what the editor calls harmful."""
    layers = settings.layers or ((own.layer,) if hasattr(own, "layer") else ())
    found = []
    for layer in layers or (None,):
        here = own if layer is None else editor.resolve(model, replace(own, layer=layer))
        place = "" if layer is None else f"layer {layer}, "
        for strength in settings.strengths if editor.strength else (1.0,):
            pushed = {editor.strength: strength * getattr(here, editor.strength)} if editor.strength else {}
            more = (*settings.times,) if strength == settings.strengths[0] else ()
            name = f"{place}{editor.strength} times {strength:g}" if pushed else f"{place}as set"
            found.append(_Ways(name, editor, replace(here, **pushed), (1.0, *more), (1.0, *more) if more else ()))
        found += [
            _Ways(f"{place}{name}", named(who), how, harmful=True) for name, (who, how) in editor.harmful(here).items()
        ]
    return found


class _Probing:
    """One way to edit, tried on every fact, and kept."""

    def __init__(
        self, model: HookedModel, editor: Editor, way: _Ways, facts: Sequence[Fact], settings: CalibrateSettings
    ) -> None:
        self.model, self.editor, self.way, self.seed = model, editor, way, settings.seed
        self.by_unit = {unit(fact): fact for fact in facts}
        self.prepared: Prepared | None = None
        self.bos = way.settings.prepend_bos
        self.text: float = nan

    def rows(self, folder: Path, progress: Progress) -> list[dict[str, Any]]:
        """The numbers of every edit made in this way, with its fact and name."""
        what = provenance.kept_under(self.model) | making(self.way.editor, self.way.settings, None)
        what |= {"calibration": {"times": self.way.times, "random": self.way.random, "seed": self.seed}}
        store = score_store(folder / cache.content_key(what), what, "edits")
        found = store.run(list(self.by_unit), self, Local(self.model), progress)
        return [row for index, scored in enumerate(found) for row in self._unpacked(index, scored)]

    def _unpacked(self, index: int, scored: Scored) -> Iterable[dict[str, Any]]:
        """Rows of a fact, whose numbers are kept under `variant|name`."""
        variants = dict.fromkeys(key.partition("|")[0] for key in scored.scores)
        for variant in variants:
            numbers = {
                key.partition("|")[2]: value for key, value in scored.scores.items() if key.startswith(f"{variant}|")
            }
            harmful = self.way.harmful or bool(variant)
            yield {
                "fact": index,
                "way": f"{self.way.name}{variant}",
                **numbers,
                "verdict": judged(numbers, harmful=harmful),
            }

    def __call__(self, model: HookedModel, name: str) -> Scored:
        if self.prepared is None:
            self.prepared = editing.make_ready(model, self.way.editor, self.way.settings)
            self.text = _apart(model, self.bos)
        fact = self.by_unit[name]
        edit = attempt(model, [fact], self.way.editor, self.way.settings, self.prepared)
        if not edit.changes:
            return Scored({}, "; ".join(edit.reasons) or "its edit changes no weight, which could be multiplied")
        healthy = guards.of_unedited(model, [fact.subject], prepend_bos=self.bos)
        (before,) = counterfact.scores(model, [fact], prepend_bos=self.bos)
        rest = {key: value for key, value in edit.report.items() if key in self.editor.bands}
        size = edit.report["relative_norm"] / edit.report["update_norm"] if edit.report["update_norm"] else nan
        found: dict[str, float] = {}
        for variant, made, more in self._variants(edit.changes, rest, fact):
            report = more | {"relative_norm": norm(made) * size}
            numbers = report | self._effects(model, fact, made, before, healthy)
            found |= {f"{variant}|{key}": value for key, value in numbers.items()}
        return Scored(found)

    def _variants(
        self, found: Sequence[Change], report: Mapping[str, float], fact: Fact
    ) -> Iterable[tuple[str, Sequence[Change], dict[str, float]]]:
        for name, (times, is_random) in self.way.variants.items():
            if is_random:
                yield name, _randomised(found, times, generator(self.seed, "random change", fact.prompt)), {}
            else:
                yield name, found if times == 1 else _scaled(found, times), dict(report)

    def _effects(
        self, model: HookedModel, fact: Fact, made: Sequence[Change], before: Mapping[str, float], healthy: Health
    ) -> dict[str, float]:
        """What guards read of the model with these changes, and what the edit is judged by."""
        with applying.written(model, made):
            (after,) = counterfact.scores(model, [fact], prepend_bos=self.bos)
            drift = guards.drift(healthy, guards.measure(model, [fact.subject], prepend_bos=self.bos))
            text = _apart(model, self.bos)
        right = before["NS"]
        return drift | {
            "takes": after["ES"],
            "neighbours_lost": max(0.0, right - after["NS"]) / right if right else nan,
            "text": float(np.exp(min(self.text - text, 700.0))),
        }


def judged(numbers: Mapping[str, float], *, harmful: bool = False) -> str:
    """sound, broken or neither, by `takes`, `neighbours_lost` and `text`; a text of no number is broken. What was made to harm is never
    sound."""
    lost, text = numbers["neighbours_lost"], numbers["text"]
    if lost >= LOST or not text < BROKEN_TEXT:
        return "broken"
    return "sound" if not harmful and numbers["takes"] == 1 and lost <= KEPT and text <= SOUND_TEXT else "neither"


def edges(name: str, band: Band, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float, float]:
    """The band of a number from judged rows: low, high, the 99th percentile of sound ones, and the tenth percentile of broken ones beyond."""
    lower = band[0] > 0  # then it is small numbers that are suspicious
    turn: Callable[[float], float] = (
        (lambda value: 1 / max(value, SMALLEST)) if lower else (lambda value: max(value, SMALLEST))
    )
    sound, broken = (
        [turn(row[name]) for row in rows if row["verdict"] == verdict and isfinite(row.get(name, nan))]
        for verdict in ("sound", "broken")
    )
    top = float(np.percentile(sound, PERCENTILE)) if sound else nan
    beyond = inf
    edge = NO_EDGE
    if further := [each for each in broken if each > top]:
        beyond = float(np.percentile(further, BEYOND))
        edge = (top * beyond) ** 0.5
        if sum(each > edge for each in broken) < FOUND * len(broken):
            edge, beyond = NO_EDGE, inf
    low, high = (1 / edge if edge < NO_EDGE else 0.0, NO_EDGE) if lower else (0.0, edge)
    back: Callable[[float], float] = (lambda value: 1 / value) if lower else float
    return low, high, back(top), back(beyond) if isfinite(beyond) else nan


def _set(
    editor: str,
    bands: Mapping[str, Band],
    rows: list[dict[str, Any]],
    seed: int,
    origin: dict[str, Any],
    record: dict[str, Any],
    versions: dict[str, str],
) -> Calibration:
    verdicts = [row["verdict"] for row in rows]
    sound, broken = verdicts.count("sound"), verdicts.count("broken")
    if min(sound, broken) < FEWEST:
        more = "Use more facts, or other layers." if sound < FEWEST else "Multiply edits by more (times)."
        raise CalibrationError(
            f"bands need {FEWEST} sound and {FEWEST} broken edits; found {sound} and {broken} of {len(rows)}. {more}"
        )
    bands = {name: band for name, band in bands.items() if _tells(name, band, rows)}
    halves = [{name: edges(name, band, [row for row in rows if row["fact"] % 2 == half])[:2] for name, band in bands.items()} for half in (0, 1)]  # fmt: skip

    def rates(names: Sequence[str]) -> tuple[Mean, Mean]:
        alarmed = [(row, _out(row, {name: halves[1 - row["fact"] % 2][name] for name in names})) for row in rows]
        return _rate(alarmed, "sound", True, seed), _rate(alarmed, "broken", False, seed)

    found = tuple(Calibrated(name, *edges(name, band, rows), *rates([name])) for name, band in bands.items())
    return Calibration(editor, found, *rates(list(bands)), tuple(rows), origin, record, versions)


def _tells(name: str, band: Band, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these edits say more of a number than the editor's own band: not where all sound ones have the same, nor where none is
    broken beyond them and the editor's band has them all."""
    _, high, top, _ = edges(name, band, rows)
    if high == NO_EDGE and band[0] == 0 and top <= band[1]:
        return False
    values = [row[name] for row in rows if row["verdict"] == "sound" and isfinite(row.get(name, nan))]
    return bool(values) and max(values) > min(values) * (1 + SMALLEST)


def _out(row: Mapping[str, Any], bands: Mapping[str, tuple[float, float]]) -> bool:
    """Whether a number is out of its band; NaN is, what was not measured is not."""
    return any(not low <= row[name] <= high for name, (low, high) in bands.items() if name in row)


def _rate(alarmed: Sequence[tuple[Mapping[str, Any], bool]], verdict: str, counted: bool, seed: int) -> Mean:
    """The share of edits of a verdict with (or without) an alarm: of each fact, then over facts."""
    of: dict[int, list[bool]] = {}
    for row, out in alarmed:
        if row["verdict"] == verdict:
            of.setdefault(row["fact"], []).append(out == counted)
    shares = np.array([float(np.mean(each)) for each in of.values()])
    return statistics.summary(shares, seed, (0.0, 1.0)) if len(shares) else Mean(nan, nan, nan, 0)


def _apart(model: HookedModel, bos: bool) -> float:
    """The mean log P of the second half of the held-out text, whose beginning alone guards read."""
    text = guards.held_out_text(model)
    return scoring.mean_log_p(model, text[len(text) // 2 :], prepend_bos=bos)


def _scaled(found: Sequence[Change], times: float) -> list[Change]:
    return [Dense(weight, times * total(own)) for weight, own in by_weight(found).items()]


def _randomised(found: Sequence[Change], times: float, stream: torch.Generator) -> list[Change]:
    """Changes of the same weights and norms in directions that are drawn."""
    made: list[Change] = []
    for weight, own in by_weight(found).items():
        drawn = torch.randn(own[0].shape, generator=stream, dtype=torch.float64)
        made.append(Dense(weight, times * norm(own) / drawn.norm() * drawn))
    return made
