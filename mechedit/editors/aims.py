"""What ROME and its kin want of one subject's facts: the prompts that are asked, the key and the direction, and what v* is sought from.

`Rome.begun` puts it together for all subjects at once, `values.optimise_all` seeks the values, and `Begun.aim` is what comes of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import keys, prompts, values
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.settings import RomeSettings

__all__ = ["Aim", "Asked", "Begun", "asked_of", "by_subject", "check_learnt", "chosen_of", "shares_of"]


@dataclass(frozen=True, eq=False)
class Aim:
    """What one subject's facts come to: the direction u = C^-1 k, the key that returns v*, v*, and by how much that is more than what is
    there; with what they were made from."""

    direction: Float[Tensor, " d_mlp"]
    u: Float[Tensor, " d_mlp"]
    key: Float[Tensor, " d_mlp"]
    value: Float[Tensor, " d_model"]
    losses: tuple[tuple[float, float, float], ...]
    shares: tuple[float, ...]
    change: Float[Tensor, " d_model"]
    rows: tuple[keys.Context, ...]


@dataclass(frozen=True, eq=False)
class Begun:
    """One subject's facts, the direction u = C^-1 k, the key that is to return v*, all prompts, the parts of the block that are changed
    while v* is sought, and what it is sought from."""

    facts: tuple[Fact, ...]
    direction: Float[Tensor, " d_mlp"]
    u: Float[Tensor, " d_mlp"]
    key: Float[Tensor, " d_mlp"]
    rows: tuple[keys.Context, ...]
    parts: tuple[str, ...]
    sought: values.Sought

    def aim(self, found: values.Value) -> Aim:
        """With the value that was found."""
        new, old = (each.reshape(len(self.parts), -1)[-1] for each in (found.value, self.sought.initial))
        shares = tuple(self.sought.shares.tolist())
        return Aim(self.direction, self.u, self.key, new, found.losses, shares, new - old, self.rows)


@dataclass(frozen=True)
class Asked:
    """The prompts of a subject's facts behind each prefix, the ids that each is to be answered by, and the essence prompt."""

    rows: tuple[keys.Context, ...]
    wanted: tuple[list[int], ...]
    essence: keys.Context

    @property
    def contexts(self) -> tuple[keys.Context, ...]:
        """All rows, and the essence prompt."""
        return (*self.rows, self.essence)


def by_subject(facts: Sequence[Fact]) -> list[list[Fact]]:
    """The facts of each subject, in the order in which they name them."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(fact.subject, []).append(fact)
    return list(found.values())


def asked_of(model: HookedModel, facts: Sequence[Fact], settings: RomeSettings, before: tuple[str, ...]) -> Asked:
    """The prompts of facts about one subject, behind these prefixes; errors of facts that do not fit the model's context."""
    bos, token = settings.prepend_bos, settings.fact_token
    targets = [prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join) for fact in facts]
    rows = [row for fact in facts for row in keys.contexts(model, fact, before, token, prepend_bos=bos)]
    wanted = [target for target in targets for _ in before]
    for row, target in zip(rows, wanted, strict=True):
        prompts.check_length(model, len(row.ids) + len(target) - 1)
    (essence,) = keys.contexts(model, Fact(facts[0].subject, "{} is a"), ("",), token, prepend_bos=bos)
    return Asked(tuple(rows), tuple(wanted), essence)


def shares_of(
    found: Float[Tensor, "rows_and_essence d_mlp"],
    u: Float[Tensor, " d_mlp"],
    key: Float[Tensor, " d_mlp"],
    settings: RomeSettings,
) -> Float[Tensor, " rows_and_essence"]:
    """How much of the change of the value each row sees while v* is sought."""
    own = (found.double() @ u / (key.double() @ u)).float()
    return own if settings.shares == "own" else torch.ones(len(found))


def chosen_of(rows: int, prefixes: Sequence[str], settings: RomeSettings) -> list[int]:
    """Which rows v* is sought with, of each fact as many: the bare prompt's, and others evenly."""
    n = min(settings.sought_with or len(prefixes), len(prefixes))
    order = sorted(range(len(prefixes)), key=lambda index: bool(prefixes[index]))
    places = sorted(order[index * len(prefixes) // n] for index in range(n))
    return [begin + place for begin in range(0, rows, len(prefixes)) for place in places]


def check_learnt(facts: Sequence[Fact], found: Sequence[values.Value], settings: RomeSettings) -> None:
    """Raise where facts were to be strengthened and of none of them anything was learnt."""
    if (
        settings.strengthen
        and settings.steps > 1
        and all(value.is_learnt and len(value.losses) == 1 for value in found)
    ):
        raise EditError(
            f"the model already says {facts[0].target_new!r} after {facts[0].prompt!r} with a loss of {found[0].losses[0][0]:.2g}, "
            f"and v* is sought until it is below stop_at = {settings.stop_at:g}. Lower stop_at to strengthen it further."
        )
