"""What the tables of model editing measure: `METRICS` says what each number is, the functions make it of log-probabilities, tokens
or texts.

A target's log-probability is the mean over its tokens, so exp of it is the geometric mean a token, as the published code has it.
Scores are shares from 0 to 1 here; tables show them in percent (`Metric.unit`).

A model that an edit broke, whose logits are no numbers, gives every target the probability 0: it fails each success, its magnitudes
are 0, it puts no token first, and it counts in every mean of these. What would be infinite of it (a perplexity, say) is nan, and is left
out of that mean, which says its n; `broken` counts such records.

Meng et al. 2022, section 3 and appendices; the published code's `experiments/py/eval_utils_*` and `summarize.py`; EasyEdit
(zjunlp) at commit 08da19c, `test_prediction_acc` in `easyeditor/evaluate/evaluate_utils.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mechedit.statistics import UNBOUNDED, Mean, Paired, Support, compared, compared_statistic, statistic, summaries
from mechedit.writing import folded, is_spaceless

__all__ = [
    "METRICS",
    "SUCCESSES",
    "Metric",
    "Pair",
    "accuracy",
    "described",
    "differences",
    "entropy",
    "essence",
    "exact_match",
    "fluency",
    "harmonic",
    "magnitude",
    "metric",
    "nkl_published",
    "rewrite_scores",
    "success",
    "table",
]


@dataclass(frozen=True)
class Metric:
    """What a number of a table is: its unit there, which way is better, what it means, and the least and greatest value it can have."""

    name: str
    unit: str
    better: str
    meaning: str
    support: Support | None

    @property
    def scale(self) -> float:
        """What a value is multiplied with to be in the unit."""
        return {"%": 100.0, "bits x 100": 100.0}.get(self.unit, 1.0)

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def __str__(self) -> str:
        said = ", ".join(each for each in (self.unit, self.better and f"{self.better} is better") if each)
        return self.name + (f" ({said})" if said else "") + (f": {self.meaning}" if self.meaning else "")

    def shown(self, mean: Mean, n: int | None = None) -> str:
        """The mean in its unit, its interval where it has one, and its n where that is not `n`."""
        if not mean.n:
            return ""
        bounds = [] if math.isnan(mean.low + mean.high) else [mean.low, mean.high]
        scaled = [self.scale * value for value in (mean.mean, *bounds)]
        form = ".1f" if self.scale > 1 else ".1e" if 0 < max(map(abs, scaled)) < 0.01 else ".3f"
        value, *between = (f"{each:{form}}" for each in scaled)
        of = f", n = {mean.n}" if n is not None and mean.n != n else ""
        return value + (f" [{', '.join(between)}]" if between else "") + of


_SHARE, _DIFFERENCE, _POSITIVE = (0.0, 1.0), (-1.0, 1.0), (0.0, math.inf)

METRICS = {
    each.name: each
    for each in (
        Metric("ES", "%", "higher", "efficacy score: new target more probable than the true one after the edited prompt", _SHARE),
        Metric("PS", "%", "higher", "paraphrase score: the same after paraphrases of the prompt, the mean over them", _SHARE),
        Metric("NS", "%", "higher", "neighbourhood score: true target more probable than the new one after neighbours' prompts", _SHARE),
        Metric("S", "%", "higher", "harmonic mean of the means over facts of ES, PS and NS", _SHARE),
        Metric("EM", "%", "higher", "efficacy magnitude: P(new) - P(true) after the edited prompt", _DIFFERENCE),
        Metric("PM", "%", "higher", "the same after paraphrases, the mean over them", _DIFFERENCE),
        Metric("NM", "%", "higher", "P(true) - P(new) after neighbours' prompts, the mean over them", _DIFFERENCE),
        Metric("rewrite_acc", "%", "higher", "share of the new target's tokens that the model puts first after the prompt; EasyEdit's default", _SHARE),
        Metric("rephrase_acc", "%", "higher", "the same after paraphrases", _SHARE),
        Metric("p_new", "%", "higher", "P of the whole new target after the prompt", _SHARE),
        Metric("answer", "%", "higher", "asked the question alone, what the model says up to its sentence's end holds the new target", _SHARE),
        Metric("N+", "%", "higher", "NS after neighbours' prompts that stand behind the new fact, stated; elsewhere NS+ of CounterFact+, and DNS", _SHARE),
        Metric("NM+", "%", "higher", "NM after the same prompts", _DIFFERENCE),
        Metric("SR", "%", "higher", "same subject, other relations: own answer more probable than the new target; elsewhere RS", _SHARE),
        Metric("drift", "nats", "lower", "mean over neighbours' prompts of KL(after || before) of the next token", _POSITIVE),
        Metric("drift_log_p", "nats", "near 0", "mean over neighbours of the change of log P of the neighbour's whole own answer", UNBOUNDED),
        Metric("efficacy", "%", "higher", "zsRE: share of the new answer's tokens that the model puts first after the question", _SHARE),
        Metric("paraphrase", "%", "higher", "zsRE: the same after the question's paraphrase", _SHARE),
        Metric("specificity", "%", "higher", "zsRE: the same of an unrelated question's own answer", _SHARE),
        Metric("exact_match", "%", "higher", "greedy text goes on with the new target", _SHARE),
        Metric("GE", "bits x 100", "higher", "generation entropy: mean of 2/3 H2 and 4/3 H3, entropies of a text's word bigrams and trigrams", _POSITIVE),
        Metric("RS", "%", "higher", "reference score: cosine of TF-IDF vectors of generated texts and of reference texts", _SHARE),
        Metric("essence", "", "lower", "perplexity of texts about the subject, the first token counted in the number of tokens", _POSITIVE),
        Metric("perplexity", "", "lower", "of text that has nothing to do with the edit", _POSITIVE),
        Metric("perplexity_ratio", "", "near 1", "that perplexity, to the unedited model's", _POSITIVE),
        Metric("next_token_kl", "nats", "lower", "mean KL(edited || unedited) of the next token on that text", _POSITIVE),
        Metric("next_token_same", "%", "higher", "positions of that text whose most probable next token is still the same", _SHARE),
        Metric("weight_norm_ratio", "", "near 1", "norm of W_out, edited over unedited, of the layer where it changed most", _POSITIVE),
        Metric("broken", "%", "lower", "records whose edited model gives numbers that are not finite", _SHARE),
        Metric("relative_norm", "", "lower", "norm of the change of a weight, to the weight's", _POSITIVE),
        Metric("divisor_share", "", "higher", "how much of k*'s length in the metric of C the mean key has", _POSITIVE),
        Metric("essence_kl", "nats", "lower", "KL of the next token after the subject and 'is a', edited from unedited", _POSITIVE),
        Metric("edited", "%", "higher", "records that were edited", _SHARE),
    )
}  # fmt: skip
"""Every number of mechedit's tables, in their order."""

