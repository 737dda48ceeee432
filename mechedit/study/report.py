"""What a study found: pairwise wins, best picks, strengths, agreement, where texts stood, and time, beside the paper's two numbers.

The paper says that ROME's texts are 1.8 times as likely as FT+L's to be rated more consistent, and 1.3 times less likely to be rated more fluent. It does not
say whether these are ratios of pairwise wins or of best picks, nor how uncertain they are; both ratios are here, with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechedit import cache, statistics
from mechedit.study import agreement, clusters
from mechedit.study.forms import QUESTIONS, SCALE
from mechedit.study.judged import Judged, judged, long_form
from mechedit.study.making import Study
from mechedit.study.responses import Response, kept

__all__ = ["LEGEND", "PAPER", "Report", "report"]

PAPER = {("consistency", "rome", "ft-l"): 1.8, ("fluency", "rome", "ft-l"): 1 / 1.3}
"""Ratios of Meng et al. 2022, section 3.6: of the first's to the second's."""
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Report:
    """The numbers of a study, JSON values; infinite and unknown ones are null there."""

    numbers: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(cache.plain(self.numbers))

    @property
    def summary(self) -> str:
        """What it is the report of."""
        numbers = self.numbers
        return (
            f"{numbers['responses']} of {numbers['of']} forms came back: {numbers['pages']} pages about {numbers['facts']} facts by "
            f"{numbers['raters']} raters."
        )

    def tables(self) -> list[Table]:
        """(title, header, rows) of each table, as people read them."""
        return list(_tables(self.numbers))

    def markdown(self) -> str:
        """The tables as a page."""
        lines = ["# Human study", self.summary]
        for title, header, rows in self.tables():
            lines += [f"## {title}", "\n".join(["| " + " | ".join(map(_cell, row)) + " |" for row in (header, ["---"] * len(header), *rows)])]  # fmt: skip
        return "\n\n".join([*lines, LEGEND]) + "\n"

    def save(self, folder: str | Path) -> list[Path]:
        """`report.json` and `report.md` there."""
        import json

        texts = {"report.json": json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", "report.md": self.markdown()}  # fmt: skip
        paths = []
        for name, text in texts.items():
            paths.append(Path(folder) / name)
            with cache.atomic_write(paths[-1]) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return paths


LEGEND = (
    "Share: of the pages on which the first's text was ranked before the second's. Wilson: 95 % interval as if pages were independent. "
    "By facts and raters: 95 % interval that minds that pages of a fact, and of a rater, are alike; never the narrower of the two. Odds: wins to "
    "losses. Best picks: how often a text was ranked first, and the ratio of the two editors' counts. Strength: Bradley and Terry's, with half a win added to each side; their product is 1. "
    "Alpha: Krippendorff's, of ranks; W: Kendall's, mean over facts; both are 1 where all raters agree."
)


def report(study: Study, responses: Sequence[Response] | None = None, seed: int = 0) -> Report:
    """The numbers of these responses, or of those that were accepted last.

    Raises:
        StudyError: no response was accepted, or no page is finished.
    """
    own = list(responses) if responses is not None else kept(study)
    found = judged(study, own)
    numbers: dict[str, Any] = {
        "study": study.name,
        "editors": list(study.editors),
        "about": study.about,
        "responses": len(own),
        "of": len(study.forms),
        "pages": len(found.facts),
        "facts": len(np.unique(found.facts)),
        "raters": len(np.unique(found.raters)),
        "questions": {question: _question(found, question, seed) for question in QUESTIONS},
        "seconds": _seconds(found),
        "comments": [each.comment for each in own if each.comment.strip()],
    }
    if marks := long_form(study, own):
        numbers["long_form"] = {item: _marks(study, each, seed) for item, each in marks.items()}
    return Report(numbers)


def _question(found: Judged, question: str, seed: int) -> dict[str, Any]:
    rated = agreement.rankings(found.facts, found.ranks[question])
    best = found.best(question).sum(0).astype(int)
    return {
        "pairs": _pairs(found, question, seed),
        "best": dict(zip(found.editors, best.tolist(), strict=True)),
        "strengths": _strengths(found, question, seed),
        "agreement": {"facts": len(rated), "alpha": agreement.alpha(rated), "W": agreement.concordance(rated), "W_at_random": _at_random(rated)},
        "places": _places(found, question),
    }  # fmt: skip


def _pairs(found: Judged, question: str, seed: int) -> list[dict[str, Any]]:
    """Wins and best picks of editors two by two."""
    wins, best, n = found.wins(question), found.best(question), len(found.facts)
    both = np.stack([wins, 1 - wins], 2).reshape(n, -1)
    odds = clusters.spread(both, clusters.log_odds, found.facts, found.raters, seed)
    picked = clusters.spread(best, clusters.log_ratios(found.pairs), found.facts, found.raters, seed)
    rows = []
    for at, (a, b) in enumerate(found.pairs):
        won, first, second = int(wins[:, at].sum()), int(best[:, a].sum()), int(best[:, b].sum())
        share = clusters.of_share(odds, at, won, n)
        of_picks = clusters.of_share(picked, at, first, first + second)
        names = found.editors[a], found.editors[b]
        rows.append(
            {
                "first": names[0],
                "second": names[1],
                "wins": won,
                "pages": n,
                "share": won / n,
                "wilson": list(clusters.wilson(won, n)),
                "by_facts_and_raters": list(share),
                "odds": _ratio(won, n - won),
                "odds_interval": [_odds(each) for each in share],
                "best_ratio": _ratio(first, second),
                "best_ratio_interval": [_odds(each) for each in of_picks],
                "paper": _paper(question, *names),
            }
        )
    return rows


def _ratio(first: float, second: float) -> float:
    return first / second if second else (math.inf if first else math.nan)


def _odds(share: float) -> float:
    return _ratio(share, 1 - share) if share == share else math.nan


def _paper(question: str, first: str, second: str) -> float | None:
    if (question, first, second) in PAPER:
        return PAPER[question, first, second]
    return 1 / PAPER[question, second, first] if (question, second, first) in PAPER else None


def _strengths(found: Judged, question: str, seed: int) -> dict[str, Any]:
    """Bradley and Terry's strengths with half a win added to each side of each pair, which keeps those of winners of all finite."""
    wins = found.wins(question)
    both = np.stack([wins, 1 - wins], 2).reshape(len(wins), -1)
    logs = clusters.log_strengths(found.pairs, len(found.editors))
    own = clusters.spread(both, logs, found.facts, found.raters, seed)
    return {
        name: {"strength": float(np.exp(own.estimate[at])), "low": float(np.exp(own.low[at])), "high": float(np.exp(own.high[at]))}
        for at, name in enumerate(found.editors)
    }  # fmt: skip


