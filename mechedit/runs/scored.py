"""The scores of one record: what is measured, and how it is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from mechedit import applying, cache, generation, prompts, writing
from mechedit.benchmarks import answers, metrics, texts
from mechedit.benchmarks.answers import Judge
from mechedit.benchmarks.benchmark import Benchmark, Detailed, Said
from mechedit.benchmarks.beside import Near, beside, drift, near
from mechedit.benchmarks.health import Unedited, health
from mechedit.benchmarks.texts import References
from mechedit.edits import Edit
from mechedit.facts import Fact, FactError
from mechedit.files import Blob, FileError
from mechedit.models import HookedModel
from mechedit.runs.store import Store
from mechedit.scoring import log_p
from mechedit.settings import EvaluateSettings

__all__ = ["Measuring", "Scored", "lines", "measure", "record_unit", "rows", "score_store"]


@dataclass(frozen=True)
class Scored:
    """The numbers of a record, or why there are none; what each prompt's targets had (`Said`), and generated texts, each behind its
    prompt."""

    scores: dict[str, float]
    reason: str = ""
    said: tuple[Said, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, record: dict[str, Any]) -> Scored:
        """As it was, from JSON, which has null for nan."""
        scores = {name: nan if value is None else value for name, value in record["scores"].items()}
        return cls(scores, record["reason"], tuple(Said(*each) for each in record.get("said", ())), tuple(map(tuple, record.get("texts", ()))))  # fmt: skip


@dataclass
class Details:
    """What the numbers of a record are made of, as it comes."""

    said: list[Said] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def measure(
    model: HookedModel,
    record: Any,
    benchmark: Benchmark,
    settings: EvaluateSettings,
    *,
    before: Unedited | None = None,
    near_before: Near | None = None,
    references: References | None = None,
    judge: Judge | None = None,
    prepend_bos: bool | None = None,
    details: Details | None = None,
) -> dict[str, float]:
    """Every number of one record on the model as it is now; `before` is the unedited model, for its health, `near_before` what it said at the
    record's neighbours, for drift; `judge` says whether an answer is the one wanted, in place of `settings.answer_rule`. What they are made of
    is added to `details`."""
    details = details if details is not None else Details()
    if isinstance(benchmark, Detailed) and _tells(benchmark):
        ((found, said),) = benchmark.measured(model, [record], prepend_bos=prepend_bos)
        details.said += said
    else:
        (found,) = benchmark.scores(model, [record], prepend_bos=prepend_bos)
    fact = benchmark.fact(record)
    more: dict[str, float] = {}
    if settings.answers and fact.target_new:
        more |= _answered(model, fact, settings, judge, prepend_bos, details)
    if settings.beside and fact.target_new:
        numbers, prompts_said = beside(model, fact, prepend_bos=prepend_bos)
        more |= numbers | (drift(model, fact, near_before, prepend_bos=prepend_bos) if near_before else {})
        details.said += prompts_said
    found |= {name: value for name, value in more.items() if name not in found}  # a benchmark's own stand
    if settings.generate:
        found |= _generated(model, fact, settings, references, prepend_bos, details)
    return found | (health(model, before) if settings.health and before else {})


def _answered(
    model: HookedModel, fact: Fact, settings: EvaluateSettings, judge: Judge | None, bos: bool | None, details: Details
) -> dict[str, float]:
    """Whether the model, asked the fact's prompt alone, says the new target."""
    rule, target = settings.answer_rule, str(fact.target_new)
    over = partial(answers.is_over, rule=rule)
    (text,) = generation.completions(model, [fact.prompt], answers.TOKENS, until=over, prepend_bos=bos)
    details.texts.append((fact.prompt, text))
    said = answers.cut(text, rule)
    right = judge(fact.prompt, said, target) if judge else answers.is_answered(said, target, rule)
    return {"answer": float(right)}


def _tells(benchmark: Any) -> bool:
    """Whether what it measures is what it scores: a class may have scores of its own, and the rest from another."""
    scores, measured = (
        next((own for own in type(benchmark).__mro__ if name in vars(own)), object) for name in ("scores", "measured")
    )
    return issubclass(measured, scores)


