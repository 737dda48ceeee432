"""Trace many facts into a folder, resumably: whole traces, or severed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mechedit import corruption, provenance
from mechedit.cache import content_key
from mechedit.corruption import Statistics
from mechedit.facts import Fact
from mechedit.models import Blocks, HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import continuation, encode, pad, resolve_bos
from mechedit.runs.engines import Engine, Local
from mechedit.runs.store import Store, check_plain
from mechedit.settings import TraceSettings
from mechedit.tracing import Trace, trace
from mechedit.tracing.cells import resolve
from mechedit.tracing.severing import Severed, severed

__all__ = ["check_run", "finished", "known", "partners", "sever_facts", "trace_facts", "unit"]


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
    engine: Engine | None = None,
    progress: Progress = silent,
) -> list[Trace]:
    """The trace of each fact, from `folder` where it is there, computed (by `engine`, here by default) and saved otherwise.

    With `settings.corruption` "tokens" each subject gives way to one of the same relation and length; a fact without such a
    partner is left out.

    Raises:
        RunError: the folder holds a run of other settings, or another process works in it.
    """
    settings, statistics, what = _run(model, settings, statistics)
    others = partners(model, facts, settings)
    by_unit = {unit(fact, other): (fact, other) for fact, other in others}
    store: Store[Trace] = Store(folder, what, Trace.load, Trace.save)

    task = _Tracing(by_unit, settings, statistics)
    return store.run([unit(*each) for each in others], task, engine or Local(model), progress)


@dataclass(frozen=True)
class _Tracing:
    """The trace of a unit's fact, given the subject that takes its subject's place, if any."""

    by_unit: dict[str, tuple[Fact, str | None]]
    settings: TraceSettings
    statistics: Statistics

    def __call__(self, model: HookedModel, name: str) -> Trace:
        fact, other = self.by_unit[name]
        return trace(model, fact, self.settings, statistics=self.statistics, other=other)


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
    others = partners(model, facts, settings)
    by_unit = {unit(fact, other): (fact, other) for fact, other in others}
    store: Store[Severed] = Store(folder, what | {"shared_draws": shared_draws}, Severed.load, Severed.save)

    task = _Severing(by_unit, settings, statistics, shared_draws)
    return store.run([unit(*each) for each in others], task, engine or Local(model), progress)


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
    """How many of these facts, each with its partner, have a file in a run's folder."""
    return sum((Path(folder) / "units" / f"{unit(*pair)}.safetensors").is_file() for pair in pairs)


def partners(model: HookedModel, facts: Sequence[Fact], settings: TraceSettings) -> list[tuple[Fact, str | None]]:
    """Each fact with the subject that takes its subject's place, where the corruption is other tokens."""
    if settings.corruption != "tokens":
        return [(fact, None) for fact in facts]
    found = [(fact, corruption.partner(model, fact, facts, seed=settings.seed)) for fact in facts]
    return [(fact, other) for fact, other in found if other is not None]


@torch.no_grad()
def known(
    model: HookedModel, facts: Sequence[Fact], *, prepend_bos: bool | None = None, progress: Progress = silent
) -> list[Fact]:
    """The facts whose answer's first token is what the model finds most probable, and those without an answer of their own.

    The published code compares one decoded token with the whole answer, and so drops every answer of several tokens.
    """
    bos = resolve_bos(model, prepend_bos)
    blocks, size = Blocks(model), 32
    asked = [fact for fact in facts if fact.target_true]
    wrong = set()
    for begin in range(0, len(asked), size):
        progress("asking the model", begin, len(asked))
        part = asked[begin : begin + size]
        ids = [encode(model, fact.prompt, prepend_bos=bos)[0] for fact in part]
        resid = blocks.final(pad(model, ids))
        last = torch.tensor([len(row) - 1 for row in ids], device=resid.device)
        said = blocks.logits(resid[torch.arange(len(ids), device=resid.device), last]).argmax(-1).tolist()
        wrong |= {
            fact
            for fact, token in zip(part, said, strict=True)
            if continuation(model, fact.prompt, str(fact.target_true), fact.join)[0] != token
        }
    progress("asking the model", len(asked), len(asked))
    return [fact for fact in facts if fact not in wrong]
