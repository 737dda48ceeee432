"""COUNTERFACT's scores of facts (Meng et al. 2022, section 3.3), on a model as it is or as an edit left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechedit import sources
from mechedit.benchmarks.benchmark import Measured, Said
from mechedit.benchmarks.metrics import Pair, accuracy, rewrite_scores
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.scoring import score

__all__ = ["COUNTERFACT", "Counterfact", "measured", "scores"]


def scores(model: HookedModel, facts: Sequence[Fact], *, prepend_bos: bool | None = None) -> list[dict[str, float]]:
    """ES, EM, PS, PM, NS and NM of each fact, 0 to 1; rewrite_acc and rephrase_acc; and `p_new`, P of the whole new target.

    What they are is in `benchmarks.metrics`. All prompts of all facts ride in as few passes as `scoring.score` makes. A fact without paraphrases or neighbours has nan there.

    Raises:
        FactError: a fact has no new or no true target, or does not fit the context.
    """
    return [each.scores for each in measured(model, facts, prepend_bos=prepend_bos)]


def measured(model: HookedModel, facts: Sequence[Fact], *, prepend_bos: bool | None = None) -> list[Measured]:
    """`scores`, with the log-probabilities of both targets after every prompt; errors as there."""
    pairs: list[tuple[str, ...]] = []
    for fact in facts:
        if fact.target_new is None or fact.target_true is None:
            raise FactError(f"success compares a new and a true target; the fact about {fact.subject!r} lacks one.")
        asked = [(prompt, fact.target_true) for prompt in (fact.prompt, *fact.paraphrases)] + [*fact.neighbourhood]
        pairs += [(prompt, target, fact.join) for prompt, own in asked for target in (fact.target_new, str(own))]
    found = score(model, pairs, prepend_bos=prepend_bos)
    rows, at = [], 0
    for fact in facts:
        n = 1 + len(fact.paraphrases)
        own = found[at : at + 2 * (n + len(fact.neighbours))]
        at += len(own)
        each = [Pair(new.mean_log_p, true.mean_log_p) for new, true in zip(own[::2], own[1::2], strict=True)]
        first = [new.first for new in own[: 2 * n : 2]]
        as_elsewhere = {"rewrite_acc": accuracy(first[:1]), "rephrase_acc": accuracy(first[1:])}
        numbers = rewrite_scores(each[0], each[1:n], each[n:]) | as_elsewhere | {"p_new": own[0].p}
        kinds = ["prompt", *["paraphrase"] * (n - 1), *["neighbour"] * (len(each) - n)]
        said = zip((kind for kind in kinds for _ in range(2)), pairs[at - len(own) : at], own, strict=True)
        rows.append(
            Measured(
                numbers,
                tuple(Said(kind, prompt, target, one.log_p, one.first) for kind, (prompt, target, *_), one in said),
            )
        )
    return rows


class Counterfact:
    """COUNTERFACT as a benchmark: its records are facts."""

    name = "counterfact"

    def read(self, source: str | Path) -> Sequence[Fact]:
        """The facts of a file or a named set, each with both targets."""
        return sources.named(source, ("target_true", "target_new"))

    def takes(self, record: Any) -> bool:
        """Whether it is a fact."""
        return isinstance(record, Fact)

    def fact(self, record: Fact) -> Fact:
        """The record itself."""
        return record

    def lacks(self, record: Fact) -> str:
        """A target that is not there."""
        return (
            ""
            if record.target_new is not None and record.target_true is not None
            else "a new or a true target, and scores compare the two"
        )

    def named(self, record: Fact, name: str) -> Fact:
        """The fact with another id."""
        return replace(record, id=name)

    def scores(
        self, model: HookedModel, records: Sequence[Fact], *, prepend_bos: bool | None = None
    ) -> list[dict[str, float]]:
        """`scores` of this module."""
        return scores(model, records, prepend_bos=prepend_bos)

    def measured(
        self, model: HookedModel, records: Sequence[Fact], *, prepend_bos: bool | None = None
    ) -> list[Measured]:
        """`measured` of this module."""
        return measured(model, records, prepend_bos=prepend_bos)


COUNTERFACT = Counterfact()
