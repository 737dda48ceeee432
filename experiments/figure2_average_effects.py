"""Average indirect effects by layer and token role (figures 2 and 7).  python -m experiments.figure2_average_effects

Traces facts that the model knows, all layers and tokens, three kinds, exactly, and averages them with 95 % intervals over
facts. Writes figures/MODEL/figure2_average_effects.json and pictures; each fact's trace is kept in out/, so that a killed run
goes on and `figure7_lines` needs no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.common import FIGURES, known_facts, parse, progress, runs, say, short_name, write
from mechedit import figures, models, sites
from mechedit.runs import tracing
from mechedit.settings import TraceSettings
from mechedit.tracing.averages import average


@dataclass(frozen=True)
class AverageEffects:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    facts: int = 200  # the paper has 1,000; intervals are 6 to 7 points wide with 200
    draws: int = 10
    seed: int = 0
    threads: int = 2


def main(settings: AverageEffects) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = known_facts(model, settings.facts, settings.seed)
    traces = tracing.trace_facts(
        model,
        chosen,
        runs(model, "traces"),
        TraceSettings(draws=settings.draws, seed=settings.seed),
        progress=progress(100),
    )
    mean = average(traces, seed=settings.seed)
    early, late = sites.early(mean), sites.late(mean)
    for path in figures.save_average(mean, FIGURES / short_name(model) / "figure2_average_effects"):
        say(f"wrote {path}")
    result = mean.to_json() | {"early_site": vars(early), "late_site": vars(late)}
    say(f"total effect {mean.total}; early {early}; late {late}; {len(mean.exceptions)} exceptions of {mean.n}")
    say(f"wrote {write('figure2_average_effects', model, settings, result)}")


if __name__ == "__main__":
    main(parse(AverageEffects))