def _generated(
    model: HookedModel,
    fact: Fact,
    settings: EvaluateSettings,
    references: References | None,
    bos: bool | None,
    details: Details,
) -> dict[str, float]:
    """GE and RS of sampled texts, essence of texts about the subject, and whether greedy text goes on with the new target."""
    target = str(fact.target_new)
    length = len(prompts.continuation(model, fact.prompt, target, fact.join)) + 1
    said = generation.complete(model, fact.prompt, length, prepend_bos=bos)
    found = {"exact_match": metrics.exact_match(said, target)}
    written = generation.continuations(
        model, fact.generations, settings.tokens, top_k=settings.top_k, seed=settings.seed, prepend_bos=bos
    )
    details.texts += [(fact.prompt, said), *zip(fact.generations, written, strict=True)]
    found["GE"] = metrics.fluency([texts.words(each) for each in written])
    if references is not None:
        about = references.about(fact.relation, fact.target_new_id or target)
        own = [text for name, text in about if writing.same(name, fact.subject)]
        found["essence"] = (
            metrics.essence(log_p(model, " ".join(own), settings.tokens, prepend_bos=bos)) if own else nan
        )
        found["RS"] = texts.consistency(references.tfidf, written, [text for _, text in about])
    return found


@dataclass(frozen=True)
class Measuring:
    """Every number of a unit's record, with its own edit written where it has one; the edit travels with the unit."""

    by_unit: dict[str, Any]
    benchmark: Benchmark
    settings: EvaluateSettings
    bos: bool
    before: Unedited | None
    references: References | None
    judge: Judge | None = None
    drifts: bool = False  # whether what is measured follows an edit
    near: dict[str, Near | None] | None = None  # of each unit, where the model that is measured has the edit already

    def __call__(self, model: HookedModel, unit: str, edit: Edit | None = None) -> Scored:
        if self.near is not None:
            return self.now(model, self.by_unit[unit], self.near[unit])
        before = self.at_neighbours(model, self.by_unit[unit])
        with applying.edited(model, *([edit] if edit is not None else [])):
            return self.now(model, self.by_unit[unit], before)

    def at_neighbours(self, model: HookedModel, record: Any) -> Near | None:
        """What the model as it is says at a record's neighbours, where drift is measured."""
        if not (self.drifts and self.settings.beside):
            return None
        try:
            return near(model, self.benchmark.fact(record), prepend_bos=self.bos)
        except Exception:  # whatever it is, scoring the record tells it
            return None

    def now(self, model: HookedModel, record: Any, before: Near | None = None) -> Scored:
        """Of a record, on the model as it is."""
        beside: dict[str, Any] = {"before": self.before, "near_before": before, "references": self.references, "judge": self.judge, "prepend_bos": self.bos}  # fmt: skip
        details = Details()
        try:
            scores = measure(model, record, self.benchmark, self.settings, **beside, details=details)
            return Scored(scores, "", tuple(details.said), tuple(details.texts))
        except FactError as error:  # a paraphrase that does not fit the context, say
            return Scored({}, str(error))


def score_store(folder: Path, what: dict[str, Any], noun: str, *, waits: bool = False) -> Store[Scored]:
    """Where scores are kept."""
    return Store(folder, what, _read, _write, noun, waits=waits)


def _read(blob: Blob) -> Scored:
    """Plain JSON: what it is kept in has checks of its own."""
    try:
        return Scored.of(json.loads(blob.data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{blob} holds no scores ({error}).") from error


def _write(scored: Scored, blob: Blob) -> None:
    record = cache.plain({name: value for name, value in vars(scored).items() if value or name in ("scores", "reason")})
    blob.data = json.dumps(record, separators=(",", ":")).encode()


def rows(scored: Iterable[Scored]) -> tuple[list[dict[str, float]], list[str]]:
    """The numbers of each record, nan where a record could not be scored, so that rows are alike; and the reasons."""
    found = [(each.scores, each.reason) for each in scored]
    names = list(dict.fromkeys(name for scores, _ in found for name in scores))
    return [{name: scores.get(name, nan) for name in names} for scores, _ in found], [reason for _, reason in found]


def lines(scored: Mapping[str, Iterable[Scored]], name: str) -> Iterator[dict[str, Any]]:
    """The lines of `prompts` or of `texts` (`runs.results`) of all stages."""
    for stage, own in scored.items():
        for index, each in enumerate(own):
            place = {"stage": stage, "record": index}
            if name == "prompts":
                yield from (place | said._asdict() for said in each.said)
            else:
                yield from (place | {"prompt": prompt, "text": text} for prompt, text in each.texts)


def record_unit(record: Any, benchmark: Benchmark) -> str:
    """The name of a record's unit: what it says, whatever its id."""
    return cache.content_key(asdict(benchmark.named(record, "")))
