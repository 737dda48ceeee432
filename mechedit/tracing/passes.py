"""One pass of a sweep: cells of one first position, walked up the blocks together.

A cell joins the batch in the block where it first differs from the corrupted run, or from a cell that does the same up to
there. If what it changes in that block reaches no keys and values (an output of the MLP, say), the block is computed for the
changed positions alone, and what comes after them is what it joins. In the last block only positions from the first that is
read are computed.
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
from mechedit.models import Sharing, parts
from mechedit.tracing.baseline import Runs, bytes_a_token
from mechedit.tracing.cells import Component, Patch, check_index

__all__ = ["Effect", "Member", "Pass", "is_local"]

ROW_TOKENS = 1024  # rows times positions in one call of a block: enough to keep a matmul busy, little enough to hold
COPIED = 1 << 25  # bytes of keys and values that are copied for the rows of one call, where they must be
LOCAL = ("hook_attn_out", "hook_resid_mid", "hook_mlp_out", "attn.hook_z", "attn.hook_q", "mlp.", "ln2")


@dataclass(frozen=True)
class Effect:
    """What of a cell changes anything, and the first position and block that it changes."""

    position: int
    start: int
    restored: tuple[Patch, ...]
    held: tuple[Patch, ...]


@dataclass(frozen=True)
class Member:
    """A cell of a job, as a pass sees it."""

    job: int
    cell: int
    effect: Effect


def is_local(patch: Patch) -> bool:
    """Whether a patch inside a block changes its own position alone there: nothing that keys and values are made of."""
    return patch.component.enters is None and _inside(patch.component).startswith(LOCAL)


def _inside(component: Component) -> str:
    """The name of a component's hook point inside its block."""
    return component.hook.partition("{layer}.")[2]


