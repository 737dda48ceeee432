"""How well edits did on COUNTERFACT, and its rows."""

from __future__ import annotations

import os
from pathlib import Path

from mechedit import edits, facts, models
from mechedit.benchmarks import counterfact
from mechedit.edits import Edit
from mechedit.facts import Fact

NUMBERS = ("relative_norm", "divisor_share", "essence_kl", "perplexity_ratio")


def success_of(model: models.HookedModel, fact: Fact, edit: Edit) -> dict[str, float]:
    """The fact's scores on the edited model, with the numbers of the edit."""
    with edits.edited(model, edit):
        (found,) = counterfact.scores(model, [fact])
    return (
        found | {name: edit.report.get(name, float("nan")) for name in NUMBERS} | {"edited": float(bool(edit.changes))}
    )


def counterfact_facts(begin: int, n: int) -> list[Fact]:
    """`n` rows of the flat COUNTERFACT file from row `begin` on: MECHEDIT_DATA, or ../shared/data beside the project."""
    data = (
        Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "counterfact_flat.json"
    )
    return list(facts.read(data)[begin : begin + n])
