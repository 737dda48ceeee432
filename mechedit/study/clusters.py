"""Intervals of what is counted over pages, when pages of one fact, and pages of one rater, are alike.

The variance of a statistic is that over facts, plus that over raters, less that over pages, which both of them hold (Cameron, Gelbach and Miller
2011), and no less than the largest of the three. Each is a Bayesian bootstrap's (Rubin 1981): the clusters are weighed with exponential numbers, and
the statistic is computed again. Statistics are logarithms (of odds, of a ratio, of a strength), with half a page added to each count, so that none is
infinite; their intervals are Student's t with one degree of freedom fewer than there are facts or raters, whichever are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["HALF", "Spread", "log_odds", "log_ratios", "log_strengths", "of_share", "spread", "wilson"]

DRAWS = 2000
HALF = 0.5  # of a page, added to a count
STEPS, CLOSE = 1000, 1e-8  # of Bradley and Terry's iteration: at most so many, until nothing moves by more
Logs = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Spread:
    """Estimates [value], their standard errors over facts and raters, and by how many of these their 95 % intervals reach."""

    estimate: np.ndarray
    error: np.ndarray
    reach: float

    @property
    def low(self) -> np.ndarray:
        """The lower bounds."""
        return self.estimate - self.reach * self.error

    @property
    def high(self) -> np.ndarray:
        """The upper bounds."""
        return self.estimate + self.reach * self.error


def spread(counts: np.ndarray, logs: Logs, facts: np.ndarray, raters: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Spread:  # fmt: skip
    """`logs` of the sums of `counts` [page, column] over pages: it takes sums [draw, column] and gives [draw, value].

    Where all pages are of one fact, or of one rater, nothing is known of others: the errors are nan.
    """
    from scipy.special import stdtrit

    random = np.random.default_rng(seed)
    estimate = logs(counts.sum(0, keepdims=True))[0]
    fewest = min(len(np.unique(facts)), len(np.unique(raters)))
    if fewest < 2:
        return Spread(estimate, np.full(estimate.shape, math.nan), math.nan)
    by = [_variance(counts, logs, own, random, draws) for own in (facts, raters, np.arange(len(counts)))]
    variance = np.maximum(by[0] + by[1] - by[2], np.max(by, axis=0))
    return Spread(estimate, np.sqrt(variance), float(stdtrit(fewest - 1, 0.975)))


def _variance(counts: np.ndarray, logs: Logs, clusters: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:  # fmt: skip
    """[value]: over weights of the clusters, as much too small as it is with few of them made good."""
    _, cluster = np.unique(clusters, return_inverse=True)
    n = int(cluster.max()) + 1
    sums = np.zeros((n, counts.shape[1]))
    np.add.at(sums, cluster.ravel(), counts)
    weights = random.standard_exponential((draws, n))
    weights *= n / weights.sum(1, keepdims=True)
    return (
        logs(weights @ sums).var(0) * (n + 1) / (n - 1)
    )  # a Bayesian bootstrap's is (n - 1) / (n + 1) of the sample's


def log_odds(sums: np.ndarray) -> np.ndarray:
    """Of counts (for, against, for, against, …) the logarithm of each one's odds."""
    return np.log(sums[:, 0::2] + HALF) - np.log(sums[:, 1::2] + HALF)


def log_ratios(pairs: list[tuple[int, int]]) -> Logs:
    """Of counts the logarithms of the ratios of some."""
    first, second = (np.array(each) for each in zip(*pairs, strict=True))
    return lambda sums: np.log(sums[:, first] + HALF) - np.log(sums[:, second] + HALF)


def log_strengths(pairs: list[tuple[int, int]], editors: int) -> Logs:
    """Of wins and losses of pairs the logarithms of Bradley and Terry's strengths, whose sum is 0: P(a before b) = s_a / (s_a + s_b).

    By Hunter's (2004) iteration: s_a = wins of a / sum over b of n_ab / (s_a + s_b).
    """

    def logs(sums: np.ndarray) -> np.ndarray:
        wins = np.zeros((len(sums), editors, editors))
        for at, (a, b) in enumerate(pairs):
            wins[:, a, b], wins[:, b, a] = sums[:, 2 * at] + HALF, sums[:, 2 * at + 1] + HALF
        met, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
        strength = np.ones((len(sums), editors))
        for _ in range(STEPS):
            before = strength
            strength = won / (met / (before[:, :, None] + before[:, None])).sum(2)
            strength /= np.exp(np.log(strength).mean(1, keepdims=True))
            if np.abs(strength / before - 1).max() < CLOSE:
                break
        return np.log(strength)

    return logs


def of_share(found: Spread, at: int, wins: int, n: int) -> tuple[float, float]:
    """The interval of the share whose log odds are value `at`: never narrower than Wilson's of `wins` of `n`, which holds where counts
    are so small that no spread is seen. nan where the errors are."""
    if not n or math.isnan(found.error[at]):
        return math.nan, math.nan
    low, high = (float(1 / (1 + np.exp(-each[at]))) for each in (found.low, found.high))
    least, most = wilson(wins, n)
    return min(least, low), max(most, high)


def wilson(wins: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, as if pages were independent."""
    from scipy.stats import binomtest

    found = binomtest(wins, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
