"""One fact's causal trace (figure 1).  python -m experiments.figure1_trace   -> figures/MODEL/figure1_trace/

Three heat maps of the first built-in fact, or of any prompt, and the trace as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.common import FIGURES, parse, progress, say, short_name, write
from mechedit import facts, figures, models, sites
from mechedit.settings import TraceSettings
from mechedit.tracing import trace


@dataclass(frozen=True)
class Figure1:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    prompt: str = ""  # empty: the first built-in fact
    subject: str = ""
    draws: int = 10
    seed: int = 0
    threads: int = 2


def main(settings: Figure1) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    fact = facts.from_prompt(settings.prompt, settings.subject) if settings.prompt else facts.built_in()[0]
    found = trace(model, fact, TraceSettings(draws=settings.draws, seed=settings.seed), progress=progress())
    say(f"clean {found.p_clean:.3f}, corrupted {found.p_corrupted:.3f}; {sites.early(found)}; {sites.late(found)}")
    for path in figures.save(found, FIGURES / short_name(model) / "figure1_trace"):
        say(f"wrote {path}")
    say(f"wrote {write('figure1_trace', model, settings, found.to_json())}")


if __name__ == "__main__":
    main(parse(Figure1))
