"""Trace many facts into a folder, resumably: whole traces, or severed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mechedit import corruption, provenance
from mechedit.cache import content_key
from mechedit.corruption import Statistics
from mechedit.facts import Fact, FactError
from mechedit.models import Blocks, HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import continuation, encode, pad, resolve_bos
from mechedit.runs.engines import Engine, Local
from mechedit.runs.shards import Shards
from mechedit.runs.store import Store, check_plain, units_of
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import Trace, trace, trace_all
from mechedit.tracing.cells import resolve
from mechedit.tracing.preparation import check
from mechedit.tracing.severing import Severed, severed
from mechedit.tracing.tracer import wanted_positions

__all__ = ["check_run", "finished", "known", "partners", "sever_facts", "trace_facts", "traceable", "unit"]


def unit(fact: Fact, other: str | None = None) -> str:
    """The name of a fact's unit: a hash of what a trace depends on, the subject that takes its subject's place among it."""
    said = [fact.subject, fact.template, fact.target_true, fact.target_new, fact.join]
    return content_key([*said, other] if other is not None else said)


def trace_facts(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: TraceSettings | None = None,
    *,
    statistics: Statistics | None = None,
    batch: int = 1,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> list[Trace]:
    """The trace of each fact, from `folder` where it is there, computed (by `engine`, here by default) and saved otherwise.

    `batch` facts share a sweep here, which changes numbers by rounding only; a cluster's workers take one at a time.

    With `settings.corruption` "tokens" each subject gives way to one of the same relation and length; a fact without such a
    partner is left out.

    Raises:
        FactError: facts that cannot be traced with these settings (`traceable` leaves them out).
        RunError: the folder holds a run of other settings, or another process works in it.
    """
    settings, statistics, what = _run(model, settings, statistics)
    _check_traceable(model, facts, settings)
    others = partners(model, facts, settings)
    by_unit = {unit(fact, other): (fact, other) for fact, other in others}
    store: Store[Trace] = Store(folder, what, Trace.load, Trace.save)

    alone = engine is None and len(by_unit) == 1  # then its own steps are what there is to tell
    task = _Tracing(by_unit, settings, statistics, batch, progress if alone else silent)
    return list(
        store.run([unit(*each) for each in others], task, engine or Local(model), progress, called=_called(by_unit))
    )


def _called(by_unit: dict[str, tuple[Fact, str | None]]) -> Callable[[str], str]:
    """How people know a unit: by its fact's id, or by its prompt."""
    return lambda name: f"fact {by_unit[name][0].id or repr(by_unit[name][0].prompt)}"


@dataclass(frozen=True)
class _Tracing:
    """The trace of a unit's fact, given the subject that takes its subject's place, if any."""

    by_unit: dict[str, tuple[Fact, str | None]]
    settings: TraceSettings
    statistics: Statistics
    batch: int
    steps: Progress = silent

    def __call__(self, model: HookedModel, name: str) -> Trace:
        fact, other = self.by_unit[name]
        return trace(model, fact, self.settings, statistics=self.statistics, other=other, progress=self.steps)

    def many(self, model: HookedModel, names: Sequence[str]) -> list[Trace]:
        """The traces of several units, in one sweep."""
        facts, others = zip(*(self.by_unit[name] for name in names), strict=True)
        asked = list(others) if self.settings.corruption == "tokens" else None
        found = trace_all(model, facts, self.settings, statistics=self.statistics, others=asked, batch=len(facts))
        return list(found)


@dataclass(frozen=True)
class _Severing:
    """The severed curves of a unit's fact."""

    by_unit: dict[str, tuple[Fact, str | None]]
    settings: TraceSettings
    statistics: Statistics
    shared_draws: bool

    def __call__(self, model: HookedModel, name: str) -> Severed:
        fact, other = self.by_unit[name]
        shared, statistics = self.shared_draws, self.statistics
        return severed(model, fact, self.settings, shared_draws=shared, statistics=statistics, other=other)


def sever_facts(
    model: HookedModel,
    facts: Sequence[Fact],
    folder: str | Path,
    settings: TraceSettings | None = None,
    *,
    shared_draws: bool = True,
    statistics: Statistics | None = None,
    engine: Engine | None = None,
    progress: Progress = silent,
) -> list[Severed]:
    """`tracing.severing.severed` of each fact, resumably as `trace_facts`."""
    settings, statistics, what = _run(model, settings, statistics)
    _check_traceable(model, facts, settings)
    others = partners(model, facts, settings)
    by_unit = {unit(fact, other): (fact, other) for fact, other in others}
    store: Store[Severed] = Store(folder, what | {"shared_draws": shared_draws}, Severed.load, Severed.save)

    task = _Severing(by_unit, settings, statistics, shared_draws)
    return list(
        store.run([unit(*each) for each in others], task, engine or Local(model), progress, called=_called(by_unit))
    )


