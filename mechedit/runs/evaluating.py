"""Edit each record of a benchmark and score it, into a folder, resumably.

The folder gets `edits/` and `scores/`, each a run of its own; what the unedited model scores is kept in the cache, once for a model,
and used by every editor. Independent edits and scores are computed by an engine; one edit of all records, and edits that depend on
each other, are computed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mechedit import applying, cache, editing, edits, prompts, provenance
from mechedit.benchmarks import benchmark as benchmarks
from mechedit.benchmarks.answers import Judge, judge_key
from mechedit.benchmarks.benchmark import Benchmark
from mechedit.benchmarks.health import Unedited, unedited
from mechedit.benchmarks.texts import References
from mechedit.editing import Editor, Prepared, State
from mechedit.editors import named
from mechedit.edits import Edit
from mechedit.facts import Fact, FactError
from mechedit.files import Blob
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs.checks import about, announce, check_generation, check_records, contradictions, doubts
from mechedit.runs.editing import Made, attempt, edit_facts, edit_store, making
from mechedit.runs.engines import Done, Engine, Local, told
from mechedit.runs.results import Evaluation
from mechedit.runs.scored import Measuring, Scored, lines, record_unit, rows, score_store
from mechedit.runs.store import Store, check_plain, claim, plan
from mechedit.settings import EvaluateSettings

__all__ = ["evaluate"]


def evaluate(
    model: HookedModel,
    records: Sequence[Any],
    folder: str | Path,
    settings: EvaluateSettings | None = None,
    editor: str | Editor | None = "rome",
    edit_settings: Any = None,
    prepared: Prepared | None = None,
    *,
    benchmark: str | Benchmark | None = None,
    references: References | None = None,
    judge: Judge | None = None,
    edits_in: str | Path | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Scores of every record before and after its edit. Everything finished is kept in `folder`; the model is left as it is.

    Without an editor the model is scored as it is. A record that cannot be edited, or whose edit is rolled back, is scored on the
    model as it was, and says why. `edits_in` is where edits are kept, if not in `folder`: a run of the same edits, `edit_facts`'
    say, is used as it is. `judge` says of a question, an answer and the answer wanted whether they agree, in place of the settings' rule; another judge's scores are
    another run's (`answers.judge_key`). `prepared` is what `editing.make_ready` gives, which is made here where it is not given.

    Raises:
        FactError: no records, two that are the same, or one that lacks what its scores need.
        SettingsError: generated texts that do not fit the model's context, or a judge that cannot be told from others.
        TextError: text is to be generated, and the extra `evaluate` is missing.
        RunError: the folder holds a run of other settings, another process works in it, or there are hooks on the model.
    """
    settings, folder = settings or EvaluateSettings(), Path(folder)
    measure = check_records(records, benchmarks.named(benchmark) if benchmark is not None else None)
    check_generation(model, settings)
    check_plain(model)
    way = _Way.of(model, editor, edit_settings, prepared)
    bos = prompts.resolve_bos(model, way.settings.prepend_bos if way else getattr(edit_settings, "prepend_bos", None))
    run = _Run(model, records, measure, folder, Path(edits_in or folder / "edits"), settings, bos, references, engine or Local(model), progress, judge)  # fmt: skip
    together = settings.mode != "independent"  # then every record matters to every other
    everyone = {"records": cache.content_key(list(run.by_unit))} if together else {}
    made_with = {"editor": way.editor.name, "edit": asdict(way.settings)} if way else {"editor": "none"}
    if way and settings.mode == "batch":
        with suppress(FactError):  # of a fact, which is left out below
            way.editor.check(model, run.facts, way.settings, way.prepared)
    claim(folder, run.described | made_with | everyone)
    if way:
        announce(records, measure, *([run.edits_in] if settings.mode != "batch" else []), folder / "scores")
    with run.engine.open():
        scored, made = {"before": run.before()}, list[Made]()
        if way:
            way = way.ready(model, progress)
            made_with = way.described  # with a digest of C and the prefixes
            stages = {"independent": run.independent, "batch": run.batch, "sequential": run.sequential}
            made, after = stages[settings.mode](way)
            scored |= after
    return run.result(scored, made, made_with)


