"""Evaluations compared record by record, over all of them and relation by relation.

The others are compared with the first, on the records that all of them have: a record's differences are means over nothing but that
record, so what makes one record harder than another cancels. Intervals and p-values are those of `mechedit.statistics`; p-values
are corrected for the number of comparisons in their table (Holm 1979). S is a function of three means, and so has an interval and no p.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mechedit.benchmarks.metrics import METRICS, SUCCESSES, harmonic, metric
from mechedit.runs.results import Evaluation
from mechedit.runs.store import RunError
from mechedit.statistics import UNBOUNDED, Mean, compared, holm, statistic

__all__ = ["Comparison", "Difference", "compare", "places"]

STAGES = ("after", "before")  # of which the first that a result has is compared, unless another is asked for
BY_RELATION = ("ES", "PS", "NS", "efficacy", "paraphrase", "specificity", "exact_match")
SIGN = {"prompt", "subject", "target_true", "target_new"}  # of a record


@dataclass(frozen=True)
class Difference:
    """A number in one result less the same number in the first, over the records that have it in both.

    `p` is that of a two-sided sign-flip test, `p_corrected` corrected for the comparisons in its table; nan where there is none.
    """

    name: str
    result: int  # which it is of the results, from 1 on
    relation: str  # empty: of all records
    first: float
    second: float
    difference: Mean
    p: float
    p_corrected: float = math.nan
    could_see: float = (
        math.nan
    )  # the smallest mean difference that these records would have shown (`statistics.smallest_seen`)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, null for nan."""
        said = {name: None if value != value else value for name, value in vars(self).items() if name != "difference"}
        return said | {"difference": self.difference.to_json()}


@dataclass(frozen=True)
class Comparison:
    """What each result is called, at which stage, of how many records; how many are common to all; and every difference."""

    names: tuple[str, ...]
    stages: tuple[str, ...]
    records: tuple[int, ...]
    common: int
    benchmark: str
    overall: tuple[Difference, ...]
    by_relation: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        said = {name: value for name, value in vars(self).items() if name not in ("overall", "by_relation")}
        return said | {name: [each.to_json() for each in getattr(self, name)] for name in ("overall", "by_relation")}

    def __str__(self) -> str:
        of = ", ".join(map(str, self.records))
        whole = len(set(self.records)) == 1 and self.records[0] == self.common
        return f"{self.common} records, with the numbers of {self.benchmark}, are common to all" + (
            "" if whole else f" (of {of})"
        )


def compare(
    results: Sequence[Evaluation], names: Sequence[str] = (), *, stage: str | None = None, seed: int = 0
) -> Comparison:
    """Every number of the results less the first's, paired by record.

    Without a `stage` it is after the edits, where there are any, else before: so a result without an editor is what others start from.

    Raises:
        RunError: fewer than two results, of different benchmarks, without a common record, or without the stage.
    """
    if len(results) < 2:
        raise RunError(f"a comparison takes two results or more; found {len(results)}.")
    names = tuple(names) or tuple(map(str, range(1, len(results) + 1)))
    benchmarks = [str(each.what.get("benchmark")) for each in results]
    if len(set(benchmarks)) > 1:
        raise RunError(f"results of different benchmarks cannot be compared: {', '.join(f'{name} is of {of}' for name, of in zip(names, benchmarks, strict=True))}.")  # fmt: skip
    stages = tuple(_stage(each, name, stage) for each, name in zip(results, names, strict=True))
    where = [places(each) for each in results]
    common = [key for key in where[0] if all(key in own for own in where)]
    if not common:
        counts = " and ".join(f"{len(own)} of {name}" for own, name in zip(where, names, strict=True))
        raise RunError(f"results of different records cannot be compared: of the {counts}, 0 are common to all.")
    rows = [[each.rows[at][own[key]] for key in common] for each, at, own in zip(results, stages, where, strict=True)]
    relations = [str(results[0].facts[where[0][key]].get("relation") or "") for key in common]
    overall = [each for other in range(1, len(rows)) for each in _differences(rows[0], rows[other], other, "", seed)]
    by_relation = [
        each
        for relation in sorted({*relations} - {""})
        for other in range(1, len(rows))
        for each in _differences(
            _of(relation, relations, rows[0]), _of(relation, relations, rows[other]), other, relation, seed
        )
        if each.name in BY_RELATION
    ]
    return Comparison(names, stages, tuple(map(len, where)), len(common), benchmarks[0], _corrected(overall), _corrected(by_relation))  # fmt: skip


def _stage(result: Evaluation, name: str, wanted: str | None) -> str:
    found = next((stage for stage in ([wanted] if wanted else STAGES) if stage in result.rows), None)
    if found is None:
        raise RunError(f"{name} has no stage {wanted!r}; it has {', '.join(result.rows)}.")
    return found


def places(result: Evaluation) -> dict[tuple[Any, ...], int]:
    """Where each record of a result is: by what it says, whatever its id, and by its number where several say the same."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for index, fact in enumerate(result.facts):
        key = tuple(fact.get(name) for name in sorted(SIGN))
        found[(*key, seen[key])] = index
        seen[key] += 1
    return found


def _of(relation: str, relations: Sequence[str], rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row, own in zip(rows, relations, strict=True) if own == relation]


def _differences(
    first: Sequence[dict[str, float]], second: Sequence[dict[str, float]], other: int, relation: str, seed: int
) -> list[Difference]:
    """Every number that both have, in the order of the tables."""
    shared = {name for row in first for name in row} & {name for row in second for name in row}
    names = [name for name in METRICS if name in shared] + sorted(shared - METRICS.keys())
    both = np.array([[[row.get(name, math.nan) for name in names] for row in rows] for rows in (first, second)], float)
    both = np.where(np.isfinite(both).all(0), both, math.nan)  # pairs that are whole
    found = []
    for column, each in enumerate(
        compared(both[0], both[1], [metric(name).support or UNBOUNDED for name in names], seed)
    ):
        if each.difference.n:
            mine, theirs = np.nanmean(both[:, :, column], 1).tolist()
            found.append(
                Difference(
                    names[column], other, relation, mine, theirs, each.difference, each.p, could_see=each.could_see
                )
            )
    if all(name in names for name in SUCCESSES):
        S = _of_S(both[:, :, [names.index(name) for name in SUCCESSES]], other, relation, seed)
        at = [each.name for each in found].index("NS") + 1 if S else 0
        found[at:at] = S
    return found


def _of_S(both: np.ndarray, other: int, relation: str, seed: int) -> list[Difference]:
    """S of the second less S of the first, where any record has all three; `both` is [result, record, score]."""
    if np.isnan(both).all(1).any():
        return []
    mine, theirs = (float(harmonic(*np.nanmean(own, 0))) for own in both)

    def of_means(*each: Any) -> Any:
        return harmonic(*each[3:]) - harmonic(*each[:3])

    difference = statistic(np.concatenate(list(both), 1), of_means, seed, falling=(0, 1, 2))
    return [Difference("S", other, relation, mine, theirs, difference, math.nan)]


def _corrected(found: Sequence[Difference]) -> tuple[Difference, ...]:
    return tuple(replace(each, p_corrected=p) for each, p in zip(found, holm([each.p for each in found]), strict=True))
