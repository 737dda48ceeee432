"""What becomes of a batch of a sequence, sorted out before anything is computed: what is written, what goes out, and what is not written and why.

Two facts are about the same where subject and relation (or, without one, the template) are equal, or the whole prompt. With other targets they
contradict each other: the later wins, or it is refused (`conflicts`). A fact that repeats a standing one of the same target takes its place,
unless the model says it already: then the standing one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mechedit.facts import Fact
from mechedit.runs.sequence import Entry, Sequence
from mechedit.settings import SequenceSettings

__all__ = ["SAID", "Plan", "noted", "parts", "plain", "planned"]

SAID = "the model says it already"
REFUSED = "it contradicts an earlier edit of the sequence, which stays (conflicts = refuse)"


@dataclass(frozen=True)
class Plan:
    """What becomes of a batch: facts to write, those of earlier rows that are written again with them, and why others are not."""

    chosen: Mapping[int, Fact] = field(default_factory=dict)  # by the place in the batch
    again: Mapping[int, Fact] = field(default_factory=dict)  # by the number in the sequence
    rows: tuple[int, ...] = ()  # that go out
    gone: Mapping[int, str] = field(default_factory=dict)  # entries that nothing stands for any more
    why: Mapping[int, str] = field(default_factory=dict)  # places in the batch that are not written
    conflicts: int = 0
    repeats: Set[int] = frozenset()  # places whose fact stands already, with the same target

    @property
    def wanted(self) -> list[Fact]:
        """What is to be written."""
        return [*self.again.values(), *self.chosen.values()]


def planned(
    sequence: Sequence,
    facts: Several[Fact],
    how: SequenceSettings,
    unfit: Callable[[Fact], str],
    said: Set[int] = frozenset(),
) -> Plan:
    """The plan of a batch. `unfit` is why a fact can be edited on no model of this kind, empty where it can; `said` are places of repeats that the
    model says already."""
    standing, start = sequence.standing, len(sequence.entries)
    first = {name: index for index, entry in standing.items() for name in entry.about}
    holders, repeats, conflicts = dict(first), set[int](), 0  # by what a fact is about, the number of who holds it
    why: dict[int, str] = {}
    gone: dict[int, str] = {}
    entries = [Entry(plain(fact), 0, -1) for fact in facts]

    def target(number: int) -> str:
        return str((standing[number] if number < start else entries[number - start]).fact["target_new"])

    for place, entry in enumerate(entries):
        if reason := unfit(facts[place]):
            why[place] = reason
            continue
        number = start + place
        before = {holders[name] for name in entry.about if name in holders}
        if any(target(each) != entry.fact["target_new"] for each in before):
            conflicts += 1
            if how.conflicts == "refuse":
                why[place] = REFUSED
                continue
        for each in before:
            if each < start:
                gone[each] = f"edit {number} is about the same"
            else:
                why[each - start] = f"edit {number}, of the same batch, is about the same"
        twin = next((first[name] for name in entry.about if name in first and target(first[name]) == entry.fact["target_new"]), None)  # fmt: skip
        if twin is not None and place in said:
            gone.pop(twin, None)
            why[place], number = SAID, twin
        elif twin is not None:
            repeats.add(place)
        holders = {name: each for name, each in holders.items() if each not in before} if before else holders
        holders |= dict.fromkeys([*entry.about, *(standing[number].about if number < start else ())], number)
    chosen = {place: fact for place, fact in enumerate(facts) if place not in why}
    rows, again = _shared(sequence, chosen, gone, how) if sequence.sums is not None else ((), {})
    return Plan(chosen, again, rows, gone, why, conflicts, repeats & chosen.keys())


def parts(sequence: Sequence, facts: Several[Fact], how: SequenceSettings) -> list[list[Fact]]:
    """The batch as it is written, one part after another: as one, or with each subject once in a part where its facts share no value."""
    if how.shared or sequence.sums is None:
        return [list(facts)]
    found: list[list[Fact]] = [[]]
    for fact in facts:
        if any(each.subject == fact.subject for each in found[-1]):
            found.append([])
        found[-1].append(fact)
    return found


def _shared(
    sequence: Sequence, chosen: Mapping[int, Fact], gone: Mapping[int, str], how: SequenceSettings
) -> tuple[tuple[int, ...], dict[int, Fact]]:
    """Rows that go out, and the facts of theirs that are written again."""
    subjects = {fact.subject for fact in chosen.values()} if how.shared else set()
    standing = sequence.standing
    rows = {standing[index].row for index in gone}
    rows |= {entry.row for entry in standing.values() if entry.fact["subject"] in subjects}
    again = {index: entry.as_fact for index, entry in standing.items() if entry.row in rows and index not in gone}
    return tuple(sorted(rows)), again


def noted(done: Sequence, facts: Several[Fact], plan: Plan, before: Sequence) -> Sequence:
    """The sequence with the entries of a batch, and those that it changed."""
    subjects = list(dict.fromkeys(fact.subject for fact in plan.wanted))
    exact = done.sums is not None
    row = {subject: before.made + (index if exact else 0) for index, subject in enumerate(subjects)}

    def now(index: int, entry: Entry) -> Entry:
        if index in plan.gone:
            return replace(entry, row=-1, why=plan.gone[index])
        if index in plan.again:
            batch = entry.batch if entry.row >= 0 else before.batches
            return replace(entry, row=row[entry.fact["subject"]], why="", batch=batch)
        return entry

    entries = [now(index, entry) for index, entry in enumerate(before.entries)] if plan.gone or plan.again else before.entries  # fmt: skip
    new = [
        Entry(plain(fact), before.batches, row[fact.subject] if place in plan.chosen else -1, plan.why.get(place, ""))
        for place, fact in enumerate(facts)
    ]
    return replace(
        done,
        entries=(*entries, *new),
        batches=before.batches + 1,
        made=before.made + (len(subjects) if exact else int(bool(subjects))),
        conflicts=before.conflicts + plan.conflicts,
    )


def plain(fact: Fact) -> dict[str, Any]:
    """The fact as JSON values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(fact).items()}
