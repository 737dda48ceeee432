"""Edit each record of a benchmark and score it, into a folder, resumably.

The folder gets `edits/` and `scores/`, each a run of its own; what the unedited model scores is kept in the cache, once for a model,
and used by every editor. Independent edits and scores are computed by an engine; one edit of all records, and edits that depend on
each other, are computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mechedit import applying, cache, editing, edits, prompts, provenance
from mechedit.benchmarks import benchmark as benchmarks
from mechedit.benchmarks.benchmark import Benchmark
from mechedit.benchmarks.health import Unedited, unedited
from mechedit.benchmarks.texts import References
from mechedit.editing import Editor, Prepared, State
from mechedit.editors import named
from mechedit.edits import Edit
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.runs.checks import about, announce, check_generation, check_records, contradictions, doubts
from mechedit.runs.editing import attempt, edit_facts, edit_store, making
from mechedit.runs.engines import Engine, Local
from mechedit.runs.results import Evaluation
from mechedit.runs.scored import Measuring, Scored, edit_numbers, record_unit, rows, score_store
from mechedit.runs.store import check_plain, claim, plan
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
    edits_in: str | Path | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Scores of every record before and after its edit. Everything finished is kept in `folder`; the model is left as it is.

    Without an editor the model is scored as it is. A record that cannot be edited, or whose edit is rolled back, is scored on the
    model as it was, and says why. `edits_in` is where edits are kept, if not in `folder`: a run of the same edits, `edit_facts`'
    say, is used as it is. `prepared` is what `editing.make_ready` gives, which is made here where it is not given.

    Raises:
        FactError: no records, two that are the same, or one that lacks what its scores need.
        SettingsError: generated texts that do not fit the model's context.
        TextError: text is to be generated, and the extra `evaluate` is missing.
        RunError: the folder holds a run of other settings, another process works in it, or there are hooks on the model.
    """
    settings, folder = settings or EvaluateSettings(), Path(folder)
    measure = check_records(records, benchmarks.named(benchmark) if benchmark is not None else None)
    check_generation(model, settings)
    check_plain(model)
    way = _Way.of(model, editor, edit_settings, prepared)
    bos = prompts.resolve_bos(model, way.settings.prepend_bos if way else getattr(edit_settings, "prepend_bos", None))
    run = _Run(model, records, measure, folder, Path(edits_in or folder / "edits"), settings, bos, references, engine or Local(model), progress)  # fmt: skip
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
        scored, made = {"before": run.before()}, list[Edit]()
        if way:
            way = way.ready(model, progress)
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
    ) -> None:
        self.model, self.records, self.benchmark, self.settings = model, records, benchmark, settings
        self.folder, self.edits_in = folder, edits_in
        self.bos, self.references, self.engine, self.progress = bos, references, engine, progress
        self.by_unit = {record_unit(record, benchmark): record for record in records}
        self.facts = [benchmark.fact(record) for record in records]
        self.kept_under = provenance.kept_under(model)
        of_text = ("tokens", "top_k", "seed") if settings.generate else ()
        self.measured = {name: getattr(settings, name) for name in ("generate", *of_text)} | {
            "benchmark": benchmark.name,
            "prepend_bos": bos,
            "references": references.key if references else "",
        }

    @property
    def described(self) -> dict[str, Any]:
        """What scores after edits depend on, beside the edits."""
        return self.kept_under | {"settings": asdict(self.settings), "measured": self.measured}

    def measuring(self, before: Unedited | None, **changes: Any) -> Measuring:
        whole = Measuring(self.by_unit, {}, self.benchmark, self.settings, self.bos, before, self.references)
        return replace(whole, **changes)

    def healthy(self) -> Unedited | None:
        """The model as it is now, where its health is measured."""
        return unedited(self.model, prepend_bos=self.bos) if self.settings.health else None

    def before(self) -> list[Scored]:
        """Of the unedited model, from the cache where they are there."""
        what = self.kept_under | {"measured": self.measured}
        place = cache.root() / "before" / cache.content_key(what)
        plan(self.folder / "before", place, list(self.by_unit))
        task = self.measuring(None, settings=replace(self.settings, health=False))
        store = score_store(place, what, "records before", waits=True)
        return store.run(list(self.by_unit), task, self.engine, self.progress)

    def independent(self, way: _Way) -> tuple[list[Edit], dict[str, list[Scored]]]:
        """Each record's edit, found on the unedited model, and its scores on the model with that edit."""
        made = edit_facts(self.model, self.facts, self.edits_in, way.editor, way.settings, way.prepared, engine=self.engine, progress=self.progress)  # fmt: skip
        units = [cache.content_key([unit, edit.digest]) for unit, edit in zip(self.by_unit, made, strict=True)]
        own = {unit: edit for unit, edit in zip(units, made, strict=True) if edit.changes}
        task = self.measuring(self.healthy(), by_unit=dict(zip(units, self.records, strict=True)), edits=own)
        store = score_store(self.folder / "scores", self.described, "records after")
        return made, {"after": store.run(units, task, self.engine, self.progress)}

    def batch(self, way: _Way) -> tuple[list[Edit], dict[str, list[Scored]]]:
        """One edit for all records that can be edited, and every record on the model with it."""
        reasons = [editing.refusal(self.model, fact, way.editor, way.settings) for fact in self.facts]
        chosen = [fact for fact, reason in zip(self.facts, reasons, strict=True) if not reason]
        store = edit_store(self.edits_in, self.kept_under | way.described | {"mode": "batch"})
        unit = cache.content_key([asdict(replace(fact, id="")) for fact in chosen])

        def task(model: HookedModel, name: str) -> Edit:
            return way.attempt(model, chosen)

        before = self.healthy()
        whole = store.run([unit], task, Local(self.model), self.progress) if chosen else []
        with applying.edited(self.model, *whole, force=True):
            after = self.here(self.described | {"edits": [edit.digest for edit in whole]}, before)
        refused = [editing.refused(self.model, [fact], way.editor, way.settings, reason) if reason else whole[0] for fact, reason in zip(self.facts, reasons, strict=True)]  # fmt: skip
        return refused, {"after": after}

    def sequential(self, way: _Way) -> tuple[list[Edit], dict[str, list[Scored]]]:
        """Each record's edit, found on the model with those before it, scored right after it; and all records at the end."""
        order = [f"{index:07d}-{unit}" for index, unit in enumerate(self.by_unit)]
        what = self.described | way.described | {"order": cache.content_key(order)}
        store, before = edit_store(self.edits_in, what), self.healthy()
        measuring = self.measuring(before)
        standing, state = applying.apply(self.model), dict[str, Tensor]()
        written = 0  # how many of the edits are in the model

        def write(edit: Edit) -> None:
            nonlocal written, state
            standing.add(edit)
            written, state = written + 1, edit.state or state

        def task(model: HookedModel, name: str) -> Edit:
            for earlier in order[written : order.index(name)]:  # of a run that was stopped
                write(edits.load(store.path(earlier)))
            record = self.by_unit[name.partition("-")[2]]
            edit = way.attempt(model, [self.benchmark.fact(record)], state)
            write(edit)
            return replace(edit, details=edit.details | {"scored": asdict(measuring.now(model, record))})

        try:
            made = store.run(order, task, Local(self.model), self.progress)
            for edit in made[written:]:
                write(edit)
            end = self.here(what, before)
        finally:
            standing.take_out()
        return made, {"after": [Scored(**edit.details["scored"]) for edit in made], "at the end": end}

    def here(self, what: dict[str, Any], before: Unedited | None) -> list[Scored]:
        """Every record on the model as it is now, in this process."""
        store = score_store(self.folder / "scores", what, "records after")
        return store.run(list(self.by_unit), self.measuring(before), Local(self.model), self.progress)

    def result(self, scored: Mapping[str, list[Scored]], made: Sequence[Edit], made_with: dict[str, Any]) -> Evaluation:
        """The table, with a note on each record that has one."""
        numbers = {stage: rows(each) for stage, each in scored.items()}
        what = self.described | made_with
        if made:
            numbers["after"] = [row | edit_numbers(edit) for row, edit in zip(numbers["after"], made, strict=True)]
            conditions = {edit.layer: edit.report["cond_C"] for edit in made if "cond_C" in edit.report}
            what |= {"cond_C": {str(layer): conditions[layer] for layer in sorted(conditions)}}
        notes: list[Sequence[Sequence[str]]] = [
            [doubts(self.model, fact, self.bos) for fact in self.facts],
            [(*edit.reasons, *(edit.notes if edit.changes else ())) for edit in made] or [()] * len(self.records),
            contradictions(self.facts) if made and self.settings.mode == "sequential" else [()] * len(self.records),
            *([(each.reason,) for each in of] for of in scored.values()),
        ]
        reasons = [
            "; ".join(dict.fromkeys(reason.removesuffix(".") for own in each for reason in own if reason))
            for each in zip(*notes, strict=True)
        ]
        facts = tuple(about(fact, index, reason) for index, (fact, reason) in enumerate(zip(self.facts, reasons, strict=True)))  # fmt: skip
        versions = {"benchmark": self.benchmark.name, "versions": provenance.versions()}
        return Evaluation(facts, numbers, what | versions, self.settings.seed)
