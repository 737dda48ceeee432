"""Where does the model recall a fact? Causal tracing (Meng et al. 2022, section 2.1).

Three kinds of run give an answer's probability: clean; corrupted, with noise on the subject's embeddings; and corrupted
with some clean activations put back. What raises the probability there carries the fact. `trace` runs the grid of all layers
and tokens; `restore` runs any cells; `severed` and `averages` and `attribution` beside this module build on them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import corruption, files, models, prompts, provenance
from mechedit.corruption import Family, Statistics
from mechedit.facts import Fact, FactError, check_fact
from mechedit.models import HookedModel, device_of
from mechedit.progress import Progress, silent
from mechedit.prompts import Prompt
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import cells
from mechedit.tracing.cells import Cell, Component, Patch, resolve, single, window
from mechedit.tracing.engine import GIGABYTE, Job, Read, Swept, sweep
from mechedit.tracing.roles import roles

__all__ = ["Cell", "Component", "Patch", "Prepared", "Trace", "TraceSettings", "grid", "in_precision", "measured", "prepare", "restore", "single", "trace", "trace_all", "window"]  # fmt: skip

STATES = {"resid": cells.RESID_POST, "resid_pre": cells.RESID_PRE, "resid_mid": cells.RESID_MID}
WINDOWED = {"mlp": cells.MLP_OUT, "attn": cells.ATTN_OUT}


@dataclass(frozen=True, repr=False)
class Trace:
    """A causal trace of one fact.

    `effects[kind]` is [layer, position]: the mean over draws of what is measured (P of the answer's first token, unless
    `settings.measure` says otherwise) with that state, or the window of outputs around that layer, restored at that
    position; nan where `settings.roles` left a position out. `draws[kind]` is [layer, position, draw]. `p_clean` and
    `p_corrupted` are the same measure of the other two runs. `corrupted_by` says what the settings do not: a family of noise
    of one's own, whose sigma it is, the subject that took the subject's place.
    """

    prompt: str
    tokens: tuple[str, ...]
    subject: str
    subject_range: tuple[int, int]
    relation: str | None
    answer: str
    answer_ids: tuple[int, ...]
    corrupted_by: str
    p_clean: float
    p_corrupted: float
    effects: dict[str, Float[Tensor, "layer position"]]
    draws: dict[str, Float[Tensor, "layer position draw"]]
    noise_std: float
    settings: TraceSettings
    origin: dict[str, Any]
    versions: dict[str, str]
    seconds: float = field(default=math.nan, compare=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """The token role of each position."""
        return roles(len(self.tokens), self.subject_range)

    @property
    def label(self) -> str:
        """What was measured, in a few words: P(Seattle)."""
        measure, answer = self.settings.measure, self.answer.strip()
        if measure == "logit_difference":
            return f"logit({answer}) less the other's"
        if measure != "p_answer" and len(self.answer_ids) > 1:
            answer = f"first token of {answer}"
        return f"log P({answer})" if measure == "log_p" else f"P({answer})"

    def __repr__(self) -> str:
        kinds = ", ".join(self.effects)
        return f"Trace({self.prompt!r}: {self.label} = {self.p_clean:.3f} clean, {self.p_corrupted:.3f} corrupted; {kinds})"

    def to_json(self) -> dict[str, Any]:
        """What `mechedit trace --json` writes."""
        return self._record() | {
            "effects": {
                kind: [[None if value != value else value for value in row] for row in grid.tolist()]
                for kind, grid in self.effects.items()
            },
            "seconds": self.seconds,
        }

    def _record(self) -> dict[str, Any]:
        return {
            "model": self.origin["name"],
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "subject": self.subject,
            "subject_range": list(self.subject_range),
            "relation": self.relation,
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "corrupted_by": self.corrupted_by,
            "p_clean": self.p_clean,
            "p_corrupted": self.p_corrupted,
            "noise_std": self.noise_std,
            "settings": asdict(self.settings),
            "origin": self.origin,
            "versions": self.versions,
        }

    def save(self, path: str | Path) -> Path:
        """Write the trace, draws included, as one safetensors file. The same trace gives the same bytes."""
        return files.write(path, "trace", {f"draws.{kind}": grid for kind, grid in self.draws.items()}, self._record())

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or something else.
        """
        tensors, record = files.read(path, "trace")
        try:
            settings = TraceSettings.from_json(record["settings"])
            draws = {kind: tensors[f"draws.{kind}"] for kind in settings.kinds}
            return Trace(
                prompt=record["prompt"],
                tokens=tuple(record["tokens"]),
                subject=record["subject"],
                subject_range=(record["subject_range"][0], record["subject_range"][1]),
                relation=record["relation"],
                answer=record["answer"],
                answer_ids=tuple(record["answer_ids"]),
                corrupted_by=record["corrupted_by"],
                p_clean=record["p_clean"],
                p_corrupted=record["p_corrupted"],
                effects={kind: grid.mean(-1) for kind, grid in draws.items()},
                draws=draws,
                noise_std=record["noise_std"],
                settings=settings,
                origin=record["origin"],
                versions=record["versions"],
            )
        except (KeyError, TypeError, IndexError, SettingsError) as error:
            raise files.FileError(
                f"{path} is a trace that lacks something, or has what is not known: {error}."
            ) from error


