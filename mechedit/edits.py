"""An edit as a result and as a file: what was changed, how it was found, what it did; saved, loaded, applied, undone.

The file is one safetensors file of a few kilobytes: u and step of each rank-one change, and a JSON record with the fact, the
settings, the prefixes, the model's weight hash, versions, and what was measured. Loading executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechedit import cache, files, models, rank_one
from mechedit.errors import MecheditError
from mechedit.files import FileError
from mechedit.models import HookedModel
from mechedit.rank_one import RankOneEdit

__all__ = ["Applied", "Edit", "EditError", "Overlap", "apply", "compose", "diff", "edited", "load", "revert", "save"]


COMPOSED = "composed"
IMPROBABLE = 0.01  # of a new target after its edit


class EditError(MecheditError, ValueError):
    """An edit that is refused, or that does not belong to the model."""


@dataclass(frozen=True)
class Edit:
    """What an editor returns. `record` holds JSON values only.

    `report` has `divisor` (u @ key), `update_norm` (Frobenius norm of the change of W_out), `cond_C`, and the numbers that
    `mechedit.guards` explains; `reasons` says which of them are out of their bands, and an edit without changes is one that
    was rolled back for them. `before` and `after` have the probabilities `p_new` and `p_true` of the whole targets.
    """

    method: str
    changes: tuple[RankOneEdit, ...]
    fact: dict[str, Any]
    report: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    origin: dict[str, Any] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    seconds: float
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    reasons: tuple[str, ...] = ()

    @property
    def layer(self) -> int:
        """The block that is edited."""
        return self.changes[0].layer if self.changes else int(self.settings["layer"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this less than an edit: no changes, or a target that stays improbable. Guards look at damage, not at that."""
        if not self.changes:
            return ("it has no changes, and writes nothing",)
        p = {name: self.after.get(name, float("nan")) for name in ("p_new", "p_true")}  # nan in a composed edit
        if p["p_new"] < IMPROBABLE or p["p_new"] <= p["p_true"]:
            return (f"it hardly took: P(new) = {p['p_new']:.2g} and P(true) = {p['p_true']:.2g} after it",)
        return ()

    def to_json(self) -> dict[str, Any]:
        """What `mechedit edit --json` writes."""
        return {
            "model": self.origin["name"],
            "method": self.method,
            "prompt": self.fact["prompt"],
            "subject": self.fact["subject"],
            "target_new": self.fact["target_new"],
            "target_true": self.fact["target_true"],
            "layer": self.layer,
            "before": self.before,
            "after": self.after,
            "edit": self.report,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "settings": self.settings,
            "origin": self.origin,
            "versions": self.versions,
        } | ({"parts": self.details["parts"]} if self.method == COMPOSED else {})


_RECORD = (
    "method",
    "fact",
    "report",
    "before",
    "after",
    "origin",
    "settings",
    "versions",
    "seconds",
    "details",
    "reasons",
)


def save(edit: Edit, path: str | Path) -> Path:
    """Write an edit as one safetensors file, whole or not at all.

    Raises:
        WriteError: the path is a folder, or cannot be written.
    """
    if Path(path).is_dir():
        raise cache.WriteError(f"{path} is a folder; name a file in it.")
    tensors: dict[str, Tensor] = {}
    for index, change in enumerate(edit.changes):
        tensors |= {f"{index}.u": change.u, f"{index}.step": change.step}
    record = {name: getattr(edit, name) for name in _RECORD}
    record["changes"] = [{"layer": change.layer, "divisor": change.divisor} for change in edit.changes]
    return files.write(path, "edit", tensors, record)


