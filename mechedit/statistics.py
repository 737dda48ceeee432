"""Means over facts with honest intervals, and paired comparisons. The unit is the fact, everywhere in mechedit.

An interval holds the true mean in 95 of 100 repetitions, and is chosen by what is known of the numbers (`experiments/coverage.py`
simulates each):

successes           0 or 1 a fact: Clopper and Pearson's, which is exact.
bounded numbers     shares, probabilities and their differences: facts are weighed at random (the weights uniform over all that sum to
                    1), with one more observation at the worst value there could be, the lower end of the support for the lower
                    bound and the upper end for the upper (Gaffke 2005; Learned-Miller and Thomas 2020). Of successes it is Clopper
                    and Pearson's; it never has zero width; of many facts it is the bootstrap's.
functions of means  S, say: the same weights for all means, taken through the function.
unbounded numbers   the outer bounds of Student's t and of Hall's t, which undoes the skewness (Hall 1992), a little wider for few facts;
                    none below 20 facts, or where all facts have one value.

With one fact there is no interval: the bounds are nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "UNBOUNDED",
    "Mean",
    "Paired",
    "Support",
    "compared",
    "compared_statistic",
    "holm",
    "interval",
    "paired",
    "smallest_seen",
    "statistic",
    "summaries",
    "summary",
]

Support = tuple[float, float]
UNBOUNDED: Support = (-math.inf, math.inf)
DRAWS = 10_000
FEWEST = 20  # facts, without bounds
SMALL = 5  # of n facts each tail has 1 - 5 / n of its 2.5 %, or skewed numbers of few facts are missed too often
PART = 1 << 21  # random numbers at a time
COLUMNS = 500  # at a time
EXACT = 12  # differences up to which all signs are tried


@dataclass(frozen=True)
class Mean:
    """A mean over facts (or another statistic of them), the low and high bound of its 95 % interval (nan where there is none), and
    the number of facts."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        known = not math.isnan(self.low + self.high)
        return f"{self.mean:.3f} " + (f"[{self.low:.3f}, {self.high:.3f}]" if known else f"[no interval: n = {self.n}]")

    def to_json(self) -> dict[str, float | None]:
        """The numbers, null where there is none."""
        return {name: None if value != value else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, float | None]) -> Mean:
        """What `to_json` gave."""
        mean, low, high = (math.nan if (value := record.get(name)) is None else float(value) for name in ("mean", "low", "high"))  # fmt: skip
        return cls(mean, low, high, int(record["n"] or 0))

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and it lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """The mean difference of two conditions over the same facts, and the chance p of one so large if signs were random."""

    difference: Mean
    p: float
    could_see: float = math.nan  # `smallest_seen` of the differences; nan where no difference is so large


def interval(
    values: np.ndarray, seed: int = 0, support: Support | None = None, draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean over the first axis, nans left out; nan where there is no interval.

    `support` is the least and the greatest value there can be. Without it, values that are all from 0 to 1 are taken for shares,
    and others for unbounded.
    """
    flat = np.asarray(values, float).reshape(len(values), -1)
    means = summaries(flat, [support or _guess(flat)] * flat.shape[1], seed, draws)
    bounds = np.array([[each.low for each in means], [each.high for each in means]])
    low, high = bounds.reshape(2, *np.shape(values)[1:])
    return low, high


def summary(values: np.ndarray, seed: int = 0, support: Support | None = None) -> Mean:
    """The mean of one number a fact, nans left out, with its interval; `support` as for `interval`."""
    flat = np.asarray(values, float)[:, None]
    return summaries(flat, [support], seed)[0]


def summaries(values: np.ndarray, supports: Sequence[Support | None], seed: int = 0, draws: int = DRAWS) -> list[Mean]:
    """The mean of each column of `values` [fact, column] with its interval, as fits the column's support, or what it looks like."""
    known = [each or _guess(values[:, column]) for column, each in enumerate(supports)]
    n = (~np.isnan(values)).sum(0)
    means = _means(values)
    bounds = np.full((2, len(known)), np.nan)
    bounded, drawn = np.isfinite(np.array(known, float).reshape(-1, 2)).all(1), []
    for column, support in enumerate(known):
        own = values[~np.isnan(values[:, column]), column]
        if len(own) < 2:
            continue
        if not bounded[column]:
            bounds[:, column] = np.clip(_unbounded(own), *support)
        elif np.isin(own, support).all():
            bounds[:, column] = _exact(int((own == support[1]).sum()), len(own), support)
        else:
            drawn.append(column)
    for begin in range(0, len(drawn), COLUMNS):
        part = drawn[begin : begin + COLUMNS]
        lower, upper = _weighed(values[:, part], [known[column] for column in part], seed, draws)
        bounds[:, part] = np.quantile(lower, 0.025, axis=0), np.quantile(upper, 0.975, axis=0)
    low, high = bounds.tolist()
    return list(map(Mean, means.tolist(), low, high, n.tolist()))


def statistic(
    values: np.ndarray,
    of_means: Callable[..., float | np.ndarray],
    seed: int = 0,
    support: Support = (0.0, 1.0),
    falling: Sequence[int] = (),
    draws: int = DRAWS,
) -> Mean:
    """A function of the means of the columns of `values` [fact, column], with its interval; n is of the column with the fewest.

    `of_means` takes a number a column, or an array a column, and rises with each but those that are `falling`.
    """
    n = int((~np.isnan(values)).sum(0).min())
    value = float(of_means(*_means(values)))
    if n < 2:
        return Mean(value, math.nan, math.nan, n)
    lower, upper = _weighed(values, [support] * values.shape[1], seed, draws)
    for column in falling:
        lower[:, column], upper[:, column] = upper[:, column].copy(), lower[:, column].copy()
    low, high = (np.quantile(of_means(*each.T), share) for each, share in ((lower, 0.025), (upper, 0.975)))
    return Mean(value, float(low), float(high), n)


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0, support: Support | None = None) -> Paired:
    """Second less first, fact by fact, pairs with a nan left out, with the p-value of a two-sided permutation test that flips signs.

    `support` is that of each condition, as for `interval`.
    """
    both = np.stack([first, second], 1).astype(float)
    return compared(both[:, :1], both[:, 1:], [support], seed)[0]


