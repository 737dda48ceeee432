"""Controls: ROME with one of its parts taken out, to see what that part is worth."""

from __future__ import annotations

from dataclasses import replace

import torch

from mechedit import keys, models, rank_one
from mechedit.corruption import generator
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.moments import Moment

__all__ = ["at_random_key", "identity", "random_layer"]


def identity(moment: Moment) -> Moment:
    """C = 1, as if every direction of keys were as common."""
    return replace(moment, C=torch.eye(len(moment.C), dtype=torch.float64), cond=1.0, source="identity")


def random_layer(model: HookedModel, fact: Fact, layer: int, seed: int) -> int:
    """A layer other than `layer`, which depends on the seed and the fact beside it."""
    drawn = int(
        torch.randint(int(model.cfg.n_layers) - 1, (1,), generator=generator(seed, "random layer", fact.prompt))
    )
    return drawn + (drawn >= layer)


def at_random_key(model: HookedModel, edit: Edit, fact: Fact, moment: Moment, seed: int) -> Edit:
    """The edit's v*, written at a random key of the length of k* instead; an edit without changes as it is.

    What was measured on the edit that was is left out of the result; its report has the norm of its own change.
    """
    if not edit.changes:
        return edit
    (change,), own = edit.changes, edit.settings
    weight, bias = models.W_out(model, edit.layer).detach().float().cpu(), models.b_out(model, edit.layer).float().cpu()
    prefixes = tuple(edit.details["prefixes"]) if own["policy"] == "averaged" else ("",)  # v* belongs to that key
    rows = keys.contexts(model, fact, prefixes, own["fact_token"], prepend_bos=own["prepend_bos"])
    key = keys.subject_keys(model, edit.layer, rows).cpu().mean(0).double()
    value = key @ weight.double() + bias.double() + change.step.double() * float(change.u.double() @ key)
    other = torch.randn(len(key), generator=generator(seed, "random key", fact.prompt), dtype=torch.float64)
    other *= key.norm() / other.norm()
    made = rank_one.solve(edit.layer, weight, bias, other, value, rank_one.regularised(moment.C, own["ridge"]))
    report = {"update_norm": made.norm, "relative_norm": made.norm / float(weight.double().norm())}
    return replace(edit, changes=(made,), report=report, reasons=(), before={}, after={})
