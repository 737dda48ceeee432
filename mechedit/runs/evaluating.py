"""Edit each record of a benchmark and score it, into a folder, resumably.

A record is a fact (scored as COUNTERFACT's) or a zsRE question. The folder gets `edits/` and `scores/`, each a run of its own;
what the unedited model scores is kept in the cache, once for a model, and used by every editor.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from mechedit import cache, edits, files, generation, models, moments, prompts, provenance, rank_one
from mechedit.benchmarks import counterfact, metrics, texts, zsre
from mechedit.benchmarks.health import Unedited, health, unedited
from mechedit.benchmarks.texts import References
from mechedit.benchmarks.zsre import Question
from mechedit.editors import controls, rome
from mechedit.edits import Edit
from mechedit.facts import Fact, FactError
from mechedit.models import HookedModel
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.records import listed
from mechedit.runs.editing import attempt, edit_facts
from mechedit.runs.engines import Engine, Local
from mechedit.runs.results import Evaluation
from mechedit.runs.store import PLAN, Store, claim, plan
from mechedit.scoring import log_p
from mechedit.settings import EvaluateSettings, MomentSettings, RomeSettings, SettingsError

__all__ = ["Estimate", "Record", "check_records", "estimate", "evaluate", "fact_of", "measure"]

Record = Fact | Question
EDIT_NUMBERS = ("relative_norm", "divisor_share", "essence_kl")


def fact_of(record: Record) -> Fact:
    """The fact that a record writes."""
    return record.fact if isinstance(record, Question) else record


def evaluate(
    model: HookedModel,
    records: Sequence[Record],
    folder: str | Path,
    settings: EvaluateSettings | None = None,
    edit_settings: RomeSettings | None = None,
    moment: Moment | None = None,
    *,
    references: References | None = None,
    edits_in: str | Path | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Scores of every record before and after its edit. Everything finished is kept in `folder`; the model is left as it is.

    A record that cannot be edited, or whose edit is rolled back, is scored on the model as it was, and says why. `edits_in` is
    where edits are kept, if not in `folder`: a run of the same edits, `edit_facts`' say, is used as it is. `engine` computes
    independent edits and scores; edits that depend on each other are written here. Without `moment`, and always at random layers, C
    is estimated from text sampled from the model.

    Raises:
        FactError: no records, two that are the same, or one without both targets.
        SettingsError: generated texts that do not fit the model's context.
        TextError: text is to be generated, and the extra `evaluate` is missing.
        RunError: the folder holds a run of other settings, or another process works in it.
    """
    settings, folder, engine = settings or EvaluateSettings(), Path(folder), engine or Local(model)
    check_records(records)
    _check_generation(model, settings)
    resolved = rome.resolve(model, edit_settings) if settings.editor == "rome" else None
    bos = prompts.resolve_bos(model, edit_settings.prepend_bos if edit_settings else None)
    run = _Run(model, records, folder, Path(edits_in or folder / "edits"), settings, bos, references, engine, progress)
    if resolved and moment and settings.control != "random_layer":
        rome.check_moment(model, moment, resolved)
    together = settings.mode != "independent"  # then every record matters to every other
    everyone = {"records": cache.content_key(list(run.by_unit))} if together else {}
    claim(folder, run.described | {"edit": asdict(resolved) if resolved else None} | everyone)
    if resolved:
        announce(records, *[run.edits_in] * (settings.control != "random_layer"), folder / "scores")
    made: list[Edit] = []
    with engine.open():
        scored = {"before": run.before()}
        if resolved and settings.mode == "sequential":
            in_turn = run.in_sequence(resolved, moment)
            made = in_turn.edits
            scored |= {"after": in_turn.after, "at the end": in_turn.end}
        elif resolved:
            made = run.edits(resolved, moment)
            scored["after"] = run.scores_together(made) if settings.mode == "batch" else run.scores(made)
    rows = {stage: _rows(each) for stage, each in scored.items()}
    if resolved:
        rows["after"] = [row | _numbers(edit) for row, edit in zip(rows["after"], made, strict=True)]
        conditions = {edit.settings["layer"]: edit.report["cond_C"] for edit in made if "cond_C" in edit.report}
        run.what |= {
            "edit": asdict(resolved),
            "cond_C": {str(layer): conditions[layer] for layer in sorted(conditions)},
        }
    notes: list[Sequence[Sequence[str]]] = [
        [_doubts(model, fact_of(record), bos) for record in records],
        [(*edit.reasons, *(edit.notes if edit.changes else ())) for edit in made] or [()] * len(records),
        *([(each.reason,) for each in of] for of in scored.values()),
    ]
    reasons = [
        "; ".join(dict.fromkeys(reason.removesuffix(".") for own in each for reason in own if reason))
        for each in zip(*notes, strict=True)
    ]
    about = tuple(_about(fact_of(record), index, reason) for index, (record, reason) in enumerate(zip(records, reasons, strict=True)))  # fmt: skip
    benchmark = "zsre" if isinstance(records[0], Question) else "counterfact"
    what = run.what | {"benchmark": benchmark, "versions": provenance.versions()}
    return Evaluation(about, rows, what, settings.seed)


