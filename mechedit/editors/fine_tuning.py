"""Fine-tuning of one MLP's `W_out`, free (FT) or within an L-infinity ball around the original weights (FT+L).

Baselines of Meng et al. 2022, section 3.2 and appendix E.1. The default loss reads each token of a target where it is predicted, as
later work does (FT-M); with that of the policy `published`, all tokens are read at the prompt's last, and `b_out` is tuned too.
`descent` has the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mechedit.editing import Editor, Found, State
from mechedit.editors.descent import descend
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import BoundedSettings, DescentSettings, FineTuningSettings
from mechedit.weights import Weight, is_used

__all__ = ["Bounded", "FineTuning"]


class FineTuning(Editor):
    """FT as an editor."""

    name = "ft"
    settings: ClassVar[type[DescentSettings]] = FineTuningSettings
    strength = "learning_rate"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3)}

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: DescentSettings,
        prepared: None,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        tuned = [Weight(settings.layer, "mlp.W_out")]
        bias = Weight(settings.layer, "mlp.b_out")
        if settings.bias and is_used(model, bias):
            tuned.append(bias)
        return descend(model, facts, dict.fromkeys(tuned), settings, progress)


class Bounded(FineTuning):
    """FT+L as an editor."""

    name = "ft-l"
    settings: ClassVar[type[DescentSettings]] = BoundedSettings
    strength = "norm_bound"
    grid: ClassVar[dict[str, tuple[float, ...]]] = {
        "learning_rate": (5e-4, 2e-3),
        "norm_bound": (3e-4, 1e-3, 3e-3, 1e-2),
    }
