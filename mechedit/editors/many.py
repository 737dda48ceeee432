"""Editors of many facts at one layer: keys and values as ROME finds them, and one solve (`mechedit.closed_form`).

    W_out += A^T (K A^T + slack I)^-1 R,    A = K M^-1,    M = a C + b P + c I

    memit       a = 15000, slack 1: residuals are met as far as 15,000 ordinary keys let them (Meng et al. 2023, at one layer)
    emmet       a = 1, no slack: residuals are met exactly; with one fact it is ROME (Gupta et al. 2024)
    alphaedit   b = 1, c = 10, in the null space of C: earlier edits keep their values, C's large directions are not touched
                (Fang et al. 2025)

R is what the values v* are more than the keys return now. In a sequence each edit hands on its keys, and P is the sum of k k^T over all of
them. MEMIT's spread over several layers is not built: one layer is edited.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import guards, models
from mechedit.changes import LowRank
from mechedit.closed_form import Metric, Terms
from mechedit.editing import Found, State
from mechedit.editors.rome import BANDS, Prepared, Rome, details
from mechedit.facts import Fact
from mechedit.guards import Band
from mechedit.models import HookedModel
from mechedit.progress import Progress, silent
from mechedit.settings import AlphaEditSettings, EmmetSettings, MemitSettings, RomeSettings

__all__ = ["AlphaEdit", "Emmet", "Memit"]

KEYS, EARLIER = "keys", "earlier"  # in a state: of one edit, and the sum of k k^T over those before


class Memit(Rome):
    """MEMIT at one layer, as an editor."""

    name = "memit"
    settings: ClassVar[type[MemitSettings]] = MemitSettings
    bands: ClassVar[ChainMap[str, Band]] = ChainMap({"cond_C": BANDS["cond_C"]}, guards.BANDS)

    def harmful(self, settings: RomeSettings) -> dict[str, tuple[str, RomeSettings]]:
        """None of its own."""
        return {}

    def joined(self, state: State, new: State) -> State:
        """The sum of k k^T over the keys of all edits so far."""
        if KEYS not in new:
            return state
        keys = new[KEYS].double()
        seen = keys.T @ keys
        return {EARLIER: state[EARLIER] + seen if EARLIER in state else seen}

    def find(
        self,
        model: HookedModel,
        facts: Sequence[Fact],
        settings: Any,
        prepared: Prepared,
        state: State,
        *,
        progress: Progress = silent,
    ) -> Found:
        metric = Metric(terms_of(settings), prepared.moment.C, state.get(EARLIER))
        aims = self.aims(model, facts, settings, prepared, progress=progress)
        W_out, b_out = (each(model, settings.layer).detach().double().cpu() for each in (models.W_out, models.b_out))
        keys, values = (torch.stack([getattr(aim, name) for aim in aims]).double() for name in ("key", "value"))
        residuals = values - (keys @ W_out + b_out)
        change = metric.solve(settings.layer, keys, residuals)
        return Found(
            [change],
            _report(metric, change, keys, residuals) | {"cond_C": prepared.moment.cond},
            details(aims, prepared),
            {"k*": keys.float().squeeze(0), "v*": values.float().squeeze(0)},
            {KEYS: keys.float()} if settings.b else {},
        )


class Emmet(Memit):
    """EMMET as an editor."""

    name = "emmet"
    settings: ClassVar[type[EmmetSettings]] = EmmetSettings


class AlphaEdit(Memit):
    """AlphaEdit as an editor."""

    name = "alphaedit"
    settings: ClassVar[type[AlphaEditSettings]] = AlphaEditSettings


def terms_of(settings: MemitSettings) -> Terms:
    """What the settings weigh a change by."""
    return Terms(settings.a, settings.b, settings.c, settings.slack, settings.null or None)


def _report(
    metric: Metric, change: LowRank, keys: Float[Tensor, "n d_mlp"], residuals: Float[Tensor, "n d_model"]
) -> dict[str, float]:
    """Of the fact for which it is least: the share of its residual that the change adds, and of its key that lies where one may be."""
    added = keys @ change.left.T @ change.right
    met = (added * residuals).sum(1) / residuals.square().sum(1)
    return {"met": float(met.min()), "survives": float(metric.survives(keys).min())}