def _at_random(rated: Sequence[np.ndarray]) -> float:
    """The mean W of random rankings: one in the number of raters, for each fact."""
    return float(np.mean([1 / len(own) for own in rated])) if rated else math.nan


def _places(found: Judged, question: str) -> dict[str, Any]:
    """How often the text at each place was ranked best, and how probable so uneven counts are if places do not matter."""
    from scipy.stats import chisquare

    at = found.places[found.ranks[question] == 0]
    counts = np.bincount(at, minlength=len(found.editors))
    return {"best": counts.tolist(), "p": float(chisquare(counts).pvalue)}


def _seconds(found: Judged) -> dict[str, Any]:
    low, middle, high = np.quantile(found.seconds, (0.25, 0.5, 0.75)).tolist()
    own = {int(rater): float(np.median(found.seconds[found.raters == rater])) for rater in np.unique(found.raters)}
    return {"median": middle, "quartiles": [low, high], "fastest_rater": min(own.values()), "slowest_rater": max(own.values())}  # fmt: skip


def _marks(study: Study, marks: np.ndarray, seed: int) -> dict[str, Any]:
    """The mean mark of each editor over facts."""
    means = statistics.summaries(marks, [(1.0, float(SCALE))] * marks.shape[1], seed)
    return {name: each.to_json() for name, each in zip(study.editors, means, strict=True)}


def _tables(numbers: dict[str, Any]) -> Iterable[Table]:
    for question, own in numbers["questions"].items():
        yield (
            f"More {QUESTIONS[question]}",
            (
                "first / second",
                "wins",
                "share",
                "Wilson",
                "by facts and raters",
                "odds",
                "best picks",
                "paper (GPT-2 XL)",
            ),
            [_pair_row(each, own["best"]) for each in own["pairs"]],
        )
    names = list(numbers["questions"])
    rows = [(editor, *(_strength(numbers["questions"][name]["strengths"][editor]) for name in names)) for editor in numbers["editors"]]  # fmt: skip
    yield "Strength", ("", *names), rows
    yield "Raters, places and time", ("", *names), list(_checks(numbers))
    if marks := numbers.get("long_form"):
        rows = [(item, *(_mark(own[editor]) for editor in numbers["editors"])) for item, own in marks.items()]
        yield f"Long form, 1 to {SCALE}", ("", *numbers["editors"]), rows


def _checks(numbers: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    own = list(numbers["questions"].values())
    yield ("Krippendorff's alpha", *(f"{_number(each['agreement']['alpha'])}" for each in own))
    yield ("Kendall's W (at random)", *(f"{_number(each['agreement']['W'])} ({_number(each['agreement']['W_at_random'])})" for each in own))  # fmt: skip
    yield ("best at place A, B, …", *(f"{', '.join(map(str, each['places']['best']))} (p = {each['places']['p']:.2g})" for each in own))  # fmt: skip
    seconds = numbers["seconds"]
    yield ("seconds a page, median [quartiles]", f"{seconds['median']:.0f} [{seconds['quartiles'][0]:.0f}, {seconds['quartiles'][1]:.0f}]", *([""] * (len(own) - 1)))  # fmt: skip


def _pair_row(each: dict[str, Any], best: dict[str, int]) -> tuple[str, ...]:
    return (
        f"{each['first']} / {each['second']}",
        f"{each['wins']} of {each['pages']}",
        _number(each["share"]),
        _interval(each["wilson"]),
        _interval(each["by_facts_and_raters"]),
        f"{_number(each['odds'])} {_interval(each['odds_interval'])}",
        f"{best[each['first']]} to {best[each['second']]}: {_number(each['best_ratio'])} {_interval(each['best_ratio_interval'])}",
        "" if each["paper"] is None else _number(each["paper"]),
    )


def _strength(each: dict[str, float]) -> str:
    return f"{_number(each['strength'])} {_interval([each['low'], each['high']])}"


def _mark(each: dict[str, Any]) -> str:
    known = {name: math.nan if value is None else value for name, value in each.items()}
    parts = (_number(known["mean"]), _interval([known["low"], known["high"]]), f"(n = {each['n']})")
    return " ".join(part for part in parts if part)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _interval(bounds: Sequence[float]) -> str:
    return "" if any(map(math.isnan, bounds)) else f"[{_number(bounds[0])}, {_number(bounds[1])}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
