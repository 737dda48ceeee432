"""v*, the value to store: the MLP output at the subject's last token that makes the model say the new target.

    loss(d) = -mean_j log p(target | x_j + p, d) + kl * KL(p(. | essence, d) || p(. | essence)) + decay * |d| / |v|^2
              + fisher * d G d / 2

after Meng et al. 2022, eq. 4, with the form and constants of the published code (the paper's text has others). d is
optimised by Adam and kept within `clamp` lengths of v. The essence prompt is "{subject} is a", read at the subject's last
token, as the code does. The last term is ours, and off where nothing else is said: the KL that d costs ordinary text
(`mechedit.moments.curvature`); with it d is optimised by L-BFGS (`mechedit.optimisers`). Only d changes: no parameter needs a gradient.

A rank-one write that gives the key k* the value v + d gives another key k the share (k @ u) / (k* @ u) of d. Each row is
optimised with the share that its own key will get (`Sought.shares`), so that what is optimised is what will be written; the
published code adds the whole of d to every row, and its averaged edit can then miss the very prompt it was made for.

Values of many facts are sought together, each with its own d, steps, clamp and end: the sum of their losses has for each d the slope
that its own loss has, so what is found is what one after another would find. Rows of a fact that is done are run no more. What no d
can change is computed once (`mechedit.above`).

v is W_out's own output. Where a norm follows the MLP (Gemma 2 and 3) that is before the norm. Other `parts` of the block can be changed
in its place or with it, each by a d of its own that is kept within `clamp` lengths of what the part gives now (`above.HOOKS`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit import above
from mechedit.above import HOOKS, Row
from mechedit.keys import Context
from mechedit.models import Blocks, HookedModel, check_layer, check_plain, device_of, frozen
from mechedit.optimisers import descent
from mechedit.progress import Progress, silent
from mechedit.settings import RomeSettings, SettingsError

__all__ = ["HOOKS", "Sought", "Value", "optimise", "optimise_all"]

MEMORY = 2**29  # bytes of what is kept of the rows of facts whose values are sought at once
TIE = 1e-4  # of logits: of two that are closer, rounding decides which is first
# PMET's stop, once the target is first everywhere: its loss's weight, and the KL term to reach.
TOP_WEIGHT, TOP_KL = 0.1, 0.01

Losses = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, eq=False)
class Value:
    """v* in float32, one for each part where `initial` had several, and a row for each step of the optimisation that was not taken back: the terms of
    the loss, of the target, of the essence's KL, and of what d itself costs (decay and G). `is_learnt` says whether it ended before its steps did."""

    value: Float[Tensor, "*parts d_model"]
    losses: Losses
    is_learnt: bool


@dataclass(frozen=True, eq=False)
class Sought:
    """A value near `initial` (v above) with which the model answers each context of `rows` by its ids in `targets`. Of several parts
    `initial` has a row for each."""

    rows: Sequence[Context]
    essence: Context
    targets: Sequence[Sequence[int]]
    initial: Float[Tensor, "*parts d_model"]
    shares: Float[Tensor, " rows_and_essence"]

    @property
    def as_rows(self) -> list[Row]:
        """The contexts with their targets, then the essence."""
        found = [
            Row((*row.ids, *target[:-1]), row.lookup, tuple(range(row.last, row.last + len(target))))
            for row, target in zip(self.rows, self.targets, strict=True)
        ]
        at = self.essence.lookup  # what follows it is not read
        return [*found, Row(tuple(self.essence.ids[: at + 1]), at, (at,))]

    @property
    def wanted(self) -> list[tuple[int, float]]:
        """The token wanted at each read, and its weight, rows counting alike; of the essence -1 and 0."""
        found = [(token, 1 / (len(self.rows) * len(target))) for target in self.targets for token in target]
        return [*found, (-1, 0.0)]


def optimise(
    model: HookedModel,
    rows: Sequence[Context],
    essence: Context,
    targets: Sequence[Sequence[int]],
    initial: Float[Tensor, "*parts d_model"],
    shares: Float[Tensor, " rows_and_essence"],
    layer: int,
    settings: RomeSettings,
    parts: Sequence[str] = ("mlp",),
    *,
    G: Float[Tensor, "d_model d_model"] | None = None,
    progress: Progress = silent,
) -> Value:
    """Find v* of one fact (`Sought`); errors as `optimise_all`."""
    one = Sought(rows, essence, targets, initial, shares)
    return optimise_all(model, [one], layer, settings, parts, G=G, progress=progress)[0]