def announce(records: Sequence[Record], *stages: Path) -> None:
    """Note folders of stages to come, so that `status` counts them before they begin."""
    for place in stages:
        if not (place / PLAN).exists():
            plan(place, place, [_unit(record) for record in records])


def _doubts(model: HookedModel, fact: Fact, bos: bool) -> list[str]:
    """What may be a mistake in a record; of one that cannot be read by the model its scores say why."""
    try:
        return prompts.doubts(model, fact, prepend_bos=bos)
    except FactError:
        return []


def _about(fact: Fact, index: int, reason: str) -> dict[str, Any]:
    """Whom a row of results is about."""
    return {
        "id": fact.id or str(index),
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_true": fact.target_true,
        "target_new": fact.target_new,
        "reason": reason,
    }


def measure(
    model: HookedModel,
    record: Record,
    settings: EvaluateSettings,
    *,
    before: Unedited | None = None,
    references: References | None = None,
    prepend_bos: bool | None = None,
) -> dict[str, float]:
    """Every number of one record on the model as it is now; `before` is the unedited model, for its health."""
    if isinstance(record, Question):
        (found,) = zsre.scores(model, [record], prepend_bos=prepend_bos)
    else:
        (found,) = counterfact.scores(model, [record], prepend_bos=prepend_bos)
    if settings.generate:
        found |= _generated(model, fact_of(record), settings, references, prepend_bos)
    return found | (health(model, before) if settings.health and before else {})


def _generated(
    model: HookedModel, fact: Fact, settings: EvaluateSettings, references: References | None, bos: bool | None
) -> dict[str, float]:
    """GE and RS of sampled texts, essence of texts about the subject, and whether greedy text goes on with the new target."""
    target = str(fact.target_new)
    length = len(prompts.continuation(model, fact.prompt, target)) + 1
    said = generation.complete(model, fact.prompt, length, prepend_bos=bos)
    found = {"exact_match": metrics.exact_match(said, target)}
    written = generation.continuations(
        model, fact.generations, settings.tokens, top_k=settings.top_k, seed=settings.seed, prepend_bos=bos
    )
    found["GE"] = metrics.fluency([texts.words(each) for each in written])
    if references is not None:
        about = references.about(fact.relation, fact.target_new_id or target)
        own = [text for name, text in about if name == fact.subject]
        found["essence"] = (
            metrics.essence(log_p(model, " ".join(own), settings.tokens, prepend_bos=bos)) if own else float("nan")
        )
        found["RS"] = texts.consistency(references.tfidf, written, [text for _, text in about])
    return found


def check_records(records: Sequence[Record]) -> None:
    """Raise unless these can be evaluated. All mistakes are named.

    Raises:
        FactError: no records, facts and questions together, two that are the same, or some without targets.
    """
    if not records:
        raise FactError("an evaluation needs one or more records.")
    if len({isinstance(record, Question) for record in records}) > 1:
        raise FactError("records are facts or zsRE questions, not both in one evaluation.")
    names = [f"record {fact_of(record).id or index}" for index, record in enumerate(records)]
    seen: dict[str, int] = {}
    wrong = []
    for index, (name, record) in enumerate(zip(names, records, strict=True)):
        fact = fact_of(record)
        if fact.target_new is None or (fact.target_true is None and not isinstance(record, Question)):
            wrong.append(f"{name}, about {fact.subject!r}, lacks a new or a true target.")
        if (first := seen.setdefault(_unit(record), index)) != index:
            wrong.append(f"{name} says what {names[first]} says; give each once.")
    if wrong:
        raise FactError(listed(wrong))


