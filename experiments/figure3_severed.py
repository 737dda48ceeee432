"""Which modules carry the restored state on? (figure 3).  python -m experiments.figure3_severed

Restores the state at the subject's last token, layer by layer, with nothing, all MLPs or all attention held at that token at
their corrupted values, over facts the model knows, and averages the three curves with 95 % intervals over facts (none of fewer than 20).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experiments.common import FIGURES, known_facts, parse, progress, runs, say, short_name, write
from mechedit import figures, models
from mechedit.runs import tracing
from mechedit.settings import TraceSettings
from mechedit.statistics import UNBOUNDED, interval
from mechedit.tracing.severing import CURVES


@dataclass(frozen=True)
class SeveredEffects:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    facts: int = 200
    draws: int = 10
    seed: int = 0
    threads: int = 2


def main(settings: SeveredEffects) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = known_facts(model, settings.facts, settings.seed)
    wanted = TraceSettings(draws=settings.draws, seed=settings.seed)
    found = tracing.sever_facts(model, chosen, runs(model, "severed"), wanted, progress=progress(50))
    curves = {
        name: np.stack([each.curves[name].mean(-1).double().numpy() - each.p_corrupted for each in found])
        for name in CURVES
    }
    result = {"n": len(found)}
    for name, effects in curves.items():
        low, high = interval(effects, settings.seed, UNBOUNDED)
        result[name] = {"mean": effects.mean(0).tolist(), "low": _nulls(low), "high": _nulls(high)}
    for name in ("mlp", "attn"):
        low, high = interval(curves["ordinary"] - curves[name], settings.seed, UNBOUNDED)
        lost = (curves["ordinary"] - curves[name]).mean(0)
        result[f"lost_without_{name}"] = {"mean": lost.tolist(), "low": _nulls(low), "high": _nulls(high)}
        layer = int(lost.argmax())
        say(f"most lost with {name} severed: {lost[layer]:.3f} [{low[layer]:.3f}, {high[layer]:.3f}] at layer {layer}")
    for path in figures.write(figures.severed_lines(found), FIGURES / short_name(model) / "figure3_severed"):
        say(f"wrote {path}")
    say(f"wrote {write('figure3_severed', model, settings, result)}")


def _nulls(bounds: np.ndarray) -> list[float | None]:
    """What no interval has as null."""
    return [None if np.isnan(each) else float(each) for each in bounds]


if __name__ == "__main__":
    main(parse(SeveredEffects))