def optimise_all(
    model: HookedModel,
    sought: Sequence[Sought],
    layer: int,
    settings: RomeSettings,
    parts: Sequence[str] = ("mlp",),
    *,
    G: Float[Tensor, "d_model d_model"] | None = None,
    progress: Progress = silent,
) -> list[Value]:
    """Find v* of each fact, together: as many at once as `MEMORY` lets. G is of the last part, in
    whatever units the settings weigh it (`Fisher.relative`).

    Raises:
        SettingsError: they do, and there is no G.
    """
    check_layer(model, layer)
    check_plain(model)
    if settings.fisher and G is None:
        raise SettingsError(f"fisher = {settings.fisher:g} weighs G (moments.fisher), and none was given.")
    found: list[Value] = []
    of = len(sought) * settings.steps
    with frozen(model):
        for batch in _batches(model, sought, layer):
            done, search = len(found) * settings.steps, _Search(model, batch, layer, settings, parts, G)
            for step in range(settings.steps):
                progress("finding v*", done + step * len(batch), of)
                if not search.step():
                    break
            found += search.found()
    progress("finding v*", of, of)
    return found


def _batches(model: HookedModel, sought: Sequence[Sought], layer: int) -> Iterator[list[Sought]]:
    """Facts in their order, as many at once as the memory lets."""
    batch: list[Sought] = []
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


