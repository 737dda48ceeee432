"""What facts' prompts cost when something is added, at their subjects, to what parts of one block give: the loss of each, and its slope.

    of a prompt      -log p(target), a mean over its tokens, that counts 1 / prompts of its fact
    of an essence    KL(p(. | essence) || p(. | essence) before anything was added), weighed by `kl`

What is added changes nothing below the block, nor at earlier positions: that is computed once (`mechedit.above`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit import above
from mechedit.above import Row
from mechedit.keys import Context
from mechedit.models import Blocks, HookedModel, device_of
from mechedit.threads import side_by_side

__all__ = ["Losses", "Sought", "Terms", "Wanted", "batches"]

MEMORY = 2**29  # bytes of what is kept of the rows of facts that are run at once
TIE = 1e-4  # of logits: of two that are closer, rounding decides which is first


@dataclass(frozen=True, eq=False)
class Wanted:
    """Each context of `rows` is to be answered by its ids in `targets`, and after `essence`, where there is one, all is to be as it is."""

    rows: Sequence[Context]
    essence: Context | None
    targets: Sequence[Sequence[int]]

    @property
    def as_rows(self) -> list[Row]:
        """The contexts with their targets, then the essence."""
        found = [
            Row((*row.ids, *target[:-1]), row.lookup, tuple(range(row.last, row.last + len(target))))
            for row, target in zip(self.rows, self.targets, strict=True)
        ]
        if self.essence is None:
            return found
        at = self.essence.lookup  # what follows it is not read
        return [*found, Row(tuple(self.essence.ids[: at + 1]), at, (at,))]

    @property
    def wanted(self) -> list[tuple[int, float]]:
        """The token wanted at each read, and its weight, rows counting alike; of the essence -1 and 0."""
        found = [(token, 1 / (len(self.rows) * len(target))) for target in self.targets for token in target]
        return found if self.essence is None else [*found, (-1, 0.0)]


@dataclass(frozen=True, eq=False)
class Sought(Wanted):
    """A value near `initial`, what the key returns now, with which that is so. Of several parts `initial` has a row for each."""

    initial: Float[Tensor, "*parts d_model"]
    shares: Float[Tensor, " rows_and_essence"]


@dataclass(frozen=True, eq=False)
class Terms:
    """Of each row its share in its fact's loss of the target; of each fact the KL of its essence, weighed, and how many tokens are not first;
    and of each row the slope of what it costs. Of rows that have left all is 0."""

    target: Float[Tensor, " rows"]
    kl: Float[Tensor, " facts"]
    missed: Float[Tensor, " facts"]
    slope: Float[Tensor, "rows parts d_model"]


Kind = TypeVar("Kind", bound=Wanted)


class Losses:
    """Of some facts, whose rows are numbered through, those of a fact together, its essence last."""

    def __init__(
        self,
        model: HookedModel,
        sought: Sequence[Wanted],
        layer: int,
        parts: Sequence[str],
        kl: float,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.layer, self.parts, self.kl, self.dtype = model, layer, parts, kl, dtype
        self.blocks, device = Blocks(model), device_of(model)
        self.facts, self.is_begun = len(sought), False
        rows = [(fact, row) for fact, each in enumerate(sought) for row in each.as_rows]
        self.fact = torch.tensor([fact for fact, _ in rows], device=device)  # of each row
        self.row = torch.tensor([index for index, (_, row) in enumerate(rows) for _ in row.reads], device=device)
        tokens, weights = zip(*(wanted for each in sought for wanted in each.wanted), strict=True)
        self.token, self.weight = torch.tensor(tokens, device=device), torch.tensor(weights, dtype=dtype, device=device)
        self.is_essence = torch.zeros_like(self.fact, dtype=torch.bool).index_fill(0, self.row[self.token < 0], True)
        self.gone = torch.zeros_like(self.is_essence)
        self.groups = above.prepare(model, self.blocks, [row for _, row in rows], layer)
        self.workers = above.workers(model, self.blocks, layer)
        self.run_at_once = above.at_once(model, self.groups, self.workers)
        self.before: dict[int, Tensor] = {}  # of each fact, what the essence says at first, as log probabilities

    def leave(self, gone: Bool[Tensor, " rows"]) -> None:
        """These rows are run no more."""
        if not torch.equal(gone, self.gone):
            self.gone = gone
            self.groups = [left for each in self.groups if (left := each.without(gone)) is not None]
            self.run_at_once = above.at_once(self.model, self.groups, self.workers)

    def at(self, changes: Float[Tensor, "rows parts d_model"]) -> Terms:
        """With so much added at each row. What an essence says the first time is what its KL is to."""
        target = torch.zeros(len(self.fact), dtype=self.dtype, device=changes.device)
        kl, missed = (target.new_zeros(self.facts) for _ in range(2))
        slope = torch.zeros_like(changes)
        if not self.run_at_once:
            return Terms(target, kl, missed, slope)
        with above.changing(self.model, self.layer, self.parts) as changing:
            of_parts = partial(self._of_parts, changes, changing)
            for rows, row, of_rows, nll, essences, drift, is_missed in side_by_side(of_parts, self.run_at_once, self.workers):  # fmt: skip
                slope[rows] = of_rows
                target.index_add_(0, row, nll)
                kl.index_add_(0, essences, drift)
                missed.index_add_(0, self.fact[row], is_missed)
        self.is_begun = True
        return Terms(target, kl, missed, slope)

    def _of_parts(
        self, changes: Float[Tensor, "rows parts d_model"], changing: above.Changing, parts: Sequence[above.Group]
    ) -> tuple[Tensor, ...]:
        """Of some groups: their rows, the row of each read, the slopes of rows, the loss of each read, the facts of essences, their KL, and
        which reads' tokens are not first."""
        rows, reads = (torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "reads"))
        token, row = self.token[reads], self.row[reads]
        essence = (token < 0).nonzero()[:, 0]
        essences = self.fact[row[essence]]
        added = [changes[part.rows].requires_grad_() for part in parts]
        with torch.enable_grad():
            final = torch.cat([part.run(self.blocks, self.layer, changing, own) for part, own in zip(parts, added, strict=True)])  # fmt: skip
            before = self._before(essences, final[essence].detach())
            log_p, drift, below = self.blocks.said(final, token.clamp(min=0), essence, before)
            nll, drift = -log_p * self.weight[reads], self.kl * drift
            slope = torch.cat(torch.autograd.grad(nll.sum() + drift.sum(), added))
        is_missed = ((below > TIE) & (token >= 0)).to(self.dtype)
        return rows, row, slope, nll.detach(), essences, drift.detach(), is_missed

    @torch.no_grad()
    def _before(
        self, facts: Int[Tensor, " compared"], final: Float[Tensor, "compared d_model"]
    ) -> Float[Tensor, "compared d_vocab"]:
        """What the essences of these facts said at first."""
        if not self.is_begun:
            log_p = self.blocks.logits(final).to(self.dtype).log_softmax(-1)
            self.before |= dict(zip(facts.tolist(), log_p, strict=True))
        of_facts = [self.before[fact] for fact in facts.tolist()]
        return torch.stack(of_facts) if of_facts else self.weight.new_empty(0, int(self.model.cfg.d_vocab))


def batches(model: HookedModel, sought: Sequence[Kind], layer: int) -> Iterator[list[Kind]]:
    """Facts in their order, as many at once as the memory lets."""
    batch: list[Kind] = []
    size = 0
    for each in sought:
        own = above.kept_bytes(model, each.as_rows, layer)
        if batch and size + own > MEMORY:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += own
    if batch:
        yield batch
