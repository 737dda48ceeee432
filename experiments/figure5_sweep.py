"""An editor at every layer and token, ROME by default, beside the causal trace (figure 5).  python -m experiments.figure5_sweep

`--editor NAME`, with its defaults, gives another picture: figures/MODEL/figure5_sweep_NAME.

A killed run goes on. The facts are the first ones of the benchmark, from `begin` on, that the model knows: what it does not
know it has nowhere to recall from. On the organism they are of its own world.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from experiments.editing import benchmark_facts
from mechedit import figures, models
from mechedit.editors import named
from mechedit.runs import tracing
from mechedit.runs.sweeping import sweep, sweep_maps
from mechedit.settings import SweepSettings

CANDIDATES = 20  # read for each fact wanted: Gemma 3 270M knows one in eleven of COUNTERFACT's


@dataclass(frozen=True)
class Figure5:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    editor: str = "rome"  # or package.module:Class
    begin: int = 1000  # after the facts of the tables
    facts: int = 10
    every: int = 3  # layers
    window: int = 0  # of the traces; 0: the preset's
    seed: int = 0
    threads: int = 2


def main(settings: Figure5) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    candidates = benchmark_facts(settings.model, settings.begin, CANDIDATES * settings.facts)
    chosen = tracing.known(model, candidates, progress=progress())[: settings.facts]
    say(f"{len(chosen)} facts that {settings.model} knows")
    layers = tuple(range(0, int(model.cfg.n_layers), settings.every))
    wanted = SweepSettings(layers=layers, window=settings.window, seed=settings.seed)
    way = named(settings.editor)
    of = "" if settings.editor == "rome" else f"_{way.name}"
    found = sweep(model, chosen, runs(model, f"sweep{of}"), wanted, way, progress=progress(10))
    say(f"rank correlation of S with the trace's indirect effect: {found.correlation('S')}")
    for path in figures.write(sweep_maps(found), FIGURES / short_name(model) / f"figure5_sweep{of}"):
        say(f"wrote {path}")
    say(f"wrote {write(f'figure5_sweep{of}', model, settings, {'sweep': found.to_json()})}")


if __name__ == "__main__":
    main(parse(Figure5))
