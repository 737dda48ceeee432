"""An editor at every layer and token (Meng et al. 2022, figure 5), and whether the causal trace foretells where it works.

For each layer and each choice of token, every fact is edited there, alone, and scored, with the strength that suits the place
(`runs.suiting`): what suits one layer starves another, and a comparison with one strength for all measures that. The traces of the same facts give the
average indirect effect of MLP windows at the same layers and tokens. (An editor that has no choice of token has the same scores for each.) The rank correlation of the two over cells says whether
localisation predicts where an edit succeeds; its interval draws facts again, because cells of one fact are not independent.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechedit import provenance
from mechedit.benchmarks.counterfact import COUNTERFACT
from mechedit.benchmarks.metrics import SUCCESSES, harmonic
from mechedit.cache import atomic_write
from mechedit.editing import Editor
from mechedit.editors import named
from mechedit.errors import ManyMistakes
from mechedit.facts import Fact
from mechedit.models import HookedModel, check_layer
from mechedit.progress import Progress, silent
from mechedit.records import listed
from mechedit.runs.checks import announce, check_records
from mechedit.runs.engines import Engine, Local
from mechedit.runs.evaluating import evaluate
from mechedit.runs.suiting import suited, tried
from mechedit.runs.tracing import trace_facts
from mechedit.settings import (
    ROLE_TITLES,
    EvaluateSettings,
    SettingsError,
    SweepSettings,
    TraceSettings,
)
from mechedit.statistics import FEWEST, Mean
from mechedit.tracing import Trace
from mechedit.tracing.roles import positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sweep", "check_complete", "sweep", "sweep_maps"]

RESAMPLES = 1_000


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """`scores[name]` is [fact, layer, token], from 0 to 1, nan where a fact has no such token; `effects` the traces' indirect
    effects there. Layers and tokens are named in order."""

    layers: tuple[int, ...]
    tokens: tuple[str, ...]
    scores: dict[str, np.ndarray]
    effects: np.ndarray
    seed: int
    origin: dict[str, Any]
    settings: dict[str, Any]
    strengths: np.ndarray | None = None
    """[fact, layer, token]: the editor's strength that was chosen there, nan where there is none; None where one was for all."""

    def __repr__(self) -> str:
        return f"Sweep({len(self.effects)} facts: layers {', '.join(map(str, self.layers))}; tokens {', '.join(self.tokens)})"

    def mean(self, name: str) -> np.ndarray:
        """[layer, token]: a score's mean over facts; "S" is the harmonic mean of the means, "effect" the trace's."""
        return _mean(self.scores, self.effects, name)

    def correlation(self, name: str) -> Mean:
        """Spearman's rank correlation over cells of a score's means and the average indirect effects, facts drawn again; no
        interval below 20 facts."""
        n, random = len(self.effects), np.random.default_rng(self.seed)
        found = _rank_correlation(self.scores, self.effects, name)
        if n < FEWEST:
            return Mean(found, np.nan, np.nan, n)
        drawn = [random.integers(n, size=n) for _ in range(RESAMPLES)]
        again = [_rank_correlation({key: each[own] for key, each in self.scores.items()}, self.effects[own], name) for own in drawn]  # fmt: skip
        there = [each for each in again if not np.isnan(each)]
        low, high = np.percentile(there, [2.5, 97.5]) if there else (np.nan, np.nan)
        return Mean(found, float(low), float(high), n)

    def to_json(self) -> dict[str, Any]:
        """Means and correlations, nan as null."""
        means = {name: _nulls(self.mean(name)) for name in (*SUCCESSES, "S", "effect")}
        found = {name: self.correlation(name).to_json() for name in ("ES", "PS", "S")}
        return {
            "layers": list(self.layers),
            "tokens": list(self.tokens),
            "n": len(self.effects),
            "mean": means,
            "correlation_with_effect": found,
            "origin": self.origin,
            "strengths": None if self.strengths is None else _nulls(_mean({}, self.strengths, "effect")),
            "settings": self.settings,
            "versions": provenance.versions(),
        }

    def save_csv(self, path: str | Path) -> Path:
        """One line for each layer and token: means over the facts that have such a token, and how many they are; the path.

        Raises:
            WriteError: the path cannot be written.
        """
        names = (*SUCCESSES, "S", "effect")
        means = {name: self.mean(name) for name in names}
        n = (~np.isnan(self.effects)).sum(0)
        lines = [["layer", "token", *names, "n"]]
        for row, layer in enumerate(self.layers):
            for column, token in enumerate(self.tokens):
                found = (float(means[name][row, column]) for name in names)
                lines.append([str(layer), token, *("" if np.isnan(each) else repr(each) for each in found), str(n[row, column])])  # fmt: skip
        with atomic_write(Path(path)) as temporary:
            temporary.write_text("".join(",".join(line) + "\n" for line in lines))
        return Path(path)