def load(path: str | Path) -> Edit:
    """Read an edit that `save` wrote.

    Raises:
        FileError: the file is missing, truncated, something else, or holds what no edit can hold.
    """
    tensors, record = files.read(path, "edit")
    if any(tensor.ndim != 1 for tensor in tensors.values()):
        raise FileError(f"{path} is an edit whose changes are no vectors.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise FileError(f"{path} holds NaN or infinity; such an edit would destroy the model.")
    try:
        changes = tuple(
            RankOneEdit(int(each["layer"]), tensors[f"{index}.u"], tensors[f"{index}.step"], float(each["divisor"]))
            for index, each in enumerate(record["changes"])
        )
        edit = Edit(changes=changes, **{name: record[name] for name in _RECORD} | {"reasons": tuple(record["reasons"])})
        needed = [edit.origin["weight_hash"], edit.fact["prompt"]]
        if changes and edit.method != COMPOSED:  # whose parts were measured, each alone
            needed += [
                edit.report["update_norm"],
                edit.report["relative_norm"],
                edit.before["p_new"],
                edit.after["p_new"],
            ]
        if None in needed:
            raise TypeError("a value that may not be null is")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path} is an edit whose record is not whole ({type(error).__name__} {error}).") from error
    if not changes and not edit.reasons:
        raise FileError(f"{path} is an edit without changes.")
    return edit


def check(model: HookedModel, edits: Sequence[Edit]) -> None:
    """Raise unless every edit was made for exactly these weights, and fits them."""
    weight_hash = models.weight_hash(model)
    for edit in edits:
        if edit.origin["weight_hash"] != weight_hash:
            raise EditError(
                f"this edit of {edit.fact['subject']!r} was made for {edit.origin['name']} with weights "
                f"{edit.origin['weight_hash'][:12]}…, but {model.cfg.model_name} has weights {weight_hash[:12]}…. Load the model "
                "it was made for, give edits that belong together in one call, or pass force=True (--force) if you know that "
                "the weights agree where it matters."
            )


class Applied:
    """Edits that are in a model. `undo()` puts back the exact original weights, bit for bit."""

    def __init__(self, model: HookedModel, originals: dict[int, Tensor], written: dict[int, Tensor]) -> None:
        self._model, self._originals, self._written = model, originals, written

    @torch.no_grad()
    def undo(self) -> None:
        """Put the original weights back.

        Raises:
            EditError: the weights changed since; undo what came later first. Nothing is written then.
        """
        for layer, written in self._written.items():
            if not torch.equal(models.W_out(self._model, layer), written):
                raise EditError(
                    f"W_out of block {layer} changed after this edit was applied; undo the later changes first."
                )
        for layer, original in self._originals.items():
            models.W_out(self._model, layer).copy_(original)
        self._originals, self._written = {}, {}


@torch.no_grad()
def apply(model: HookedModel, *edits: Edit, force: bool = False) -> Applied:
    """Write edits into the model, all or none; keep the result to undo them.

    Raises:
        EditError: an edit was made for other weights, and `force` is not given.
        RankOneError: an edit does not fit the model's shapes.
    """
    if not force:
        check(model, edits)
    return _write(model, [change for edit in edits for change in edit.changes])


def _write(model: HookedModel, changes: Sequence[RankOneEdit]) -> Applied:
    """Write all changes, or none."""
    originals = {change.layer: models.W_out(model, change.layer).detach().clone() for change in changes}
    try:
        for change in changes:
            rank_one.write_(model, change)
    except BaseException:
        for layer, original in originals.items():
            models.W_out(model, layer).copy_(original)
        raise
    return Applied(model, originals, {layer: models.W_out(model, layer).detach().clone() for layer in originals})


@contextmanager
def edited(model: HookedModel, *edits: Edit, force: bool = False) -> Iterator[None]:
    """Run the body on the edited model, then put back the exact original weights."""
    if not force:
        check(model, edits)
    with rank_one.edited(model, *(change for edit in edits for change in edit.changes)):
        yield