SUCCESSES = ("ES", "PS", "NS")
MOST = 700.0  # what exp can take


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


def nkl_published(kl: float, vocabulary: int) -> float:
    """NKL as CounterFact+ has it: its code divides KL(after || before) by the number of tokens in the vocabulary."""
    return kl / vocabulary


def harmonic(*values: Any) -> Any:
    """The harmonic mean, which is the paper's S of ES, PS and NS; 0 where one of them is 0. Of arrays, one by one."""
    each = np.stack(np.broadcast_arrays(*values)).astype(float)
    with np.errstate(divide="ignore"):
        found = np.where(each.min(0) > 0, len(each) / (1 / each).sum(0), 0.0)
    return found if found.ndim else float(found)


def worth(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """S of the means of some facts' scores, and their efficacy, which tells edits apart where S is 0: to choose the best by. A fact without a
    score counts in the means of those that it has; what no fact has is 0."""
    scores = {name: [row[name] for row in rows if not np.isnan(row.get(name, np.nan))] for name in SUCCESSES}
    means = {name: float(np.mean(each)) if each else 0.0 for name, each in scores.items()}
    return round(float(harmonic(*means.values())), 6), round(means["ES"], 6)


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
    """Perplexity of a text from the log-probabilities of its tokens but the first, which counts in their number all the same; nan
    where it is no number or too large for one."""
    mean = -sum(log_p) / (len(log_p) + 1)
    return math.exp(mean) if mean < MOST else math.nan


def accuracy(first: Sequence[Sequence[bool]]) -> float:
    """The share of the targets' tokens that the model puts first, each after the prompt and the tokens before it: the mean over
    tokens, then over prompts; nan without prompts. `scoring.Score.first` says which are."""
    return _mean([_mean([float(each) for each in target]) for target in first])


def exact_match(text: str, target: str) -> float:
    """Whether a generated text (without its prompt) begins with the target, case and leading white space aside, as whole words
    where the script sets them apart."""
    said, wanted = folded(text.lstrip()), folded(target.strip())
    follows = said[len(wanted) : len(wanted) + 1]
    goes_on = follows.isalnum() and not is_spaceless(follows) and not is_spaceless(wanted[-1])
    return float(said.startswith(wanted) and not goes_on)


def table(rows: Sequence[dict[str, float]], seed: int = 0) -> dict[str, Mean]:
    """Mean and interval over facts of every number, shares as they are, and S where any fact has ES, PS and NS.

    Raises:
        ValueError: there are no rows, or they do not hold the same numbers.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("a table needs one or more rows that hold the same numbers.")
    values, names = np.array([list(row.values()) for row in rows], float), list(rows[0])
    values[~np.isfinite(values)] = np.nan
    found = dict(zip(names, summaries(values, [metric(name).support for name in names], seed), strict=True))
    if all(name in found and found[name].n for name in SUCCESSES):
        found["S"] = statistic(values[:, [names.index(name) for name in SUCCESSES]], harmonic, seed)
    return found


def differences(
    first: Sequence[dict[str, float]], second: Sequence[dict[str, float]], seed: int = 0
) -> dict[str, Paired]:
    """Second less first of every number that both have, and of S, over the same facts in the same order; facts that lack a number in
    one of the two are left out of it. With several comparisons, correct their p (`statistics.holm`).

    Raises:
        ValueError: there are no rows, or not as many of the one as of the other.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"pairs need one or more rows of each; found {len(first)} and {len(second)}.")
    names = [name for name in second[0] if name in first[0]]
    a, b = (np.array([[row[name] for name in names] for row in rows], float) for rows in (first, second))
    for values in (a, b):
        values[~np.isfinite(values)] = np.nan
    found = dict(zip(names, compared(a, b, [metric(name).support for name in names], seed), strict=True))
    if all(name in found and found[name].difference.n for name in SUCCESSES):
        own = [names.index(name) for name in SUCCESSES]
        found["S"] = compared_statistic(a[:, own], b[:, own], harmonic, seed)
    return found


def metric(name: str) -> Metric:
    """What a number is; of a benchmark from outside it is shown as it is."""
    return METRICS.get(name) or Metric(name, "", "", "", None)


def described() -> str:
    """`METRICS` as a table in Markdown."""
    lines = ["| name | unit in tables | better | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| {each.name} | {each.unit} | {each.better} | {each.meaning.replace('|', chr(92) + '|')} |" for each in METRICS.values()]  # fmt: skip
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
