"""Means over facts with honest intervals, and paired comparisons. The unit is the fact, everywhere in mechedit.

Intervals are 95 % bootstrap percentiles: facts are drawn again with replacement, all numbers of one together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Mean", "Paired", "interval", "paired", "statistic", "summary"]

RESAMPLES = 10_000


@dataclass(frozen=True)
class Mean:
    """A mean over facts (or another statistic of them) with its 95 % interval, low and high, and the number of facts."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float | None]:
        """The numbers, null where there is none."""
        return {name: None if value != value else value for name, value in vars(self).items()}

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """The mean difference of two conditions over the same facts, and the chance p of one so large if signs were random."""

    difference: Mean
    p: float


def interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean over the first axis, nans left out."""
    flat = values.reshape(len(values), -1)
    means = _resampled(flat, seed, resamples)
    some = (~np.isnan(flat)).any(0)
    bounds = np.full((2, flat.shape[1]), np.nan)
    if some.any():
        bounds[:, some] = np.nanpercentile(means[:, some], [2.5, 97.5], axis=0)
    low, high = bounds.reshape(2, *values.shape[1:])
    return low, high


def summary(values: np.ndarray, seed: int = 0) -> Mean:
    """The mean of one number a fact, nans left out, with its interval."""
    values = values[~np.isnan(values)]
    low, high = interval(values[:, None], seed)
    return Mean(float(values.mean()), float(low[0]), float(high[0]), len(values))


def statistic(values: np.ndarray, of_means: Callable[..., float], seed: int = 0) -> Mean:
    """A function of the means of the columns of `values` [fact, column], with its interval; n is of the column with the fewest."""
    means = _resampled(values, seed, RESAMPLES)
    found = [of_means(*row) for row in means[~np.isnan(means).any(1)]]
    low, high = np.percentile(found, [2.5, 97.5])
    return Mean(of_means(*np.nanmean(values, 0)), float(low), float(high), int((~np.isnan(values)).sum(0).min()))


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Paired:
    """Second less first, fact by fact, with the p-value of a two-sided permutation test that flips signs."""
    from scipy import stats

    found = stats.permutation_test(
        (second, first),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        rng=np.random.default_rng(seed),
    )
    return Paired(summary(second - first, seed), float(found.pvalue))


def _resampled(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """[resample, column]: the means of the columns over facts drawn again, nans left out."""
    random = np.random.default_rng(seed)
    counts = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples).astype(float)
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return (counts @ np.where(present, values, 0.0)) / (counts @ present)