@dataclass(frozen=True)
class Prepared:
    """A fact made ready to run: its tokens, answer, the embeddings of its corrupted runs, and what is read."""

    fact: Fact
    prompt: Prompt
    answer_ids: tuple[int, ...]
    ids: tuple[int, ...]
    corrupted: Float[Tensor, "draws pos d_model"]
    noise_std: float
    corrupted_by: str
    reads: tuple[Read, ...]
    settings: TraceSettings

    def job(self, cells: Sequence[Cell], held_shift: int = 0) -> Job:
        """A sweep of these cells."""
        return Job(self.ids, self.corrupted, self.reads, tuple(cells), held_shift)


def trace(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    components: Sequence[Component] = (),
    family: Family | None = None,
    known: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> Trace:
    """Trace one fact through every layer and token, exactly.

    The answer is the fact's `target_true`, or what the model itself says next where the fact has none. `components` are
    kinds of one's own, restored in windows; `family`, `known` and `other` are for `corruption.corrupt`.

    Raises:
        FactError: the prompt does not fit the model.
        SettingsError: settings that cannot be meant.
        ModelError: the model lacks an activation that a kind restores.
        CorruptionError: a corruption that cannot be made.
    """
    one = trace_all(
        model, [fact], settings, components=components, family=family, known=known, others=[other], progress=progress
    )
    return next(one)


def trace_all(
    model: HookedModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    components: Sequence[Component] = (),
    family: Family | None = None,
    known: Statistics | None = None,
    others: Sequence[str | None] | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> Iterator[Trace]:
    """Trace facts one after another, `batch` of them at a time: 1 keeps a CPU busy, a GPU wants more.

    Which facts share a batch changes numbers by rounding only.
    """
    settings = resolve(model, settings)
    others = others or [None] * len(facts)
    known = known or corruption.needed(model, settings)
    origin, versions = provenance.origin(model), provenance.versions()
    n_layers = int(model.cfg.n_layers)
    for begin in range(0, len(facts), batch):
        began = time.perf_counter()
        part = [
            prepare(model, fact, settings, family=family, known=known, other=other)
            for fact, other in zip(facts[begin : begin + batch], others[begin : begin + batch], strict=True)
        ]
        grids = [grid(settings, components, n_layers, each.prompt) for each in part]
        jobs = [each.job([cell for _, cell in cells_]) for each, cells_ in zip(part, grids, strict=True)]
        with in_precision(model, settings):
            found = sweep(model, jobs, progress, memory=int(settings.memory * GIGABYTE))
        seconds = (time.perf_counter() - began) / len(part)
        for each, cells_, swept in zip(part, grids, found, strict=True):
            yield _trace(model, each, cells_, swept, settings, origin, versions, seconds)


def _trace(
    model: HookedModel,
    prepared: Prepared,
    grid: list[tuple[tuple[int, int, int], Cell]],
    swept: Swept,
    settings: TraceSettings,
    origin: dict[str, Any],
    versions: dict[str, str],
    seconds: float,
) -> Trace:
    prompt = prepared.prompt
    values = measured(settings, swept.cells)
    shape = (len(settings.kinds), int(model.cfg.n_layers), len(prompt.ids), values.shape[-1])
    filled = torch.full(shape, torch.nan)
    places = torch.tensor([place for place, _ in grid])
    filled[tuple(places.T)] = values
    draws = dict(zip(settings.kinds, filled, strict=True))
    return Trace(
        prompt=prompt.text,
        tokens=prompt.tokens,
        subject=prepared.fact.subject,
        subject_range=prompt.subject,
        relation=prepared.fact.relation,
        answer=str(model.tokenizer.decode(list(prepared.answer_ids))),
        answer_ids=prepared.answer_ids,
        corrupted_by=prepared.corrupted_by,
        p_clean=float(measured(settings, swept.clean)),
        p_corrupted=float(measured(settings, swept.corrupted).mean()),
        effects={kind: each.mean(-1) for kind, each in draws.items()},
        draws=draws,
        noise_std=prepared.noise_std,
        settings=settings,
        origin=origin,
        versions=versions,
        seconds=seconds,
    )


def restore(
    model: HookedModel,
    fact: Fact,
    cells: Sequence[Cell] | Callable[[Prompt], Sequence[Cell]],
    settings: TraceSettings | None = None,
    *,
    family: Family | None = None,
    known: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> tuple[Float[Tensor, "cells draws"], float, Float[Tensor, " draws"]]:
    """What is measured in each of any cells, in the clean run, and in the corrupted runs.

    `cells` may be a function of the prompt, which knows where the subject stands.
    """
    settings = resolve(model, settings)
    prepared = prepare(model, fact, settings, family=family, known=known, other=other)
    chosen = cells(prepared.prompt) if callable(cells) else cells
    with in_precision(model, settings):
        (swept,) = sweep(model, [prepared.job(chosen)], progress, memory=int(settings.memory * GIGABYTE))
    return (
        measured(settings, swept.cells),
        float(measured(settings, swept.clean)),
        measured(settings, swept.corrupted),
    )


def prepare(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings,
    *,
    family: Family | None = None,
    known: Statistics | None = None,
    other: str | None = None,
) -> Prepared:
    """The fact as tokens and corrupted embeddings, with the reads that `settings.measure` needs."""
    check_fact(fact)
    prompt = prompts.prepare(model, fact, prepend_bos=settings.prepend_bos)
    answer = (
        prompts.continuation(model, fact.prompt, fact.target_true) if fact.target_true else [_top(model, prompt.ids)]
    )
    known = known or corruption.needed(model, settings)
    corrupted, scale = corruption.corrupt(model, fact, prompt, settings, known=known, family=family, other=other)
    by = corruption.describe(settings, known, family, other)
    last = len(prompt.ids) - 1
    ids = prompt.ids
    if settings.measure == "p_answer":
        ids = (*ids, *answer[:-1])
        prompts.check_length(model, len(ids))
        tail = torch.tensor([ids[len(prompt.ids) :]], dtype=torch.long, device=device_of(model))
        clean_tail = models.embed(model, tail).float().cpu().expand(len(corrupted), -1, -1)
        corrupted = torch.cat([corrupted, clean_tail], 1)
        reads = tuple(Read(last + step, (token,)) for step, token in enumerate(answer))
    elif settings.measure == "logit_difference":
        if not fact.target_new:
            raise FactError("a logit difference needs a second answer: give the fact a `target_new`.")
        second = prompts.continuation(model, fact.prompt, fact.target_new)[0]
        if second == answer[0]:
            raise FactError(
                f"{fact.target_true!r} and {fact.target_new!r} begin with the same token, so their logits do not differ."
            )
        reads = (Read(last, (answer[0], second)),)
    else:
        reads = (Read(last, (answer[0],)),)
    return Prepared(fact, prompt, tuple(answer), ids, corrupted, scale, by, reads, settings)


def measured(settings: TraceSettings, log_p: Float[Tensor, "*runs targets"]) -> Float[Tensor, "*runs"]:
    """`settings.measure` from the log-probabilities that were read.

    p: of the answer's first token; p_answer: of all its tokens, teacher-forced; log_p: natural logarithm of p;
    logit_difference: the answer's logit less the other answer's, first tokens.
    """
    if settings.measure == "p_answer":
        return log_p.sum(-1).exp()
    if settings.measure == "logit_difference":
        return log_p[..., 0] - log_p[..., 1]  # the normaliser is the same in both
    return log_p[..., 0] if settings.measure == "log_p" else log_p[..., 0].exp()


def grid(
    settings: TraceSettings, components: Sequence[Component], n_layers: int, prompt: Prompt
) -> list[tuple[tuple[int, int, int], Cell]]:
    """Every cell of every kind, with its place as (kind, layer, position), for settings as `cells.resolve` gives them."""
    own = {each.name: each for each in components}
    n_positions = len(prompt.ids)
    wanted = [
        position
        for position, role in enumerate(roles(n_positions, prompt.subject))
        if not settings.roles or role in settings.roles
    ]
    if not wanted:
        raise SettingsError(f"no token of {prompt.text!r} has a role among {', '.join(settings.roles)}.")
    grid = []
    for number, kind in enumerate(settings.kinds):
        component = own.get(kind) or WINDOWED.get(kind) or STATES.get(kind)
        if component is None:
            raise SettingsError(
                f"kinds must be among {', '.join([*STATES, *WINDOWED, *own])}; {kind!r} is not. "
                "Pass a component of your own by that name in `components`."
            )
        for layer in range(n_layers):
            layers = [layer] if kind in STATES else window(layer, settings.window, n_layers, settings.centre)
            grid += [((number, layer, position), single(component, layers, position)) for position in wanted]
    return grid


def in_precision(model: HookedModel, settings: TraceSettings) -> contextlib.AbstractContextManager[None]:
    """The model in the number format that the settings ask for, for the length of a `with` block."""
    return models.cast(model, torch.bfloat16) if settings.precision == "bfloat16" else contextlib.nullcontext()


@torch.no_grad()
def _top(model: HookedModel, ids: tuple[int, ...]) -> int:
    """The token the model finds most probable next."""
    tokens: Int[Tensor, "1 pos"] = torch.tensor([list(ids)], device=device_of(model))
    return int(model(tokens)[0, -1].argmax())