def _run(
    model: HookedModel, settings: TraceSettings | None, statistics: Statistics | None
) -> tuple[TraceSettings, Statistics, dict[str, Any]]:
    settings = resolve(model, settings)
    statistics = statistics or corruption.needed(model, settings)
    check_plain(model)
    wanted = {name: value for name, value in asdict(settings).items() if name != "memory"}  # on which no number depends
    what = {"settings": wanted, "noise": {"source": statistics.source, "sigma": statistics.sigma}}
    return settings, statistics, what | provenance.kept_under(model)


def check_run(model: HookedModel, folder: str | Path, settings: TraceSettings) -> None:
    """Raise where `folder` holds a run of other settings; the vocabulary gives sigma.

    Raises:
        RunError: it does.
    """
    Store(folder, _run(model, settings, None)[2], Trace.load, Trace.save)


def finished(pairs: Sequence[tuple[Fact, str | None]], folder: str | Path) -> int:
    """How many of these facts, each with its partner, are done in a run's folder."""
    there = Shards(units_of(Path(folder)))
    return sum(unit(*pair) in there for pair in pairs)


def partners(model: HookedModel, facts: Sequence[Fact], settings: TraceSettings) -> list[tuple[Fact, str | None]]:
    """Each fact with the subject that takes its subject's place, where the corruption is other tokens."""
    if settings.corruption != "tokens":
        return [(fact, None) for fact in facts]
    found = [(fact, corruption.partner(model, fact, facts, seed=settings.seed)) for fact in facts]
    return [(fact, other) for fact, other in found if other is not None]


def traceable(
    model: HookedModel, facts: Sequence[Fact], settings: TraceSettings | None = None
) -> tuple[list[Fact], list[tuple[Fact, str]]]:
    """The facts that can be traced with these settings, and the others, each with what is in the way; the model is not run.

    A prompt may be longer than the context, a second answer lack, a subject have no token of the roles asked for.
    """
    settings = resolve(model, settings)
    fit, others = [], []
    for fact in facts:
        try:
            wanted_positions(settings, check(model, fact, settings))
        except (FactError, SettingsError) as error:
            others.append((fact, str(error)))
        else:
            fit.append(fact)
    return fit, others


def _check_traceable(model: HookedModel, facts: Sequence[Fact], settings: TraceSettings) -> None:
    """Raise for facts that would stop a run on its way."""
    if others := traceable(model, facts, settings)[1]:
        raise FactError(
            f"{len(others)} of {len(facts)} facts cannot be traced with these settings (`runs.tracing.traceable` leaves them out). "
            f"The first: {others[0][1]}"
        )


@torch.no_grad()
def known(
    model: HookedModel, facts: Sequence[Fact], *, prepend_bos: bool | None = None, progress: Progress = silent
) -> list[Fact]:
    """The facts whose whole answer is what the model says, each of its tokens the most probable one after those before it, and
    those without an answer of their own. What does not fit the model's context is not known.

    The published code compares one decoded token with the whole answer, and so drops every answer of several tokens.
    """
    bos, size = resolve_bos(model, prepend_bos), 32
    asked = [(index, *both) for index, fact in enumerate(facts) if (both := _asked(model, fact, bos)) is not None]
    right = {index for index, _, answer in asked if not answer}
    asked = [each for each in asked if each[2]]
    for begin in range(0, len(asked), size):
        progress("asking the model", begin, len(asked))
        part = asked[begin : begin + size]
        said = _said(model, [(ids, answer) for _, ids, answer in part])
        right |= {index for (index, _, answer), tokens in zip(part, said, strict=True) if answer == tokens}
    progress("asking the model", len(asked), len(asked))
    return [fact for index, fact in enumerate(facts) if index in right]


def _asked(model: HookedModel, fact: Fact, bos: bool) -> tuple[list[int], list[int]] | None:
    """The tokens of a fact's prompt and of its answer, if any; None where they do not fit the model."""
    try:
        ids = encode(model, fact.prompt, prepend_bos=bos)[0]
        answer = continuation(model, fact.prompt, fact.target_true, fact.join) if fact.target_true else []
    except FactError:  # text that gives no tokens
        return None
    return (ids, answer) if len(ids) + len(answer[:-1]) <= int(model.cfg.n_ctx) else None


def _said(model: HookedModel, asked: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The model's most probable token in place of each one of an answer, after the answer's own tokens before it."""
    blocks = Blocks(model)
    resid = blocks.final(pad(model, [[*ids, *answer[:-1]] for ids, answer in asked]))
    places = [(row, len(ids) - 1 + step) for row, (ids, answer) in enumerate(asked) for step in range(len(answer))]
    rows, columns = torch.tensor(places, device=resid.device).T
    tokens = iter(blocks.logits(resid[rows, columns]).argmax(-1).tolist())
    return [[next(tokens) for _ in answer] for _, answer in asked]
