"""zsRE in the form of MEND: question answering, scored by the tokens that the model puts first (Meng et al. 2022, section 3.2).

As published, a score is the share of the answer's tokens that are the most probable ones, teacher-forced, and specificity is
agreement with the gold answer of an unrelated question, not with the model before the edit. The published code encodes one
decoded token at a time; here an answer is tokenised once, as it stands behind its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechedit import sources
from mechedit.benchmarks.benchmark import Measured, Said
from mechedit.benchmarks.metrics import accuracy
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.scoring import score
from mechedit.sources import Question

__all__ = ["ZSRE", "Question", "Zsre", "measured", "scores"]


def scores(
    model: HookedModel, questions: Sequence[Question], *, prepend_bos: bool | None = None
) -> list[dict[str, float]]:
    """Efficacy, paraphrase and specificity of each question, 0 to 1, and `p_new`, P of the whole new answer.

    Raises:
        FactError: a fact has no new target, or does not fit the context.
    """
    return [each.scores for each in measured(model, questions, prepend_bos=prepend_bos)]


def measured(model: HookedModel, questions: Sequence[Question], *, prepend_bos: bool | None = None) -> list[Measured]:
    """`scores`, with the log-probabilities of the answers after every prompt; errors as there."""
    pairs: list[tuple[str, ...]] = []
    for question in questions:
        fact = question.fact
        if fact.target_new is None:
            raise FactError(f"zsRE scores a new answer; the fact about {fact.subject!r} has no target_new.")
        pairs += [(prompt, fact.target_new, fact.join) for prompt in (fact.prompt, *fact.paraphrases)]
        pairs.append((question.unrelated, question.answer, fact.join))
    found = score(model, pairs, prepend_bos=prepend_bos)
    rows, at = [], 0
    for question in questions:
        own = found[at : at + 2 + len(question.fact.paraphrases)]
        at += len(own)
        first = [each.first for each in own]
        numbers = {
            "efficacy": accuracy(first[:1]),
            "paraphrase": accuracy(first[1:-1]),
            "specificity": accuracy(first[-1:]),
            "p_new": own[0].p,
        }
        said = zip(
            ["prompt", *["paraphrase"] * (len(own) - 2), "unrelated"], pairs[at - len(own) : at], own, strict=True
        )
        rows.append(
            Measured(
                numbers,
                tuple(Said(kind, prompt, target, one.log_p, one.first) for kind, (prompt, target, *_), one in said),
            )
        )
    return rows


class Zsre:
    """zsRE as a benchmark: its records are questions."""

    name = "zsre"

    def read(self, source: str | Path) -> Sequence[Question]:
        """The questions of a file, or of the organism's world."""
        return sources.questions(source)

    def takes(self, record: Any) -> bool:
        """Whether it is a question."""
        return isinstance(record, Question)

    def fact(self, record: Question) -> Fact:
        """The fact to write; its neighbour is the unrelated question, at which drift is measured."""
        return replace(record.fact, neighbours=(record.unrelated,), neighbour_answers=(record.answer,))

    def lacks(self, record: Question) -> str:
        """A new answer that is not there."""
        return "" if record.fact.target_new is not None else "a new answer"

    def named(self, record: Question, name: str) -> Question:
        """The question with another id."""
        return replace(record, fact=replace(record.fact, id=name))

    def scores(
        self, model: HookedModel, records: Sequence[Question], *, prepend_bos: bool | None = None
    ) -> list[dict[str, float]]:
        """`scores` of this module."""
        return scores(model, records, prepend_bos=prepend_bos)

    def measured(
        self, model: HookedModel, records: Sequence[Question], *, prepend_bos: bool | None = None
    ) -> list[Measured]:
        """`measured` of this module."""
        return measured(model, records, prepend_bos=prepend_bos)


ZSRE = Zsre()
