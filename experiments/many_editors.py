"""Editors of many facts, side by side.  python -m experiments.many_editors --model gemma-3-270m     figures/MODEL/many_editors.json, .md, .png

Each writes the same facts, those that are new at each of `sizes` at once; none of them is said in the held-out text. Every editor has its preset for
the model, or else its own defaults, C of text sampled from the model, and the same `search` of v*. At each size `scored` of the facts so far, spread evenly, are
scored on the model with all edits; at the largest, editors are compared with `sequential` and with the unedited model, record by record. Perplexity is
of stretches of prose that C does not have. Runs are kept in out/MODEL with what was scored, and go on where they were stopped; seconds are of the process where
it has one thread, else of the clock, and of a run that was not stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from experiments.editing import LESS, LESS_DEFAULT, Row, among, benchmark_facts, corrected, write_table
from experiments.scaling import MANY, apart, prose, ratio, sample
from mechedit import cache, figures, models
from mechedit.benchmarks import metrics
from mechedit.benchmarks.beside import Near, near
from mechedit.benchmarks.counterfact import COUNTERFACT
from mechedit.editing import make_ready
from mechedit.editors import named
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs import sequence
from mechedit.runs.extending import run_sequence
from mechedit.runs.scored import measure
from mechedit.settings import EvaluateSettings, SequenceSettings
from mechedit.settings.rome import SEARCHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "answer", "drift", "drift_log_p")
COLOURS = {"rome": "tab:red", "memit": "tab:orange", "emmet": "tab:brown", "alphaedit": "tab:blue", "pmet": "tab:purple", "sequential": "tab:green"}  # fmt: skip
PANELS = {"S": "S, %", "answer": "generated answer, %", "NS": "NS, %", "prose": "perplexity of prose / unedited"}
BASE = "sequential"  # what the others are compared with
LOOK = ("perplexity_ratio", "next_token_kl", "others", "change", "spectrum")
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class ManyEditors:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    editors: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[int, ...] = (1, 10, 100)
    scored: int = 40
    prose: int = 64  # stretches
    search: str = "few"  # of the values: whole, or with fewer prompts, each left out when it is learnt
    layer: int = -1
    threads: int = 2


@dataclass(frozen=True, eq=False)
class Unedited:
    """What the model says without edits: at each fact's neighbours, by its prompt, and of the prose."""

    near: Mapping[str, Near | None]
    prose: np.ndarray


def measured(model: HookedModel, facts: Sequence[Fact], unedited: Unedited) -> Rows:
    """All numbers of each fact, on the model as it is."""
    how = EvaluateSettings(health=False)
    return [measure(model, fact, COUNTERFACT, how, near_before=unedited.near[fact.prompt]) for fact in facts]


def followed(
    model: HookedModel, settings: ManyEditors, name: str, facts: Sequence[Fact], unedited: Unedited
) -> list[dict[str, Any]]:
    """What the model has after so many edits by this editor, a row a size: the numbers of each sampled fact, perplexity, and those of the last look."""
    editor = named(name)
    own = {"layer": settings.layer} if settings.layer >= 0 else {}
    edit = editor.resolve(model, editor.settings(guard="warn", **SEARCHES[settings.search], **own))
    how = SequenceSettings(together=max(settings.sizes), every=0, keep=max(settings.sizes))
    prepared: Any = make_ready(model, editor, edit)
    what = cache.content_key(f"{edit}{how}{prepared.key}{[fact.prompt for fact in facts]}{settings.sizes}")
    folder = runs(model, "many-editors") / f"{name}-{what}"
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    state, found = folder / "state.safetensors", []
    for n, had in zip(settings.sizes, (0, *settings.sizes), strict=False):
        kept = folder / f"scored-{settings.scored}-{settings.prose}-{n}.json"
        if not kept.is_file():
            there = len(sequence.load(state).entries) if state.exists() else 0
            if there > n:
                raise SystemExit(
                    f"the run in {folder} has {there} edits, and was not scored so at {n}; delete the folder."
                )
            began = clock()
            done = run_sequence(model, facts[:n], folder, how, editor, edit, prepared, progress=progress(4))
            spent = (clock() - began) / (n - had) if there == had else None
            with sequence.written(model, done):
                rows = measured(model, sample(facts[:n], settings.scored), unedited)
                said = ratio(unedited.prose, prose(model, settings.prose))
            look = {each: done.looks[-1][each] for each in LOOK}
            row = {
                "edits": n,
                "standing": len(done.standing),
                "rows": rows,
                "prose": said,
                "seconds_an_edit": spent,
                **look,
            }
            with cache.atomic_write(kept) as temporary:
                temporary.write_text(json.dumps(cache.plain(row | {"edit": vars(edit)})))
            say(f"{name}, {n}: S {metrics.table(rows)['S'].mean:.3f}, prose {said['mean']:.4f}")
        found.append(json.loads(kept.read_text()))
    return found


def picture(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A panel a number, over the number of edits, a line an editor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), dpi=150, layout="constrained")
    for axes, (number, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, rows in found.items():
            numbers = [
                row["prose"]["mean"] if number == "prose" else 100 * row["scores"][number]["mean"] for row in rows
            ]
            axes.plot([row["edits"] for row in rows], numbers, "o-", color=COLOURS[name], label=name, markersize=4)
        sizes = [row["edits"] for row in next(iter(found.values()))]
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("edits", fontsize=9)
        axes.set_title(title, fontsize=9)
        if number != "prose":
            axes.set_ylim(0, 103)
    figure.axes[-1].legend(fontsize=7)
    return figure


def main(settings: ManyEditors) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    facts = apart(model, benchmark_facts(settings.model, 0, MANY))[: max(settings.sizes)]
    unedited = Unedited({fact.prompt: near(model, fact) for fact in facts}, prose(model, settings.prose))
    before = measured(model, sample(facts, settings.scored), unedited)
    found = {name: followed(model, settings, name, facts, unedited) for name in settings.editors}
    last = {name: rows[-1]["rows"] for name, rows in found.items()}
    paired = corrected(
        {
            LESS: {name: among(COLUMNS, metrics.differences(before, rows)) for name, rows in last.items()},
            LESS_DEFAULT: {name: among(COLUMNS, metrics.differences(last[BASE], rows)) for name, rows in last.items() if name != BASE and BASE in last},
        }
    )  # fmt: skip
    table = {name: Row(metrics.table(rows), metrics.table(before)) for name, rows in last.items()}
    sizes = {name: [row | {"scores": {each: mean.to_json() for each, mean in metrics.table(row.pop("rows")).items() if mean.n}} for row in rows] for name, rows in found.items()}  # fmt: skip
    result = {
        "editors": sizes,
        "unedited": Row(metrics.table(before), {}).to_json()["scores"],
        "paired": paired,
        "base": BASE,
    }
    for path in [
        *figures.write(picture(sizes), FIGURES / short_name(model) / "many_editors"),
        write("many_editors", model, settings, cache.plain(result)),
        write_table(model, "many_editors", COLUMNS, table, paired, [[f"the default is {BASE}"]], {}),
    ]:
        say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(ManyEditors))
