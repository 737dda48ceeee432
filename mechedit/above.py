"""Rows of a model, run again and again with something else added, at one position of each, to what a part of one block gives.

What is added changes nothing below the block, and nothing at earlier positions: all that is computed once (`prepare`), and every run
(`Group.run`) goes on from there, with the keys and values of the positions before. Rows that are changed at nearby positions are a
group. What runs need for gradients bounds how many rows run at once (`at_once`).

The part is `mlp`, W_out's own output, before any norm that follows it; `attn`, what the attention adds to the residual stream; or
`stream`, that stream as it leaves the block. Several can be changed at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.interventions import Activation, Change, intervened, mlp_outputs
from mechedit.models import Blocks, HookedModel, KeyValues, device_of
from mechedit.prompts import pad

__all__ = ["HOOKS", "Changing", "Group", "Row", "at_once", "changing", "kept_bytes", "prepare", "together", "workers"]

HOOKS = {"attn": "blocks.{}.hook_attn_out", "stream": "blocks.{}.hook_resid_post"}
"""Where parts of a block are changed, `mlp` aside, which is `interventions.mlp_outputs`."""

GROUP_COST = 24  # what running one more group costs, in positions of a row: the weights are read once for each
MEMORY = (
    2**29
)  # bytes for gradients, of the rows that run at once: some hundred positions, and more at once are hardly faster


MOST = 4  # threads that run groups side by side, each by itself
PIECES = 2  # for each of them, of FEWEST positions or more: products of fewer are slower
FEWEST = 128


@dataclass(frozen=True)
class Row:
    """Token ids; the position that is changed; and those whose final states are read."""

    ids: tuple[int, ...]
    lookup: int
    reads: tuple[int, ...]


class Changing(threading.local):
    """What a thread adds now, and where: nothing but while it runs a group."""

    lookup: Int[Tensor, " rows"]
    changes: Float[Tensor, "rows parts d_model"] | None = None

    @contextmanager
    def by(self, lookup: Int[Tensor, " rows"], changes: Float[Tensor, "rows parts d_model"]) -> Iterator[None]:
        """Within it these changes are added, each row's at its lookup."""
        self.lookup, self.changes = lookup, changes
        try:
            yield
        finally:
            self.changes = None


