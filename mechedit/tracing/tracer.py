"""Trace facts: every cell of the grid of kinds, layers and positions, or any cells of one's own.

Whole traces are [layer, position, draw] a kind; any cells are [cell, draw]. Both are one sweep (`engine`), read by one measure
(`measures`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import corruption, models, provenance
from mechedit.corruption import Family, Statistics
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import Prompt, decoded
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing.baseline import Job
from mechedit.tracing.cells import STATES, WINDOWED, Cell, Component, resolve, restored_blocks, single
from mechedit.tracing.engine import GIGABYTE, Swept, sweep
from mechedit.tracing.measures import measured
from mechedit.tracing.preparation import Prepared, prepare
from mechedit.tracing.result import Trace
from mechedit.tracing.roles import roles

__all__ = ["grid", "in_precision", "restore", "run_jobs", "trace", "trace_all"]


def trace(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    components: Sequence[Component] = (),
    family: Family | None = None,
    statistics: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> Trace:
    """Trace one fact through every layer and token, exactly.

    The answer is the fact's `target_true`, or what the model itself says next where the fact has none. `components` are
    kinds of one's own, restored in windows; `family`, `statistics` and `other` are for `corruption.corrupt`.

    Raises:
        FactError: the prompt does not fit the model.
        SettingsError: settings that cannot be meant.
        ModelError: the model lacks an activation that a kind restores.
        CorruptionError: a corruption that cannot be made.
    """
    one = trace_all(
        model,
        [fact],
        settings,
        components=components,
        family=family,
        statistics=statistics,
        others=[other],
        progress=progress,
    )
    return next(one)


def trace_all(
    model: HookedModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    components: Sequence[Component] = (),
    family: Family | None = None,
    statistics: Statistics | None = None,
    others: Sequence[str | None] | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Iterator[Trace]:
    """Trace facts one after another, `batch` of them at a time: 1 keeps a CPU busy, a GPU wants more.

    Which facts share a batch changes numbers by rounding only. `others` has the subject that takes each one's place.

    Raises:
        SettingsError: settings that cannot be meant together; the rest as `trace`.
    """
    settings = resolve(model, settings)
    _check_asked(settings, components, facts, others, batch)
    return _trace_all(model, facts, settings, components, family, statistics, others, batch, progress)


def _trace_all(
    model: HookedModel,
    facts: Sequence[Fact],
    settings: TraceSettings,
    components: Sequence[Component],
    family: Family | None,
    statistics: Statistics | None,
    others: Sequence[str | None] | None,
    batch: int,
    progress: Progress,
) -> Iterator[Trace]:
    others = others or [None] * len(facts)
    statistics = statistics or corruption.needed(model, settings)
    origin, versions = provenance.origin(model), provenance.versions()
    n_layers = int(model.cfg.n_layers)
    for begin in range(0, len(facts), batch):
        began = time.perf_counter()
        part = [
            prepare(model, fact, settings, family=family, statistics=statistics, other=other)
            for fact, other in zip(facts[begin : begin + batch], others[begin : begin + batch], strict=True)
        ]
        grids = [grid(settings, components, n_layers, each.prompt) for each in part]
        jobs = [each.job([cell for _, cell in cells_]) for each, cells_ in zip(part, grids, strict=True)]
        found = run_jobs(model, jobs, settings, progress)
        seconds = (time.perf_counter() - began) / len(part)
        for each, cells_, log_p in zip(part, grids, found, strict=True):
            yield _trace(model, each, cells_, log_p, origin, versions, seconds)


def _check_asked(
    settings: TraceSettings,
    components: Sequence[Component],
    facts: Sequence[Fact],
    others: Sequence[str | None] | None,
    batch: int,
) -> None:
    """Raise for what would be passed over, or come out as something else than was asked for."""
    if batch < 1:
        raise SettingsError(f"batch must be at least 1 fact; found {batch}.")
    if others is not None and len(others) != len(facts):
        raise SettingsError(
            f"others must name a subject, or None, for each of {len(facts)} facts; it has {len(others)}."
        )
    names = [each.name for each in components]
    for name in names:
        if name in STATES or name in WINDOWED or names.count(name) > 1:
            raise SettingsError(
                f"a component of one's own must have a name of its own; {name!r} is a kind already, or twice there."
            )
        if name not in settings.kinds:
            raise SettingsError(
                f"the component {name!r} is not among kinds ({', '.join(settings.kinds)}), so nothing would restore it. "
                "Name it there, or leave it out."
            )


def _trace(
    model: HookedModel,
    prepared: Prepared,
    grid: list[tuple[tuple[int, int, int], Cell]],
    log_p: Swept,
    origin: dict[str, Any],
    versions: dict[str, str],
    seconds: float,
) -> Trace:
    prompt, settings = prepared.prompt, prepared.settings
    values = measured(settings, log_p.cells)
    shape = (len(settings.kinds), int(model.cfg.n_layers), len(prompt.ids), values.shape[-1])
    filled = values.new_full(shape, torch.nan)
    places = torch.tensor([place for place, _ in grid])
    filled[tuple(places.T)] = values
    draws = dict(zip(settings.kinds, filled, strict=True))
    return Trace(
        prompt=prompt.text,
        tokens=prompt.tokens,
        subject=prepared.fact.subject,
        subject_range=prompt.subject,
        relation=prepared.fact.relation,
        answer=decoded(model, prepared.answer_ids),
        answer_ids=prepared.answer_ids,
        corrupted_by=prepared.corrupted_by,
        p_clean=float(measured(settings, log_p.clean)),
        p_corrupted=float(measured(settings, log_p.corrupted).mean()),
        effects={kind: each.mean(-1) for kind, each in draws.items()},
        draws=draws,
        noise_std=prepared.noise_std,
        settings=settings,
        origin=origin,
        versions=versions,
        seconds=seconds,
        blanks=prepared.blanks,
        said=prepared.instead(model, log_p.first),
    )


def restore(
    model: HookedModel,
    fact: Fact,
    cells: Sequence[Cell] | Callable[[Prompt], Sequence[Cell]],
    settings: TraceSettings | None = None,
    *,
    family: Family | None = None,
    statistics: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> tuple[Float[Tensor, "cells draws"], float, Float[Tensor, " draws"]]:
    """What is measured in each of any cells, in the clean run, and in the corrupted runs.

    `cells` may be a function of the prompt, which knows where the subject stands.
    """
    settings = resolve(model, settings)
    prepared = prepare(model, fact, settings, family=family, statistics=statistics, other=other)
    chosen = cells(prepared.prompt) if callable(cells) else cells
    if isinstance(chosen, Cell) or not all(isinstance(each, Cell) for each in chosen):
        raise SettingsError("restore takes cells in a list, or a function of the prompt that returns such a list.")
    (found,) = run_jobs(model, [prepared.job(chosen)], settings, progress)
    return measured(settings, found.cells), float(measured(settings, found.clean)), measured(settings, found.corrupted)


def grid(
    settings: TraceSettings, components: Sequence[Component], n_layers: int, prompt: Prompt
) -> list[tuple[tuple[int, int, int], Cell]]:
    """Every cell of every kind, with its place as (kind, layer, position), for settings as `cells.resolve` gives them."""
    own, wanted = {each.name: each for each in components}, wanted_positions(settings, prompt)
    grid = []
    for number, kind in enumerate(settings.kinds):
        component = own.get(kind) or WINDOWED.get(kind) or STATES.get(kind)
        if component is None:
            raise SettingsError(
                f"kinds must be among {', '.join([*STATES, *WINDOWED, *own])}; {kind!r} is not. "
                "Pass a component of your own by that name in `components`."
            )
        for layer in range(n_layers):
            layers = restored_blocks(kind, layer, n_layers, settings)
            grid += [((number, layer, position), single(component, layers, position)) for position in wanted]
    return grid


def wanted_positions(settings: TraceSettings, prompt: Prompt) -> list[int]:
    """The positions whose roles are asked for, all by default.

    Raises:
        SettingsError: there are none.
    """
    named = enumerate(roles(len(prompt.ids), prompt.subject))
    wanted = [position for position, role in named if not settings.roles or role in settings.roles]
    if not wanted:
        raise SettingsError(f"no token of {prompt.text!r} has a role among {', '.join(settings.roles)}.")
    return wanted


def run_jobs(model: HookedModel, jobs: Sequence[Job], settings: TraceSettings, progress: Progress) -> list[Swept]:
    """The sweep of these jobs, in the number format and the memory that the settings give it.

    Only jobs that read as many tokens go through one sweep together; answers of several lengths take one each.

    Raises:
        ModelError: the clean run gives no finite logits.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault((len(job.corrupted), *(len(each.targets) for each in job.reads)), []).append(index)
    found: dict[int, Swept] = {}
    if settings.precision == "bfloat16":
        jobs = [replace(job, clean=_embedded(model, job)) for job in jobs]
    with in_precision(model, settings):
        for indices in alike.values():
            part = [jobs[index] for index in indices]
            _check_narrow(model, part[0])
            found |= zip(indices, sweep(model, part, progress, memory=int(settings.memory * GIGABYTE)), strict=True)
    for swept in found.values():
        check_finite(model, swept.clean)
    return [found[index] for index in range(len(jobs))]


