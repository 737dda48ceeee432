"""Facts of a sequence that are asked again, and what it takes to say again what the model does not say any more.

The fuller the layer is, the smaller are the steps in which a batch is written (`gently`); what is not said then is learnt again, from where the
model is. So the change stays small, as a fact is pushed little further than it takes to be said. What pulls at a row is its force f (`mechedit.recursive`), by which its target is raised.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from collections.abc import Set
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import models, scoring
from mechedit.closed_form import Metric
from mechedit.corruption import generator
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs.sequence import Row, Sequence, solved, written
from mechedit.settings import SequenceSettings

__all__ = ["forces", "gently", "is_gentle", "lost", "raised", "says"]


def is_gentle(settings: Any, how: SequenceSettings) -> bool:
    """Whether batches are met step by step, which is for exact editors with a slack of their own."""
    return bool(getattr(settings, "loose", 0.0)) and how.shared and how.sought == "current"


def gently(model: HookedModel, settings: Any, how: SequenceSettings, rows: int) -> Any:
    """The settings with a slack of `gentle` times what so many rows are of the layer's width, where that is more than the editor's own."""
    if not is_gentle(settings, how):
        return settings
    return replace(
        settings, loose=max(settings.loose, how.gentle * rows / models.W_out(model, settings.layer).shape[0])
    )


def says(model: HookedModel, facts: Several[Fact], settings: Any) -> list[bool]:
    """Whether the model, as it is now, says each fact's new target first."""
    pairs = [(fact.prompt, str(fact.target_new), fact.join) for fact in facts]
    return [all(score.first) for score in scoring.score(model, pairs, prepend_bos=settings.prepend_bos)]


def lost(
    model: HookedModel,
    sequence: Sequence,
    settings: Any,
    how: SequenceSettings,
    turn: int,
    but: Set[int] = frozenset(),
) -> dict[int, list[Fact]]:
    """Of the last batch and of earlier facts that are drawn, the rows of those that the model does not say, but these, with all their facts:
    `again` rows at most for each fact of a batch. The model without edits is given."""
    standing = list(sequence.standing.values())
    new = [entry for entry in standing if entry.batch == sequence.batches - 1]
    old = [entry for entry in standing if entry.batch < sequence.batches - 1]
    stream = generator(settings.seed, "rehearsed", str(sequence.batches), str(turn))
    drawn = torch.randperm(len(old), generator=stream)[: how.rehearsed * how.together].sort().values.tolist()
    asked = [*new, *(old[index] for index in drawn)]
    if not asked:
        return {}
    with written(model, sequence):
        stands = says(model, [entry.as_fact for entry in asked], settings)
    missed = [entry for entry, stood in zip(asked, stands, strict=True) if not stood and entry.row not in but]
    rows = {entry.fact["subject"]: entry.row for entry in reversed(missed)}  # an edit has one value a subject
    some = list(dict.fromkeys(entry.row for entry in missed if entry.row in rows.values()))[: how.again * how.together]
    return {row: [entry.as_fact for entry in standing if entry.row == row] for row in some}


def forces(edit: Edit) -> Float[Tensor, "keys d_model"]:
    """(K M^-1 K^T + slack I)^-1 R of an edit of one weight by one solve, a row for each of its keys."""
    (change,) = edit.changes
    factors = change.factors()
    assert factors is not None
    return factors[1].double()


def raised(sequence: Sequence, rows: Several[int], more: Float[Tensor, "rows d_model"], metric: Metric) -> Sequence:
    """With the targets of these rows, of an exact editor, raised by so much."""
    assert sequence.sums is not None
    old = [sequence.rows[row] for row in rows]
    new = [Row(each.key, (each.value + own).float()) for each, own in zip(old, more, strict=True)]
    steps = torch.stack([one.value.double() - other.value.double() for one, other in zip(new, old, strict=True)])
    sums = sequence.sums.raised(torch.stack([each.key for each in new]), steps)
    return solved(replace(sequence, rows=dict(sequence.rows) | dict(zip(rows, new, strict=True))), sums, metric)
