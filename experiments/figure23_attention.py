"""Does an attention edit repeat, or generalise? (figure 24)  python -m experiments.figure23_attention

ROME and the attention edit (Meng et al. 2022, appendix I) on the same facts: how far P(new) is above P(true) after the edited prompt, after
paraphrases, and P(true) above P(new) after neighbours, as distributions over records, beside the unedited model's; the paired differences of
all scores. Edits and scores are those of `table4_counterfact`, where they are there. `figure6_generations --editors rome attention-edit` has
texts that both go on with (figure 25).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from experiments.common import FIGURES, parse, progress, say, short_name, write
from experiments.editing import benchmark_facts, compared, corrected, folder, opponent
from mechedit import cache, figures, models
from mechedit.editors import rome
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation
from mechedit.settings import EvaluateSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {"EM": "edited prompt: P(new) - P(true)", "PM": "paraphrases: P(new) - P(true)", "NM": "neighbours: P(true) - P(new)"}  # fmt: skip
NAMES = ("ES", "EM", "PS", "PM", "NS", "NM", "S")
COLOURS = {"no edit": "0.6", "rome": "tab:green", "attention-edit": "tab:red"}


@dataclass(frozen=True)
class Figure23:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    facts: int = 60
    seed: int = 0
    threads: int = 2


def distributions(rows: dict[str, Sequence[dict[str, float]]]) -> Figure:
    """A panel a kind of prompt, a cumulative line a method: of all records, the share at or below each difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=150, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for method, own in rows.items():
            axes.ecdf([row[name] for row in own if row[name] == row[name]], label=method, color=COLOURS[method])
        axes.axvline(0.0, color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlim(-1.02, 1.02)
        axes.set_xlabel(title, fontsize=9)
    figure.axes[0].set_ylabel("share of records", fontsize=9)
    figure.axes[0].legend(fontsize=8, loc="upper left")
    return figure


def main(settings: Figure23) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    facts = benchmark_facts(settings.model, settings.begin, settings.facts)
    wanted = {"rome": replace(rome.resolve(model), guard="warn"), "attention-edit": opponent(model, "attention-edit", settings.seed)[1]}  # fmt: skip
    found: dict[str, Evaluation] = {}
    for name, edit in wanted.items():
        place = folder(model, "table4", settings.begin, "default" if name == "rome" else name)
        run = EvaluateSettings(health=False, seed=settings.seed)
        found[name] = evaluate(model, facts, place, run, name, edit, progress=progress(10))
    rows = {"no edit": found["rome"].rows["before"]} | {name: each.rows["after"] for name, each in found.items()}
    differences = corrected({"attention-edit less rome": {"after": compared(found["rome"], found["attention-edit"], NAMES)}})  # fmt: skip
    result = {
        "scores": {name: [{key: row[key] for key in NAMES if key in row} for row in own] for name, own in rows.items()},
        "paired": differences,
    }
    for path in figures.write(distributions(rows), FIGURES / short_name(model) / "figure23_attention"):
        say(f"wrote {path}")
    say(f"wrote {write('figure23_attention', model, settings, cache.plain(result))}")


if __name__ == "__main__":
    main(parse(Figure23))
