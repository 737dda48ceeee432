"""Whether raters agree: Krippendorff's alpha for ranks, and Kendall's W.

Of rankings drawn at random, alpha is about 0 and the mean W of m raters is 1 / m; of rankings that all agree, both are 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["alpha", "concordance", "rankings"]


def rankings(facts: np.ndarray, ranks: np.ndarray) -> list[np.ndarray]:
    """[rater, editor] of each fact that two or more rated."""
    return [own for fact in np.unique(facts) if len(own := ranks[facts == fact]) > 1]


def alpha(rated: Sequence[np.ndarray]) -> float:
    """Krippendorff's alpha of ordinal values (Krippendorff 2011), a unit being a fact's text by one editor: 1 - observed / expected
    disagreement, where two ranks c < k disagree by ((n_c + n_k) / 2 + n between them)^2. nan where nobody rated what another did, or no
    two values differ."""
    if not rated:
        return float("nan")
    values = max(int(own.max()) for own in rated) + 1
    seen = np.zeros((values, values))  # pairs of values of a unit, each unit's weighed by 1 / (its raters - 1)
    for own in rated:
        for unit in own.T:
            counts = np.bincount(unit, minlength=values).astype(float)
            seen += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    n = seen.sum(0)
    middle = np.cumsum(n) - n / 2
    distance = (middle[:, None] - middle[None]) ** 2  # from the middle of one value to that of the other
    expected = (np.outer(n, n) * distance).sum() / (n.sum() - 1)
    return float(1 - (seen * distance).sum() / expected) if expected > 0 else float("nan")


def concordance(rated: Sequence[np.ndarray]) -> float:
    """Kendall's W, the mean over facts: 12 S / (m^2 (k^3 - k)) of m raters' rankings of k texts, S the squares of the sums of ranks
    about their mean. nan where no fact has two raters."""
    if not rated:
        return float("nan")
    found = []
    for own in rated:
        raters, texts = own.shape
        sums = own.sum(0)
        found.append(12 * ((sums - sums.mean()) ** 2).sum() / (raters**2 * (texts**3 - texts)))
    return float(np.mean(found))
