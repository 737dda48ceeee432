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

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit.interventions import Change, intervened
from mechedit.models import HookedModel, ModelError, alone, check_plain
from mechedit.progress import Progress, silent
from mechedit.tracing.baseline import Job, Runs
from mechedit.tracing.cells import Cell, Component, Patch

__all__ = ["GIGABYTE", "Swept", "sweep"]

GIGABYTE = 1 << 30
ROW_TOKENS = 1024  # rows times positions in one call of a block: enough to keep a matmul busy, little enough to hold


@dataclass(frozen=True, eq=False)
class Swept:
    """log P of every read's targets, one after another: in the clean run, the corrupted ones, and each cell."""

    clean: Float[Tensor, " targets"]
    corrupted: Float[Tensor, "draws targets"]
    cells: Float[Tensor, "cells draws targets"]


@torch.no_grad()
def sweep(
    model: HookedModel, jobs: Sequence[Job], progress: Progress = silent, *, memory: int = 2 * GIGABYTE
) -> list[Swept]:
    """Every cell of every job, exactly, within about `memory` bytes beside the model.

    Raises:
        ModelError: the model has no such activation, block or part, or there are hooks on it.
    """
    check_plain(model)
    _check(model, jobs)
    with alone(model):
        return _sweep(model, jobs, progress, memory)


def _sweep(model: HookedModel, jobs: Sequence[Job], progress: Progress, memory: int) -> list[Swept]:
    runs = Runs.of(model, jobs)
    results = [
        Swept(runs.clean_log_p[job], runs.corrupted_log_p[job], runs.corrupted_log_p[job].repeat(len(each.cells), 1, 1))
        for job, each in enumerate(jobs)
    ]
    members = [
        _Member(job, index, effect)
        for job, each in enumerate(jobs)
        for index, cell in enumerate(each.cells)
        if (effect := _effect(cell, runs.begins[job], each.held_shift % runs.draws != 0)) is not None
    ]
    by_position: dict[int, list[_Member]] = {}
    for member in members:
        by_position.setdefault(member.effect.position, []).append(member)
    done, total = 0, len(members)
    for position, here in sorted(by_position.items()):
        here.sort(key=lambda member: (member.job, member.effect.start, len(member.effect.restored)))
        most = _members_at_once(model, runs, position, memory)
        for begin in range(0, len(here), most):
            progress("trace", done, total)
            part = here[begin : begin + most]
            walk = _Pass(runs, part, position, memory)
            for member, log_p in zip(walk.members, walk.log_p(), strict=True):
                results[member.job].cells[member.cell] = log_p
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


@dataclass(frozen=True)
class _Effect:
    """What of a cell changes anything, and the first position and block that it changes."""

    position: int
    start: int
    restored: tuple[Patch, ...]
    held: tuple[Patch, ...]


def _effect(cell: Cell, begin: int, shifted: bool) -> _Effect | None:
    """The cell without what changes nothing; None if all of it is that.

    Before `begin`, where corruption begins, the clean and all corrupted runs are the same. What is held at the run's own
    values changes nothing before something is restored; held at another draw's (`shifted`), it does.
    """
    restored = tuple(patch for patch in cell.restored if patch.position >= begin)
    held = tuple(patch for patch in cell.held if patch.position >= begin)
    moving = (*restored, *held) if shifted else restored
    if not moving:
        return None
    position, start = min(patch.position for patch in moving), min(patch.start for patch in moving)
    held = tuple(patch for patch in held if patch.position >= position and patch.start >= start)
    return _Effect(position, start, restored, held)


@dataclass(frozen=True)
class _Member:
    """A cell of a job, as a pass sees it."""

    job: int
    cell: int
    effect: _Effect