def _check_generation(model: HookedModel, settings: EvaluateSettings) -> None:
    """Raise where texts cannot be generated, or not be measured."""
    if not settings.generate:
        return
    texts.words("")  # needs the extra `evaluate`
    if settings.tokens >= (limit := int(model.cfg.n_ctx)):
        raise SettingsError(
            f"generated texts must fit the context of {limit} tokens of {model.cfg.model_name}, with one before them; found "
            f"{settings.tokens}. Give fewer tokens (--tokens)."
        )


def _unit(record: Record) -> str:
    """The name of a record's unit: what it says, whatever its id."""
    plain = replace(record, fact=replace(record.fact, id="")) if isinstance(record, Question) else replace(record, id="")  # fmt: skip
    return cache.content_key(asdict(plain))


def _numbers(edit: Edit) -> dict[str, float]:
    """What the edit itself measured; whether there is one."""
    return {name: float(edit.report.get(name, float("nan"))) for name in EDIT_NUMBERS} | {
        "edited": float(bool(edit.changes))
    }


@dataclass(frozen=True)
class Scored:
    """The numbers of a record, or why there are none."""

    scores: dict[str, float]
    reason: str = ""


def _read_scored(path: Path) -> Scored:
    record = files.read(path, "scores")[1]
    return Scored(
        {name: float("nan") if value is None else value for name, value in record["scores"].items()}, record["reason"]
    )


def _write_scored(scored: Scored, path: Path) -> None:
    files.write(path, "scores", {}, {"scores": cache.plain(scored.scores), "reason": scored.reason})


def _rows(scored: Sequence[Scored]) -> list[dict[str, float]]:
    """The numbers of each record; nan where a record could not be scored, so that rows are alike."""
    names = list(dict.fromkeys(name for each in scored for name in each.scores))
    return [{name: each.scores.get(name, float("nan")) for name in names} for each in scored]


@dataclass(frozen=True)
class _Measuring:
    """Every number of a unit's record, with its own edit written where it has one."""

    by_unit: dict[str, Record]
    edits: dict[str, Edit]
    settings: EvaluateSettings
    bos: bool
    before: Unedited | None
    references: References | None

    def __call__(self, model: HookedModel, unit: str) -> Scored:
        own = [self.edits[unit]] if unit in self.edits else []
        with edits.edited(model, *own, force=True):
            return self.now(model, self.by_unit[unit])

    def now(self, model: HookedModel, record: Record) -> Scored:
        """Of a record, on the model as it is."""
        known: dict[str, Any] = {"before": self.before, "references": self.references, "prepend_bos": self.bos}
        try:
            return Scored(measure(model, record, self.settings, **known))
        except FactError as error:  # a paraphrase that does not fit the context, say
            return Scored({}, str(error))


@dataclass(frozen=True)
class _Sequence:
    """Edits one after the other, and the scores after each and at the end."""

    edits: list[Edit]
    after: list[Scored]
    end: list[Scored]


@dataclass(frozen=True)
class Estimate:
    """What an evaluation will take, from a few records that were tried here; each worker computes as fast as this process.

    Seconds: `once` before the first record, here (C) or in a worker (loading); of a record, its edit and one scoring.
    """

    records: int
    workers: int
    mode: str
    once: float
    edit: float
    score: float
    memory: float  # gigabytes of a worker

    @property
    def total(self) -> float:
        """Seconds from the start to the end."""
        shared = math.ceil(self.records / self.workers)  # what workers share; the rest is done by one process
        if not self.edit:
            return self.once + shared * self.score
        if self.mode == "sequential":
            return self.once + shared * self.score + self.records * (self.edit + 2 * self.score)
        after = self.records if self.mode == "batch" else shared
        return self.once + shared * (self.score + self.edit) + after * self.score

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.mode}, {self.edit:.2f} s an edit and {self.score:.2f} s a scoring, on {self.workers} "
            f"worker{'s' if self.workers > 1 else ''}: {_span(self.total)}, of which {self.once:.0f} s come first (C, workers' loading); "
            f"workers are held for {self.workers * self.total / 3600:.2f} worker hours; {self.memory:.1f} GB a worker"
        )


