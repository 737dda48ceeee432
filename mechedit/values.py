"""v*, the value to store: the MLP output at the subject's last token that makes the model say the new target.

    loss(d) = -mean_j log p(target | x_j + p, d) + kl * KL(p(. | essence, d) || p(. | essence)) + decay * |d| / |v|^2
              + fisher * d G d / 2

after Meng et al. 2022, eq. 4, with the form and constants of the published code (the paper's text has others). d is
optimised by Adam and kept within `clamp` lengths of v. The essence prompt is "{subject} is a", read at the subject's last
token, as the code does. The last term is ours, and off where nothing else is said: the KL that d costs ordinary text
(`mechedit.moments.curvature`); with it d is optimised by L-BFGS (`mechedit.optimisers`). Only d changes: no parameter needs a gradient.

A rank-one write that gives the key k* the value v + d gives another key k the share (k @ u) / (k* @ u) of d. Each row is
optimised with the share that its own key will get (`Sought.shares`), so that what is optimised is what will be written; the
published code adds the whole of d to every row, and its averaged edit can then miss the very prompt it was made for. Editors of many
facts are given ROME's shares, of u = C^-1 k*; where their solve weighs more than C they are an approximation.

Values of many facts are sought together, each with its own d, steps, clamp and end: the sum of their losses has for each d the slope
that its own loss has, so what is found is what one after another would find. Rows of a fact that is done are run no more. What no d
can change is computed once (`mechedit.above`).

v is W_out's own output. Where a norm follows the MLP (Gemma 2 and 3) that is before the norm. Other `parts` of the block can be changed
in its place or with it, each by a d of its own that is kept within `clamp` lengths of what the part gives now (`above.HOOKS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.above import HOOKS
from mechedit.keys import Context
from mechedit.losses import Losses, Sought, batches
from mechedit.models import HookedModel, check_layer, check_plain, device_of, frozen
from mechedit.optimisers import descent
from mechedit.progress import Progress, silent
from mechedit.settings import RomeSettings, SettingsError

__all__ = ["HOOKS", "Sought", "Value", "optimise", "optimise_all"]

# PMET's stop, once the target is first everywhere: its loss's weight, and the KL term to reach.
TOP_WEIGHT, TOP_KL = 0.1, 0.01


@dataclass(frozen=True, eq=False)
class Value:
    """v* in float32, one for each part where `initial` had several, and a row for each step of the optimisation that was not taken back: the terms of
    the loss, of the target, of the essence's KL, and of what d itself costs (decay and G). `is_learnt` says whether it ended before its steps did."""

    value: Float[Tensor, "*parts d_model"]
    losses: tuple[tuple[float, float, float], ...]
    is_learnt: bool


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
    """Find v* of each fact, together: as many at once as `losses.MEMORY` lets. G is of the last part, in
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
        for batch in batches(model, sought, layer):
            done, search = len(found) * settings.steps, _Search(model, batch, layer, settings, parts, G)
            for step in range(settings.steps):
                progress("finding v*", done + step * len(batch), of)
                if not search.step():
                    break
            found += search.found()
    progress("finding v*", of, of)
    return found


class _Search:
    """The values of some facts, as far as they are found: d, and the terms of the loss so far, of each."""

    def __init__(
        self,
        model: HookedModel,
        sought: Sequence[Sought],
        layer: int,
        settings: RomeSettings,
        parts: Sequence[str],
        G: Float[Tensor, "d_model d_model"] | None,
    ) -> None:
        self.settings = settings
        self.given = [each.initial.shape for each in sought]
        initial = torch.stack([each.initial.view(len(parts), -1) for each in sought]).to(device_of(model))
        self.initial = initial.to(torch.promote_types(initial.dtype, torch.float32))
        self.size = self.initial.norm(dim=2, keepdim=True)
        self.G = G.to(self.initial) if G is not None and settings.fisher else None
        self.descent = descent(self.initial, settings, None if self.G is None else settings.fisher * self.G)
        self.history: list[list[tuple[float, float, float]]] = [[] for _ in sought]
        self.losses = Losses(model, sought, layer, parts, settings.kl, self.initial.dtype)
        self.fact, device = self.losses.fact, self.initial.device  # the fact of each row
        self.done = torch.zeros(len(sought), dtype=torch.bool, device=device)
        self.rows_of = torch.tensor([len(each.rows) for each in sought], device=device)
        self.share = torch.cat([each.shares for each in sought]).to(self.initial)
        self.learnt = torch.zeros(len(self.fact)).to(self.initial)  # the latest share of each row in the target's loss

    def step(self) -> bool:
        """Take the loss of each fact that is not done, and a step where it is not good enough; False where all are done."""
        terms, is_top, slope = self._terms()
        is_better = self.descent.judge(terms.sum(1), slope)
        done = self.done.clone()
        for fact in (~self.done & is_better).nonzero()[:, 0].tolist():
            self.history[fact].append(tuple(terms[fact].tolist()))
            done[fact] = _done(self.history[fact], self.settings, bool(is_top[fact]))
        self.done = done
        self._leave(is_better)
        self.descent.go(done)
        return not bool(done.all())

    def _leave(self, is_better: Bool[Tensor, " facts"]) -> None:
        """Rows of facts that are done are run no more; nor, where that is wanted, rows that are learnt by a step that is not taken back."""
        gone = self.losses.gone | self.done[self.fact]
        if self.settings.leave_learnt:
            is_learnt = self.learnt * self.rows_of[self.fact] < self.settings.stop_at
            gone |= is_learnt & is_better[self.fact] & ~self.losses.is_essence
        self.losses.leave(gone)

    def _terms(
        self,
    ) -> tuple[Float[Tensor, "facts 3"], Bool[Tensor, " facts"], Float[Tensor, "facts parts d_model"]]:
        """Terms of each fact's loss (`Value.losses`); whether its target is first everywhere; and the slope of the loss. Of a fact that is
        done they say nothing; of a row that has left its last loss counts, and no slope."""
        delta, share = self.descent.delta, self.share[:, None, None]
        terms = self.losses.at(share * delta[self.fact])
        target, of_target, of_kl = (torch.zeros_like(each) for each in (terms.kl, self.initial, self.initial))
        for into, kind in ((of_target, ~self.losses.is_essence), (of_kl, self.losses.is_essence)):
            into.index_add_(0, self.fact[kind], (share * terms.slope)[kind])
        self.learnt = torch.where(self.losses.gone, self.learnt, terms.target)
        target.index_add_(0, self.fact, self.learnt)
        is_top = (terms.missed == 0) & (self.settings.stop == "top")
        weigh = torch.where(is_top, TOP_WEIGHT, 1.0).to(target)
        decay = self.settings.weight_decay / self.size**2
        slope = weigh[:, None, None] * of_target + of_kl + decay * F.normalize(delta, dim=2)
        costs = (decay * delta.norm(dim=2, keepdim=True)).sum((1, 2))
        if self.G is not None:
            own = delta[:, -1]
            felt = self.settings.fisher * own @ self.G
            slope[:, -1] += felt
            costs = costs + (own * felt).sum(1) / 2
        return torch.stack([weigh * target, terms.kl, costs], 1), is_top, slope

    def found(self) -> list[Value]:
        """As far as they are found."""
        values = (self.initial + self.descent.best).cpu()
        done = self.done.tolist()
        return [Value(value.view(shape), tuple(own), ended) for value, shape, own, ended in zip(values, self.given, self.history, done, strict=True)]  # fmt: skip


def _done(losses: Sequence[tuple[float, float, float]], settings: RomeSettings, is_top: bool = False) -> bool:
    """Whether the target is learnt. The published code judges the sum, penalties and all, and takes no last step; PMET's asks for little
    KL where the target is first everywhere."""
    if settings.stop == "top":
        return losses[-1][1] <= TOP_KL if is_top else sum(losses[-1]) < settings.stop_at
    if settings.stop == "published":
        return sum(losses[-1]) < settings.stop_at or len(losses) == settings.steps
    return losses[-1][0] < settings.stop_at
