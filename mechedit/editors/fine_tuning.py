"""Plain fine-tuning of one MLP's `W_out`: gradient steps until the model says the new targets.

    loss(d) = -mean over facts of log p(target | prompt, W_out + d), the mean over each target's tokens
    d <- Adam's step; with `norm_bound` e, then kept within [-e, e] number by number (FT+L)

d starts at zero. It acts as the MLP's output plus keys @ d, so that no weight is written and no parameter has a gradient; everything
below the edited block is constant and computed once. The change is a whole matrix. Baselines FT and FT+L of Meng et al. 2022,
section 3.2 and appendix E.1, in plain form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import models, prompts, weights
from mechedit.changes import Dense
from mechedit.editing import Editor, Found, State
from mechedit.facts import Fact
from mechedit.interventions import intervened, mlp_outputs, read
from mechedit.models import Blocks, HookedModel
from mechedit.progress import Progress, silent
from mechedit.prompts import encode, pad
from mechedit.settings import FineTuningSettings
from mechedit.weights import Weight

__all__ = ["FineTuning"]


class FineTuning(Editor):
    """Fine-tuning of one `W_out` as an editor."""

    name = "ft"
    settings: ClassVar[type[FineTuningSettings]] = FineTuningSettings
    strength = "learning_rate"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"learning_rate": (1e-4, 5e-4, 2e-3), "norm_bound": (0.0,)}

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: FineTuningSettings,
        prepared: None,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        weight = Weight(settings.layer, "mlp.W_out")
        rows = _Rows(model, facts, settings)
        delta = torch.zeros(weights.matrix_shape(model, weight), device=rows.entering.device, requires_grad=True)
        with models.frozen(model):
            losses = _descend(delta, rows, settings, progress)
        return Found([Dense(weight, delta.detach().cpu())], {"loss": losses[-1]}, {"losses": losses})


class _Rows:
    """The facts as rows of tokens, and the states that enter the edited block, which no step changes."""

    def __init__(self, model: HookedModel, facts: Sequence[Fact], settings: FineTuningSettings) -> None:
        models.check_plain(model)
        self.model, self.blocks = model, Blocks(model)
        self.layer, self.n_layers = settings.layer, int(model.cfg.n_layers)
        ids = [encode(model, fact.prompt, prepend_bos=bool(settings.prepend_bos))[0] for fact in facts]
        targets = [prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join) for fact in facts]
        tokens = pad(model, [[*row, *target[:-1]] for row, target in zip(ids, targets, strict=True)])
        with torch.no_grad():
            self.entering = self.blocks.embed(tokens)
            for block in range(self.layer):
                self.entering, _ = self.blocks.run(block, self.entering)
        reads = [(row, len(ids[row]) - 1 + step, token, 1 / (len(facts) * len(target))) for row, target in enumerate(targets) for step, token in enumerate(target)]  # fmt: skip
        row, position, token, share = zip(*reads, strict=True)
        device = tokens.device
        self.row, self.position, self.token = (torch.tensor(each, device=device) for each in (row, position, token))
        self.share = torch.tensor(share, device=device)

    def loss(self, delta: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, ""]:
        """-log p of the targets, the mean over their tokens, then over facts, with `delta` added to `W_out`."""
        kept: list[Tensor] = []
        keys = read(f"blocks.{self.layer}.mlp.hook_post", kept.append)
        with intervened(self.model, keys), mlp_outputs(self.model, self.layer, lambda output: output + kept[0] @ delta.to(output)):  # fmt: skip
            resid = self.entering
            for block in range(self.layer, self.n_layers):
                resid, _ = self.blocks.run(block, resid)
        log_p = self.blocks.logits(resid[self.row, self.position]).float().log_softmax(-1)
        return -(log_p.gather(1, self.token[:, None])[:, 0] * self.share).sum()


def _descend(
    delta: Float[Tensor, "d_mlp d_model"], rows: _Rows, settings: FineTuningSettings, progress: Progress
) -> list[float]:
    """Take Adam's steps on `delta`, in place; the loss before each, and at the end."""
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    losses: list[float] = []
    for step in range(settings.steps + 1):
        progress("fine-tuning", step, settings.steps)
        with torch.enable_grad():
            loss = rows.loss(delta)
        losses.append(loss.item())
        if losses[-1] < settings.stop_at or step == settings.steps:
            break
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        if settings.norm_bound:
            with torch.no_grad():
                delta.clamp_(-settings.norm_bound, settings.norm_bound)
    progress("fine-tuning", settings.steps, settings.steps)
    return losses
