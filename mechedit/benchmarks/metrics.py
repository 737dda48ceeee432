"""What the tables of model editing measure, each a pure function of log-probabilities, tokens or texts.

A target's log-probability is the mean over its tokens, so exp of it is the geometric mean a token, as the published code has it.

    ES  efficacy score        new target more probable than the true one after the edited prompt
    EM  efficacy magnitude    P(new) - P(true) there
    PS, PM                    the same, mean over the paraphrases of the prompt
    NS, NM                    the reverse, mean over neighbours: true more probable than new, P(true) - P(new)
    S                         harmonic mean of the means over facts of ES, PS and NS (not the mean of harmonic means)
    GE  generation entropy    mean of 2/3 H2 and 4/3 H3, entropies in bits of a text's word bigrams and trigrams
    RS  reference score       cosine of the TF-IDF vectors of generated texts and of reference texts
    essence                   perplexity of a text, its first token counted in the number of tokens
    accuracy                  share of the target's tokens that are the most probable ones, teacher-forced
    efficacy, paraphrase      zsRE's: accuracy of the new answer to the question and to its paraphrase
    specificity               zsRE's: accuracy of an unrelated question's own answer
    rewrite_acc, rephrase_acc accuracy of the new target after a fact's prompt and paraphrases, which EasyEdit scores by default (its
                              locality is agreement with what the unedited model puts first)
    exact match               whether free generation goes on with the target

Meng et al. 2022, section 3 and appendices; the published code's `experiments/py/eval_utils_*` and `summarize.py`; EasyEdit
(zjunlp) at commit 08da19c, `test_prediction_acc` in `easyeditor/evaluate/evaluate_utils.py`.
Scores are shares from 0 to 1 here; tables show them times 100.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mechedit.statistics import UNBOUNDED, Mean, Support, statistic, summaries

__all__ = [
    "SUCCESSES",
    "Pair",
    "accuracy",
    "entropy",
    "essence",
    "exact_match",
    "fluency",
    "harmonic",
    "magnitude",
    "rewrite_scores",
    "success",
    "support",
    "table",
]

SUCCESSES = ("ES", "PS", "NS")


class Pair(NamedTuple):
    """Mean log-probability a token of the new and of the true target, after one prompt."""

    new: float
    true: float

    @property
    def turned(self) -> Pair:
        """The two exchanged, for neighbours."""
        return Pair(self.true, self.new)


def success(pairs: Sequence[Pair]) -> float:
    """The share of prompts after which the new target is more probable than the true one; nan without prompts."""
    return _mean([float(pair.new > pair.true) for pair in pairs])


def magnitude(pairs: Sequence[Pair]) -> float:
    """The mean of P(new) - P(true); nan without prompts."""
    return _mean([math.exp(pair.new) - math.exp(pair.true) for pair in pairs])


def rewrite_scores(prompt: Pair, paraphrases: Sequence[Pair], neighbours: Sequence[Pair]) -> dict[str, float]:
    """ES, EM, PS, PM, NS and NM of one fact, 0 to 1; nan where the fact has no prompts of that kind."""
    turned = [pair.turned for pair in neighbours]
    found: dict[str, float] = {}
    for letter, pairs in (("E", [prompt]), ("P", paraphrases), ("N", turned)):
        found |= {f"{letter}S": success(pairs), f"{letter}M": magnitude(pairs)}
    return found


def harmonic(*values: Any) -> Any:
    """The harmonic mean, which is the paper's S of ES, PS and NS; 0 where one of them is 0. Of arrays, one by one."""
    each = np.stack(np.broadcast_arrays(*values)).astype(float)
    with np.errstate(divide="ignore"):
        found = np.where(each.min(0) > 0, len(each) / (1 / each).sum(0), 0.0)
    return found if found.ndim else float(found)


def entropy(words: Sequence[str], n: int) -> float:
    """Entropy in bits of the n-grams of a text; 0 where it has none."""
    counts = np.array(list(Counter(zip(*(words[start:] for start in range(n)), strict=False)).values()), float)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def fluency(words: Sequence[Sequence[str]]) -> float:
    """GE, over 100: the mean over texts (each a list of words) of the mean of 2/3 H2 and 4/3 H3; nan without texts."""
    return _mean([(2 / 3 * entropy(text, 2) + 4 / 3 * entropy(text, 3)) / 2 for text in words])


def essence(log_p: Sequence[float]) -> float:
    """Perplexity of a text from the log-probabilities of its tokens but the first, which counts in their number all the same."""
    return math.exp(-sum(log_p) / (len(log_p) + 1))


def accuracy(first: Sequence[Sequence[bool]]) -> float:
    """The share of the targets' tokens that the model puts first, each after the prompt and the tokens before it: the mean over
    tokens, then over prompts; nan without prompts. `scoring.Score.first` says which are."""
    return _mean([_mean([float(each) for each in target]) for target in first])


def exact_match(text: str, target: str) -> float:
    """Whether a generated text (without its prompt) begins with the target, case and leading white space aside, as whole words."""
    said, wanted = text.lstrip().casefold(), target.strip().casefold()
    follows = said[len(wanted) : len(wanted) + 1]
    return float(said.startswith(wanted) and not follows.isalnum())


def table(rows: Sequence[dict[str, float]], seed: int = 0) -> dict[str, Mean]:
    """Mean and interval over facts of every number, shares as they are, and S where any fact has ES, PS and NS.

    Raises:
        ValueError: there are no rows, or they do not hold the same numbers.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("a table needs one or more rows that hold the same numbers.")
    values = np.array([list(row.values()) for row in rows], float)
    names = list(rows[0])
    found = dict(zip(names, summaries(values, [support(name) for name in names], seed), strict=True))
    if all(name in found and found[name].n for name in SUCCESSES):
        found["S"] = statistic(values[:, [names.index(name) for name in SUCCESSES]], harmonic, seed)
    return found


def support(name: str) -> Support:
    """The least and the greatest value that a number can have."""
    return _SUPPORTS.get(name, UNBOUNDED)


_SHARES = ("ES", "PS", "NS", "S", "rewrite_acc", "rephrase_acc", "p_new", "efficacy", "paraphrase", "specificity", "exact_match", "RS", "next_token_same", "edited", "broken")  # fmt: skip
_SUPPORTS: dict[str, Support] = dict.fromkeys(_SHARES, (0.0, 1.0)) | dict.fromkeys(("EM", "PM", "NM"), (-1.0, 1.0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
