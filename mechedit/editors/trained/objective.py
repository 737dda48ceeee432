"""What the networks are trained for: the edited model says the target after equivalent prompts, and elsewhere what it said before.

    L_e    -log p of the target after an equivalent prompt, the mean over its tokens
    L_loc  KL(before || after), the mean over the tokens of what is to stay
    MEND, and KE as published      edit_weight L_e + locality_weight L_loc
    KE, of the paper               L_CR + alpha (L_loc - margin)
        L_CR   -log p with smoothed labels, of the edit's own prompt and of an equivalent one
        alpha  goes up the gradient, not below 0; the margin shrinks as validations succeed

The model's gradient, of which the edit is made, is a constant: nothing is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechedit import models
from mechedit.editors.trained.data import Case
from mechedit.editors.trained.editor import embedded
from mechedit.editors.trained.factors import added, factors
from mechedit.editors.trained.ke import Ke
from mechedit.editors.trained.rows import Rows
from mechedit.editors.trained.state import Trained
from mechedit.models import Blocks, HookedModel
from mechedit.settings import KeTraining, TrainingSettings

__all__ = ["Losses", "Multiplier", "losses", "observe", "precise"]

SUCCESS = 0.9  # of a validation, from which on the margin shrinks


@dataclass(frozen=True, eq=False)
class Losses:
    """Of each case: -log p of the target, the KL divergence elsewhere, and whether the model says the target."""

    edit: Float[Tensor, " cases"]
    locality: Float[Tensor, " cases"]
    says: Float[Tensor, " cases"]


class Multiplier(nn.Module):
    """What the two losses weigh, and what of it is learnt: alpha and the margin of KE's paper."""

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__()
        self.settings, self.constrained = settings, isinstance(settings, KeTraining) and settings.form == "paper"
        self.alpha = nn.Parameter(torch.ones(()), requires_grad=self.constrained)
        self.margin: Tensor
        self.register_buffer("margin", torch.tensor(getattr(settings, "margin", 0.0)))

    def forward(self, edit: Float[Tensor, " cases"], locality: Float[Tensor, " cases"]) -> Float[Tensor, ""]:
        """The loss; alpha's own gradient has the other sign, so that it goes up where the network goes down."""
        if not self.constrained:
            return self.settings.edit_weight * edit.mean() + self.settings.locality_weight * locality.mean()
        alpha = 2 * self.alpha.detach() - self.alpha
        return edit.mean() + alpha * (locality.mean() - self.margin)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep alpha from going below 0."""
        self.alpha.clamp_(min=0)

    def validated(self, success: float) -> None:
        """Let the margin shrink where a validation succeeded."""
        if self.constrained and success > SUCCESS:
            assert isinstance(self.settings, KeTraining)
            self.margin.mul_(self.settings.margin_factor).clamp_(min=self.settings.least_margin)


def losses(model: HookedModel, trained: Trained, cases: Sequence[Case], blocks: Blocks, *, training: bool) -> Losses:
    """The losses of some cases, each with its own edit, all in one pass. In training, statistics that follow it do."""
    settings, first, n = trained.settings, trained.weights[0].layer, len(cases)
    constrained = training and isinstance(settings, KeTraining) and settings.form == "paper"
    with precise(model, settings):
        own, _ = factors(Rows(model, [case.example.edit for case in cases], first, blocks), trained.weights)
    if training and settings.form == "published":
        trained.network.observe(own)
    conditions = _conditions(model, trained, cases)
    said = [*(case.equivalent for case in cases), *(case.example.edit for case in cases if constrained)]
    rows = Rows(model, [*said, *(case.unrelated for case in cases)], first, blocks)
    stays = rows.row >= len(said)
    with precise(model, settings):
        with torch.no_grad():
            before = rows.log_p(rows.final()[stays])
        with added(model, trained.network.terms(own, conditions), torch.arange(n, device=rows.row.device).repeat(rows.count // n)):  # fmt: skip
            final = rows.final()
        log_p = rows.log_p(final)
    smoothing = settings.smoothing if constrained and isinstance(settings, KeTraining) else 0.0
    kl = (before.exp() * (before - log_p[stays])).sum(-1)
    return Losses(
        edit=rows.nll(log_p, smoothing)[: len(said)].view(-1, n).mean(0),
        locality=rows.mean(torch.zeros_like(log_p[:, 0]).masked_scatter(stays, kl))[len(said) :],
        says=rows.says(log_p.detach())[:n],
    )


@torch.no_grad()
def observe(model: HookedModel, trained: Trained, parts: Iterator[Sequence[Case]], blocks: Blocks) -> None:
    """Let the statistics be of the edits of these cases."""
    for cases in parts:
        rows = Rows(model, [case.example.edit for case in cases], trained.weights[0].layer, blocks)
        trained.network.observe(factors(rows, trained.weights)[0])


def _conditions(model: HookedModel, trained: Trained, cases: Sequence[Case]) -> list[Tensor]:
    if not isinstance(trained.network, Ke):
        return []
    ids: list[Int[Tensor, " pos"]] = [torch.tensor(case.example.condition) for case in cases]
    return embedded(model, trained.network, ids)


def precise(model: HookedModel, settings: TrainingSettings) -> AbstractContextManager[object]:
    """The number format of the model's products: bfloat16 where it is wanted, or where a GPU has it."""
    device = models.device_of(model)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.precision == "bfloat16" or (settings.precision == "auto" and fast):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