@contextmanager
def restored(model: HookedModel, *layers: int) -> Iterator[None]:
    """Run the body, which may write to `W_out` of these layers, then put back the exact original weights."""
    originals = {layer: models.W_out(model, layer).detach().clone() for layer in layers}
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, original in originals.items():
                models.W_out(model, layer).copy_(original)


@torch.no_grad()
def revert(model: HookedModel, *edits: Edit) -> None:
    """Take edits out of a model that was loaded with them in, an exported one, say: all or none, exact up to rounding.

    That they are in it is the caller's word; `Applied.undo` is for edits that were applied here, and exact.

    Raises:
        RankOneError: an edit does not fit the model's shapes.
    """
    changes = [change for edit in edits for change in edit.changes]
    _write(model, [replace(change, step=-change.step) for change in changes])


def compose(*edits: Edit) -> Edit:
    """One edit that writes what these write, in order. What was measured stays with its part, in `details["parts"]`.

    `report` has the Frobenius norm of all changes together.

    Raises:
        EditError: fewer than two edits, or edits made for different weights.
    """
    if len(edits) < 2:
        raise EditError(f"composing takes two edits or more; found {len(edits)}.")
    first = edits[0]
    for edit in edits[1:]:
        if edit.origin["weight_hash"] != first.origin["weight_hash"]:
            raise EditError(
                f"edits must be made for the same weights to be one; these are for {first.origin['name']} "
                f"{first.origin['weight_hash'][:12]}… and {edit.origin['name']} {edit.origin['weight_hash'][:12]}…."
            )
    changes = tuple(change for edit in edits for change in edit.changes)
    layers = sorted({change.layer for change in changes})
    by_layer = [[change for change in changes if change.layer == layer] for layer in layers]
    return Edit(
        method=COMPOSED,
        changes=changes,
        fact=first.fact,
        report={"update_norm": sum(_norm(each) ** 2 for each in by_layer) ** 0.5},
        before={},
        after={},
        origin=first.origin,
        settings={"layer": first.layer},
        versions=first.versions,
        seconds=sum(edit.seconds for edit in edits),
        details={"parts": [edit.to_json() for edit in edits]},
        reasons=tuple(reason for edit in edits for reason in edit.reasons),
    )


@dataclass(frozen=True)
class Overlap:
    """How alike what two edits write in one layer is: cosines, 1 alike, 0 independent, -1 opposite.

    `change` is that of the whole changes of W_out, as vectors; `u` and `step` are those of the factors, nan where an edit has
    several changes in the layer. `ratio` is the second's Frobenius norm over the first's.
    """

    layer: int
    u: float
    step: float
    change: float
    ratio: float


def diff(first: Edit, second: Edit) -> list[Overlap]:
    """Where both edits write, and how alike it is, layer by layer; empty where they share no layer."""
    found = []
    for layer in sorted({change.layer for change in first.changes} & {change.layer for change in second.changes}):
        mine, theirs = ([change for change in edit.changes if change.layer == layer] for edit in (first, second))
        sizes = [_norm(each) for each in (mine, theirs)]
        single = len(mine) == len(theirs) == 1
        found.append(
            Overlap(
                layer,
                _cosine(mine[0].u, theirs[0].u) if single else float("nan"),
                _cosine(mine[0].step, theirs[0].step) if single else float("nan"),
                _inner(mine, theirs) / (sizes[0] * sizes[1]) if all(sizes) else float("nan"),
                sizes[1] / sizes[0] if sizes[0] else float("nan"),
            )
        )
    return found


def _inner(first: Sequence[RankOneEdit], second: Sequence[RankOneEdit]) -> float:
    """The Frobenius inner product of two sums of outer(u, step)."""
    return sum(
        float(a.u.double() @ b.u.double()) * float(a.step.double() @ b.step.double()) for a in first for b in second
    )


def _norm(changes: Sequence[RankOneEdit]) -> float:
    """Its root; rounding can put the square of nothing below zero."""
    return max(0.0, _inner(changes, changes)) ** 0.5


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
