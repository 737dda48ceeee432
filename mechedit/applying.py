"""Edits written into a model, taken out again, put together and compared.

Everything is all or nothing, and exact: all edits of a weight that stand in a model are added to its first value in float64 and
rounded once, in whatever order and however many calls they came, and what is undone is what was saved, bit for bit.

The text of an edit that tells the model something stands before its prompts (`prompts.encode`) from the same moment to the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from mechedit import models, weights
from mechedit.changes import Change, by_weight, norm, total
from mechedit.edits import COMPOSED, Edit, EditError
from mechedit.models import HookedModel, Identity, kept
from mechedit.provenance import lineage
from mechedit.weights import Weight

__all__ = ["Applied", "Overlap", "apply", "check", "compose", "diff", "edited", "revert", "underneath", "written"]


def check(model: HookedModel, wanted: Sequence[Edit], now: Identity | None = None) -> None:
    """Raise unless every edit was found on exactly these weights, or on them with the edits before it, and is written once.

    `now` is the model's identity, where it was asked for.

    Raises:
        EditError: one was not.
    """
    if not wanted:
        return
    now = now or models.identity(model)
    line = lineage(model, now)
    before = line.edits
    for edit in wanted:
        if set(edit.parts) & set(before):
            there = f"applied to {model.cfg.model_name} already" if set(edit.parts) & set(line.edits) else "given twice"
            raise EditError(f"an edit is written once; that of {edit.fact['subject']!r} is {there}. Leave it out.")
        if edit.is_of_0_1:
            matches = edit.origin["weight_hash"] == models.weight_hash(model)
        else:
            matches = edit.origin["weights"] == now.weights or (
                edit.base == line.base and edit.parents in (line.edits, before)
            )
        if not matches:
            raise EditError(_not_for(model, edit, now))
        before = (*before, *edit.parts)


def _not_for(model: HookedModel, edit: Edit, now: Identity) -> str:
    found = models.weight_hash(model) if edit.is_of_0_1 else now.weights
    wanted = edit.origin.get("weights", edit.origin.get("weight_hash", ""))
    on_top = f" and {_counted(edit.parents)} in it" if edit.parents else ""
    dtype = str(edit.origin.get("dtype", now.dtype)).removeprefix("torch.")
    its, own, how = ("", "", "") if dtype == now.dtype else (f" in {dtype}", f" in {now.dtype}", f" (--dtype {dtype})")
    return (
        f"this edit of {edit.fact['subject']!r} was made for {edit.origin['name']} with weights {wanted[:12]}…{its}{on_top}, but "
        f"{model.cfg.model_name} has weights {found[:12]}…{own}. Load the model it was made for{how}, give edits that belong together in one "
        "call, in the order in which they were found, or pass force=True (--force) if you know that the weights agree where it matters."
    )


@dataclass(frozen=True, eq=False)
class _Sum:
    """A weight before any edit that stands in the model, and the sum of the changes since, in float64; `is_now` where none stands."""

    first: Tensor
    change: Tensor
    is_now: bool


class Applied:
    """Edits that are in a model. `undo()` puts back the exact weights from before; `add` writes more, to be undone with them.

    `digests` are those of the edits, `below` is the identity of the model without any edit that stands in it, `names` are the
    parts of the identity that were written, `told` is text that stands before prompts.
    """

    def __init__(
        self, model: HookedModel, digests: Sequence[str], below: Identity, sums: dict[Weight, _Sum], told: str = ""
    ) -> None:
        self.digests, self.below, self.sums, self.told = tuple(digests), below, sums, told
        self._model = model
        self._saved: dict[Weight, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._after: dict[str, str] = {}

    @property
    def names(self) -> dict[str, Weight]:
        """The weights that were written, by their names in an identity."""
        return {weight.part: weight for weight in self.sums}

    def write(self) -> None:
        """All weights, or none; from then on the edits stand in the model."""
        self._write(self.sums)
        kept(self._model).applied.append(self)
        kept(self._model).told.append(self)

    def _write(self, sums: dict[Weight, _Sum]) -> None:
        before = {
            weight: each.first if each.is_now else weights.value(self._model, weight).detach().clone()
            for weight, each in sums.items()
        }
        try:
            for weight, each in sums.items():
                weights.write_(self._model, weight, each.first, each.change)
        except BaseException:
            weights.put_back(self._model, before)
            raise
        self._saved = before | self._saved
        for weight in sums:
            self._versions[weight.part] = weights.value(self._model, weight)._version
            self._after.pop(weight.part, None)

    def add(self, *wanted: Edit, force: bool = False) -> None:
        """Write further edits, found on the model as it is now, all or none.

        Raises:
            EditError: as in `apply`, or these edits were undone, or others were applied after them.
        """
        with models.alone(self._model):
            if not any(each is self for each in kept(self._model).applied[-1:]):
                raise EditError("edits are added to what was applied last; apply these by themselves.")
            more = _planned(self._model, wanted, force=force)
            self._write(more.sums)
            self.sums = self.sums | more.sums
            self.digests += more.digests
            self.told += more.told

    def stands(self, name: str, now: Identity) -> bool:
        """Whether a part is as it was written."""
        if name not in self._after:
            if weights.value(self._model, self.names[name])._version != self._versions[name]:
                return False
            self._after[name] = now.parts.get(name, "")
        return now.parts.get(name, "") == self._after[name]

    def take_out(self) -> None:
        """Put the weights from before back, whatever they are now."""
        for stack in (kept(self._model).applied, kept(self._model).told):
            stack[:] = [each for each in stack if each is not self]
        weights.put_back(self._model, self._saved)

    def undo(self) -> None:
        """Put the weights from before back.

        Raises:
            EditError: the weights changed since; undo what came later first. Nothing is written then.
        """
        now = models.identity(self._model)
        if changed := [weight for name, weight in self.names.items() if not self.stands(name, now)]:
            raise EditError(f"{changed[0]} changed after this edit was applied; undo the later changes first.")
        with models.alone(self._model):
            self.take_out()
        self.sums, self._saved, self.told = {}, {}, ""


def apply(model: HookedModel, *wanted: Edit, force: bool = False) -> Applied:
    """Write edits into the model, all or none; keep the result to undo them.

    Raises:
        EditError: an edit was found on other weights, and `force` is not given, or would write what is no number.
        ModelError: an edit does not fit the model's shapes.
    """
    with models.alone(model):
        applied = _planned(model, wanted, force=force)
        applied.write()
        now = models.identity(model)
        assert all(applied.stands(name, now) for name in applied.names)  # which also notes how they are
        return applied


@contextmanager
def edited(model: HookedModel, *wanted: Edit, force: bool = False) -> Iterator[None]:
    """Run the body on the edited model, then put back the exact weights from before; errors as in `apply`."""
    with models.alone(model), _within(model, _planned(model, wanted, force=force)):
        yield


@contextmanager
def written(model: HookedModel, found: Sequence[Change], told: str = "") -> Iterator[None]:
    """Run the body on the model with these changes and this text, on top of the edits that stand in it; then put back what was."""
    with models.alone(model), _within(model, _of_changes(model, found, (), models.identity(model), told)):
        yield


@contextmanager
def _within(model: HookedModel, applied: Applied) -> Iterator[None]:
    with models.as_they_were(model, [weights.value(model, weight) for weight in applied.sums], looked_at=True):
        try:
            applied.write()
            yield
        finally:
            applied.take_out()


def _planned(model: HookedModel, wanted: Sequence[Edit], *, force: bool) -> Applied:
    """The edits, checked, and with their sums, before anything is written."""
    for each in wanted:
        if not isinstance(each, Edit):
            raise EditError(f"what is applied must be an Edit; found {each!r:.60}. Read a file with edits.load.")
    now = models.identity(model)
    if not force:
        check(model, wanted, now)
    digests = [digest for edit in wanted for digest in edit.parts]
    told = "".join(edit.told for edit in wanted)
    return _of_changes(model, [change for edit in wanted for change in edit.changes], digests, now, told)


def _of_changes(
    model: HookedModel, found: Sequence[Change], digests: Sequence[str], now: Identity, told: str = ""
) -> Applied:
    standing = kept(model).applied
    if standing and lineage(model, now).base != standing[0].below.weights:
        standing.clear()  # the model was changed in another way: they do not stand any more
    below = standing[0].below if standing else now
    sums = {weight: _summed(model, weight, own, standing) for weight, own in by_weight(found).items()}
    return Applied(model, digests, below, sums, told)


def _summed(model: HookedModel, weight: Weight, own: Sequence[Change], standing: Sequence[Applied]) -> _Sum:
    """The weight's changes on top of those that stand in it."""
    for each in own:
        weights.check_shape(model, weight, each.shape)
    size, largest = norm(own), torch.finfo(weights.value(model, weight).dtype).max
    if not size < largest:  # no number of a matrix is larger than its norm
        raise EditError(
            f"the change of {weight} has a norm of {size:.2g}, and would destroy the model: it must be a number below {largest:.2g}. "
            "Find the edit again."
        )
    change = total(own)
    for applied in reversed(standing):
        if weight in applied.sums:
            earlier = applied.sums[weight]
            return _Sum(earlier.first, earlier.change + change, is_now=False)
    return _Sum(weights.value(model, weight).detach().clone(), change, is_now=True)