def estimate(
    model: HookedModel,
    records: Sequence[Record],
    settings: EvaluateSettings,
    edit_settings: RomeSettings | None = None,
    *,
    workers: int = 1,
    load: float = 0.0,
    tried: int = 3,
    references: References | None = None,
) -> Estimate:
    """Try a few records, spread over all of them, and say what all of them will take; `load` is a worker's.

    Edits and scores are not kept; C is, in the cache.
    """
    check_records(records)
    _check_generation(model, settings)
    began = time.perf_counter()
    chosen = [records[index * len(records) // tried] for index in range(min(tried, len(records)))]
    resolved = replace(rome.resolve(model, edit_settings), guard="warn") if settings.editor == "rome" else None
    windows = MomentSettings(prepend_bos=resolved.prepend_bos) if resolved else None
    moment = moments.estimate(model, resolved.layer, settings=windows) if resolved else None
    bos = prompts.resolve_bos(model, edit_settings.prepend_bos if edit_settings else None)
    before = unedited(model, prepend_bos=bos) if settings.health and resolved else None
    measuring = _Measuring({}, {}, settings, bos, before, references)
    once, spent = time.perf_counter() - began, []
    for record in chosen:
        began = time.perf_counter()
        if resolved and moment:
            attempt(model, fact_of(record), resolved, moment)
        edited = time.perf_counter()
        measuring.now(model, record)
        spent.append((edited - began if resolved else 0.0, time.perf_counter() - edited))
    edit, score = (median(each) for each in zip(*spent, strict=True))
    return Estimate(len(records), workers, settings.mode, once + load, edit, score, _peak_memory())


def _peak_memory() -> float:
    """Gigabytes that this process held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class _Run:
    """What the stages of one evaluation share."""

    def __init__(
        self,
        model: HookedModel,
        records: Sequence[Record],
        folder: Path,
        edits_in: Path,
        settings: EvaluateSettings,
        bos: bool,
        references: References | None,
        engine: Engine,
        progress: Progress,
    ) -> None:
        self.model, self.records, self.settings = model, records, settings
        self.folder, self.edits_in = folder, edits_in
        self.bos, self.references, self.engine, self.progress = bos, references, engine, progress
        self.by_unit = {_unit(record): record for record in records}
        self.what: dict[str, Any] = {"settings": asdict(settings), "model": provenance.identity(model)}
        of_text = ("tokens", "top_k", "seed") if settings.generate else ()
        self.measured = {name: getattr(settings, name) for name in ("generate", *of_text)} | {
            "prepend_bos": bos,
            "references": references.key if references else "",
        }

    def store(self, folder: Path, what: dict[str, Any]) -> Store[Scored]:
        return Store(folder, what, _read_scored, _write_scored, "records after")

    def before(self) -> list[Scored]:
        """Of the unedited model, from the cache where they are there."""
        what = {"model": self.what["model"], "measured": self.measured, "versions": provenance.versions()}
        task = _Measuring(self.by_unit, {}, replace(self.settings, health=False), self.bos, None, self.references)
        place = cache.root() / "before" / cache.content_key(what)
        plan(self.folder / "before", place, list(self.by_unit))
        store: Store[Scored] = Store(place, what, _read_scored, _write_scored, "records before", waits=True)
        return store.run(list(self.by_unit), task, self.engine, self.progress)

    def edits(self, resolved: RomeSettings, moment: Moment | None) -> list[Edit]:
        """Each record's edit, found on the unedited model."""
        facts, control = [fact_of(record) for record in self.records], self.settings.control
        if control == "random_layer":
            return self._at_random_layers(facts, resolved)
        moment = moment or self.moment(resolved)
        if control == "identity":
            moment = controls.identity(moment)
        found = edit_facts(
            self.model, facts, self.edits_in, resolved, moment, engine=self.engine, progress=self.progress
        )
        if control == "random_key":
            pairs = zip(found, facts, strict=True)
            return [controls.at_random_key(self.model, edit, fact, moment, self.settings.seed) for edit, fact in pairs]
        return found

    def moment(self, resolved: RomeSettings) -> Moment:
        windows = MomentSettings(prepend_bos=resolved.prepend_bos)
        return moments.estimate(self.model, resolved.layer, settings=windows, progress=self.progress)

    def _at_random_layers(self, facts: list[Fact], resolved: RomeSettings) -> list[Edit]:
        drawn = [controls.random_layer(self.model, fact, resolved.layer, self.settings.seed) for fact in facts]
        windows = MomentSettings(prepend_bos=resolved.prepend_bos)
        Cs = moments.estimate_layers(self.model, sorted(set(drawn)), settings=windows, progress=self.progress)
        found: dict[int, Edit] = {}
        for layer in sorted(set(drawn)):
            own = [index for index, each in enumerate(drawn) if each == layer]
            made = edit_facts(
                self.model,
                [facts[index] for index in own],
                self.edits_in / f"layer{layer}",
                replace(resolved, layer=layer),
                Cs[layer],
                engine=self.engine,
                progress=self.progress,
            )
            found |= dict(zip(own, made, strict=True))
        return [found[index] for index in range(len(facts))]

    def scores(self, made: Sequence[Edit]) -> list[Scored]:
        """Each record on the model with its own edit, by which its unit is named."""
        units = [cache.content_key([unit, _digest([edit])]) for unit, edit in zip(self.by_unit, made, strict=True)]
        records = dict(zip(units, self.by_unit.values(), strict=True))
        own = dict(zip(units, made, strict=True))
        task = _Measuring(records, own, self.settings, self.bos, self.healthy(), self.references)
        return self.store(self.folder / "scores", self.described).run(units, task, self.engine, self.progress)

    @property
    def described(self) -> dict[str, Any]:
        """What scores after edits depend on, beside the edits."""
        return self.what | {"measured": self.measured}

    def healthy(self) -> Unedited | None:
        """The model as it is now, where its health is measured."""
        return unedited(self.model, prepend_bos=self.bos) if self.settings.health else None

    def scores_together(self, made: Sequence[Edit]) -> list[Scored]:
        """Every record on the model with all edits."""
        before = self.healthy()
        with edits.edited(self.model, *made, force=True):
            return self.here(self.described | {"edits": _digest(made)}, before)

    def here(self, what: dict[str, Any], before: Unedited | None) -> list[Scored]:
        """Every record on the model as it is now, in this process."""
        task = _Measuring(self.by_unit, {}, self.settings, self.bos, before, self.references)
        return self.store(self.folder / "scores", what).run(list(self.by_unit), task, Local(self.model), self.progress)

    def in_sequence(self, resolved: RomeSettings, moment: Moment | None) -> _Sequence:
        """Each edit on what those before it left. C is the unedited model's: no edit of the layer changes the keys of it."""
        moment = moment or self.moment(resolved)
        rome.check_moment(self.model, moment, resolved)
        order = [f"{index:05d}-{unit}" for index, unit in enumerate(self.by_unit)]
        what = self.what | {"edit": asdict(resolved), "moment": moment.hash, "measured": self.measured, "order": cache.content_key(order)}  # fmt: skip
        store: Store[Edit] = Store(
            self.edits_in, what, edits.load, lambda edit, path: edits.save(replace(edit, seconds=math.nan), path), "edits"
        )  # fmt: skip
        before = self.healthy()
        measuring = _Measuring(self.by_unit, {}, self.settings, self.bos, before, self.references)
        written = 0  # how many of the edits are in the model

        def write(edit: Edit) -> None:
            nonlocal written
            for change in edit.changes:
                rank_one.write_(self.model, change)
            written += 1

        def task(model: HookedModel, name: str) -> Edit:
            for earlier in order[written : order.index(name)]:  # of a run that was stopped
                write(edits.load(store.path(earlier)))
            record = self.by_unit[name[6:]]
            origin = replace(moment, origin=moment.origin | {"weight_hash": models.weight_hash(model)})
            edit = attempt(model, fact_of(record), resolved, origin)
            write(edit)
            return replace(edit, details=edit.details | {"scored": asdict(measuring.now(model, record))})

        with edits.restored(self.model, resolved.layer):
            made = store.run(order, task, Local(self.model), self.progress)
            for edit in made[written:]:
                write(edit)
            end = self.here(what, before)
        return _Sequence(made, [Scored(**edit.details["scored"]) for edit in made], end)


def _digest(made: Sequence[Edit]) -> str:
    """A hash of what edits write."""
    digest = hashlib.sha256()
    for edit in made:
        for change in edit.changes:
            digest.update(f"{change.layer}".encode())
            for part in (change.u, change.step):
                digest.update(part.contiguous().numpy().tobytes())
        digest.update(b";")
    return digest.hexdigest()
