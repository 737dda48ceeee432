"""What an evaluation will take, from a few records that are tried here."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mechedit import editing, prompts
from mechedit.benchmarks import benchmark as benchmarks
from mechedit.benchmarks.benchmark import Benchmark
from mechedit.benchmarks.health import unedited
from mechedit.benchmarks.texts import References
from mechedit.editing import Editor
from mechedit.editors import named
from mechedit.models import HookedModel
from mechedit.runs.checks import check_generation, check_records
from mechedit.runs.editing import attempt
from mechedit.runs.scored import Measuring
from mechedit.settings import EvaluateSettings

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """What an evaluation will take, from a few records that were tried here; each worker computes as fast as this process.

    Seconds: `once` before the first record, here (C) or in a worker (loading); of a record, its edit and one scoring.
    """

    records: int
    workers: int
    mode: str
    once: float
    edit: float
    score: float
    memory: float  # gigabytes of a worker

    @property
    def total(self) -> float:
        """Seconds from the start to the end."""
        shared = math.ceil(self.records / self.workers)  # what workers share; the rest is done by one process
        if not self.edit:
            return self.once + shared * self.score
        if self.mode == "sequential":
            return self.once + shared * self.score + self.records * (self.edit + 2 * self.score)
        after = self.records if self.mode == "batch" else shared
        return self.once + shared * (self.score + self.edit) + after * self.score

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.mode}, {self.edit:.2f} s an edit and {self.score:.2f} s a scoring, on {self.workers} "
            f"worker{'s' if self.workers > 1 else ''}: {_span(self.total)}, of which {self.once:.0f} s come first (C, workers' loading); "
            f"workers are held for {self.workers * self.total / 3600:.2f} worker hours; {self.memory:.1f} GB a worker"
        )


def estimate(
    model: HookedModel,
    records: Sequence[Any],
    settings: EvaluateSettings,
    editor: str | Editor | None = "rome",
    edit_settings: Any = None,
    *,
    benchmark: str | Benchmark | None = None,
    workers: int = 1,
    load: float = 0.0,
    tried: int = 3,
    references: References | None = None,
) -> Estimate:
    """Try a few records, spread over all of them, and say what all of them will take; `load` is a worker's.

    Edits and scores are not kept; what the editor prepares is.
    """
    measure = check_records(records, benchmarks.named(benchmark) if benchmark is not None else None)
    check_generation(model, settings)
    began = time.perf_counter()
    chosen = [records[index * len(records) // tried] for index in range(min(tried, len(records)))]
    way = named(editor) if editor is not None else None
    resolved = replace(way.resolve(model, edit_settings), guard="warn") if way else None
    prepared = editing.make_ready(model, way, resolved) if way else None
    bos = prompts.resolve_bos(model, getattr(resolved or edit_settings, "prepend_bos", None))
    before = unedited(model, prepend_bos=bos) if settings.health and way else None
    measuring = Measuring({}, measure, settings, bos, before, references, drifts=way is not None)
    once, spent = time.perf_counter() - began, []
    for record in chosen:
        began = time.perf_counter()
        if way:
            attempt(model, [measure.fact(record)], way, resolved, prepared)
        edited = time.perf_counter()
        measuring.now(model, record, measuring.at_neighbours(model, record))
        spent.append((edited - began if way else 0.0, time.perf_counter() - edited))
    edit, score = (median(each) for each in zip(*spent, strict=True))
    return Estimate(len(records), workers, settings.mode, once + load, edit, score, _peak_memory())


def _peak_memory() -> float:
    """Gigabytes that this process held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