def compared(first: np.ndarray, second: np.ndarray, supports: Sequence[Support | None], seed: int = 0) -> list[Paired]:
    """`paired` for each column of two arrays [fact, column] of the same facts; `supports` are those of the columns."""
    differences = second - first
    known = [each or _guess(np.stack([first[:, column], second[:, column]])) for column, each in enumerate(supports)]
    widths = [(low - high, high - low) if math.isfinite(high - low) else UNBOUNDED for low, high in known]
    means, p = summaries(differences, widths, seed), _sign_test(differences, seed).tolist()
    seen = [_possible(smallest_seen(column), high) for column, (_, high) in zip(differences.T, widths, strict=True)]
    return list(map(Paired, means, p, seen))


def _possible(seen: float, most: float) -> float:
    """nan for a difference that is larger than there can be: then none can be seen."""
    return seen if seen <= most else math.nan


def compared_statistic(
    first: np.ndarray,
    second: np.ndarray,
    of_means: Callable[..., float | np.ndarray],
    seed: int = 0,
    support: Support = (0.0, 1.0),
) -> Paired:
    """A rising function of the means of the columns of `second` [fact, column] less that of `first`, over the facts that have all
    numbers in both; p is of a permutation test that exchanges the two conditions of a fact."""
    there = ~(np.isnan(first) | np.isnan(second)).any(1)
    a, b, columns = first[there], second[there], first.shape[1]

    def gain(*means: float | np.ndarray) -> float | np.ndarray:
        return of_means(*means[:columns]) - of_means(*means[columns:])

    both = np.concatenate([b, a], 1)
    if not len(both):
        return Paired(Mean(math.nan, math.nan, math.nan, 0), math.nan)
    difference = statistic(both, gain, seed, support, falling=range(columns, 2 * columns))
    sums, exact = a.sum(0), len(a) <= EXACT
    hits = 0 if exact else 1
    for signs in [_all_signs(len(a))] if exact else _signs(len(a), seed):
        moved = signs @ (b - a)
        found = gain(*(np.concatenate([sums + moved, b.sum(0) - moved], 1) / len(a)).T)
        hits += int((np.abs(found) >= abs(difference.mean) - 1e-9).sum())
    return Paired(difference, hits / (2 ** len(a) if exact else DRAWS))


