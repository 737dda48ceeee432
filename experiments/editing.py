"""How well edits did: COUNTERFACT's success scores of single facts, and their means with intervals."""

from __future__ import annotations

import os
import statistics
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


def success(model: models.HookedModel, fact: Fact) -> dict[str, float]:
    """Efficacy, paraphrase and neighbourhood success of one fact, 0 to 1, and the new target's probability."""
    prompts = (fact.prompt, *fact.paraphrases, *fact.neighbours)
    pairs = [(prompt, str(target)) for prompt in prompts for target in (fact.target_new, fact.target_true)]
    scores = scoring.score(model, pairs)
    wins = [float(new.mean_log_p > true.mean_log_p) for new, true in zip(scores[::2], scores[1::2], strict=True)]
    n = 1 + len(fact.paraphrases)
    return {"ES": wins[0], "PS": statistics.mean(wins[1:n]), "NS": 1 - statistics.mean(wins[n:]), "p_new": scores[0].p}


def success_of(model: models.HookedModel, fact: Fact, edit: Edit) -> dict[str, float]:
    """The same on the edited model, with the numbers of the edit."""
    with edits.edited(model, edit):
        found = success(model, fact)
    return found | {name: edit.report.get(name, float("nan")) for name in ("relative_norm", "divisor_share", "essence_kl", "perplexity_ratio")} | {"edited": float(bool(edit.changes))}  # fmt: skip


def means(rows: Sequence[dict[str, float]], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean, bootstrap interval and n of each number, success in percent; S is the harmonic mean of the three means."""
    found = {}
    for name in rows[0]:
        scale = 100 if name in SCORES else 1
        found[name] = asdict(summary(scale * np.array([row[name] for row in rows]), seed))
    values = 100 * np.array([[row[name] for name in SCORES] for row in rows])
    random = np.random.default_rng(seed)
    resampled = [harmonic(values[random.integers(len(values), size=len(values))].mean(0)) for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    found["S"] = {"mean": harmonic(values.mean(0)), "low": float(low), "high": float(high), "n": len(rows)}
    return found


def harmonic(values: np.ndarray) -> float:
    """The harmonic mean; 0 where one of them is 0."""
    return float(len(values) / (1 / values).sum()) if values.min() > 0 else 0.0


def counterfact(begin: int, n: int) -> list[Fact]:
    """`n` rows of the flat COUNTERFACT file from row `begin` on: MECHEDIT_DATA, or ../shared/data beside the project."""
    data = (
        Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "counterfact_flat.json"
    )
    return list(facts.read(data)[begin : begin + n])
