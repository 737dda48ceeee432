"""The runs that every cell of a sweep starts from: the clean and the corrupted ones of all its prompts, kept block by block.

One batch of jobs gives them in one forward pass: a clean row a job, then a corrupted row a job and draw. What is kept are the
states between blocks, the keys and values of the corrupted rows, and those activations inside blocks that some cell restores
(clean) or holds (corrupted). Shapes count `job`, or `(job draw)` with draws innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.interventions import Change, intervened, read
from mechedit.models import Blocks, HookedModel, KeyValues, device_of, embed
from mechedit.tracing.cells import Cell, Component

__all__ = ["Job", "Read", "Runs", "bytes_a_token", "bytes_kept"]

UNEMBED_ROWS = 1024  # final states unembedded together
ROW_TOKENS = 4096  # rows times positions run together


@dataclass(frozen=True)
class Read:
    """log P of each target as the next token after `position`, or its logit, which needs no other token's (`logits`)."""

    position: int
    targets: tuple[int, ...]
    logits: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt to sweep: the embeddings of its corrupted runs, what is read, and the cells.

    All jobs of a sweep have as many draws, and reads of one shape. `held_shift` lets a cell's held values come from another
    draw, so many places on, as the published severed runs do; 0 holds those of the same draw. `clean` are the embeddings that
    were corrupted, where the sweep computes in another number format and so has others. `asked` is the position after which the clean run's most
    probable token is told.
    """

    ids: tuple[int, ...]
    corrupted: Float[Tensor, "draws pos d_model"]
    reads: tuple[Read, ...]
    cells: tuple[Cell, ...]
    held_shift: int = 0
    clean: Float[Tensor, "pos d_model"] | None = None
    asked: int | None = None


@dataclass(eq=False)
class Runs:
    """The clean and the corrupted runs of all jobs. States enter each block; the last ones are final."""

    model: HookedModel
    blocks: Blocks
    jobs: Sequence[Job]
    draws: int
    begins: list[int]  # each job's first corrupted position
    clean: dict[tuple[Component, int], Tensor]  # [job, pos, ...]; what cells restore inside a block
    corrupted: dict[tuple[Component, int], Tensor]  # [(job draw), pos, ...]; what cells hold there
    clean_states: list[Tensor]  # [job, pos, d_model]
    states: list[Tensor]  # [(job draw), pos, d_model]
    past: list[KeyValues]
    clean_read: Tensor  # [job, target]
    corrupted_read: Tensor  # [job, draw, target]

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, jobs: Sequence[Job], memory: int = 1 << 31) -> Runs:
        """Run all jobs, filled on the right to one length, some rows at a time as the memory allows."""
        draws = len(jobs[0].corrupted)
        tokens = _padded(jobs).to(device_of(model))
        embeddings, begins = _embedded(jobs, embed(model, tokens))
        runs = cls(model, Blocks(model), jobs, draws, begins, {}, {}, [], [], [], torch.empty(0), torch.empty(0))
        rows = torch.cat([tokens, repeat(tokens, "job pos -> (job draw) pos", draw=draws)])
        step = max(1, max(64, memory // 8 // bytes_a_token(model)) // rows.shape[1])
        for part in torch.arange(len(rows)).split(min(step, max(1, ROW_TOKENS // rows.shape[1]))):
            runs._go(slice(int(part[0]), int(part[-1]) + 1), rows, embeddings)
        runs._compare()
        runs._read()
        return runs

    def _go(self, part: slice, tokens: Tensor, embeddings: Tensor) -> None:
        """Run some of the rows: the clean ones come first."""
        rows = tokens[part]
        changes = [Change("hook_embed", lambda activation: embeddings[part].to(activation)), *self._keeping(part)]
        with intervened(self.model, *changes):
            resid = self.blocks.embed(rows)
            for layer in range(int(self.model.cfg.n_layers) + 1):
                self._keep(self.clean_states, self.states, layer, part, resid)
                if layer < int(self.model.cfg.n_layers):
                    resid, present = self.blocks.run(layer, resid)
                    self._keep_past(layer, part, present)

    def _rows(self, part: slice) -> tuple[slice, slice, slice, slice]:
        """Of some rows: where the clean ones are among them and go, where the corrupted ones are and go."""
        n = len(self.jobs)
        clean = slice(part.start, min(part.stop, n)) if part.start < n else slice(0, 0)
        first = max(part.start, n)
        corrupted = slice(first - n, part.stop - n) if part.stop > n else slice(0, 0)
        return slice(0, clean.stop - clean.start), clean, slice(first - part.start, max(part.stop, first) - part.start), corrupted  # fmt: skip

    def _keep(self, clean: list[Tensor], corrupted: list[Tensor], layer: int, part: slice, resid: Tensor) -> None:
        """Put rows where they belong, in tensors made for all of them."""
        if layer == len(clean):
            clean.append(resid.new_empty(len(self.jobs), *resid.shape[1:]))
            corrupted.append(resid.new_empty(len(self.jobs) * self.draws, *resid.shape[1:]))
        mine, into, theirs, there = self._rows(part)
        clean[layer][into], corrupted[layer][there] = resid[mine], resid[theirs]

    def _keep_past(self, layer: int, part: slice, present: KeyValues) -> None:
        if layer == len(self.past):
            n = len(self.jobs) * self.draws
            keys, values = (each.new_empty(n, *each.shape[1:]) for each in (present.keys, present.values))
            self.past.append(KeyValues(keys, values, present.axis))
        _, _, theirs, there = self._rows(part)
        self.past[layer].keys[there] = present.keys[theirs]
        self.past[layer].values[there] = present.values[theirs]

    def _compare(self) -> None:
        """Look, on one row, whether blocks run by their parts give what they give whole."""
        for layer, (resid, after) in enumerate(zip(self.states, self.states[1:], strict=False)):
            past = self.past[layer]
            first = KeyValues(past.keys[:1], past.values[:1], past.axis)
            self.blocks.compare_parts(layer, resid[:1], first, after[:1])

    @torch.no_grad()
    def first(self, job: int) -> tuple[int, float] | None:
        """The clean run's most probable token where the job asks for it, and its P."""
        at = self.jobs[job].asked
        if at is None:
            return None
        p = self.blocks.logits(self.clean_states[-1][job, at][None])[0].float().softmax(-1)
        return int(p.argmax()), float(p.max())

    @property
    def bytes(self) -> int:
        """What is kept takes so many."""
        kept = [*self.states, *self.clean_states, *self.clean.values(), *self.corrupted.values()]
        kept += [each for past in self.past for each in (past.keys, past.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def _keeping(self, part: slice) -> list[Change]:
        """Reads of every activation inside a block that some cell restores or holds."""
        restored, held = _inside(self.jobs)
        mine, into, theirs, there = self._rows(part)

        def keep(key: tuple[Component, int]) -> Callable[[Tensor], None]:
            def store(activation: Tensor) -> None:
                for kept, rows, where, n in (
                    (self.clean if key in restored else None, mine, into, len(self.jobs)),
                    (self.corrupted if key in held else None, theirs, there, len(self.jobs) * self.draws),
                ):
                    if kept is not None:
                        if key not in kept:
                            kept[key] = activation.new_empty(n, *activation.shape[1:])
                        kept[key][where] = activation[rows]

            return store

        return [read(key[0].at(key[1]), keep(key)) for key in sorted(restored | held, key=str)]

    def _read(self) -> None:
        jobs = torch.arange(len(self.jobs))
        self.clean_read = self.read(self.clean_states[-1], jobs, 0).cpu()
        found = self.read(self.states[-1], repeat(jobs, "job -> (job draw)", draw=self.draws), 0)
        self.corrupted_read = rearrange(found, "(job draw) target -> job draw target", draw=self.draws).cpu()

    def read(
        self, states: Float[Tensor, "rows pos d_model"], jobs: Int[Tensor, " rows"], position: int
    ) -> Float[Tensor, "rows targets"]:
        """What the jobs read, from final states of positions from `position` on; `jobs` says which job a row is of."""
        reads = [job.reads for job in self.jobs]
        columns = []
        for number in range(len(reads[0])):
            at = torch.tensor([each[number].position for each in reads])[jobs].to(states.device)
            targets = torch.tensor([each[number].targets for each in reads])[jobs].to(states.device)
            rows = torch.arange(len(states), device=states.device)
            # a position that was not computed again is the corrupted run's, which the caller has
            finals = states[rows, (at - position).clamp(min=0)]
            what = self.blocks.logits_of if reads[0][number].logits else self.blocks.log_p
            parts = zip(finals.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True)
            columns.append(torch.cat([what(*part) for part in parts]))
        return torch.cat(columns, 1)


def _inside(jobs: Sequence[Job]) -> tuple[set[tuple[Component, int]], set[tuple[Component, int]]]:
    """Every activation inside a block that some cell restores, and that some cell holds."""
    cells = [cell for job in jobs for cell in job.cells]
    restored = {(patch.component, patch.layer) for cell in cells for patch in cell.restored}
    held = {(patch.component, patch.layer) for cell in cells for patch in cell.held}
    inside, also = ({each for each in of if each[0].enters is None} for of in (restored, held))
    return inside, also


def bytes_kept(model: HookedModel, jobs: Sequence[Job], length: int) -> tuple[int, int]:
    """What is kept of a clean run, and of a corrupted one, of so many tokens."""
    cfg = model.cfg
    kv = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * int(cfg.d_head)
    states = (int(cfg.n_layers) + 1) * int(cfg.d_model)
    restored, held = (
        sum(int(cfg.d_mlp or 0) if "mlp." in each.hook else max(int(cfg.d_model), int(cfg.n_heads) * int(cfg.d_head)) for each, _ in of)
        for of in _inside(jobs)
    )  # fmt: skip
    size = length * next(model.parameters()).element_size()
    return (states + restored) * size, (states + held + 2 * int(cfg.n_layers) * kv) * size


def bytes_a_token(model: HookedModel) -> int:
    """Memory that a block needs for one token while it runs, measured: about six rows of each of its widths."""
    cfg = model.cfg
    size = next(model.parameters()).element_size()
    return 6 * size * (int(cfg.d_model) + int(cfg.d_mlp or 0) + int(cfg.n_heads) * int(cfg.d_head))


def _padded(jobs: Sequence[Job]) -> Int[Tensor, "job pos"]:
    """Every job's tokens, filled on the right."""
    tokens = torch.zeros(len(jobs), max(len(job.ids) for job in jobs), dtype=torch.long)
    for row, job in enumerate(jobs):
        tokens[row, : len(job.ids)] = torch.tensor(job.ids)
    return tokens


def _embedded(
    jobs: Sequence[Job], clean: Float[Tensor, "job pos d_model"]
) -> tuple[Float[Tensor, "rows pos d_model"], list[int]]:
    """The embeddings of the clean runs and then of the corrupted ones, and where corruption begins in each job."""
    draws, begins = len(jobs[0].corrupted), []
    both = torch.cat([clean, repeat(clean, "job pos d_model -> (job draw) pos d_model", draw=draws)])
    rows = rearrange(both[len(jobs) :], "(job draw) pos d_model -> job draw pos d_model", draw=draws)
    for job, own, row in zip(jobs, clean, rows, strict=True):
        corrupted = job.corrupted.to(clean)
        before = own[: len(job.ids)] if job.clean is None else job.clean.to(clean)
        changed = (corrupted != before).any(-1).any(0).nonzero()[:, 0]
        begins.append(int(changed[0]) if len(changed) else len(job.ids))
        row[:, changed] = corrupted[:, changed]  # in place: `rows` is a view of `both`
    return both, begins
