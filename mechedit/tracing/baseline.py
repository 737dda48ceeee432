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

__all__ = ["Job", "Read", "Runs"]

UNEMBED_ROWS = 1024  # final states unembedded together


@dataclass(frozen=True)
class Read:
    """log P of each target as the next token after `position`."""

    position: int
    targets: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt to sweep: the embeddings of its corrupted runs, what is read, and the cells.

    All jobs of a sweep have as many draws, and reads of one shape. `held_shift` lets a cell's held values come from another
    draw, so many places on, as the published severed runs do; 0 holds those of the same draw. `clean` are the embeddings that
    were corrupted, where the sweep computes in another number format and so has others.
    """

    ids: tuple[int, ...]
    corrupted: Float[Tensor, "draws pos d_model"]
    reads: tuple[Read, ...]
    cells: tuple[Cell, ...]
    held_shift: int = 0
    clean: Float[Tensor, "pos d_model"] | None = None


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
    clean_log_p: Tensor  # [job, target]
    corrupted_log_p: Tensor  # [job, draw, target]

    @classmethod
    def of(cls, model: HookedModel, jobs: Sequence[Job]) -> Runs:
        """Run all jobs, filled on the right to one length."""
        draws = len(jobs[0].corrupted)
        tokens = _padded(jobs).to(device_of(model))
        embeddings, begins = _embedded(jobs, embed(model, tokens))
        runs = cls(model, Blocks(model), jobs, draws, begins, {}, {}, [], [], [], torch.empty(0), torch.empty(0))
        runs._go(torch.cat([tokens, repeat(tokens, "job pos -> (job draw) pos", draw=draws)]), embeddings)
        runs._read()
        return runs

    def _go(self, tokens: Tensor, embeddings: Tensor) -> None:
        n_jobs = len(self.jobs)
        corrupted = torch.arange(n_jobs, len(tokens), device=tokens.device)
        changes = [Change("hook_embed", lambda activation: embeddings.to(activation)), *self._keeping()]
        with intervened(self.model, *changes):
            resid = self.blocks.embed(tokens)
            for layer in range(int(self.model.cfg.n_layers)):
                self.clean_states.append(resid[:n_jobs])
                self.states.append(resid[n_jobs:])
                resid, present = self.blocks.run(layer, resid)
                self.past.append(present.rows(corrupted))
        self.clean_states.append(resid[:n_jobs])
        self.states.append(resid[n_jobs:])

    def _keeping(self) -> list[Change]:
        """Reads of every activation inside a block that some cell restores or holds."""
        n_jobs, cells = len(self.jobs), [cell for job in self.jobs for cell in job.cells]
        restored = {(patch.component, patch.layer) for cell in cells for patch in cell.restored}
        held = {(patch.component, patch.layer) for cell in cells for patch in cell.held}

        def keep(key: tuple[Component, int]) -> Callable[[Tensor], None]:
            def into(activation: Tensor) -> None:
                if key in restored:
                    self.clean[key] = activation[:n_jobs].clone()
                if key in held:
                    self.corrupted[key] = activation[n_jobs:].clone()

            return into

        inside = [each for each in sorted(restored | held, key=str) if each[0].enters is None]
        return [read(component.at(layer), keep((component, layer))) for component, layer in inside]

    def _read(self) -> None:
        jobs = torch.arange(len(self.jobs))
        self.clean_log_p = self.log_p(self.clean_states[-1], jobs, 0).cpu()
        found = self.log_p(self.states[-1], repeat(jobs, "job -> (job draw)", draw=self.draws), 0)
        self.corrupted_log_p = rearrange(found, "(job draw) target -> job draw target", draw=self.draws).cpu()

    def log_p(
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
            parts = zip(finals.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True)
            columns.append(torch.cat([self.blocks.log_p(*part) for part in parts]))
        return torch.cat(columns, 1)


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
