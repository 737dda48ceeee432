"""Looks at a model's health in the middle of a sequence of edits, at a cost that does not grow with them.

    success     share of earlier edits, sampled, whose new target is still more probable than the true one; `row` has each of them. Facts without a
                true target are left out, and so are neighbours without an answer
    others      share of facts never edited (neighbours of edited ones, sampled) whose own answer is more probable than the new target
    perplexity_ratio, next_token_kl, next_token_same, weight_norm_ratio     of held-out text, as `benchmarks.health` has them
    change      |W - W0| / |W0| of the edited weights together
    spectrum    largest singular value of W over that of W0, of the weight where that is most; `singular` has the three largest of both

A look scores at most 4 times `sampled` (prompt, target) pairs and 256 tokens of text, and takes the singular values of what is edited.
The sampled edits are those whose numbers come first by their binary digits read backwards: all multiples of a power of two, and of the next lower
one as many as there is room for. So later looks go on with edits that earlier ones saw, whichever do not stand any more.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import cache, scoring, weights
from mechedit.benchmarks.health import Unedited, health
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs.sequence import Sequence, written
from mechedit.settings import SequenceSettings

__all__ = ["look", "out_of_bands", "sampled"]

SINGULAR = 3


def sampled(numbers: list[int], most: int) -> list[int]:
    """At most so many of them, evenly apart: those first by their binary digits read backwards, in the order of the numbers."""
    return sorted(sorted(numbers, key=lambda number: int(f"{number:064b}"[::-1], 2))[:most])


def look(
    model: HookedModel, sequence: Sequence, healthy: Unedited, how: SequenceSettings, *, bos: bool
) -> dict[str, Any]:
    """The numbers above as JSON values, of the model without edits given, with the sequence written for as long as it takes."""
    standing = sequence.standing
    chosen = sampled([index for index, entry in standing.items() if entry.fact["target_true"] is not None], how.sampled)
    compared = [standing[index].as_fact for index in chosen]
    facts = [standing[index].as_fact for index in sampled(list(standing), how.sampled)]
    asked = {entry.as_fact.prompt for entry in standing.values()}
    found: dict[str, Any] = {"edits": len(sequence.entries), "standing": len(standing)}
    with written(model, sequence):
        rows = [(fact.prompt, str(fact.target_new), str(fact.target_true), fact.join) for fact in compared]
        held = _compared(model, rows, bos)
        kept = _compared(model, _others(facts, asked, how.sampled), bos)
        found |= health(model, healthy)
    found |= {"success": _share(held), "others": _share(kept), "row": dict(zip(map(str, chosen), held, strict=True))}
    found = cache.plain(found | _of_weights(model, sequence))
    return found | {"out": out_of_bands(found, how)}


def _others(facts: list[Fact], asked: set[str], most: int) -> list[tuple[str, str, str, str]]:
    """Neighbours' prompts that no edit is of, each with its own answer and the target that it must stay above: one a fact in turn."""
    found: dict[str, tuple[str, str, str, str]] = {}
    for place in range(max((len(fact.neighbours) for fact in facts), default=0)):
        for fact in facts:
            if len(found) < most and place < len(fact.neighbours) and fact.neighbours[place] not in asked:
                prompt, answer = fact.neighbourhood[place]
                if answer is not None:
                    found.setdefault(prompt, (prompt, answer, str(fact.target_new), fact.join))
    return list(found.values())


def _compared(model: HookedModel, rows: list[tuple[str, str, str, str]], bos: bool) -> list[bool]:
    """Whether the first target of each is more probable, by the mean over its tokens, than the second."""
    pairs = [(prompt, target, join) for prompt, *targets, join in rows for target in targets]
    scores = scoring.score(model, pairs, prepend_bos=bos) if pairs else []
    return [one.mean_log_p > other.mean_log_p for one, other in zip(scores[::2], scores[1::2], strict=True)]


def _share(found: list[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def _of_weights(model: HookedModel, sequence: Sequence) -> dict[str, Any]:
    """Sizes of the change and of singular values, before and after."""
    changed = before = 0.0
    ratios, singular = [1.0], {}
    for weight, total in sequence.totals.items():
        W = weights.as_matrix(weight, weights.value(model, weight)).detach().cpu().double()
        changed, before = changed + float(total.square().sum()), before + float(W.square().sum())
        was, now = _largest(W), _largest(W + total)
        ratios += [now[0] / was[0]] if was[0] else []  # biases may be zeros
        singular[f"{weight.layer}.{weight.name}"] = [was, now]
    size = (changed / before) ** 0.5 if before else 0.0
    return {"change": size, "spectrum": max(ratios), "singular": singular}


def _largest(W: Float[Tensor, "rows columns"]) -> list[float]:
    smaller = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
    return [max(value, 0.0) ** 0.5 for value in torch.linalg.eigvalsh(smaller).flip(0)[:SINGULAR].tolist()]


def out_of_bands(found: dict[str, Any], how: SequenceSettings) -> list[str]:
    """Which measures are outside of their bands, and by what; None is a number that is not finite."""
    least = {"success": how.least_success, "others": how.least_others}
    most = {"perplexity_ratio": how.most_perplexity, "next_token_kl": how.most_kl, "spectrum": how.most_spectrum}
    low = [f"{name} {found[name]:.3g} below {edge:g}" for name, edge in least.items() if found[name] is not None and found[name] < edge]  # fmt: skip
    own = {name: inf if found[name] is None else found[name] for name in most}
    high = [f"{name} {own[name]:.3g} above {edge:g}" for name, edge in most.items() if not own[name] <= edge]
    return low + high
