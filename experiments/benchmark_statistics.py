"""The whole table of many records: thirty numbers, S, and their differences to the unedited model.  python -m experiments.benchmark_statistics

Seconds, and gigabytes beyond what the process held before. -> figures/benchmark_statistics.json
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.common import FIGURES, parse, say
from mechedit import cache, provenance, statistics
from mechedit.benchmarks.metrics import METRICS, SUCCESSES, table


@dataclass(frozen=True)
class BenchmarkStatistics:
    """Settings of the experiment."""

    records: int = 21_919  # all of COUNTERFACT
    more: int = 4  # numbers beside those that mechedit has
    seed: int = 0


def rows(settings: BenchmarkStatistics, random: np.random.Generator) -> list[dict[str, float]]:
    """Records with every number: shares of ten, magnitudes, numbers without bounds; a few are missing."""
    names = [name for name in METRICS if name != "S"] + [f"number {each}" for each in range(settings.more)]
    values = {name: random.binomial(10, 0.8, settings.records) / 10 if name in SUCCESSES else random.beta(2, 1, settings.records) for name in names}  # fmt: skip
    values["PM"][random.random(settings.records) < 0.01] = np.nan
    return [dict(zip(names, map(float, each), strict=True)) for each in zip(*values.values(), strict=True)]


def peak() -> float:
    """Gigabytes that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(settings: BenchmarkStatistics) -> None:
    random = np.random.default_rng(settings.seed)
    before, after = rows(settings, random), rows(settings, random)
    statistics.summary(np.arange(30.0))  # what is imported
    held, began = peak(), time.perf_counter()
    found = table(after, settings.seed)
    seconds: dict[str, Any] = {"table": time.perf_counter() - began, "numbers": len(found)}
    seconds["table, GB more"] = peak() - held
    began = time.perf_counter()
    both = (np.array([list(row.values()) for row in each]) for each in (before, after))
    statistics.compared(*both, [METRICS[name].support if name in METRICS else None for name in after[0]], settings.seed)
    seconds |= {"paired differences": time.perf_counter() - began, "all, GB more": peak() - held}
    path = FIGURES / "benchmark_statistics.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"settings": asdict(settings), "versions": provenance.versions(), "found": seconds}, indent=1) + "\n")  # fmt: skip
    say(f"{seconds}; wrote {path}")


if __name__ == "__main__":
    main(parse(BenchmarkStatistics))
