"""The exact sweep behind a causal trace: every cell, computed only where it differs from the corrupted run.

A cell restores clean activations of the corrupted run, at position i and perhaps later ones, from block l on. Below block l
it *is* the corrupted run, and so is every position before i in all blocks. So the sweep takes one first position at a time
and walks up the blocks once: at each block the cells that start there join the batch, in the state of the corrupted run, and
all cells run together on positions i and later, attending to the corrupted run's keys and values for what lies before. Cells
that do the same up to some block, as windows cut off at the model's foot, share their rows until they part. Only positions
that are read are unembedded. Nothing is approximated: a cell is what one forward pass with hooks gives, to rounding.

Several prompts of any length ride in one batch, filled on the right, where causal attention lets nothing look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.models import HookedModel, ModelError, alone, check_plain
from mechedit.progress import Progress, silent
from mechedit.settings import SettingsError
from mechedit.tracing.baseline import Job, Runs, bytes_kept
from mechedit.tracing.cells import COMPONENTS, POST, Cell, Component, Patch, Z, check_index
from mechedit.tracing.passes import Effect, Member, Pass, is_local

__all__ = ["GIGABYTE", "Swept", "sweep"]

GIGABYTE = 1 << 30


@dataclass(frozen=True, eq=False)
class Swept:
    """What each read finds of its targets, log P or logits, one after another: in the clean run, the corrupted ones, and each
    cell; and the clean run's most probable token, with its P, where it was asked for."""

    clean: Float[Tensor, " targets"]
    corrupted: Float[Tensor, "draws targets"]
    cells: Float[Tensor, "cells draws targets"]
    first: tuple[int, float] | None = None


@torch.no_grad()
def sweep(
    model: HookedModel, jobs: Sequence[Job], progress: Progress = silent, *, memory: int = 2 * GIGABYTE
) -> list[Swept]:
    """Every cell of every job, exactly, within about `memory` bytes beside the model.

    Draws and jobs that do not fit together are swept in turn, each with runs of its own.

    Raises:
        ModelError: the model has no such activation, block or part, or there are hooks on it.
        SettingsError: one draw of one job does not fit.
    """
    check_plain(model)
    _check(model, jobs)
    parts = _parts(model, jobs, memory)
    found: list[list[Swept]] = [[] for _ in jobs]
    with alone(model):
        for number, (which, draws) in enumerate(parts):

            def part_of(what: str, done: int, of: int, number: int = number) -> None:
                progress(what, number * of + done, len(parts) * of)

            part = [_with_draws(jobs[index], draws) for index in which]
            for index, each in zip(which, _sweep(model, part, part_of, memory), strict=True):
                found[index].append(
                    replace(each, corrupted=each.corrupted[: len(draws)], cells=each.cells[:, : len(draws)])
                )
    return [
        replace(
            each[0],
            corrupted=torch.cat([part.corrupted for part in each]),
            cells=torch.cat([part.cells for part in each], 1),
        )
        for each in found
    ]