def revert(model: HookedModel, *wanted: Edit) -> None:
    """Take edits out of a model that was loaded with them in, an exported one, say: all or none, exact up to rounding.

    That they are in it is the caller's word; `Applied.undo` is for edits that were applied here, and exact.

    Raises:
        EditError: an edit's text stands before no prompt of the model.
        ModelError: an edit does not fit the model's shapes.
    """
    own = by_weight(change.negated() for edit in wanted for change in edit.changes)
    untold = _untold(model, wanted)
    with models.alone(model):
        sums = {weight: _summed(model, weight, each, ()) for weight, each in own.items()}
        Applied(model, (), models.identity(model), sums).write()
        for applied, text in untold.items():
            applied.told = text
        kept(model).applied.clear()
        kept(model).told = [applied for applied in kept(model).told if applied.told]


def _untold(model: HookedModel, wanted: Sequence[Edit]) -> dict[Applied, str]:
    """What is left of each text that stands in the model without those of these edits."""
    left = {applied: str(applied.told) for applied in kept(model).told}
    for edit in wanted:
        if edit.told and not (own := [applied for applied, text in left.items() if edit.told in text]):
            raise EditError(
                f"an edit's text stands before this model's prompts only after `apply`; found no {edit.told!r} there. Leave that edit out."
            )
        if edit.told:
            left[own[-1]] = left[own[-1]].replace(edit.told, "", 1)
    return left