@torch.no_grad()
def _check_narrow(model: HookedModel, job: Job) -> None:
    """Raise, before a sweep, for a model that overflows: only float16 is so narrow, so only it is asked."""
    if next(model.parameters()).dtype == torch.float16:
        blocks = models.Blocks(model)
        final = blocks.final(torch.tensor([job.ids], device=models.device_of(model)))
        check_finite(model, blocks.logits(final[:, job.reads[0].position]))


def _embedded(model: HookedModel, job: Job) -> Float[Tensor, "pos d_model"]:
    """The embeddings of a job's tokens in the number format that the model has now."""
    return models.embed(model, torch.tensor([list(job.ids)], device=models.device_of(model)))[0].float().cpu()


def check_finite(model: HookedModel, of_clean_run: Float[Tensor, "*any"]) -> None:
    """Raise where what the clean run gave is not finite.

    Raises:
        ModelError: it is not.
    """
    if not of_clean_run.isfinite().all():
        format_ = str(next(model.parameters()).dtype).removeprefix("torch.")
        raise models.ModelError(
            f"the clean run of {model.cfg.model_name} in {format_} gives logits that are not finite, so there is nothing to trace. "
            "Load it with dtype float32 or bfloat16; where it is, its weights are damaged."
        )


@contextlib.contextmanager
def in_precision(model: HookedModel, settings: TraceSettings) -> Iterator[None]:
    """The model in the number format that the settings ask for, for the length of a `with` block."""
    exact = settings.precision != "bfloat16"
    with contextlib.nullcontext() if exact else models.cast(model, torch.bfloat16):
        yield