@dataclass(frozen=True)
class _Way:
    """Who edits, with which settings, and what was prepared."""

    editor: Editor
    settings: Any
    prepared: Prepared | None = None

    @classmethod
    def of(
        cls, model: HookedModel, editor: str | Editor | None, settings: Any, prepared: Prepared | None
    ) -> _Way | None:
        if editor is None:
            return None
        found = named(editor)
        resolved = found.resolve(model, settings)
        if prepared is not None:
            found.check(model, (), resolved, prepared)
        return cls(found, resolved, prepared)

    def ready(self, model: HookedModel, progress: Progress) -> _Way:
        if self.prepared is not None:
            return self
        return replace(self, prepared=editing.make_ready(model, self.editor, self.settings, progress=progress))

    def attempt(self, model: HookedModel, facts: Sequence[Fact], state: State | None = None) -> Edit:
        return attempt(model, facts, self.editor, self.settings, self.prepared, state)

    @property
    def described(self) -> dict[str, Any]:
        return making(self.editor, self.settings, self.prepared)


class _Run:
    """What the stages of one evaluation share."""

    def __init__(
        self,
        model: HookedModel,
        records: Sequence[Any],
        benchmark: Benchmark,
        folder: Path,
        edits_in: Path,
        settings: EvaluateSettings,
        bos: bool,
        references: References | None,
        engine: Engine,
        progress: Progress,
        judge: Judge | None,
    ) -> None:
        self.model, self.records, self.benchmark, self.settings = model, records, benchmark, settings
        self.folder, self.edits_in = folder, edits_in
        self.bos, self.references, self.engine, self.progress, self.judge = bos, references, engine, progress, judge
        self.by_unit = {record_unit(record, benchmark): record for record in records}
        self.facts = [benchmark.fact(record) for record in records]
        self.kept_under = provenance.kept_under(model)
        of_text = ("tokens", "top_k", "seed") if settings.generate else ()
        self.measured = {
            name: getattr(settings, name) for name in ("generate", *of_text, "answers", "answer_rule", "beside")
        } | {
            "benchmark": _which(benchmark),
            "prepend_bos": bos,
            "references": references.key if references else "",
            "judge": judge_key(judge) if judge else "",
        }

    @property
    def described(self) -> dict[str, Any]:
        """What scores after edits depend on, beside the edits."""
        return self.kept_under | {"settings": asdict(self.settings), "measured": self.measured}

    def measuring(self, before: Unedited | None, **changes: Any) -> Measuring:
        whole = Measuring(self.by_unit, self.benchmark, self.settings, self.bos, before, self.references, self.judge)
        return replace(whole, **changes)

    def with_neighbours(self, before: Unedited | None, **changes: Any) -> Measuring:
        """For edits that will stand in the model when records are scored: what it says now at every record's neighbours."""
        plain = self.measuring(before, drifts=True, **changes)
        return replace(
            plain, near={unit: plain.at_neighbours(self.model, each) for unit, each in plain.by_unit.items()}
        )

    def healthy(self) -> Unedited | None:
        """The model as it is now, where its health is measured."""
        return unedited(self.model, prepend_bos=self.bos) if self.settings.health else None

    def before(self) -> Sequence[Scored]:
        """Of the unedited model, from the cache where they are there."""
        what = self.kept_under | {"measured": self.measured}
        place = cache.root() / "unedited" / cache.content_key(what)  # 0.1.0 kept a file a record under "before"
        plan(self.folder / "before", place, list(self.by_unit))
        task = self.measuring(None, settings=replace(self.settings, health=False))
        store = score_store(place, what, "records before", waits=True)
        return store.run(list(self.by_unit), task, self.engine, self.progress, failed=_unscored)

    def independent(self, way: _Way) -> tuple[list[Made], dict[str, Sequence[Scored]]]:
        """Each record's edit, found on the unedited model, and its scores on the model with that edit."""
        edited = edit_facts(self.model, self.facts, self.edits_in, way.editor, way.settings, way.prepared, engine=self.engine, progress=self.progress)  # fmt: skip
        made = [Made(**note) for note in edited.notes]
        units = [cache.content_key([unit, each.digest]) for unit, each in zip(self.by_unit, made, strict=True)]
        at = {unit: index for index, unit in enumerate(units)}

        def own(unit: str) -> Edit | None:
            return edited[at[unit]] if made[at[unit]].edited else None

        task = self.measuring(self.healthy(), drifts=True, by_unit=dict(zip(units, self.records, strict=True)))
        store = score_store(self.folder / "scores", self.described, "records after")
        return made, {"after": store.run(units, task, self.engine, self.progress, own=own, failed=_unscored)}

    def batch(self, way: _Way) -> tuple[list[Made], dict[str, Sequence[Scored]]]:
        """One edit for all records that can be edited, and every record on the model with it."""
        reasons = [_refusal(self.model, fact, way) for fact in self.facts]
        chosen = [fact for fact, reason in zip(self.facts, reasons, strict=True) if not reason]
        store = edit_store(self.edits_in, self.kept_under | way.described | {"mode": "batch"})
        unit = cache.content_key([asdict(replace(fact, id="")) for fact in chosen])

        def task(model: HookedModel, name: str) -> Edit:
            return way.attempt(model, chosen)

        def failed(done: Done[Any]) -> Edit:
            return editing.refused(self.model, chosen, way.editor, way.settings, done.error)

        whole = store.run([unit] if chosen else [], task, Local(self.model), self.progress, failed=failed)
        made = [Made(**note) for note in whole.notes]
        digests = [each.digest for each in made]  # an edit that failed is tried again, and has other scores then
        by_unit = {cache.content_key([unit, digests]): record for unit, record in self.by_unit.items()}
        task_after = self.with_neighbours(self.healthy(), by_unit=by_unit)
        after = self.here(self.described, task_after, lambda: applying.edited(self.model, *whole))
        refused = [Made.of(editing.refused(self.model, [fact], way.editor, way.settings, reason)) if reason else made[0] for fact, reason in zip(self.facts, reasons, strict=True)]  # fmt: skip
        return refused, {"after": after}

    def sequential(self, way: _Way) -> tuple[list[Made], dict[str, Sequence[Scored]]]:
        """Edits of `together` records each, found on the model with those before, scored right after; and all records at the end."""
        groups = _groups(list(self.by_unit), self.settings.together)
        what = self.described | way.described | {"order": cache.content_key(list(groups))}
        store, measuring = edit_store(self.edits_in, what), self.with_neighbours(self.healthy())
        sequence = _Sequence(self, way, groups, store, measuring)
        try:
            edited = store.run(list(groups), sequence, Local(self.model), self.progress, failed=sequence.failed)
            each = [own for name, note in zip(groups, edited.notes, strict=True) for own in sequence.each(name, Made(**note))]  # fmt: skip
            end = self.here(what, measuring, lambda: sequence.all_of(edited))
        finally:
            sequence.standing.take_out()
        return [made for made, _ in each], {"after": [scored for _, scored in each], "at the end": end}

    def here(
        self, what: dict[str, Any], measuring: Measuring, edited: Callable[[], AbstractContextManager[object]]
    ) -> Sequence[Scored]:
        """Every record on the edited model, in this process; where all are kept, nothing is written into the model."""
        store, units = score_store(self.folder / "scores", what, "records after"), list(measuring.by_unit)
        with edited() if store.finished(units) < len(units) else nullcontext():
            return store.run(units, measuring, Local(self.model), self.progress, failed=_unscored)

    def result(
        self, scored: Mapping[str, Sequence[Scored]], made: Sequence[Made], made_with: dict[str, Any]
    ) -> Evaluation:
        """The table, with a note on each record that has one."""
        numbers, said = {}, []
        for stage, each in scored.items():
            numbers[stage], reasons_here = rows(each)
            said.append([(reason,) for reason in reasons_here])
        what = self.described | made_with
        if made:
            numbers["after"] = [row | edit.row for row, edit in zip(numbers["after"], made, strict=True)]
            conditions = {layer: cond for edit in made for layer, cond in edit.cond_C.items()}
            what |= {"cond_C": {layer: conditions[layer] for layer in sorted(conditions, key=int)}}
        notes: list[Sequence[Sequence[str]]] = [
            [doubts(self.model, fact, self.bos) for fact in self.facts],
            [(*edit.reasons, *(edit.notes if edit.edited else ())) for edit in made] or [()] * len(self.records),
            contradictions(self.facts) if made and self.settings.mode == "sequential" else [()] * len(self.records),
            *said,
        ]
        reasons = [
            "; ".join(dict.fromkeys(reason.removesuffix(".") for own in each for reason in own if reason))
            for each in zip(*notes, strict=True)
        ]
        facts = tuple(about(fact, index, reason) for index, (fact, reason) in enumerate(zip(self.facts, reasons, strict=True)))  # fmt: skip
        versions = {"benchmark": self.benchmark.name, "records": cache.content_key(list(self.by_unit)), "versions": provenance.versions()}  # fmt: skip
        what = json.loads(json.dumps(cache.plain(what | versions)))  # as it will be read again
        return Evaluation(facts, numbers, what, self.settings.seed, partial(lines, scored))


