"""Fine-tuning of the attention of one block within an L-infinity ball around its weights (Meng et al. 2022, appendix I).

W_Q, W_K and W_V of all heads, and their biases where the model has any, at the layer where attention's effect at the prompt's last
token peaks; `weights` chooses others, W_O among them. `descent` has the steps.

`heads` are query heads by number, which W_Q, b_Q and W_O have a part each for: the others' parts stay as they are, bit for bit. With
grouped queries a key-value head is shared by a group of query heads, so that of W_K, W_V and their biases the part is tuned which a
chosen head reads, and with it what the rest of its group reads. b_O belongs to no head: it is tuned with W_O where all heads are.

Of b_K the numbers are left alone that are not rotated by their position (all in GPT-2, most of a head's in GPT-NeoX): they add the same to
a query's products with all keys, which softmax does not see. Their gradients are rounding, of which Adam would make whole steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from mechedit import models
from mechedit.editing import Editor, Found, State
from mechedit.editors.descent import Heads, descend
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import AttentionEditSettings, SettingsError
from mechedit.weights import Weight, is_used, value

__all__ = ["AttentionEdit", "tuned"]


class AttentionEdit(Editor):
    """The attention edit as an editor."""

    name = "attention-edit"
    settings: ClassVar[type[AttentionEditSettings]] = AttentionEditSettings
    strength = "norm_bound"
    site = "late"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {
        "learning_rate": (1e-3, 5e-3),
        "norm_bound": (1e-3, 3e-3, 1e-2, 3e-2),
    }

    def resolve(self, model: HookedModel, settings: Any = None) -> Any:
        """As every editor does it.

        Raises:
            SettingsError: the model has no such heads.
        """
        chosen = super().resolve(model, settings)
        n = int(model.cfg.n_heads)
        if beyond := [head for head in chosen.heads if not 0 <= head < n]:
            raise SettingsError(
                f"heads must be from 0 to {n - 1} in {model.cfg.model_name}, which has {n}; found {beyond}."
            )
        return chosen

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: AttentionEditSettings,
        prepared: None,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        return descend(model, facts, tuned(model, settings), settings, progress)


def tuned(model: HookedModel, settings: AttentionEditSettings) -> dict[Weight, Heads | None]:
    """The weights that these settings tune, each with the heads of it that are; None: all.

    Raises:
        ModelError: the block's attention lacks one of the matrices.
    """
    names = [f"attn.{name}" for name in dict.fromkeys(settings.weights)]
    biases = [name.replace(".W_", ".b_") for name in names] if settings.bias else []
    of_all = "attn.b_O"
    chosen = [Weight(settings.layer, name) for name in names]
    chosen += [
        weight
        for weight in (Weight(settings.layer, name) for name in biases)
        if is_used(model, weight) and not (settings.heads and weight.name == of_all)
        if weight.name != "attn.b_K" or models.rotated(model)
    ]
    return {weight: _heads(model, weight, settings.heads) for weight in chosen}


def _heads(model: HookedModel, weight: Weight, heads: Sequence[int]) -> Heads | None:
    """Which heads of the weight these query heads use; of b_K, which of their numbers."""
    turned = models.rotated(model)
    some = weight.name == "attn.b_K" and turned < int(model.cfg.d_head)
    if not heads and not some:
        return None
    stored = value(model, weight)
    group = int(model.cfg.n_heads) // len(stored)
    which = torch.zeros(len(stored), dtype=torch.bool, device=stored.device)
    which[[head // group for head in heads] or slice(None)] = True
    return which[:, None] & (torch.arange(stored.shape[1], device=stored.device) < turned) if some else which
