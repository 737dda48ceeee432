"""What may be done to a change after its solve: fewer entries, smaller singular values, a bound. In this order, each where it is asked for:

    entries        RECT (Gu et al. 2024): of the change's entries those that are largest beside the weight's own; the others are zero
    spectrum_base  PRUNE (Ma et al. 2025): all that W_out has changed since it was unedited, singular values above the unedited weight's
                   largest, m, become log(s) - log(m) + m, logarithms to this base. Published for the end of a sequence; here after each edit
    longest        a change that is longer than this, in lengths of W_out (Frobenius), is made so long

Then what was met of the residuals is less, and the report says how much (`met`). Where entries or singular values were changed, the change has
no thin factors any more and is kept whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, models
from mechedit.changes import Change, Dense, LowRank
from mechedit.closed_form import bounded, least_spectrum, sparsest
from mechedit.models import HookedModel
from mechedit.settings import MemitSettings

__all__ = ["shaped", "unedited", "unmet"]


def unedited(model: HookedModel, settings: MemitSettings) -> dict[int, Float[Tensor, "d_mlp d_model"]]:
    """Each written block's W_out without the edits that stand in it, in float64; none where no step asks for it."""
    if not settings.spectrum_base:
        return {}
    with applying.underneath(model):
        return {layer: models.W_out(model, layer).detach().cpu().double().clone() for layer in settings.blocks}


def shaped(
    change: LowRank,
    now: Float[Tensor, "d_mlp d_model"],
    first: Float[Tensor, "d_mlp d_model"] | None,
    settings: MemitSettings,
) -> tuple[Change, dict[str, float]]:
    """The change that is written in place of the solve's, of a W_out that is `now` and was `first`, and what each step did: the share of the
    entries that is left, how many singular values were lowered, and the share of its length that is left."""
    now, did = now.detach().cpu().double(), {}
    found: Change = change
    if settings.entries < 1:
        found = Dense(change.weight, sparsest(change.dense(), now, settings.entries))
        did["entries"] = float((found.dense() != 0).double().mean())
    if settings.spectrum_base:
        assert first is not None
        since = now - first
        total = since + found.dense()
        lowered = int((torch.linalg.svdvals(total) > torch.linalg.matrix_norm(first, 2)).sum())
        if lowered:
            found = Dense(change.weight, least_spectrum(total, first, settings.spectrum_base) - since)
        did["lowered"] = float(lowered)
    if settings.longest:
        before = found.norm
        found = bounded(found, settings.longest * float(now.norm()))
        did["length"] = found.norm / before if before else 1.0
    return found, did


def unmet(report: Mapping[str, float], settings: MemitSettings) -> str:
    """What is to be said of an edit that writes less than `least_met` of what its facts want; empty where it writes more."""
    met = report["met"]
    if met >= settings.least_met:
        return ""
    if settings.loose and not settings.slack:
        advice = f"lower loose, the slack, from {settings.loose:g}"
    elif settings.a > 0 and settings.slack:
        advice = f"lower a, the weight of C, from {settings.a:g}"
    elif settings.null:
        advice = (
            f"lower c from {settings.c:g}, or raise null ({report['survives']:.2g} of the key is in the null space)"
        )
    else:
        advice = "take steps after the solve back, or write it at another layer"
    return f"the edit writes {met:.2g} of what its facts want (met), less than least_met = {settings.least_met:g}: {advice}."
