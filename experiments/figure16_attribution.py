"""Do gradients find what restoring finds? (figure 16).  python -m experiments.figure16_attribution

Integrated gradients (50 Gauss-Legendre steps) and attribution patching on the grid of the causal trace, over facts the model
knows, with their rank correlation to the exact indirect effects, fact by fact, and whether they find the same best layer at the
subject's last token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from experiments.common import FIGURES, known_facts, parse, runs, say, short_name, write
from mechedit import corruption, figures, models
from mechedit.runs import tracing
from mechedit.settings import TraceSettings
from mechedit.statistics import summary
from mechedit.tracing import Trace, restore, single
from mechedit.tracing.attribution import agreement, attribution_patching, exact_cells, integrated_gradients
from mechedit.tracing.cells import RESID_POST


@dataclass(frozen=True)
class Attribution:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    facts: int = 60
    draws: int = 10
    gradient_draws: int = (
        3  # of both estimates alike; a draw of integrated gradients costs about as much as a whole exact trace
    )
    steps: int = 50
    seed: int = 0
    threads: int = 2


def main(settings: Attribution) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = known_facts(model, settings.facts, settings.seed)
    wanted = TraceSettings(draws=settings.draws, seed=settings.seed)
    statistics = corruption.needed(model, wanted)
    scores: dict[str, list[float]] = {"integrated gradients": []}
    differences = []
    for number, fact in enumerate(chosen):
        (exact,) = tracing.trace_facts(model, [fact], runs(model, "traces"), wanted, statistics=statistics)
        few = replace(wanted, draws=settings.gradient_draws)
        shares = integrated_gradients(model, fact, few, steps=settings.steps, statistics=statistics)
        _, clean, corrupted = restore(model, fact, [single(RESID_POST, [0], 0)], few, statistics=statistics)
        differences.append(float((shares.sum(1) - (clean - corrupted)).abs().max()))
        scores["integrated gradients"].append(agreement(shares.mean(-1), exact_cells(exact, "resid")))
        estimate = attribution_patching(model, fact, few, statistics=statistics)
        for kind, grid in estimate.items():
            scores.setdefault(f"attribution patching, {kind}", []).append(
                agreement(grid.mean(-1), exact_cells(exact, kind))
            )
        if number == 0:
            _pictures(model, exact, shares, estimate)
        say(
            f"{number + 1} of {len(chosen)}: "
            + ", ".join(f"{name} {values[-1]:.2f}" for name, values in scores.items())
        )
    result = {}
    for name, values in scores.items():
        mean = summary(np.array(values), settings.seed, (-1.0, 1.0))
        result[name] = mean.to_json() | {"by_fact": values}
        say(f"rank correlation, {name}: {mean}, from {min(values):.2f} to {max(values):.2f}")
    result |= {"n": len(chosen), "largest_gap_of_completeness": max(differences)}
    say(f"wrote {write('figure16_attribution', model, settings, result)}")


def _pictures(model: models.HookedModel, exact: Trace, shares: Tensor, estimate: dict[str, Tensor]) -> None:
    """The first fact's maps, on the grid of its trace, each titled by what it shows."""
    folder = FIGURES / short_name(model) / "figure16_attribution"

    def draw(name: str, kind: str, draws: Tensor, title: str) -> None:
        shown = replace(exact, effects={kind: draws.mean(-1)}, draws={kind: draws}, p_clean=0.0, p_corrupted=0.0)
        figure = figures.heat_map(shown, kind)
        grid, bar = figure.axes[:2]
        grid.set_title(title, fontsize=9)
        bar.set_title("effect", fontsize=9, pad=8)
        figures.write(figure, folder / name)

    draw("integrated_gradients", "resid", shares, "Integrated gradients: share of the total effect")
    for kind, grid in estimate.items():
        draw(f"attribution_patching_{kind}", kind, grid, f"Attribution patching, {kind}: effect to first order")
        draw(f"exact_{kind}", kind, exact.draws[kind] - exact.p_corrupted, f"Indirect effect, {kind}: exact")


if __name__ == "__main__":
    main(parse(Attribution))
