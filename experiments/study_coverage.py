"""How often intervals of a human study hold the truth.  python -m experiments.study_coverage

Rankings are drawn again and again, with the study's own design: what a rater thinks of an editor's text about a fact is the editor's quality, a
leaning of the fact, a leaning of the rater, and Gumbel noise. Says the share of samples whose interval holds the value of all facts and raters, for the
odds of each pair, the ratios of best picks and Bradley and Terry's strengths, by facts and raters; and Wilson's interval of the pairs as the control.
-> figures/study_coverage.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from experiments.common import FIGURES, parse, say
from mechedit import cache, provenance
from mechedit.study import clusters, design

PAIRS = list(combinations(range(3), 2))


@dataclass(frozen=True)
class StudyCoverage:
    """Settings of the experiment."""

    facts: tuple[int, ...] = (50, 20)  # the paper's first
    gaps: tuple[float, ...] = (0.0, 0.6, 2.0)  # between editors' qualities; 0.6 makes wins of 1.8 to 1 without leanings
    of_facts: tuple[float, ...] = (0.0, 1.0, 0.5, 1.0, 0.0)  # spread of the facts' leanings, in turn with
    of_raters: tuple[float, ...] = (0.0, 0.5, 1.0, 1.0, 1.5)  # that of the raters'
    raters: int = 3
    pages: int = 10
    samples: int = 400
    draws: int = 300  # in each sample; reports have 2,000
    large: int = 400_000  # rankings that stand for all facts and raters
    seed: int = 0


def rankings(random: np.random.Generator, gap: float, leaning: np.ndarray) -> np.ndarray:
    """[page, editor], 0 the best, of leanings [page, editor]."""
    thought = leaning + gap * np.array([1.0, 0.0, -1.0]) + random.gumbel(size=leaning.shape)
    return (-thought).argsort(1).argsort(1)


def counts(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[page, (win, loss) of each pair] and [page, editor ranked best]."""
    wins = np.stack([ranks[:, a] < ranks[:, b] for a, b in PAIRS], 1).astype(float)
    return np.stack([wins, 1 - wins], 2).reshape(len(ranks), -1), (ranks == 0).astype(float)


STATISTICS = {
    "odds": (0, clusters.log_odds),
    "best picks": (1, clusters.log_ratios(PAIRS)),
    "strengths": (0, clusters.log_strengths(PAIRS, 3)),
}


def measured(settings: StudyCoverage, facts: int, gap: float, of_facts: float, of_raters: float) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each statistic, and for Wilson's interval."""
    random = np.random.default_rng([settings.seed, facts])
    laid = design.plan(facts, settings.raters, settings.pages, 3, 0, settings.seed)
    fact = np.array([page.fact for own in laid.people for page in own])
    rater = np.repeat(np.arange(len(laid.people)), settings.pages)
    spread = float(np.hypot(of_facts, of_raters))
    every = counts(rankings(random, gap, spread * random.normal(size=(settings.large, 3))))
    truth = {name: logs(every[at].sum(0, keepdims=True))[0] for name, (at, logs) in STATISTICS.items()}
    chances = {"odds": 1 / (1 + np.exp(-truth["odds"])), "best picks": 1 / (1 + np.exp(-truth["best picks"]))}
    held: dict[str, list[list[bool]]] = {name: [] for name in (*STATISTICS, "Wilson")}
    for sample in range(settings.samples):
        leaning = of_facts * random.normal(size=(facts, 3))[fact] + of_raters * random.normal(size=(len(laid.people), 3))[rater]  # fmt: skip
        own = counts(rankings(random, gap, leaning))
        met = {"odds": own[0].sum(0).reshape(-1, 2), "best picks": np.stack([own[1].sum(0)[list(pair)] for pair in PAIRS])}  # fmt: skip
        for name, (at, logs) in STATISTICS.items():
            found = clusters.spread(own[at], logs, fact, rater, sample, settings.draws)
            if name in chances:
                bounds = [clusters.of_share(found, each, int(won), int(won + lost)) for each, (won, lost) in enumerate(met[name])]  # fmt: skip
                held[name].append([low <= p <= high for p, (low, high) in zip(chances[name], bounds, strict=True)])
            else:
                held[name].append(list((found.low <= truth[name]) & (truth[name] <= found.high)))
        bounds = [clusters.wilson(int(won), len(fact)) for won, _ in met["odds"]]
        held["Wilson"].append([low <= p <= high for p, (low, high) in zip(chances["odds"], bounds, strict=True)])
    about = {"facts": facts, "people": len(laid.people), "gap": gap, "of_facts": of_facts, "of_raters": of_raters}
    for name, each in held.items():
        yield about | {"statistic": name, "coverage": float(np.mean(each)), "worst": float(np.mean(each, axis=0).min())}


def main(settings: StudyCoverage) -> None:
    rows: list[dict[str, Any]] = []
    for facts in settings.facts:
        for gap in settings.gaps:
            for of_facts, of_raters in zip(settings.of_facts, settings.of_raters, strict=True):
                rows += measured(settings, facts, gap, of_facts, of_raters)
        lowest = {name: min(each["worst"] for each in rows if each["statistic"] == name) for name in (*STATISTICS, "Wilson")}  # fmt: skip
        say(f"{facts} facts: lowest coverage so far {lowest}")
    record = {"settings": asdict(settings), "versions": provenance.versions(), "lowest": lowest, "rows": rows}
    path = FIGURES / "study_coverage.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(StudyCoverage))
