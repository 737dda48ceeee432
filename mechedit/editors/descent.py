"""Gradient steps on some weights of one block until the model says the new targets: fine-tuning and the attention edit.

    loss(d) = -mean over facts of the mean over the target's tokens of log p(token | what it is read after, W + d)
        masked   each token is read after the prompt and the tokens before it
        last     each token is read after the prompt alone, as published
    d <- Adam's step; with a bound e, then kept within [-e, e] number by number

d starts at zero. W + d is written into the model's own weights while steps are taken, in its number format, so that what is optimised
is what an edit writes; the exact original weights are put back, whatever happens. No other parameter has a gradient, and everything
below the block is constant and computed once. Facts may be taken in batches, a step for each: a batch whose loss is below the
threshold is left out, and the descent ends when the mean over batches is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit import models, prompts, weights
from mechedit.changes import Dense
from mechedit.editing import Found
from mechedit.facts import Fact
from mechedit.models import Blocks, HookedModel
from mechedit.progress import Progress
from mechedit.prompts import encode, pad
from mechedit.settings import DescentSettings
from mechedit.weights import Weight, as_matrix

__all__ = ["Rows", "descend"]

Heads = Bool[Tensor, "heads *numbers"]


def descend(
    model: HookedModel,
    facts: Sequence[Fact],
    chosen: Mapping[Weight, Heads | None],
    settings: DescentSettings,
    progress: Progress,
) -> Found:
    """Dense changes of the chosen weights, of one block, after which the model says the facts' new targets. With heads, a change is
    zero outside those.

    Raises:
        ModelError: the model lacks one of the weights, or there are hooks on it.
    """
    models.check_plain(model)
    size = settings.batch or len(facts)
    with weights.restored(model, *chosen) as originals, models.frozen(model):
        batches = [Rows(model, facts[begin : begin + size], settings) for begin in range(0, len(facts), size)]
        tuned = [_Tuned(model, weight, originals[weight], heads) for weight, heads in chosen.items()]
        losses = _steps(batches, tuned, settings, progress)
    return Found([each.change() for each in tuned], {"loss": losses[-1]}, {"losses": losses})


class Rows:
    """Some facts as rows of tokens, and the states that enter the edited block, which no step changes."""

    def __init__(self, model: HookedModel, facts: Sequence[Fact], settings: DescentSettings) -> None:
        self.blocks, self.facts = Blocks(model), len(facts)
        self.layers = range(settings.layer, int(model.cfg.n_layers))
        ids = [encode(model, fact.prompt, prepend_bos=bool(settings.prepend_bos))[0] for fact in facts]
        targets = [prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join) for fact in facts]
        masked = settings.loss == "masked"
        tokens = pad(model, [[*row, *target[:-1]] if masked else row for row, target in zip(ids, targets, strict=True)])
        with torch.no_grad():
            self.entering = self.blocks.embed(tokens)
            for layer in range(settings.layer):
                self.entering, _ = self.blocks.run(layer, self.entering)
        reads = [
            ((row, len(ids[row]) - 1 + step * masked), token, 1 / (len(facts) * len(target)))
            for row, target in enumerate(targets)
            for step, token in enumerate(target)
        ]
        places = list(dict.fromkeys(place for place, _, _ in reads))
        self.row, self.position = torch.tensor(places, device=tokens.device).T
        self.at = torch.tensor([places.index(place) for place, _, _ in reads], device=tokens.device)
        self.token = torch.tensor([token for _, token, _ in reads], device=tokens.device)
        self.share = torch.tensor([share for _, _, share in reads], device=tokens.device)

    def loss(self) -> Float[Tensor, ""]:
        """-log p of the targets, the mean over their tokens, then over facts, with the weights as they are."""
        resid = self.entering
        for layer in self.layers:
            resid, _ = self.blocks.run(layer, resid)
        logits = self.blocks.logits(resid[self.row, self.position])
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return -(log_p[self.at, self.token] * self.share).sum()


class _Tuned:
    """A weight that steps change: the model's own tensor, what it was, and d, in the tensor's layout."""

    def __init__(self, model: HookedModel, weight: Weight, original: Float[Tensor, ...], heads: Heads | None) -> None:
        self.weight, self.original, self.heads = weight, original, heads
        self.stored = weights.value(model, weight).detach()
        self.parameter = weights.parameter_of(model, weight).requires_grad_(True)
        self.delta = torch.zeros_like(self.stored, dtype=torch.promote_types(self.stored.dtype, torch.float32))

    def take(self, gradient: Float[Tensor, ...]) -> None:
        """Make the parameter's gradient that of d."""
        own = weights.part_of(gradient, self.parameter, self.stored).to(self.delta)
        if self.heads is not None:  # Adam leaves a number whose gradient was always zero at zero
            own = own * self.heads.to(own).view(*self.heads.shape, *[1] * (own.ndim - self.heads.ndim))
        self.delta.grad = (
            own if own.stride() == self.delta.stride() else torch.empty_like(self.delta).copy_(own)
        )  # as one kernel reads them

    def write_(self) -> None:
        """Put W + d into the model."""
        torch.add(self.original, self.delta, out=self.stored)

    def change(self) -> Dense:
        """d as a change of the weight."""
        return Dense(self.weight, as_matrix(self.weight, self.delta).cpu().contiguous())


def _steps(
    batches: Sequence[Rows], tuned: Sequence[_Tuned], settings: DescentSettings, progress: Progress
) -> list[float]:
    """Take Adam's steps; the loss before each round of batches, and that at the end."""
    fused = all(
        each.delta.device.type in ("cpu", "cuda") for each in tuned
    )  # one kernel a weight, where a dozen cost as much as a block
    adam = torch.optim.Adam([each.delta for each in tuned], lr=settings.learning_rate, fused=fused)
    bound, facts = getattr(settings, "norm_bound", None), sum(rows.facts for rows in batches)
    losses: list[float] = []
    stepped = True
    for step in range(settings.steps):
        progress("fine-tuning", step, settings.steps)
        total, stepped = 0.0, False
        for rows in batches:
            loss = _gradients(rows, tuned, settings.stop_at)
            total += loss * rows.facts / facts
            if not loss < settings.stop_at:
                _step(adam, tuned, bound)
                stepped = True
        losses.append(total)
        if total < settings.stop_at:
            break
    if stepped:
        with torch.no_grad():
            losses.append(sum(rows.loss().item() * rows.facts / facts for rows in batches))
    progress("fine-tuning", settings.steps, settings.steps)
    return losses


def _gradients(rows: Rows, tuned: Sequence[_Tuned], stop_at: float) -> float:
    """The loss of some facts; where it is no less than `stop_at`, the gradients of all d are made too."""
    parameters = list({id(each.parameter): each.parameter for each in tuned}.values())
    with torch.enable_grad():
        loss = rows.loss()
    if not loss.item() < stop_at:
        found = torch.autograd.grad(loss, parameters)
        own = {id(parameter): gradient for parameter, gradient in zip(parameters, found, strict=True)}
        for each in tuned:
            each.take(own[id(each.parameter)])
    return loss.item()


@torch.no_grad()
def _step(adam: torch.optim.Adam, tuned: Sequence[_Tuned], bound: float | None) -> None:
    """Adam's step, kept within the bound, and written."""
    adam.step()
    for each in tuned:
        if bound is not None:
            each.delta.clamp_(-bound, bound)
        each.write_()
    torch.clear_autocast_cache()
