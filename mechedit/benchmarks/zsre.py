"""zsRE in the form of MEND: question answering, scored by the tokens that the model puts first (Meng et al. 2022, section 3.2).

As published, a score is the share of the answer's tokens that are the most probable ones, teacher-forced, and specificity is
agreement with the gold answer of an unrelated question, not with the model before the edit. The published code encodes one
decoded token at a time; here an answer is tokenised once, as it stands behind its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechedit import facts, records
from mechedit.benchmarks.metrics import accuracy
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.records import Part
from mechedit.scoring import score

__all__ = ["Question", "named", "read", "scores"]


@dataclass(frozen=True)
class Question:
    """A fact to write, with its paraphrases, and an unrelated question with its gold answer."""

    fact: Fact
    unrelated: str
    answer: str


def named(name: str | Path) -> tuple[Question, ...]:
    """The questions of the organism's world (`organism`), or of a file.

    Raises:
        FactError: as in `read`; the built-in facts have no unrelated questions.
    """
    if name == "built-in":
        raise FactError("the built-in facts are no zsRE questions; give a zsRE file, or `organism`.")
    if name != "organism":
        return read(name)
    from mechedit.organism.world import make

    return records.make(make().zsre(), _question, "the organism's world")


def read(path: str | Path) -> tuple[Question, ...]:
    """The records of a zsRE file that can be edited: the question names its subject once, and the new answer is new.

    Raises:
        FactError: the file is missing, is no such file, or records have mistakes; all of them are named.
    """
    found = records.load(path)
    if not any("loc_ans" in record for record in found if isinstance(record, dict)):
        raise FactError(f"{path} is no zsRE file: its records have no loc_ans.")
    return records.make(found, _question, path, "A zsRE record has subject, src, rephrase, alt, answers, loc and loc_ans.")  # fmt: skip


def _question(part: Part, index: int) -> Question | None:
    fact, unrelated, answer = facts.from_zsre(part, index), part.text("loc"), part.text("loc_ans")
    if fact is None or unrelated is None or answer is None:
        return None
    mark = "?" if fact.prompt.endswith("?") else ""  # the unrelated one is asked as the fact is
    return Question(fact, unrelated + mark, answer)


def scores(
    model: HookedModel, questions: Sequence[Question], *, prepend_bos: bool | None = None
) -> list[dict[str, float]]:
    """Efficacy, paraphrase and specificity of each question, 0 to 1, and `p_new`, P of the whole new answer.

    Raises:
        FactError: a fact has no new target, or does not fit the context.
    """
    pairs: list[tuple[str, str]] = []
    for question in questions:
        fact = question.fact
        if fact.target_new is None:
            raise FactError(f"zsRE scores a new answer; the fact about {fact.subject!r} has no target_new.")
        pairs += [(prompt, fact.target_new) for prompt in (fact.prompt, *fact.paraphrases)]
        pairs.append((question.unrelated, question.answer))
    found = score(model, pairs, prepend_bos=prepend_bos)
    rows, at = [], 0
    for question in questions:
        own = found[at : at + 2 + len(question.fact.paraphrases)]
        at += len(own)
        first = [each.first for each in own]
        rows.append(
            {
                "efficacy": accuracy(first[:1]),
                "paraphrase": accuracy(first[1:-1]),
                "specificity": accuracy(first[-1:]),
                "p_new": own[0].p,
            }
        )
    return rows