def _parts(model: HookedModel, jobs: Sequence[Job], memory: int) -> list[tuple[list[int], range]]:
    """Which jobs and which of their draws are swept together, so that what is kept of them takes half of the memory.

    A draw of another's held values is run with its own.
    """
    n, most = len(jobs[0].corrupted), memory // 2
    length = max(len(job.ids) for job in jobs)
    clean, each = bytes_kept(model, jobs, length)
    more = max(job.held_shift % n for job in jobs)
    if len(jobs) * (clean + n * each) <= most:
        return [(list(range(len(jobs))), range(n))]
    if (together := most // (clean + n * each)) > 0:
        return [(list(range(len(jobs)))[at : at + together], range(n)) for at in range(0, len(jobs), together)]
    draws = (most - clean) // each - more
    needed = clean + (1 + more) * each + _bytes_of_a_member(model, 1 + more, length)
    if draws < 1 and needed > memory:
        raise SettingsError(
            f"memory must be at least {needed / GIGABYTE:.2g} gigabytes for a prompt of {length} tokens on {model.cfg.model_name}, "
            f"whose states are kept; found {memory / GIGABYTE:.2g}."
        )
    draws = max(1, draws)
    return [([job], range(at, min(at + draws, n))) for job in range(len(jobs)) for at in range(0, n, draws)]


def _with_draws(job: Job, draws: range) -> Job:
    """The job with these draws, and after them those whose values they hold."""
    n = len(job.corrupted)
    if len(draws) == n:
        return job
    more = job.held_shift % n
    return replace(
        job, corrupted=job.corrupted[[at % n for at in range(draws.start, draws.stop + more)]], held_shift=more
    )


def _sweep(model: HookedModel, jobs: Sequence[Job], progress: Progress, memory: int) -> list[Swept]:
    runs = Runs.of(model, jobs, memory)
    results = [
        Swept(clean, own, own.repeat(len(each.cells), 1, 1), runs.first(job))
        for job, (each, clean, own) in enumerate(zip(jobs, runs.clean_read, runs.corrupted_read, strict=True))
    ]
    members = [
        Member(job, index, effect)
        for job, each in enumerate(jobs)
        for index, cell in enumerate(each.cells)
        if (effect := _effect(cell, each, runs.begins[job], int(model.cfg.n_layers))) is not None
    ]
    by_position: dict[int, list[Member]] = {}
    for member in members:
        by_position.setdefault(member.effect.position, []).append(member)
    done, total = 0, len(members)
    for position, here in sorted(by_position.items()):
        here.sort(key=lambda member: (member.job, member.effect.start, len(member.effect.restored)))
        most = _members_at_once(model, runs, position, memory)
        for begin in range(0, len(here), most):
            progress("trace", done, total)
            part = here[begin : begin + most]
            walk = Pass(runs, part, position, memory)
            for member, found in zip(walk.members, walk.found(), strict=True):
                results[member.job].cells[member.cell] = found
            done += len(part)
    progress("trace", total, total)
    return results


def _check(model: HookedModel, jobs: Sequence[Job]) -> None:
    """Raise before any forward pass where a cell names what is not there."""
    n_layers = int(model.cfg.n_layers)
    assert len({len(job.corrupted) for job in jobs}) == 1
    assert len({tuple(len(each.targets) for each in job.reads) for job in jobs}) == 1
    seen: set[tuple[Component, int]] = set()
    for job in jobs:
        assert job.corrupted.shape[1] == len(job.ids)
        for cell in job.cells:
            for patch in (*cell.restored, *cell.held):
                if not 0 <= patch.position < len(job.ids):
                    raise ModelError(
                        f"a patch must stand at a position from 0 to {len(job.ids) - 1}; found {patch.position}."
                    )
                check_index(patch, _width(model, patch.component))
                if (patch.component, patch.layer) in seen:
                    continue
                if not 0 <= patch.layer < n_layers:
                    raise ModelError(f"a patch must be in a block from 0 to {n_layers - 1}; found {patch.layer}.")
                if patch.component.enters is None and patch.component.at(patch.layer) not in model.hook_dict:
                    raise ModelError(
                        f"{model.cfg.model_name} has no {patch.component.name}: there is no hook point "
                        f"{patch.component.at(patch.layer)}. `model.hook_dict` has those there are."
                    )
                seen.add((patch.component, patch.layer))


def _width(model: HookedModel, component: Component) -> int | None:
    """How many parts an activation has that `index` picks from; None of a component that mechedit does not know."""
    if component not in COMPONENTS.values():
        return None
    return int({Z: model.cfg.n_heads, POST: model.cfg.d_mlp}.get(component, model.cfg.d_model))


def _effect(cell: Cell, job: Job, begin: int, n_layers: int) -> Effect | None:
    """The cell without what changes nothing; None if all of it is that.

    Before `begin`, where corruption begins, the clean and all corrupted runs are the same. What is held at the run's own
    values changes nothing before something is restored; held at another draw's, it does. Above the keys and values of the
    last block, only positions that are read count.
    """
    read = {each.position for each in job.reads}

    def matters(patch: Patch) -> bool:
        above = patch.start == n_layers or (patch.start == n_layers - 1 and is_local(patch))
        return patch.position >= begin and (patch.position in read or not above)

    restored, held = (tuple(filter(matters, patches)) for patches in (cell.restored, cell.held))
    moving = (*restored, *held) if job.held_shift % len(job.corrupted) else restored
    if not moving:
        return None
    position, start = min(patch.position for patch in moving), min(patch.start for patch in moving)
    held = tuple(patch for patch in held if patch.position >= position and patch.start >= start)
    return Effect(position, start, restored, held)


def _members_at_once(model: HookedModel, runs: Runs, position: int, memory: int) -> int:
    """How many cells fit beside the kept runs: each needs its rows' states twice, and what it restores."""
    width = runs.states[0].shape[1] - position
    return max(1, (memory // 2 - runs.bytes // 2) // _bytes_of_a_member(model, runs.draws, width))


def _bytes_of_a_member(model: HookedModel, draws: int, width: int) -> int:
    size, d_model = next(model.parameters()).element_size(), int(model.cfg.d_model)
    return 2 * draws * (width + int(model.cfg.n_layers)) * d_model * size
