"""The values of all facts of a sequence, found anew together.

Each value was sought on what stood when it came, and what it costs ordinary text was counted for it alone. Together they have one loss:

    loss(D) = sum over subjects of -mean_j log p(target | x_j, D) + fisher * s * tr(G D^T C D) / 2

D is the whole change of W_out, and the last term what it costs ordinary text (`mechedit.moments.curvature`): G in the units of `Fisher.relative`, and s
the mean of k C^-1 k over the keys, so that of one fact, whose D is C^-1 k d^T / (k C^-1 k), it is the fisher * d G d / 2 of `mechedit.values`.
Penalties of that form keep a network at what it was trained for before (Ritter et al. 2018, arXiv 1805.07810).

D stays what one solve for all keys gives (`mechedit.recursive`): what is found anew is their targets, by L-BFGS from where they are, with
some of the prompts of each fact, and each edit can be taken out as before. Prompts feel D at their subject's last token, as where single values are sought; elsewhere they have what stood.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import replace
from math import floor, log
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import keys, models
from mechedit.closed_form import Metric
from mechedit.editors.aims import asked_of, by_subject, chosen_of
from mechedit.editors.rome import Prepared
from mechedit.facts import Fact
from mechedit.losses import Losses, Wanted, batches
from mechedit.models import HookedModel
from mechedit.optimisers import ByRow, Lbfgs, root
from mechedit.progress import Progress, silent
from mechedit.runs import rehearsing
from mechedit.runs.sequence import Sequence, written
from mechedit.settings import SequenceSettings
from mechedit.weights import Weight

__all__ = ["is_due", "settled"]

PROMPTS = 6  # of each fact, at most, the bare one among them
STEPS = 16  # evaluations, at most
LEAST = 0.02  # of all that was gained: a step that gains less is the last
KEPT = 4  # batches of facts (`losses.batches`) of which what no change reaches is kept; of others it is made again for each evaluation


def is_due(before: int, after: int, growth: float) -> bool:
    """Whether a sequence of so many facts after a batch, and so many before it, has grown by that share since it was settled: each time that its
    number passes a power of 1 + growth, so that it does not depend on where a run was stopped."""
    if not growth or after < 2:
        return False
    passed, now = (floor(log(max(n, 1)) / log(1 + growth)) for n in (before, after))
    return now > passed


def settled(
    model: HookedModel,
    sequence: Sequence,
    settings: Any,
    how: SequenceSettings,
    prepared: Prepared,
    metric: Metric,
    *,
    progress: Progress = silent,
) -> Sequence:
    """The sequence with the targets of all its rows found anew together, the model without edits given; as it is where there are fewer than two, where
    values do not keep clear of ordinary text (fisher = 0), and where facts are not learnt again either (`rehearsing.is_gentle`)."""
    if len(sequence.rows) < 2 or not settings.fisher or not rehearsing.is_gentle(settings, how):
        return sequence
    with written(model, sequence), models.frozen(model), models.plainly(model):
        loss = _Loss(model, sequence, settings, prepared, metric)
        descent = Lbfgs(torch.zeros(1, *loss.shape, dtype=torch.float64), loss.coordinates)
        kept: list[float] = []  # losses
        for step in range(STEPS):
            progress("finding all values anew", step, STEPS)
            now, slope = loss.at(descent.delta[0])
            if bool(descent.judge(now[None], slope[None])):
                kept.append(float(now))
                if len(kept) > 1 and kept[-2] - kept[-1] < LEAST * (kept[0] - kept[-1]):
                    break
            descent.go(torch.zeros(1, dtype=torch.bool))
        progress("finding all values anew", STEPS, STEPS)
    return rehearsing.raised(sequence, list(sequence.rows), descent.best[0], metric)


class _Loss:
    """The loss by how much more the targets are [rows, d_model], in float64; on the model with what the sequence has written."""

    def __init__(
        self, model: HookedModel, sequence: Sequence, settings: Any, prepared: Prepared, metric: Metric
    ) -> None:
        assert prepared.fisher is not None
        assert sequence.sums is not None
        self.model, self.settings = model, settings
        self.dtype = torch.promote_types(models.W_out(model, settings.layer).dtype, torch.float32)
        K = torch.stack([row.key for row in sequence.rows.values()]).double()
        C, D = prepared.moment.C.cpu().double(), sequence.totals[Weight(settings.layer, "mlp.W_out")].cpu().double()
        spread = float((K * prepared.moment.solve(K)).sum(1).mean())
        self.G = settings.fisher * spread * prepared.fisher.relative.cpu().double()
        self.reach = settings.b * metric.at(metric.terms, sequence.sums.P).reach(K)
        self.curvature, self.standing = self.reach @ C @ self.reach.T, self.reach @ C @ D
        self.cost = float(((D.T @ C @ D) * self.G).sum()) / 2
        self.coordinates = ByRow(root(self.curvature), root(self.G))
        self.shape = self.standing.shape
        facts = [entry.as_fact for entry in sequence.standing.values()]
        wanted = [_wanted(model, own, settings, prepared) for own in by_subject(facts)]
        self.batches = [*batches(model, wanted, settings.layer)]
        self.made: dict[int, tuple[Losses, Tensor]] = {}

    def at(self, more: Float[Tensor, "rows d_model"]) -> tuple[Float[Tensor, ""], Float[Tensor, "rows d_model"]]:
        """The loss and its slope."""
        felt = self.curvature @ more
        loss = self.cost + ((more.T @ (self.standing + felt / 2)) * self.G).sum()
        slope, change = (self.standing + felt) @ self.G, (self.reach.T @ more).to(self.dtype)
        for index, batch in enumerate(self.batches):
            losses, rows = self.made.get(index) or self._made(index, batch)
            terms = losses.at((rows @ change.to(rows))[:, None])
            loss = loss + terms.target.cpu().double().sum()
            slope = slope + self.reach @ (rows.T @ terms.slope[:, 0]).cpu().double()
        return loss, slope

    def _made(self, index: int, batch: list[Wanted]) -> tuple[Losses, Float[Tensor, "rows d_mlp"]]:
        """What does not change of a batch, and the keys of its prompts."""
        layer = self.settings.layer
        losses = Losses(self.model, batch, layer, ("mlp",), 0.0, self.dtype)
        found = (
            losses,
            keys.subject_keys(self.model, layer, tuple(row for each in batch for row in each.rows)).to(self.dtype),
        )
        if len(self.made) < KEPT:
            self.made[index] = found
        return found


def _wanted(model: HookedModel, facts: Several[Fact], settings: Any, prepared: Prepared) -> Wanted:
    """Some of the prompts of facts about one subject, and their answers."""
    few = replace(settings, sought_with=min(settings.sought_with or PROMPTS, PROMPTS))
    asked = asked_of(model, facts, few, prepared.prefixes)
    chosen = chosen_of(len(asked.rows), prepared.prefixes, few)
    return Wanted([asked.rows[index] for index in chosen], None, [asked.wanted[index] for index in chosen])
