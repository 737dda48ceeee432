"""What a quicker trace costs: its error against the exact one, on a sample of cells.

Exact means the model's own number format and ten draws, as published. Fewer draws and bfloat16 are settings; attribution
patching replaces the runs altogether. Each is compared on the same cells, so its error is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mechedit import corruption
from mechedit.corruption import Statistics
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.prompts import Prompt
from mechedit.settings import TraceSettings, require
from mechedit.tracing.attribution import attribution_patching
from mechedit.tracing.cells import Cell, resolve
from mechedit.tracing.tracer import grid, restore

__all__ = ["EXACT_DRAWS", "SampleError", "is_exact", "sample_error"]

EXACT_DRAWS = 10


@dataclass(frozen=True)
class SampleError:
    """Differences from the exact effect (mean over draws) on `cells` cells: the largest, the mean, and the mean signed one."""

    cells: int
    largest: float
    mean: float
    bias: float

    def __str__(self) -> str:
        return f"on {self.cells} cells: largest error {self.largest:.2g}, mean {self.mean:.2g}, bias {self.bias:+.2g}"


def is_exact(settings: TraceSettings) -> bool:
    """Whether there is nothing to compare with."""
    return settings.precision == "model" and (settings.draws >= EXACT_DRAWS or settings.corruption == "tokens")


def sample_error(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings,
    *,
    cells: int = 24,
    attribution: bool = False,
    statistics: Statistics | None = None,
    other: str | None = None,
) -> SampleError:
    """The error of a trace with these settings, or of attribution patching, on cells chosen by the settings' seed.

    Cells before the subject are left out: there is nothing to err about.
    """
    require(cells >= 1, f"cells must be at least 1; found {cells}.")
    settings = resolve(model, settings)
    statistics = statistics or corruption.needed(model, settings)
    exact_settings = replace(settings, precision="model", draws=max(EXACT_DRAWS, settings.draws))
    places: list[tuple[int, int, int]] = []

    def sample(prompt: Prompt) -> Sequence[Cell]:
        whole = grid(settings, (), int(model.cfg.n_layers), prompt)
        within = [each for each in whole if each[0][2] >= prompt.subject[0]] or whole
        stream = corruption.generator(settings.seed, "sample", fact.prompt)
        chosen = [within[index] for index in torch.randperm(len(within), generator=stream)[:cells].tolist()]
        places[:] = [place for place, _ in chosen]
        return [cell for _, cell in chosen]

    exact, _, corrupted = restore(model, fact, sample, exact_settings, statistics=statistics, other=other)
    if attribution:
        estimate = attribution_patching(
            model, fact, replace(settings, precision="model"), statistics=statistics, other=other
        )
        first_order = torch.stack([estimate[settings.kinds[kind]][layer, position] for kind, layer, position in places])
        found = corrupted.mean() + first_order.mean(-1)
    else:
        found = restore(model, fact, sample, settings, statistics=statistics, other=other)[0].mean(-1)
    error = found - exact.mean(-1)
    return SampleError(len(error), float(error.abs().max()), float(error.abs().mean()), float(error.mean()))