@contextmanager
def underneath(model: HookedModel) -> Iterator[None]:
    """Run the body on the model without the edits that stand in it, then put them back, bit for bit."""
    own = kept(model)
    standing, told = own.applied, own.told
    first = {weight: each.first for applied in reversed(standing) for weight, each in applied.sums.items()}
    if first and lineage(model).base != standing[0].below.weights:
        first = {}  # the weights are other ones by now
    if not first and not models.told(model):
        yield
        return
    own.applied, own.told = [], []
    try:
        with weights.restored(model, *first) if first else nullcontext():
            weights.put_back(model, first)
            yield
    finally:
        own.applied, own.told = standing, told


def compose(*wanted: Edit) -> Edit:
    """One edit that writes what these write, and tells what they tell. What was measured stays with each fact, and `details["parts"]` has the rest of each.

    They were found on the same weights, or each on top of those before it. `report` has the Frobenius norm of all changes together.

    Raises:
        EditError: fewer than two edits, one given twice, or edits that do not belong together.
    """
    if len(wanted) < 2:
        raise EditError(f"composing takes two edits or more; found {len(wanted)}.")
    first, parts = wanted[0], wanted[0].parts
    for edit in wanted[1:]:
        if twice := set(edit.parts) & set(parts):
            raise EditError(f"an edit is written once; {edit.fact['subject']!r} ({min(twice)[:12]}…) is given twice.")
        together = edit.base == first.base and edit.parents in (first.parents, first.parents + parts)
        if not together:
            raise EditError(
                "edits that become one must be made for the same weights, or each on top of those before it, in this order: that of "
                f"{edit.fact['subject']!r} was found on {edit.origin['name']} {edit.base[:12]}… with {_counted(edit.parents)} in it, and the first, "
                f"of {first.fact['subject']!r}, on {first.origin['name']} {first.base[:12]}… with {_counted(first.parents)} in it. Give them in the "
                "order in which they were found."
            )
        parts += edit.parts
    whole = tuple(change for edit in wanted for change in edit.changes)
    return Edit(
        editor=COMPOSED,
        changes=whole,
        facts=tuple(fact for edit in wanted for fact in edit.facts),
        report={"update_norm": norm(whole)},
        origin=first.origin,
        settings={"layer": first.layer},
        versions=first.versions,
        seconds=sum(edit.seconds for edit in wanted),
        details={
            "parts": [own for edit in wanted for own in edit.details.get("parts", [edit.to_json()])],
            "digests": list(parts),
        },
        reasons=tuple(reason for edit in wanted for reason in edit.reasons),
        told="".join(edit.told for edit in wanted),
    )