def smallest_seen(differences: np.ndarray, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest mean difference that a paired t-test of so many facts, whose differences spread like these, two-sided at `alpha`, finds
    with the given power: (t_(1 - alpha/2) + t_power) s / sqrt(n), with n - 1 degrees of freedom (Bloom 1995; minimum detectable effect).

    nan left out; nan where there are fewer than two, or all are alike, which tells nothing of their spread.
    """
    from scipy.special import stdtrit

    own = differences[~np.isnan(differences)]
    if len(own) < 2 or not np.ptp(own) > 0:
        return math.nan
    quantiles = stdtrit(len(own) - 1, np.array([1 - alpha / 2, power]))
    return float(quantiles.sum() * own.std(ddof=1) / math.sqrt(len(own)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979); nan stays nan, and is not counted."""
    found = np.array(p, float)
    order = [index for index in np.argsort(found) if not math.isnan(found[index])]
    scaled = found[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(scaled), 1.0) if order else scaled
    return found.tolist()


def _guess(values: np.ndarray) -> Support:
    there = values[~np.isnan(values)]
    return (0.0, 1.0) if ((there >= 0) & (there <= 1)).all() else UNBOUNDED


def _means(values: np.ndarray) -> np.ndarray:
    """[column]: means, nans left out; nan where there is nothing else."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(present, values, 0.0).sum(0) / present.sum(0)


def _exact(successes: int, n: int, support: Support) -> tuple[float, float]:
    """Clopper and Pearson's bounds, on the scale of the support."""
    from scipy.special import betaincinv  # scipy.stats takes a third of a second to import

    low = betaincinv(successes, n - successes + 1, 0.025) if successes else 0.0
    high = betaincinv(successes + 1, n - successes, 0.975) if successes < n else 1.0
    width = support[1] - support[0]
    return support[0] + width * float(low), support[0] + width * float(high)


def _weighed(values: np.ndarray, supports: Sequence[Support], seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """[draw, column], twice: means under random weights, with one more observation at the lower and at the upper end."""
    present = ~np.isnan(values)
    patterns, pattern = np.unique(present, axis=1, return_inverse=True)
    columns = np.concatenate([np.where(present, values, 0.0), patterns], 1)
    low, high = np.array(supports, float).T
    parts = []
    for weights, one_more in _weights(len(values), seed, draws):
        sums = weights @ columns
        total = sums[:, values.shape[1] :][:, pattern.ravel()] + one_more
        parts.append([(sums[:, : values.shape[1]] + one_more * end) / total for end in (low, high)])
    lower, upper = (np.concatenate(each) for each in zip(*parts, strict=True))
    return lower, upper


def _weights(n: int, seed: int, draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Exponential weights [draw, fact] and [draw, 1], in parts that fit memory."""
    random = np.random.default_rng(seed)
    part = max(1, PART // n)
    for start in range(0, draws, part):
        here = min(part, draws - start)
        yield random.standard_exponential((here, n)), random.standard_exponential((here, 1))


def _unbounded(values: np.ndarray) -> tuple[float, float]:
    """The outer bounds of Student's and Hall's t, a little wider for few facts; nan for few facts, or all alike."""
    from scipy.special import stdtrit

    n = len(values)
    if n < FEWEST or not np.isfinite(values).all() or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return math.nan, math.nan
    mean, spread = values.mean(), values.std(ddof=1)
    student = float(stdtrit(n - 1, 1 - 0.025 * (1 - SMALL / n)))
    skew = float(((values - mean) ** 3).mean() / values.std() ** 3) / math.sqrt(n)
    hall = [student, -student]
    if abs(skew) > 1e-6:
        hall = [3 / skew * (float(np.cbrt(1 + skew * (q - skew / 6))) - 1) for q in hall]
    error = float(spread) / math.sqrt(n)
    return float(mean) - error * max(hall[0], student), float(mean) - error * min(hall[1], -student)


def _sign_test(differences: np.ndarray, seed: int) -> np.ndarray:
    """[column]: the share of sign flips with a sum as far from zero; exact up to 12 facts. nan where there is no pair."""
    there = ~np.isnan(differences).all(1)
    values = np.nan_to_num(differences[there])
    total, n = values.sum(0), len(values)
    least = np.abs(total) - 1e-9 * np.abs(values).sum(0)
    if n <= EXACT:
        p = (np.abs(2 * _all_signs(n) @ values - total) >= least).mean(0)
    else:
        p = (1 + sum((np.abs(2 * signs @ values - total) >= least).sum(0) for signs in _signs(n, seed))) / DRAWS
    return np.where(np.isnan(differences).all(0), np.nan, p)


def _all_signs(n: int) -> np.ndarray:
    """Zeros and ones [choice, fact], every choice."""
    return np.indices((2,) * n).reshape(n, -1).T if n else np.zeros((1, 0))


def _signs(n: int, seed: int) -> Iterator[np.ndarray]:
    """Zeros and ones [draw, fact], one draw fewer than DRAWS, in parts."""
    random = np.random.default_rng(seed)
    part = max(1, PART // n)
    for start in range(0, DRAWS - 1, part):
        yield random.integers(2, size=(min(part, DRAWS - 1 - start), n), dtype=np.int8).astype(float)