class _Writes:
    """What cells write into one activation of one block: at row, position and part; rows ascend."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, Tensor, tuple[int, ...] | None]] = []

    def add(self, row: int, position: int, values: Tensor, index: tuple[int, ...] | None) -> None:
        """`values` [draw, ...] go to the rows from `row` on."""
        self.entries.append((row, position, values, index))

    def into(self, activation: Tensor, begin: int, width: int) -> Tensor | None:
        """A copy of the activation of rows from `begin` on with its writes, or None where it has none.

        The last of the activation's positions is the last of `width`: rotated keys have earlier ones too, and queries of
        the last block only the late ones.
        """
        if not self._between(begin, begin + len(activation)):
            return None
        return self.write_(activation.clone(), begin, activation.shape[1] - width)

    def _between(self, begin: int, end: int) -> list[tuple[int, int, Tensor, tuple[int, ...] | None]]:
        first = bisect_left(self.entries, begin, key=lambda entry: entry[0] + len(entry[2]) - 1)
        return self.entries[first : bisect_left(self.entries, end, key=lambda entry: entry[0])]

    def write_(self, activation: Tensor, begin: int, shift: int = 0) -> Tensor:
        """Write into the activation of rows from `begin` on, whose position 0 stands at `shift`."""
        end = begin + len(activation)
        for row, position, values, index in self._between(begin, end):
            rows, at = slice(max(row, begin) - begin, min(row + len(values), end) - begin), position + shift
            values = values[max(0, begin - row) : end - row].to(activation)
            if at < 0:  # nobody reads it
                continue
            if index is None:
                activation[rows, at] = values
            else:
                part = list(index)
                activation[rows, at, part] = values[:, part]
        return activation


class Pass:
    """The cells of one first position, walked up the blocks together: rows are cells times draws, by joining block."""

    def __init__(self, runs: Runs, members: Sequence[Member], position: int, memory: int) -> None:
        self.runs, self.position = runs, position
        self.n_layers = int(runs.model.cfg.n_layers)
        self.forks = sorted(_forks(members), key=lambda fork: fork.order)
        self.members = [fork.member for fork in self.forks]
        self.joins = [fork.order for fork in self.forks]
        places = {id(fork.member): index for index, fork in enumerate(self.forks)}
        self.parents = [places[id(fork.parent)] if fork.parent is not None else None for fork in self.forks]
        self.late = max(0, min(read.position for job in runs.jobs for read in job.reads) - position)
        self.row_tokens = min(ROW_TOKENS, max(64, memory // 4 // bytes_a_token(runs.model)))
        self.states: dict[int, _Writes] = {}
        self.hooks: dict[tuple[Component, int], _Writes] = {}
        for place, member in enumerate(self.members):
            for patch in member.effect.held:
                self._plan(place, patch, self._held(member, patch))
            for patch in member.effect.restored:  # after what is held: where both name a place, it is restored
                self._plan(place, patch, self._clean(member, patch))
        self.at, self.width = 0, 0  # first row and number of positions of the block call under way, for the hooks

    def _plan(self, place: int, patch: Patch, values: Tensor) -> None:
        check_index(patch, values.shape[1])  # of components that mechedit does not know
        writes = (
            self.hooks.setdefault((patch.component, patch.layer), _Writes())
            if patch.component.enters is None
            else self.states.setdefault(patch.start, _Writes())
        )
        writes.add(place * self.runs.draws, patch.position - self.position, values, patch.index)

    def _clean(self, member: Member, patch: Patch) -> Tensor:
        runs = self.runs
        whole = (
            runs.clean[patch.component, patch.layer]
            if patch.component.enters is None
            else runs.clean_states[patch.start]
        )
        value = whole[member.job, patch.position]
        return value.expand(runs.draws, *value.shape)

    def _held(self, member: Member, patch: Patch) -> Tensor:
        runs = self.runs
        whole = (
            runs.corrupted[patch.component, patch.layer] if patch.component.enters is None else runs.states[patch.start]
        )
        values = whole[member.job * runs.draws : (member.job + 1) * runs.draws, patch.position]
        shift = runs.jobs[member.job].held_shift
        return values.roll(-shift, 0) if shift else values

    def found(self) -> Float[Tensor, "cells draws targets"]:
        """What every member's job reads."""
        runs, draws = self.runs, self.runs.draws
        jobs = torch.tensor([member.job for member in self.members]).repeat_interleave(draws)
        final = self._final_states()
        found = rearrange(
            runs.read(final, jobs, self.position + self.late), "(cell draw) target -> cell draw target", draw=draws
        ).cpu()
        column = 0
        for number, read_ in enumerate(runs.jobs[0].reads):
            for place, member in enumerate(self.members):
                if runs.jobs[member.job].reads[number].position < self.position:
                    here = slice(column, column + len(read_.targets))
                    found[place, :, here] = runs.corrupted_read[member.job, :, here]
            column += len(read_.targets)
        return found

    def _final_states(self) -> Float[Tensor, "rows late d_model"]:
        """The final states at positions from the first that is read."""
        runs, top = self.runs, self.n_layers
        first = self.joins[0] // 2
        rows = runs.states[0][:0, self.position + (self.late if first == top else 0) :]
        changes = [
            Change(component.at(layer), self._writing(writes)) for (component, layer), writes in self.hooks.items()
        ]
        with intervened(runs.model, *changes):
            for layer in range(first, top):
                rows = self._joined(layer, rows, 0)
                late = self.late if layer == top - 1 else 0
                out = self._run(layer, rows, 0, late)
                if end := bisect_left(self.joins, 2 * layer + 2) - len(rows) // runs.draws:
                    out = torch.cat([out, self._locally(layer, rows, out, end, late)])
                rows = out
        return self._joined(top, rows, self.late)

    def _writing(self, writes: _Writes) -> Callable[[Tensor], Tensor | None]:
        return lambda activation: writes.into(activation, self.at, self.width)

    def _joined(self, layer: int, rows: Tensor, late: int) -> Tensor:
        """The rows that enter a block: those that are there, those that join, with what is written there."""
        new = range(len(rows) // self.runs.draws, bisect_left(self.joins, 2 * layer + 1))
        if new:
            rows = torch.cat([rows, *(self._rows_of(place, layer, rows, late) for place in new)])
        if layer in self.states:
            self.states[layer].write_(rows, 0, -late)
        return rows

    def _rows_of(self, place: int, layer: int, rows: Tensor, late: int) -> Tensor:
        """The states in which a cell joins at a block: its parent's, or the corrupted run's."""
        draws, parent = self.runs.draws, self.parents[place]
        if parent is not None:
            return rows[parent * draws : (parent + 1) * draws]
        job = self.members[place].job
        return self.runs.states[layer][job * draws : (job + 1) * draws, self.position + late :]

    def _run(self, layer: int, rows: Tensor, begin: int, late: int) -> Tensor:
        """A block on the rows of the cells from place `begin` on, at positions from `late` on."""
        runs, self.width = self.runs, rows.shape[1]
        past = runs.past[layer].before(self.position)
        hooks = [_inside(component) for component, at in self.hooks if at == layer]
        whole = not all(map(parts.reaches, hooks))
        step = max(1, self.row_tokens // self.width)
        if past.length and (whole or not runs.blocks.by_parts[layer]):
            step = max(1, min(step, COPIED // (2 * past.keys[0].numel() * past.keys.element_size())))
        out = rows.new_empty(len(rows), self.width - late, rows.shape[2])
        for part, sharing in self._chunks(begin, len(rows) // runs.draws, step):
            self.at = begin * runs.draws + part.start
            out[part] = runs.blocks.run_sharing(layer, rows[part], past, sharing, late, whole=whole)
        return out

    def _chunks(self, begin: int, n: int, step: int) -> Iterator[tuple[slice, list[Sharing]]]:
        """About `step` rows at a time of the `n` cells from place `begin` on: all draws of some cells, or some of one."""
        draws, together = self.runs.draws, max(1, step // self.runs.draws)
        for first in range(0, n, together):
            jobs = [member.job for member in self.members[begin + first : begin + min(first + together, n)]]
            if step >= draws:
                yield slice(first * draws, (first + len(jobs)) * draws), _sharing(jobs, draws)
                continue
            for draw in range(0, draws, step):
                end = min(draw + step, draws)
                yield (
                    slice(first * draws + draw, first * draws + end),
                    [Sharing(slice(None), jobs[0] * draws + draw, jobs[0] * draws + end)],
                )

    def _locally(self, layer: int, rows: Tensor, out: Tensor, n: int, late: int) -> Tensor:
        """What leaves a block of the next `n` cells, which change their own positions alone there."""
        begin = len(rows) // self.runs.draws
        new = range(begin, begin + n)
        reach = max(self.forks[place].reach or 0 for place in new) - self.position + 1
        entering = torch.cat([self._rows_of(place, layer, rows, 0)[:, :reach] for place in new])
        changed = self._run(layer, entering, begin, min(late, reach))
        rest = [self._rows_of(place, layer + 1, out, late)[:, max(0, reach - late) :] for place in new]
        return torch.cat([changed, torch.cat(rest)], 1)


def _sharing(jobs: Sequence[int], draws: int) -> list[Sharing]:
    """Whose past the rows of cells of these jobs have."""
    if len(set(jobs)) == 1:
        return [Sharing(slice(None), jobs[0] * draws, (jobs[0] + 1) * draws)]
    whose = torch.tensor(jobs).repeat_interleave(draws)
    return [Sharing((whose == job).nonzero()[:, 0], job * draws, (job + 1) * draws) for job in sorted(set(jobs))]


@dataclass(frozen=True)
class _Fork:
    """A member, the block where it joins the batch, and the member whose states it has until then, if any.

    `reach` is the last position that it changes in that block, if it changes its own positions alone there.
    """

    member: Member
    layer: int
    parent: Member | None
    reach: int | None

    @property
    def order(self) -> int:
        """Members that join a block whole stand before those that join in it."""
        return 2 * self.layer + (self.reach is not None)


Plan = dict[int, frozenset[tuple[Patch, bool]]]
"""What a member does, by the first block that must be computed for it, and whether it is restored."""


def _forks(members: Sequence[Member]) -> list[_Fork]:
    """Let each member share the states of the earlier one that does the same as it up to the highest block."""
    forks: list[_Fork] = []
    groups: dict[tuple[int, int], list[tuple[_Fork, Plan]]] = {}
    for member in reversed(members):  # long windows first
        plan: Plan = {}
        for patches, restored in ((member.effect.restored, True), (member.effect.held, False)):
            for patch in patches:
                plan[patch.start] = plan.get(patch.start, frozenset()) | {(patch, restored)}
        start = member.effect.start
        group = groups.setdefault((member.job, start), [])
        best = _Fork(member, start, None, _reach(plan.get(start, frozenset())))
        for other, theirs in group:
            parting = min(
                (layer for layer in plan.keys() | theirs.keys() if plan.get(layer) != theirs.get(layer)), default=None
            )
            # one that joins there or later has a parent, looked at before it, that does the same for as long
            if parting is not None and parting > best.layer and other.layer < parting:
                differing = plan.get(parting, frozenset()) ^ theirs.get(parting, frozenset())
                best = _Fork(member, parting, other.member, _reach(differing))
        group.append((best, plan))
        forks.append(best)
    return forks


def _reach(patches: frozenset[tuple[Patch, bool]]) -> int | None:
    """The last position of patches that change their own positions alone in their block; None if one does more."""
    return max(patch.position for patch, _ in patches) if all(is_local(patch) for patch, _ in patches) else None