class _Sequence:
    """The edits of a sequence, each of a group of records, found on the model with those before it, as they come."""

    def __init__(self, run: _Run, way: _Way, groups: dict[str, list[str]], store: Store[Edit], measuring: Measuring) -> None:  # fmt: skip
        self.run, self.way, self.store, self.measuring, self.groups = run, way, store, measuring, groups
        self.order, self.at = list(groups), {name: index for index, name in enumerate(groups)}
        self.standing = applying.apply(run.model)
        self.state: State = {}
        self.written = 0  # how many of the edits are in the model

    def __call__(self, model: HookedModel, name: str) -> Edit:
        for earlier in self.order[self.written : self.at[name]]:  # of a run that was stopped
            self.write(self.store.get(earlier))
        facts = self.facts(name)
        reasons = [_refusal(model, fact, self.way) for fact in facts] if len(facts) > 1 else [""]
        chosen = [fact for fact, reason in zip(facts, reasons, strict=True) if not reason]
        edit = self.made(model, chosen or facts)
        scored = [asdict(self.scored(model, unit)) | {"refused": reason} for unit, reason in zip(self.groups[name], reasons, strict=True)]  # fmt: skip
        return replace(edit, details=edit.details | {"scored": scored})

    def facts(self, name: str) -> list[Fact]:
        """Those of a group."""
        return [self.run.benchmark.fact(self.run.by_unit[unit]) for unit in self.groups[name]]

    def made(self, model: HookedModel, facts: Sequence[Fact]) -> Edit:
        """The edit, which is in the model, or why there is none, whatever that is: it is kept, because those after it are found without it."""
        try:
            edit = self.way.attempt(model, facts, self.state)
            edits.save(edit, Blob(""))  # what cannot be kept does not go into the model
            self.write(edit)
        except Exception as error:
            line, trace = told(error)
            edit = replace(self.refused(facts, line), details={"traceback": trace})
            self.write(edit)
        return edit

    def refused(self, facts: Sequence[Fact], reason: str) -> Edit:
        """No edit of these facts."""
        return editing.refused(self.run.model, facts, self.way.editor, self.way.settings, reason)

    def each(self, name: str, made: Made) -> Iterator[tuple[Made, Scored]]:
        """Of each record of a group, its edit, which is the group's unless it was left out, and its scores right after."""
        for index, fact in enumerate(self.facts(name)):
            if not made.scored:
                yield made, Scored({}, "; ".join(made.reasons))
                continue
            own = made.scored[index]
            yield (Made.of(self.refused([fact], own["refused"])) if own["refused"] else made), Scored.of(own)

    def scored(self, model: HookedModel, unit: str) -> Scored:
        try:
            return self.measuring(model, unit)
        except Exception as error:  # the edit is in the model, and is kept all the same
            return Scored({}, told(error)[0])

    def failed(self, done: Done[Any]) -> Edit:
        return self.refused(self.facts(done.unit), done.error)

    def write(self, edit: Edit | None) -> None:
        """Put the next edit of the sequence into the model; None where there is none."""
        if edit is not None:
            state = self.way.editor.joined(self.state, edit.state, self.way.settings, self.way.prepared)
            self.standing.add(edit)
            self.state = state
        self.written += 1

    @contextmanager
    def all_of(self, edited: Sequence[Edit]) -> Iterator[None]:
        """Every edit in the model."""
        for edit in edited[self.written :]:
            self.write(edit)
        yield


def _groups(units: Sequence[str], together: int) -> dict[str, list[str]]:
    """Units in their order, `together` at a time, by names in that order."""
    groups = [list(units[first : first + together]) for first in range(0, len(units), together)]
    return {f"{index:07d}-{own[0] if together == 1 else cache.content_key(own)}": own for index, own in enumerate(groups)}  # fmt: skip


def _which(benchmark: Benchmark) -> str | list[str]:
    """What tells a benchmark's scores from another's: the name of one of ours, with its class and the key that it may have of one from outside."""
    own = type(benchmark)
    if own.__module__.startswith("mechedit."):
        return benchmark.name
    return [benchmark.name, f"{own.__module__}:{own.__qualname__}", str(getattr(benchmark, "key", ""))]


def _unscored(done: Done[Any]) -> Scored:
    return Scored({}, done.error)


def _refusal(model: HookedModel, fact: Fact, way: _Way) -> str:
    """Why a fact can be no part of a batch, whatever that is; empty where it can."""
    try:
        return editing.refusal(model, fact, way.editor, way.settings)
    except Exception as error:
        return told(error)[0]