def check_complete(facts: Sequence[Fact]) -> None:
    """Raise unless each of these has an S. All that are not complete are named.

    Raises:
        FactError: a fact has no paraphrases, or no neighbours.
    """
    wrong = [
        f"record {fact.id or index}, about {fact.subject!r}, has no {' and no '.join(missing)}."
        for index, fact in enumerate(facts)
        if (missing := [name for name in ("paraphrases", "neighbours") if not getattr(fact, name)])
    ]
    if wrong:
        raise ManyMistakes(["a sweep needs ES, PS and NS of every fact:", *listed(wrong)])


def sweep(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: SweepSettings | None = None,
    editor: str | Editor = "rome",
    edit_settings: Any = None,
    *,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Sweep:
    """Trace the facts, edit each at every layer and token, and score it. Everything is kept in `folder`, and resumed from it.

    Raises:
        FactError: no facts, two that are the same, or some that lack targets, paraphrases or neighbours, so that they have no S.
        SettingsError: an editor that has no layer to choose.
        RunError: the folder holds a run of other settings.
    """
    settings, folder = settings or SweepSettings(), Path(folder)
    check_records(facts, COUNTERFACT)
    check_complete(facts)
    layers = tuple(check_layer(model, layer) for layer in settings.layers) or tuple(range(int(model.cfg.n_layers)))
    way = named(editor)
    base = replace(way.resolve(model, _at(way, edit_settings, layers[0])), guard="warn")
    way.ahead(model, base, layers, progress=progress)
    engine = engine or Local(model)
    place = _Place(model, facts, way, base, layers, settings, engine, progress)
    scores = {name: np.full((len(facts), len(layers), len(settings.tokens)), np.nan) for name in SUCCESSES}
    strengths = np.full_like(scores["ES"], np.nan)
    with engine.open():
        wanted = TraceSettings(kinds=("mlp",), window=settings.window, draws=settings.draws, seed=settings.seed, prepend_bos=base.prepend_bos)  # fmt: skip
        traces = trace_facts(model, facts, folder / "traces", wanted, engine=engine, progress=progress)
        effects = _effects(traces, layers, settings.tokens)
        cells = _cells(folder, facts, traces, layers, settings.tokens, hasattr(base, "fact_token"))
        place.announce(cells)
        for done, cell in enumerate(cells):
            progress("layers and tokens", done, len(cells))
            for index, (row, times) in place.edited(cell).items():
                known = ~np.isnan(effects[index, cell.row])
                columns = [settings.tokens.index(cell.token)] if cell.token else list(known.nonzero()[0])
                strengths[index, cell.row, columns] = times * getattr(base, way.strength, 1.0)
                for name in SUCCESSES:
                    scores[name][index, cell.row, columns] = row.get(name, np.nan)
        progress("layers and tokens", len(cells), len(cells))
    record = {"sweep": asdict(settings), "editor": way.name, "edit": {name: each for name, each in asdict(base).items() if name not in ("layer", "fact_token")}}  # fmt: skip
    return Sweep(layers, settings.tokens, scores, effects, settings.seed, provenance.origin(model), record, strengths if place.suits else None)  # fmt: skip


def _effects(traces: Sequence[Trace], layers: Sequence[int], tokens: Sequence[str]) -> np.ndarray:
    """[fact, layer, token]: the indirect effect of MLP windows, the mean over the positions of a token; nan where there is none."""
    effects = np.full((len(traces), len(layers), len(tokens)), np.nan)
    for column, token in enumerate(tokens):
        for index, trace in enumerate(traces):
            if at := _positions(trace, token):
                mean = trace.effects["mlp"][:, at].mean(1)
                effects[index, :, column] = mean[list(layers)].numpy() - trace.p_corrupted
    return effects


@dataclass(frozen=True, eq=False)
class _Place:
    """What the cells of a sweep share: which facts are edited, by whom, with what, and who computes."""

    model: HookedModel
    facts: Sequence[Fact]
    way: Editor
    base: Any
    layers: Sequence[int]
    settings: SweepSettings
    engine: Engine
    progress: Progress

    @property
    def suits(self) -> bool:
        """Whether the strength is chosen at each place."""
        return bool(self.settings.tuned and self.way.strength) and len(self.settings.strengths) > 1

    @property
    def values(self) -> Sequence[float]:
        """The strengths that are tried, in those of the settings."""
        return self.settings.strengths if self.settings.tuned and self.way.strength else (1.0,)

    def announce(self, cells: Sequence[_Cell]) -> None:
        """Say what will be done, for who asks how far the run is."""
        for cell in cells:
            first = sorted(set().union(*tried(cell.facts, self.settings.tuned))) if self.suits else cell.facts
            for value in self.values:
                place = cell.at(value)
                announce([self.facts[index] for index in first], COUNTERFACT, place / "edits", place / "scores")

    def edited(self, cell: _Cell) -> dict[int, tuple[Mapping[str, float], float]]:
        """The scores of each of the cell's facts, and with which strength."""
        score = functools.partial(self._score, cell)
        if not self.suits:
            (only,) = self.values[:1]
            return {index: (row, only) for index, row in score(only, cell.facts).items()}
        rows, best = suited(cell.facts, self.settings.tuned, self.values, score)
        return {index: (row, best[index]) for index, row in rows.items()}

    def _score(self, cell: _Cell, value: float, own: Sequence[int]) -> dict[int, dict[str, float]]:
        there = replace(self.base, layer=self.layers[cell.row], **({"fact_token": cell.token} if cell.token else {}))
        pushed = {self.way.strength: value * getattr(there, self.way.strength)} if self.way.strength else {}
        some = [self.facts[index] for index in own]
        found = evaluate(self.model, some, cell.at(value), EvaluateSettings(health=False), self.way, replace(there, **pushed), engine=self.engine, progress=self.progress)  # fmt: skip
        return dict(zip(own, found.rows["after"], strict=True))


@dataclass(frozen=True)
class _Cell:
    """A layer by its row, a token if the editor has a choice, the facts that have such a token, and where the cell is kept."""

    row: int
    token: str
    facts: tuple[int, ...]
    place: Path

    def at(self, strength: float) -> Path:
        """Where edits with that many times the strength of the settings are kept."""
        return self.place if strength == 1 else self.place.with_name(f"{self.place.name}-times{strength:g}")


def _cells(
    folder: Path,
    facts: Sequence[Fact],
    traces: Sequence[Trace],
    layers: Sequence[int],
    tokens: Sequence[str],
    chooses: bool,
) -> list[_Cell]:
    every = tuple(range(len(facts)))
    columns = [(token, tuple(index for index in every if _positions(traces[index], token))) for token in tokens]
    return [
        _Cell(row, token, own, folder / (f"layer{layer:02d}-{token}" if token else f"layer{layer:02d}"))
        for token, own in (columns if chooses else [("", every)])
        for row, layer in enumerate(layers)
        if own
    ]


def _at(editor: Editor, settings: Any, layer: int) -> Any:
    """The settings, or those that nobody gave, at a layer.

    Raises:
        SettingsError: the editor has none, or these spread a change over several.
    """
    settings = settings if settings is not None else editor.settings()
    if not hasattr(settings, "layer"):
        raise SettingsError(f"a sweep edits at every layer, and the editor {editor.name} has no layer to choose.")
    if getattr(settings, "layers", ()):
        raise SettingsError(
            f"a sweep edits one layer at a time, and these settings spread a change over {settings.layers}; leave layers out."
        )
    return replace(settings, layer=layer)


def sweep_maps(found: Sweep) -> Figure:
    """Efficacy, paraphrase, neighbourhood and S by layer and token in percent, and the average indirect effect beside them."""
    from matplotlib.figure import Figure

    names = {"ES": "efficacy", "PS": "paraphrase", "NS": "neighbourhood", "S": "S", "effect": "trace: indirect effect"}
    figure = Figure(figsize=(2.6 * len(names) + 1.2, 1.2 + 0.34 * len(found.layers)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        grid = 100 * found.mean(name)
        digits = 1 if np.nanmax(np.abs(grid), initial=0) < 10 else 0
        image = axes.imshow(grid, cmap="Greens" if name == "effect" else "viridis", aspect="auto", vmin=0 if name != "effect" else None, vmax=100 if name != "effect" else None)  # fmt: skip
        axes.set_title(f"{title}, %", fontsize=9)
        axes.set_xticks(range(len(found.tokens)), [ROLE_TITLES[token] for token in found.tokens], rotation=40, ha="right", fontsize=7)  # fmt: skip
        for (row, column), value in np.ndenumerate(grid):
            if not np.isnan(value):
                dark = (value - np.nanmin(grid)) / max(float(np.nanmax(grid) - np.nanmin(grid)), 1e-9) if name == "effect" else 1 - value / 100  # fmt: skip
                axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color="white" if dark > 0.5 else "black")  # fmt: skip
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
    n = len(found.effects)
    figure.suptitle(
        f"{found.origin['name']}, {n} fact{'s' * (n != 1)}, each edited at each layer and token", fontsize=10
    )
    panels[0].set_yticks(range(len(found.layers)), list(map(str, found.layers)), fontsize=7)
    panels[0].set_ylabel("edited layer", fontsize=9)
    return figure


def _positions(trace: Trace, token: str) -> list[int]:
    return positions(token, len(trace.tokens), trace.subject_range)


def _mean(scores: dict[str, np.ndarray], effects: np.ndarray, name: str) -> np.ndarray:
    if name == "S":
        means = [_mean(scores, effects, each) for each in SUCCESSES]
        return np.vectorize(lambda *each: np.nan if np.isnan(each).any() else harmonic(*each))(*means)
    values = effects if name == "effect" else scores[name]
    some = ~np.isnan(values).all(0)
    found = np.full(values.shape[1:], np.nan)
    found[some] = np.nanmean(values[:, some], 0)
    return found


def _rank_correlation(scores: dict[str, np.ndarray], effects: np.ndarray, name: str) -> float:
    from scipy.stats import rankdata

    first, second = _mean(scores, effects, name).ravel(), _mean(scores, effects, "effect").ravel()
    there = ~(np.isnan(first) | np.isnan(second))
    a, b = rankdata(first[there]), rankdata(second[there])
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _nulls(grid: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in grid]
