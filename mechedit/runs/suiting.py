"""How hard an editor pushes, chosen at each place before places are compared.

ROME's clamp is in lengths of the layer's own value, and what a layer's value is long for is that layer's: with one clamp for all, a
comparison of layers measures the clamp. So the editor's strength (`Editor.strength`) is chosen at each place, by S on facts that the
choice is not used for: every second fact is scored with what suits the others best. Ties go to the gentler edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mechedit.benchmarks.metrics import worth

__all__ = ["Rows", "suited", "tried"]

Rows = Mapping[int, Mapping[str, float]]
"""Scores by fact."""


def tried(facts: Sequence[int], n: int) -> tuple[list[int], list[int]]:
    """For every second fact, and for the others: on which facts the choice is made, `n` at most. A fact alone has none but itself."""
    halves = [list(facts[0::2]), list(facts[1::2])]
    return (halves[1] or halves[0])[:n], halves[0][:n]


def suited(
    facts: Sequence[int], n: int, values: Sequence[float], score: Callable[[float, Sequence[int]], Rows]
) -> tuple[dict[int, Mapping[str, float]], dict[int, float]]:
    """The scores of each fact with the value that suits the other half, and that value; `score` gives those of some facts with a value."""
    on = tried(facts, n)
    every = sorted({*on[0], *on[1]}, key=list(facts).index)
    trials = {value: score(value, every) for value in values}
    scores: dict[int, Mapping[str, float]] = {}
    chosen: dict[int, float] = {}
    for half, own in enumerate(on):
        best = max(sorted(values), key=lambda value: worth([trials[value][fact] for fact in own]))
        these = list(facts[half::2])
        scores |= dict(score(best, these)) if these else {}
        chosen |= dict.fromkeys(these, best)
    return scores, chosen