@contextmanager
def changing(model: HookedModel, layer: int, parts: Sequence[str]) -> Iterator[Changing]:
    """Within it what these parts of a block give can be changed by `Group.run`."""
    now = Changing()
    with ExitStack() as stack:
        for index, part in enumerate(parts):
            stack.enter_context(_changed(model, layer, part, partial(_added, now, index)))
        yield now


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that run together, each from a position at which it is changed, or one before; positions count from there."""

    entering: Float[Tensor, "rows pos d_model"]  # the block
    past: tuple[
        tuple[KeyValues, ...], ...
    ]  # of the block and those above, for the positions before: one for rows that have equally many
    rows: Int[Tensor, " rows"]  # the number of each among all rows
    lengths: Int[Tensor, " rows"]
    lookup: Int[Tensor, " rows"]
    read_rows: Int[Tensor, " reads"]
    read_positions: Int[Tensor, " reads"]
    reads: Int[Tensor, " reads"]  # the number of each among the reads of all rows

    def run(
        self, blocks: Blocks, layer: int, changing: Changing, changes: Float[Tensor, "rows parts d_model"]
    ) -> Float[Tensor, "reads d_model"]:
        """The final residual state at each read, with each row's changes added to the parts; within `changing` of these."""
        resid = self.entering
        with changing.by(self.lookup, changes):
            for block, past in enumerate(self.past, layer):
                resid = blocks.run_on(block, resid, past)
        return resid[self.read_rows, self.read_positions]

    def some(self, rows: slice | Int[Tensor, " some"]) -> Group:
        """Of these rows alone, in their order, no longer than they need."""
        lengths = self.lengths[rows]
        index = torch.arange(len(self.rows), device=lengths.device)[rows]
        place = torch.full_like(self.rows, -1).index_copy(0, index, torch.arange(len(index), device=lengths.device))
        at = place[self.read_rows]
        read = at >= 0
        return Group(
            self.entering[rows, : int(lengths.max())],
            tuple(_some_of(past, index) for past in self.past),
            *(each[rows] for each in (self.rows, self.lengths, self.lookup)),
            *(each[read] for each in (at, self.read_positions, self.reads)),
        )

    def without(self, gone: Bool[Tensor, " all_rows"]) -> Group | None:
        """Without some of all rows; None where none are left."""
        stay = (~gone[self.rows]).nonzero()[:, 0]
        return self if len(stay) == len(self.rows) else self.some(stay) if len(stay) else None

    def row_bytes(self, model: HookedModel) -> int:
        """About what a run keeps of a row for gradients."""
        cfg = model.cfg
        return 4 * len(self.past) * (10 * int(cfg.d_model) + 6 * int(cfg.d_mlp)) * self.entering.shape[1]

    def parts(self, model: HookedModel, memory: int) -> Iterator[Group]:
        """As many rows at once as the memory lets, at least one."""
        n, most = len(self.rows), max(1, memory // self.row_bytes(model))
        yield from [self] if n <= most else (self.some(slice(begin, begin + most)) for begin in range(0, n, most))


def at_once(model: HookedModel, groups: Sequence[Group], workers: int = 1) -> list[list[Group]]:
    """Groups, or parts of them, whose runs' gradients are kept together, as many as `MEMORY` lets so many workers at a time: what comes after
    the blocks is then done once for all of them. Several workers have some pieces each, so that none waits long for another."""
    found: list[list[Group]] = []
    room, memory = 0, MEMORY // workers
    if workers > 1 and groups:
        whole = sum(len(group.rows) * group.row_bytes(model) for group in groups)
        least = FEWEST * groups[0].row_bytes(model) // groups[0].entering.shape[1]
        memory = min(memory, max(whole // (PIECES * workers), least))
    for part in (part for group in groups for part in group.parts(model, memory)):
        size = len(part.rows) * part.row_bytes(model)
        if size > room:
            found.append([])
            room = memory
        found[-1].append(part)
        room -= size
    return found


def workers(model: HookedModel, blocks: Blocks, layer: int) -> int:
    """How many threads may run groups at a time: `MOST` on a CPU, where the blocks are run by their parts, which nothing but `changing` hooks."""
    is_apart = device_of(model).type == "cpu" and all(blocks.by_parts[layer:])
    return min(MOST, torch.get_num_threads()) if is_apart else 1


@torch.no_grad()
def prepare(model: HookedModel, blocks: Blocks, rows: Sequence[Row], layer: int) -> list[Group]:
    """Keep of every row what no change reaches. Reads are numbered in the order of the rows."""
    firsts = torch.tensor([0] + [len(row.reads) for row in rows]).cumsum(0).tolist()
    lookups, lengths = [row.lookup for row in rows], [len(row.ids) for row in rows]
    if _by_parts(model, blocks, rows[0], layer):
        left = [length - lookup for length, lookup in zip(lengths, lookups, strict=True)]
        groups = [sorted(members, key=lookups.__getitem__) for members in together([0] * len(rows), left)]
        begins = lookups
    else:
        groups = together(lookups, lengths)
        begins = [0] * len(rows)
        for members in groups:
            for index in members:
                begins[index] = min(lookups[each] for each in members)
    return [_prepared(model, blocks, rows, begins, members, firsts, layer) for members in groups]


def _by_parts(model: HookedModel, blocks: Blocks, row: Row, layer: int) -> bool:
    """Whether the block and those above can be run by their parts; a row is run both ways."""
    resid = blocks.embed(pad(model, [list(row.ids)]))
    for block in range(int(model.cfg.n_layers)):
        after, present = blocks.run(block, resid)
        if block >= layer:
            blocks.compare_parts(block, resid, present, after)
        resid = after
    return all(blocks.by_parts[layer:])


def _prepared(
    model: HookedModel, blocks: Blocks, rows: Sequence[Row], begins: Sequence[int], members: list[int], firsts: Sequence[int], layer: int
) -> Group:  # fmt: skip
    own = [begins[index] for index in members]
    resid = blocks.embed(pad(model, [list(rows[index].ids) for index in members]))
    for block in range(layer):
        resid, _ = blocks.run(block, resid)
    of_rows = [(index, len(rows[index].ids) - begins[index], rows[index].lookup - begins[index]) for index in members]
    of_reads = [
        (place, position - begins[index], firsts[index] + number)
        for place, index in enumerate(members)
        for number, position in enumerate(rows[index].reads)
    ]
    number, length, lookup = torch.tensor(of_rows, device=resid.device).unbind(1)
    row, position, read = torch.tensor(of_reads, device=resid.device).unbind(1)
    at = torch.tensor(own, device=resid.device)[:, None] + torch.arange(int(length.max()), device=resid.device)
    entering = resid[torch.arange(len(own), device=resid.device)[:, None], at.clamp(max=resid.shape[1] - 1)]
    resid = resid[:, : max(1, *own)]  # no past is longer
    past = []
    for block in range(layer, int(model.cfg.n_layers)):
        resid, present = blocks.run(block, resid)
        past.append(tuple(present.rows(some).before(begin) for some, begin in _alike(own)))
    return Group(entering, tuple(past), number, length, lookup, row, position, read)


def _alike(begins: Sequence[int]) -> list[tuple[slice, int]]:
    """Which rows, in their order, have equally many positions before them, and how many."""
    found, first = [], 0
    for begin, own in groupby(begins):
        end = first + len(list(own))
        found.append((slice(first, end), begin))
        first = end
    return found


def _some_of(past: tuple[KeyValues, ...], rows: Int[Tensor, " some"]) -> tuple[KeyValues, ...]:
    """Keys and values of some rows, in their order."""
    found, first = [], 0
    for each in past:
        here = rows[(rows >= first) & (rows < first + len(each.keys))] - first
        if len(here):
            found.append(each.rows(here))
        first += len(each.keys)
    return tuple(found)


def kept_bytes(model: HookedModel, rows: Sequence[Row], layer: int) -> int:
    """About what `prepare` keeps of rows: for each position either what enters the block, or keys and values of it and those above."""
    above = int(model.cfg.n_layers) - layer
    return sum(8 * above * int(model.cfg.d_model) * len(row.ids) for row in rows)


def together(lookups: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Which rows to run together, so that few positions are computed for nothing and few groups are made.

    A group computes, for each of its rows, the positions from its first lookup to its longest row's end. Rows in order of
    lookup are cut where that costs least, found from the end backwards; rows that are alike stay together.
    """
    order = sorted(range(len(lookups)), key=lambda index: (lookups[index], lengths[index]))
    alike = [list(own) for _, own in groupby(order, key=lambda index: (lookups[index], lengths[index]))]
    # for each kind of row, what it and those after it cost at best, and where the first of their groups ends
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(alike) + 1)
    for begin in reversed(range(len(alike))):
        options = []
        longest, rows = 0, 0
        for end in range(begin + 1, len(alike) + 1):
            longest = max(longest, lengths[alike[end - 1][0]])
            rows += len(alike[end - 1])
            positions = rows * (longest - lookups[alike[begin][0]])
            options.append((GROUP_COST + positions + best[end][0], end))
        best[begin] = min(options)
    groups, begin = [], 0
    while begin < len(alike):
        groups.append([row for own in alike[begin : best[begin][1]] for row in own])
        begin = best[begin][1]
    return groups


def _changed(
    model: HookedModel, layer: int, part: str, apply: Callable[[Activation], Activation | None]
) -> AbstractContextManager[None]:
    """Within the block `apply` changes what the part gives."""
    if part == "mlp":
        return mlp_outputs(model, layer, apply)
    return intervened(model, Change(HOOKS[part].format(layer), apply))


def _added(now: Changing, part: int, output: Tensor) -> Tensor | None:
    if now.changes is None:
        return None
    rows = torch.arange(len(output), device=output.device)
    return output.index_put((rows, now.lookup), now.changes[:, part].to(output.dtype), accumulate=True)
