"""How well edits did: COUNTERFACT's success scores of single facts, and their means with intervals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mechedit import edits, facts, models, scoring
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.tracing.averages import summary

RESAMPLES = 2000
SCORES = ("ES", "PS", "NS")


def success_of(model: models.HookedModel, fact: Fact, edit: Edit) -> dict[str, float]:
    """The same on the edited model, with the numbers of the edit."""
    with edits.edited(model, edit):
        found = scoring.success(model, fact)
    return found | {name: edit.report.get(name, float("nan")) for name in ("relative_norm", "divisor_share", "essence_kl", "perplexity_ratio")} | {"edited": float(bool(edit.changes))}  # fmt: skip


def means(rows: Sequence[dict[str, float]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean, bootstrap interval and n of each number, success in percent; S is the harmonic mean of the three means."""
    found = {}
    for name in rows[0]:
        scale = 100 if name in SCORES else 1
        found[name] = asdict(summary(scale * np.array([row[name] for row in rows]), seed))
    values = 100 * np.array([[row[name] for name in SCORES] for row in rows])
    random = np.random.default_rng(seed)
    resampled = [
        scoring.harmonic(*values[random.integers(len(values), size=len(values))].mean(0)) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(resampled, [2.5, 97.5])
    found["S"] = {"mean": scoring.harmonic(*values.mean(0)), "low": float(low), "high": float(high), "n": len(rows)}
    return found


def counterfact(begin: int, n: int) -> list[Fact]:
    """`n` rows of the flat COUNTERFACT file from row `begin` on: MECHEDIT_DATA, or ../shared/data beside the project."""
    data = (
        Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "counterfact_flat.json"
    )
    return list(facts.read(data)[begin : begin + n])