def _counted(edits: Sequence[str]) -> str:
    return f"{len(edits) or 'no'} edit{'s' * (len(edits) != 1)}"


@dataclass(frozen=True)
class Overlap:
    """How alike what two edits write into one weight is: cosines, 1 alike, 0 independent, -1 opposite.

    `change` is that of the whole changes, as vectors; `u` and `step` are those of the factors, nan where an edit's change of the weight
    is not one product of two vectors. `ratio` is the second's Frobenius norm over the first's.
    """

    weight: Weight
    u: float
    step: float
    change: float
    ratio: float

    @property
    def layer(self) -> int:
        """The block that both change."""
        return self.weight.layer

    def to_json(self) -> dict[str, Any]:
        """The numbers, with the weight's name."""
        numbers = {name: getattr(self, name) for name in ("u", "step", "change", "ratio")}
        return {"layer": self.layer, "weight": self.weight.name} | numbers


def diff(first: Edit, second: Edit) -> list[Overlap]:
    """Where both edits write, and how alike it is, weight by weight; empty where they share none."""
    mine, theirs = (by_weight(edit.changes) for edit in (first, second))
    return [_overlap(weight, mine[weight], theirs[weight]) for weight in mine if weight in theirs]


def _overlap(weight: Weight, mine: Sequence[Change], theirs: Sequence[Change]) -> Overlap:
    sizes = [norm(each) for each in (mine, theirs)]
    inner = sum(a.inner(b) for a in mine for b in theirs)
    return Overlap(
        weight,
        *_of_factors(mine, theirs),
        inner / (sizes[0] * sizes[1]) if all(sizes) else nan,
        sizes[1] / sizes[0] if sizes[0] else nan,
    )


def _of_factors(mine: Sequence[Change], theirs: Sequence[Change]) -> tuple[float, float]:
    """The cosines of both factors, where each has one of each."""
    if len(mine) == len(theirs) == 1:
        found = [each.factors() for each in (mine[0], theirs[0])]
        if all(factors is not None and len(factors[0]) == 1 for factors in found):
            (a, b), (c, d) = found  # type: ignore[misc]
            return _cosine(a[0], c[0]), _cosine(b[0], d[0])
    return nan, nan


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