def _members_at_once(model: HookedModel, runs: Runs, position: int, memory: int) -> int:
    """How many cells fit beside the kept runs: each needs its rows' states twice, and what it restores."""
    kept = [*runs.states, *runs.clean_states, *runs.clean.values(), *runs.corrupted.values()]
    kept += [each for past in runs.past for each in (past.keys, past.values)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    width, size = runs.states[0].shape[1] - position, runs.states[0].element_size()
    each = 2 * runs.draws * width * int(model.cfg.d_model) * size
    patches = 2 * runs.draws * int(model.cfg.n_layers) * int(model.cfg.d_model) * size
    return max(1, (memory // 2 - held) // (each + patches))


class _Writes:
    """What cells write into one activation of one block: at row, position and part; rows ascend."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, Tensor, tuple[int, ...] | None]] = []

    def add(self, row: int, position: int, values: Tensor, index: tuple[int, ...] | None) -> None:
        """`values` [draw, ...] go to the rows from `row` on."""
        self.entries.append((row, position, values, index))

    def into(self, activation: Tensor, begin: int, width: int) -> Tensor | None:
        """A copy of the activation of rows from `begin` on with its writes, or None where it has none.

        `width` positions are computed; an activation that has more (rotated keys have all) has them at its end.
        """
        if not self._between(begin, begin + len(activation)):
            return None
        whole = activation.clone()
        self.write_(whole[:, activation.shape[1] - width :], begin)
        return whole

    def _between(self, begin: int, end: int) -> list[tuple[int, int, Tensor, tuple[int, ...] | None]]:
        first = bisect_left(self.entries, begin, key=lambda entry: entry[0] + len(entry[2]) - 1)
        return self.entries[first : bisect_left(self.entries, end, key=lambda entry: entry[0])]

    def write_(self, activation: Tensor, begin: int) -> Tensor:
        """Write into the activation of rows from `begin` on."""
        end = begin + len(activation)
        for row, position, values, index in self._between(begin, end):
            rows = slice(max(row, begin) - begin, min(row + len(values), end) - begin)
            values = values[max(0, begin - row) : end - row].to(activation)
            if index is None:
                activation[rows, position] = values
            else:
                part = list(index)
                activation[rows, position, part] = values[:, part]
        return activation


class _Pass:
    """The cells of one first position, walked up the blocks together: rows are cells times draws, by joining block."""

    def __init__(self, runs: Runs, members: Sequence[_Member], position: int, memory: int) -> None:
        self.runs, self.position = runs, position
        joining = sorted(_forks(members), key=lambda fork: fork.layer)
        self.members = [fork.member for fork in joining]
        self.joins = [fork.layer for fork in joining]
        places = {id(fork.member): index for index, fork in enumerate(joining)}
        self.parents = [places[id(fork.parent)] if fork.parent is not None else None for fork in joining]
        self.row_tokens = min(ROW_TOKENS, max(64, memory // 2 // _bytes_a_token(runs.model)))
        self.states: dict[int, _Writes] = {}
        self.hooks: dict[tuple[Component, int], _Writes] = {}
        for place, member in enumerate(self.members):
            for patch in member.effect.held:
                self._plan(place, member, patch, self._held(member, patch))
            for patch in member.effect.restored:  # after what is held: where both name a place, it is restored
                self._plan(place, member, patch, self._clean(member, patch))

    def _plan(self, place: int, member: _Member, patch: Patch, values: Tensor) -> None:
        writes = (
            self.hooks.setdefault((patch.component, patch.layer), _Writes())
            if patch.component.enters is None
            else self.states.setdefault(patch.start, _Writes())
        )
        writes.add(place * self.runs.draws, patch.position - self.position, values, patch.index)

    def _clean(self, member: _Member, patch: Patch) -> Tensor:
        runs = self.runs
        whole = (
            runs.clean[patch.component, patch.layer]
            if patch.component.enters is None
            else runs.clean_states[patch.start]
        )
        value = whole[member.job, patch.position]
        return value.expand(runs.draws, *value.shape)

    def _held(self, member: _Member, patch: Patch) -> Tensor:
        runs = self.runs
        whole = (
            runs.corrupted[patch.component, patch.layer] if patch.component.enters is None else runs.states[patch.start]
        )
        values = whole[member.job * runs.draws : (member.job + 1) * runs.draws, patch.position]
        shift = runs.jobs[member.job].held_shift
        return values.roll(-shift, 0) if shift else values

    def log_p(self) -> Float[Tensor, "cells draws targets"]:
        """What every member's job reads."""
        runs, draws = self.runs, self.runs.draws
        jobs = torch.tensor([member.job for member in self.members]).repeat_interleave(draws)
        final = self._final_states()
        found = rearrange(
            runs.log_p(final, jobs, self.position), "(cell draw) target -> cell draw target", draw=draws
        ).cpu()
        column = 0
        for number, read_ in enumerate(runs.jobs[0].reads):
            for place, member in enumerate(self.members):
                if runs.jobs[member.job].reads[number].position < self.position:
                    here = slice(column, column + len(read_.targets))
                    found[place, :, here] = runs.corrupted_log_p[member.job, :, here]
            column += len(read_.targets)
        return found

    def _final_states(self) -> Float[Tensor, "rows pos d_model"]:
        runs, n_layers = self.runs, int(self.runs.model.cfg.n_layers)
        device = runs.states[0].device
        source = torch.tensor(  # the corrupted run of each row
            [member.job * runs.draws + draw for member in self.members for draw in range(runs.draws)], device=device
        )
        rows = runs.states[0][:0, self.position :]
        at = 0  # the first row of the block call under way

        def writing(writes: _Writes) -> Callable[[Tensor], Tensor | None]:
            return lambda activation: writes.into(activation, at, rows.shape[1])

        changes = [Change(component.at(layer), writing(writes)) for (component, layer), writes in self.hooks.items()]
        with intervened(runs.model, *changes):
            for layer in range(self.joins[0], n_layers + 1):
                active = bisect_left(self.joins, layer + 1) * runs.draws
                if active > len(rows):
                    rows = torch.cat([rows, *self._joining(layer, rows, source)])
                if layer in self.states:
                    self.states[layer].write_(rows, 0)
                if layer == n_layers:
                    break
                past = runs.past[layer].before(self.position)
                step = max(1, self.row_tokens // rows.shape[1])
                out = torch.empty_like(rows)
                for at in range(0, len(rows), step):  # which the hooks read
                    part = slice(at, at + step)
                    here = past.rows(source[:active][part]) if self.position else None
                    out[part], _ = runs.blocks.run(layer, rows[part], here)
                rows = out
        return rows

    def _joining(self, layer: int, rows: Tensor, source: Tensor) -> Iterator[Tensor]:
        """The states in which the cells that join at a block do so: their parent's, or the corrupted run's."""
        draws = self.runs.draws
        for place in range(bisect_left(self.joins, layer), bisect_left(self.joins, layer + 1)):
            parent = self.parents[place]
            if parent is not None:
                yield rows[parent * draws : (parent + 1) * draws]
            else:
                yield self.runs.states[layer][source[place * draws : (place + 1) * draws], self.position :]


@dataclass(frozen=True)
class _Fork:
    """A member, the block where it joins the batch, and the member whose states it has until then, if any."""

    member: _Member
    layer: int
    parent: _Member | None


def _forks(members: Sequence[_Member]) -> list[_Fork]:
    """Let each member share the states of the earlier one that does the same as it up to the highest block."""
    forks: list[_Fork] = []
    groups: dict[tuple[int, int], list[tuple[_Fork, dict[int, frozenset[tuple[Patch, bool]]]]]] = {}
    for member in reversed(members):  # long windows first
        plan: dict[int, frozenset[tuple[Patch, bool]]] = {}
        for patches, restored in ((member.effect.restored, True), (member.effect.held, False)):
            for patch in patches:
                plan[patch.start] = plan.get(patch.start, frozenset()) | {(patch, restored)}
        group = groups.setdefault((member.job, member.effect.start), [])
        best = _Fork(member, member.effect.start, None)
        for other, theirs in group:
            parts = min(
                (layer for layer in plan.keys() | theirs.keys() if plan.get(layer) != theirs.get(layer)), default=None
            )
            # one that joins there or later has a parent, looked at before it, that does the same for as long
            if parts is not None and parts > best.layer and other.layer < parts:
                best = _Fork(member, parts, other.member)
        group.append((best, plan))
        forks.append(best)
    return forks


def _bytes_a_token(model: HookedModel) -> int:
    """Memory that a block needs for one token while it runs, measured: about six rows of each of its widths."""
    cfg = model.cfg
    size = next(model.parameters()).element_size()
    return 6 * size * (int(cfg.d_model) + int(cfg.d_mlp or 0) + int(cfg.n_heads) * int(cfg.d_head))
