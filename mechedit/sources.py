"""Facts, and zsRE's questions, by the name of where they come from: a set that ships, the organism's world, or a file.

facts.py            what a fact is, the built-in set, and files of facts
organism/world.py   the invented world, which is made of facts
sources.py          all of them by name, for the command line, benchmarks and experiments
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mechedit import facts, records, writing
from mechedit.facts import Fact, FactError
from mechedit.organism import world
from mechedit.records import Part
from mechedit.wording import meant

__all__ = ["SETS", "Question", "named", "questions"]


@dataclass(frozen=True)
class Question:
    """A fact to write, with its paraphrases, and an unrelated question with its gold answer: a record of zsRE."""

    fact: Fact
    unrelated: str
    answer: str


SETS = ("built-in", "organism")
"""Sets of facts that have a name."""


def named(name: str | Path, need: Sequence[str] = ()) -> tuple[Fact, ...]:
    """The set of facts of this name: `built-in`, `organism` (all that is true in the organism's world), or a file.

    Those of a file must have the fields named in `need`; the sets have all.

    Raises:
        FactError: as in `facts.read`.
    """
    if name == "organism":
        return world.make().facts
    if name != "built-in" and _is_missing(Path(name)):
        raise FactError(
            f"{name} is neither a file nor a set of facts, which are {' and '.join(SETS)}{meant(str(name), SETS)}."
        )
    return facts.built_in() if name == "built-in" else facts.read(name, need)


def _is_missing(path: Path) -> bool:
    try:
        return not path.exists()
    except OSError:  # it may be there, and reading it says what is the matter
        return False


def questions(name: str | Path) -> tuple[Question, ...]:
    """The questions of the organism's world (`organism`), or of a zsRE file in the form of MEND.

    Those that can be edited, that is: the question names its subject once, and the new answer is new.

    Raises:
        FactError: the file is missing, is no such file, or records have mistakes, which are all named; or it is the built-in
            facts, which have no unrelated questions.
    """
    if name == "built-in":
        raise FactError("the built-in facts are no zsRE questions; give a zsRE file, or `organism`.")
    if name == "organism":
        return _of_the_world()
    found = records.load(name)
    if not any("loc_ans" in record for record in found if isinstance(record, dict)):
        raise FactError(f"{name} is no zsRE file: its records have no loc_ans.")
    return records.make(found, _question, name, "A zsRE record has subject, src, rephrase, alt, answers, loc and loc_ans.")  # fmt: skip


@cache
def _of_the_world() -> tuple[Question, ...]:
    return records.make(world.make().zsre(), _question, "the organism's world")


def _question(part: Part, index: int) -> Question | None:
    fact, unrelated, answer = facts.from_zsre(part, index), part.text("loc"), part.text("loc_ans")
    if fact is None or unrelated is None or answer is None:
        return None
    mark = "?" if fact.prompt.rstrip().endswith("?") else ""  # the unrelated one is asked as the fact is
    unrelated = unrelated if fact.join == "none" else writing.ended(unrelated)
    return Question(fact, unrelated + mark * (not unrelated.rstrip().endswith("?")), answer.strip())