class _Search:
    """The values of some facts, as far as they are found: d, and the losses so far, of each."""

    def __init__(
        self,
        model: HookedModel,
        sought: Sequence[Sought],
        layer: int,
        settings: RomeSettings,
        parts: Sequence[str],
        G: Float[Tensor, "d_model d_model"] | None,
    ) -> None:
        self.model, self.layer, self.settings, self.parts = model, layer, settings, parts
        self.blocks, device = Blocks(model), device_of(model)
        self.given = [each.initial.shape for each in sought]
        initial = torch.stack([each.initial.view(len(parts), -1) for each in sought]).to(device)
        self.initial = initial.to(torch.promote_types(initial.dtype, torch.float32))
        self.size = self.initial.norm(dim=2, keepdim=True)
        self.G = G.to(self.initial) if G is not None and settings.fisher else None
        self.descent = descent(self.initial, settings, None if self.G is None else settings.fisher * self.G)
        self.losses: list[list[tuple[float, float, float]]] = [[] for _ in sought]
        self.done = torch.zeros(len(sought), dtype=torch.bool, device=device)
        self.rows_of = torch.tensor([len(each.rows) for each in sought], device=device)
        self.steps = 0
        rows = [(fact, row) for fact, each in enumerate(sought) for row in each.as_rows]
        self.fact = torch.tensor([fact for fact, _ in rows], device=device)  # of each row
        self.share = torch.cat([each.shares for each in sought]).to(self.initial)
        self.row = torch.tensor([index for index, (_, row) in enumerate(rows) for _ in row.reads], device=device)
        self.learnt = torch.zeros(len(rows)).to(self.initial)  # the latest share of each row in the target's loss
        self.gone = torch.zeros(len(rows), dtype=torch.bool, device=device)
        tokens, weights = zip(*(wanted for each in sought for wanted in each.wanted), strict=True)
        self.token, self.weight = torch.tensor(tokens, device=device), torch.tensor(weights).to(self.initial)
        self.is_essence = torch.zeros_like(self.gone).index_fill(0, self.row[self.token < 0], True)
        self.groups = above.prepare(model, self.blocks, [row for _, row in rows], layer)
        self.run_at_once = above.at_once(model, self.groups)
        self.before: dict[int, Tensor] = {}  # of each fact, what the essence says without d, as log probabilities

    def step(self) -> bool:
        """Take the loss of each fact that is not done, and a step where it is not good enough; False where all are done."""
        terms, is_top, slope = self._terms()
        self.steps += 1
        is_better = self.descent.judge(terms.sum(1), slope)
        done = self.done.clone()
        for fact in (~self.done & is_better).nonzero()[:, 0].tolist():
            self.losses[fact].append(tuple(terms[fact].tolist()))
            done[fact] = _done(self.losses[fact], self.settings, bool(is_top[fact]))
        self.done = done
        self._leave(is_better)
        self.descent.go(done)
        return not bool(done.all())

    def _leave(self, is_better: Bool[Tensor, " facts"]) -> None:
        """Rows of facts that are done are run no more; nor, where that is wanted, rows that are learnt by a step that is not taken back."""
        gone = self.gone | self.done[self.fact]
        if self.settings.leave_learnt:
            is_learnt = self.learnt * self.rows_of[self.fact] < self.settings.stop_at
            gone |= is_learnt & is_better[self.fact] & ~self.is_essence
        if not torch.equal(gone, self.gone):
            self.gone = gone
            self.groups = [left for each in self.groups if (left := each.without(gone)) is not None]
            self.run_at_once = above.at_once(self.model, self.groups)

    def _terms(
        self,
    ) -> tuple[Float[Tensor, "facts 3"], Bool[Tensor, " facts"], Float[Tensor, "facts parts d_model"]]:
        """Terms of each fact's loss (`Value.losses`); whether its target is first everywhere; and the slope of the loss. Of a fact that is
        done they say nothing; of a row that has left its last loss counts, and no slope."""
        delta = self.descent.delta
        target, kl, missed = (torch.zeros(len(self.initial)).to(self.initial) for _ in range(3))
        of_target, of_kl = (torch.zeros_like(self.initial) for _ in range(2))
        for parts in self.run_at_once:
            rows, reads = (torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "reads"))
            token, row = self.token[reads], self.row[reads]
            fact, essence = self.fact[row], (token < 0).nonzero()[:, 0]
            share = self.share[rows, None, None]
            changes = [(self.share[part.rows, None, None] * delta[self.fact[part.rows]]).requires_grad_() for part in parts]  # fmt: skip
            with torch.enable_grad():
                final = torch.cat([part.run(self.model, self.blocks, self.layer, self.parts, own) for part, own in zip(parts, changes, strict=True)])  # fmt: skip
                before = self._before(fact[essence], final[essence].detach())
                log_p, drift, below = self.blocks.said(final, token.clamp(min=0), essence, before)
                nll, drift = -log_p * self.weight[reads], self.settings.kl * drift
                slopes = torch.cat(torch.autograd.grad(nll.sum() + drift.sum(), changes))
            for into, kind in ((of_target, ~self.is_essence[rows]), (of_kl, self.is_essence[rows])):
                into.index_add_(0, self.fact[rows[kind]], (share * slopes)[kind])
            self.learnt[rows] = 0.0
            self.learnt.index_add_(0, row, nll.detach())
            kl.index_add_(0, fact[essence], drift.detach())
            missed.index_add_(0, fact, ((below > TIE) & (token >= 0)).to(missed))
        target.index_add_(0, self.fact, self.learnt)
        is_top = (missed == 0) & (self.settings.stop == "top")
        weigh = torch.where(is_top, TOP_WEIGHT, 1.0).to(target)
        decay = self.settings.weight_decay / self.size**2
        slope = weigh[:, None, None] * of_target + of_kl + decay * F.normalize(delta, dim=2)
        costs = (decay * delta.norm(dim=2, keepdim=True)).sum((1, 2))
        if self.G is not None:
            own = delta[:, -1]
            felt = self.settings.fisher * own @ self.G
            slope[:, -1] += felt
            costs = costs + (own * felt).sum(1) / 2
        return torch.stack([weigh * target, kl, costs], 1), is_top, slope

    @torch.no_grad()
    def _before(
        self, facts: Int[Tensor, " compared"], final: Float[Tensor, "compared d_model"]
    ) -> Float[Tensor, "compared d_vocab"]:
        """What the essences of these facts say without d, which is 0 at first."""
        if not self.steps:
            log_p = self.blocks.logits(final).to(self.initial.dtype).log_softmax(-1)
            self.before |= dict(zip(facts.tolist(), log_p, strict=True))
        of_facts = [self.before[fact] for fact in facts.tolist()]
        return torch.stack(of_facts) if of_facts else self.initial.new_empty(0, int(self.model.cfg.d_vocab))

    def found(self) -> list[Value]:
        """As far as they are found."""
        values = (self.initial + self.descent.best).cpu()
        done = self.done.tolist()
        return [Value(value.view(shape), tuple(own), ended) for value, shape, own, ended in zip(values, self.given, self.losses, done, strict=True)]  # fmt: skip


def _done(losses: Sequence[tuple[float, float, float]], settings: RomeSettings, is_top: bool = False) -> bool:
    """Whether the target is learnt. The published code judges the sum, penalties and all, and takes no last step; PMET's asks for little
    KL where the target is first everywhere."""
    if settings.stop == "top":
        return losses[-1][1] <= TOP_KL if is_top else sum(losses[-1]) < settings.stop_at
    if settings.stop == "published":
        return sum(losses[-1]) < settings.stop_at or len(losses) == settings.steps
    return losses[-1][0] < settings.stop_at
