"""Go on with a sequence of edits: batch after batch, each found on the model with those before it, kept as it grows.

Facts about one subject share one value (MEMIT-Merge, arXiv 2502.07322): when another comes, the row of the earlier ones is taken out, and one value
is found that answers them all. Of facts that contradict each other (`runs.planning`) the later wins, and the earlier one's key goes out first;
or it is refused. What cannot be edited is left out, and says why. All of it holds for exact editors; with the others
the later fact is written over the earlier. With `sequential` what the model does not say after a batch is learnt again (`runs.rehearsing`), and all
values are found anew together as the run grows (`runs.settling`).

The folder has `state.safetensors`, `good.safetensors` (as it was at the last due look without a measure out of its band) and `looks.json`. A
run that was killed goes on from the state, and ends bit for bit as one that was not. So does one that ended with fewer facts, where `together`
divides their number: a look that was taken only because it ended is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from collections.abc import Sequence as Several
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mechedit import cache, editing, prompts
from mechedit.benchmarks.health import unedited
from mechedit.changes import Dense, by_weight, total
from mechedit.closed_form import Metric
from mechedit.editing import Editor, Prepared
from mechedit.editors import named
from mechedit.editors.aims import by_subject
from mechedit.editors.earlier import latest
from mechedit.edits import Edit, EditError
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs import rehearsing, settling
from mechedit.runs.editing import attempt
from mechedit.runs.planning import SAID, Plan, noted, parts, planned
from mechedit.runs.sequence import (
    TAKEN_OUT,
    Row,
    Sequence,
    SequenceError,
    begin,
    check_of,
    editor_of,
    load,
    parts_of,
    returned,
    reverted,
    save,
    solved,
    without,
    written,
)  # fmt: skip
from mechedit.runs.store import check_plain
from mechedit.runs.watching import look, out_of_bands
from mechedit.settings import SequenceSettings, from_json

__all__ = ["extend", "run_sequence", "take_out"]

STATE, GOOD = "state.safetensors", "good.safetensors"
ENDED = "ended"  # of a look that was taken only because the run ended, and goes when it goes on


def run_sequence(
    model: HookedModel,
    facts: Several[Fact],
    folder: str | Path,
    how: SequenceSettings | None = None,
    editor: str | Editor = "sequential",
    settings: Any = None,
    prepared: Prepared | None = None,
    *,
    progress: Progress = silent,
) -> Sequence:
    """The sequence of all facts, kept in `folder`, from where it is. The model is left as it is.

    Raises:
        SequenceError: the folder has a sequence of another model, other settings or other facts.
        EditError: what was prepared does not belong to the model or the settings.
        FileError: its state was cut off or changed.
    """
    folder, how = Path(folder), how or SequenceSettings()
    cache.check_writable(folder / STATE)
    check_plain(model)
    editor = named(editor)
    settings = editor.resolve(model, settings)
    if prepared is None:
        prepared = editing.make_ready(model, editor, settings, progress=progress)
    editor.check(model, (), settings, prepared)
    sequence = begin(model, editor, settings, prepared, how)
    if (place := folder / STATE).exists():
        found = load(place)
        check_of(model, found, sequence)
        _check_facts(found, facts)
        sequence = found
    else:
        (folder / GOOD).unlink(missing_ok=True)  # of a run whose state is gone
    return extend(model, sequence, facts[len(sequence.entries) :], how, editor, settings, prepared, folder=folder, progress=progress)  # fmt: skip


def _check_facts(sequence: Sequence, facts: Several[Fact]) -> None:
    for index, (entry, fact) in enumerate(zip(sequence.entries, facts, strict=False)):
        if entry.fact["subject"] != fact.subject or entry.as_fact != fact:
            raise SequenceError(
                f"the folder's sequence has {entry.as_fact.prompt!r} as edit {index}, and this run {fact.prompt!r}; give the facts that it was "
                "begun with, more behind them, or another folder."
            )
    if len(facts) < len(sequence.entries):
        raise SequenceError(
            f"the folder's sequence has {len(sequence.entries)} facts already, and this run {len(facts)}; give them all, or another folder."
        )


def extend(
    model: HookedModel,
    sequence: Sequence,
    facts: Several[Fact],
    how: SequenceSettings,
    editor: Editor,
    settings: Any,
    prepared: Any,
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Sequence:
    """The sequence with these facts behind it, for settings as `resolve` gives them, on the model without edits."""
    writer = _Writer(model, editor, settings, prepared, how)
    bos = prompts.resolve_bos(model, settings.prepend_bos)
    healthy = unedited(model, prepend_bos=bos)
    if sequence.waiting:
        sequence = _kept(writer.restored(sequence), folder, STATE)
    if looks := sequence.looks:  # the last is judged by the bands of now
        sequence = replace(sequence, looks=(*looks[:-1], looks[-1] | {"out": out_of_bands(looks[-1], how)}))
        if sequence.looks[-1]["out"] and how.on_collapse != "go on":
            return sequence
    saved, good = len(sequence.entries), sequence
    if facts:
        looks = tuple(each for each in sequence.looks if not each.get(ENDED) and each["edits"] <= saved)
        sequence = replace(sequence, looks=looks)
    whole = sequence  # behind its last batch, settled and looked at where that was due
    try:
        for first in range(0, len(facts), how.together):
            progress("editing in sequence", first, len(facts))
            before, last = len(sequence.entries), first + how.together >= len(facts)
            for part in parts(sequence, facts[first : first + how.together], how):
                sequence = writer.batch(sequence, part)
            n = len(sequence.entries)
            if settling.is_due(before, n, how.settle):
                sequence = writer.settled(sequence, progress)
            due = bool(how.every) and n // how.every > before // how.every
            if last or due:
                seen = look(model, sequence, healthy, how, bos=bos) | ({} if due else {ENDED: True})
                sequence = replace(sequence, looks=(*sequence.looks, seen))
                if seen["out"] and how.on_collapse == "roll back":
                    back = good if folder is None else _good(model, sequence, folder, before)
                    sequence = replace(back, looks=sequence.looks)
                elif due and not seen["out"]:
                    good = _kept(sequence, folder, GOOD)
                last = last or bool(seen["out"] and how.on_collapse != "go on")
            if last or n - saved >= how.keep:
                _kept(sequence, folder, STATE)
                saved = n
            whole = sequence
            if last:
                break
    except BaseException:  # nothing that is finished is lost
        if len(whole.entries) > saved:
            _kept(whole, folder, STATE)
        raise
    progress("editing in sequence", len(facts), len(facts))
    return sequence


def _good(model: HookedModel, sequence: Sequence, folder: Path, most: int) -> Sequence:
    """What a sequence rolls back to: as it was at the last due look at which all was well, of at most so many facts; or before any edit, where
    the folder has none of this run."""
    if not (folder / GOOD).exists():
        return sequence.empty
    found = load(folder / GOOD)
    try:
        check_of(model, found, sequence)
    except SequenceError:
        return sequence.empty
    pairs = [*zip(found.entries, sequence.entries, strict=False)]
    is_its = all(own.fact == entry.fact and not (own.row >= 0 and entry.why == TAKEN_OUT) for own, entry in pairs)
    return found if is_its and len(found.entries) <= min(most, len(sequence.entries)) else sequence.empty


def take_out(
    model: HookedModel,
    numbers: Several[int],
    folder: str | Path,
    how: SequenceSettings | None = None,
    prepared: Prepared | None = None,
) -> Sequence:
    """The sequence kept in `folder` without these edits (a fact's number, from 0), with a look at it, kept in its place. The model, as it was
    before any edit, is left so. Facts that shared a value with them are written again. They go out of what a run rolls back to as well. An edit
    for which nothing stands any more is passed over. `prepared` is what the run was given.

    Raises:
        SequenceError: no such edit, edits of another model, of other settings, or of an editor that can take none out.
        FileError: there is no state, or it was cut off or changed.
    """
    folder = Path(folder)
    check_plain(model)
    sequence = load(folder / STATE)
    how = how or from_json(SequenceSettings, sequence.how)
    editor = editor_of(sequence)
    settings = from_json(editor.settings, sequence.settings)
    if prepared is None:
        prepared = editing.make_ready(model, editor, settings)
    check_of(model, sequence, begin(model, editor, settings, prepared, how))
    writer = _Writer(model, editor, settings, prepared, how)
    good = _good(model, sequence, folder, len(sequence.entries))
    sequence = writer.parted(sequence, numbers)
    bos = prompts.resolve_bos(model, settings.prepend_bos)
    seen = look(model, sequence, unedited(model, prepend_bos=bos), how, bos=bos)
    sequence = replace(sequence, looks=(*sequence.looks, seen))
    if not seen["out"]:
        good = sequence
    elif good.entries:
        good = writer.parted(good, [each for each in numbers if each < len(good.entries)])
    if good.entries:
        _kept(good, folder, GOOD)
    return _kept(sequence, folder, STATE)


def _kept(sequence: Sequence, folder: Path | None, name: str) -> Sequence:
    """The same, written where there is a folder, with what its looks found for people and plots."""
    if folder is not None:
        save(sequence, folder / name)
        with cache.atomic_write(folder / "looks.json") as temporary:
            temporary.write_text(json.dumps(cache.plain(list(sequence.looks)), indent=1) + "\n")
    return sequence


@dataclass(frozen=True)
class _Writer:
    """Who writes a batch."""

    model: HookedModel
    editor: Editor
    settings: Any
    prepared: Any
    how: SequenceSettings

    @property
    def metric(self) -> Metric:
        """That of exact editors, whose costly work is done once."""
        return latest(self.prepared, self.settings)

    def batch(
        self, sequence: Sequence, facts: Several[Fact], said: Set[int] = frozenset(), why: Mapping[Fact, str] = MappingProxyType({})
    ) -> Sequence:  # fmt: skip
        """The sequence with a batch behind it; as it was, with the reason, where the batch cannot be written. `said` are places of repeats that
        were found to be said already, and `why` has facts that were found to be such as cannot be edited."""
        plan = planned(sequence, facts, self.how, lambda fact: why.get(fact) or self.unfit(fact), said)
        base = without(self.model, sequence, plan.rows, self.metric) if plan.rows else sequence
        if len(facts) > 1 or plan.rows:
            with self.on(base):
                plan = self.unsaid(plan)
        if kept := {place for place in plan.repeats if plan.why.get(place) == SAID}:  # what they repeat stays
            return self.batch(sequence, facts, said | kept, why)
        if not plan.wanted:
            return noted(base, facts, plan, sequence)
        edit = self.sought(base, plan)
        if edit.is_empty and (unfit := self.hopeless(base, plan)):
            return self.batch(sequence, facts, said, {**why, **unfit})
        if edit.is_empty:
            reasons = {**plan.why, **dict.fromkeys(plan.chosen, "; ".join(edit.reasons))}
            return noted(sequence, facts, Plan(why=reasons, conflicts=plan.conflicts), sequence)
        return self.mended(noted(self.added(base, edit, plan.wanted), facts, plan, sequence))

    def hopeless(self, base: Sequence, plan: Plan) -> dict[Fact, str]:
        """Of several facts that cannot be edited together, why some cannot be even with those alone that they share a value with."""
        found: dict[Fact, str] = {}
        for place, fact in plan.chosen.items() if len(plan.chosen) > 1 else ():
            again = {index: each for index, each in plan.again.items() if each.subject == fact.subject}
            edit = self.sought(base, Plan({place: fact}, again))
            if edit.is_empty:
                found[fact] = "; ".join(edit.reasons)
        return found

    def restored(self, sequence: Sequence) -> Sequence:
        """The sequence with the facts that wait written again, those of one subject at a time; what cannot be says why."""
        for subject in dict.fromkeys(entry.fact["subject"] for entry in sequence.waiting.values()):
            own = {index: entry for index, entry in sequence.waiting.items() if entry.fact["subject"] == subject}
            plan = Plan(again={index: entry.as_fact for index, entry in own.items()})
            edit = self.sought(sequence, plan)
            if edit.is_empty:
                why = "; ".join(edit.reasons)
                entries = [replace(entry, why=why) if index in own else entry for index, entry in enumerate(sequence.entries)]  # fmt: skip
                sequence = replace(sequence, entries=tuple(entries))
            else:
                sequence = self.mended(noted(self.added(sequence, edit, plan.wanted), (), plan, sequence))
        return sequence

    def parted(self, sequence: Sequence, numbers: Several[int]) -> Sequence:
        """The sequence without these edits, the facts that shared a value with them written again."""
        for number in numbers:
            known = 0 <= number < len(sequence.entries)
            if not known or number in sequence.standing or number in sequence.waiting:
                sequence = reverted(self.model, sequence, number, self.prepared)
        return self.restored(sequence)

    def apart(self, base: Sequence) -> bool:
        """Whether values are sought on the model without edits."""
        return base.sums is not None and self.how.sought == "unedited"

    def on(self, base: Sequence) -> AbstractContextManager[None]:
        """The model as values are sought on it."""
        return nullcontext() if self.apart(base) else written(self.model, base)

    def sought(self, base: Sequence, plan: Plan) -> Edit:
        """The edit of what a plan wants, on what stands."""
        settings = replace(self.settings, strengthen=True) if plan.again else self.settings
        rows = len(base.rows) + len(by_subject(plan.wanted))
        settings = rehearsing.gently(self.model, settings, self.how, rows)
        with self.on(base):
            edit = attempt(self.model, plan.wanted, self.editor, settings, self.prepared, {} if self.apart(base) else base.earlier)  # fmt: skip
        if edit.told:
            raise SequenceError(f"a sequence is of changes of weights, and an edit by {self.editor.name} tells the model a text; choose another editor.")  # fmt: skip
        return edit

    def mended(self, sequence: Sequence) -> Sequence:
        """The sequence with what the model does not say, of the last batch and of earlier facts that are drawn, learnt again, `rounds` times
        at most."""
        if not rehearsing.is_gentle(self.settings, self.how) or sequence.sums is None:
            return sequence
        left: set[int] = set()  # rows that cannot be learnt again
        for turn in range(self.how.rounds):
            lost = rehearsing.lost(self.model, sequence, self.settings, self.how, turn, left)
            if not lost:
                break
            edit = self.learnt(sequence, lost)
            if edit.is_empty and len(lost) > 1:
                able = {row: own for row, own in lost.items() if not self.learnt(sequence, {row: own}).is_empty}
                left |= lost.keys() - able.keys()
                lost, edit = able, self.learnt(sequence, able)
            if edit.is_empty:
                left |= lost.keys()
                continue
            sequence = rehearsing.raised(sequence, list(lost), rehearsing.forces(edit) / self.settings.b, self.metric)
        return sequence

    def settled(self, sequence: Sequence, progress: Progress) -> Sequence:
        """The sequence with all values found anew together, and then what the model does not say learnt again, as after a batch."""
        if sequence.sums is None:
            return sequence
        found = settling.settled(self.model, sequence, self.settings, self.how, self.prepared, self.metric, progress=progress)  # fmt: skip
        return sequence if found is sequence else self.mended(found)

    def learnt(self, sequence: Sequence, lost: Mapping[int, list[Fact]]) -> Edit:
        """The edit of the facts of rows that stand, sought from where the model is."""
        settings = replace(self.settings, strengthen=True)
        settings = rehearsing.gently(self.model, settings, self.how, len(sequence.rows))
        facts = [fact for own in lost.values() for fact in own]
        with written(self.model, sequence):
            return attempt(self.model, facts, self.editor, settings, self.prepared, sequence.earlier)

    def unfit(self, fact: Fact) -> str:
        """Why a fact can be edited on no model of this kind; empty where it can."""
        try:
            editing.check_facts(self.model, (fact,), self.settings)
            self.editor.check(self.model, (fact,), self.settings, None)
        except (EditError, FactError) as error:
            return str(error)
        return ""

    def unsaid(self, plan: Plan) -> Plan:
        """The plan without facts that the model, as it is now, says already."""
        if self.settings.strengthen:
            return plan
        says = rehearsing.says(self.model, list(plan.chosen.values()), self.settings) if plan.chosen else []
        said = [place for place, is_said in zip(plan.chosen, says, strict=True) if is_said]
        chosen = {place: fact for place, fact in plan.chosen.items() if place not in said}
        return replace(plan, chosen=chosen, why={**plan.why, **dict.fromkeys(said, SAID)})

    def added(self, base: Sequence, edit: Edit, wanted: Several[Fact]) -> Sequence:
        """The sequence with what the edit wrote: rows of exact editors; sums of changes of others."""
        if base.sums is None:
            more = [Dense(weight, each) for weight, each in base.totals.items()]
            totals = {weight: total(own) for weight, own in by_weight([*more, *edit.changes]).items()}
            return replace(
                base, totals=totals, state=self.editor.joined(base.state, edit.state, self.settings, self.prepared)
            )
        n = len(dict.fromkeys(fact.subject for fact in wanted))
        keys, values = (edit.vectors[name].reshape(n, -1) for name in ("k*", "v*"))
        if self.how.sought == "current":  # the targets of which what the edit wrote is the least-squares solution
            now = returned(self.model, base, keys) + keys.double() @ total(edit.changes)
            values = (now + rehearsing.forces(edit) / self.settings.b).float()
        new = [Row(key.clone(), value.clone()) for key, value in zip(keys, values, strict=True)]
        sums = base.sums.plus(*parts_of(self.model, self.settings.layer, new))
        rows = dict(base.rows) | {base.made + index: row for index, row in enumerate(new)}
        return solved(replace(base, rows=rows), sums, self.metric, keys)
