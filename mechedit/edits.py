"""An edit as a result and as a file: what is changed, for which facts, how it was found, what it did.

The file is one safetensors file: the tensors of each change, of k* and v* where the editor has them, and of its state, and a JSON
record with everything else. Loading executes nothing. Files of version 0.1.0, which had rank-one changes of one fact, load as well.

An edit is found on weights that have a digest, perhaps on top of earlier edits (`parents`). That is how edits made in sequence
are told from edits of other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechedit import cache, files
from mechedit.changes import Change, ChangeError, Dense, LowRank, Rows
from mechedit.errors import MecheditError
from mechedit.files import FileError
from mechedit.models import ModelError
from mechedit.parsing import check, number
from mechedit.rank_one import RankOneEdit
from mechedit.weights import Weight

__all__ = ["COMPOSED", "Edit", "EditError", "Measured", "load", "save"]

FORMAT = 2  # of the file; 1 was version 0.1.0's
TELLING = 3  # of one with a text that stands before prompts, which earlier versions would leave out
COMPOSED = "composed"
IMPROBABLE = 0.01  # of a new target after its edit


class EditError(MecheditError, ValueError):
    """An edit that is refused, or that does not belong to the model."""


@dataclass(frozen=True)
class Measured:
    """A fact of an edit, as JSON values with its `prompt`, and what was measured of it before and after: the probabilities
    `p_new` and `p_true` of the whole targets; nothing where nothing was."""

    fact: dict[str, Any]
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True, eq=False)
class Edit:
    """What an editor's work comes to. All but `changes`, `vectors` and `state` are JSON values.

    `told` is text that stands before every prompt while the edit stands in the model, for editors that tell it something. What runs the
    model without mechedit (`model.generate`, say) does not see it: `edit.told + prompt` is what to give it.

    `report` has `update_norm` (Frobenius norm of all changes), the numbers that `mechedit.guards` explains, and the editor's own;
    `reasons` says which of them are out of their bands, and an edit that is empty is one that was rolled back for them, or
    refused. `vectors` has k* and v* where the editor has them, `state` what it hands to the edit after this one.
    """

    editor: str
    changes: tuple[Change, ...]
    facts: tuple[Measured, ...] = field(repr=False)
    report: dict[str, float]
    origin: dict[str, Any] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    seconds: float
    details: dict[str, Any] = field(default_factory=dict, repr=False)
    reasons: tuple[str, ...] = ()
    vectors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    state: dict[str, Tensor] = field(default_factory=dict, repr=False)
    told: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether it neither changes a weight nor tells the model anything."""
        return not self.changes and not self.told

    @property
    def fact(self) -> dict[str, Any]:
        """The first fact."""
        return self.facts[0].fact

    @property
    def before(self) -> dict[str, float]:
        """What was measured of the first fact before the edit."""
        return self.facts[0].before

    @property
    def after(self) -> dict[str, float]:
        """What was measured of the first fact after the edit."""
        return self.facts[0].after

    @property
    def layer(self) -> int:
        """The first block that is edited; that of the settings where nothing is, -1 where they have none."""
        return self.changes[0].weight.layer if self.changes else int(self.settings.get("layer", -1))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the edit writes."""
        digest = hashlib.sha256()
        for change in self.changes:
            digest.update(f"{change.kind} {change.weight} {sorted(change.numbers().items())}".encode())
            for name, tensor in sorted(change.tensors().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if self.told:
            digest.update(f"told {self.told}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def parts(self) -> tuple[str, ...]:
        """The digests of the edits that this one is made of: its own, unless it was composed; of an empty one none."""
        if self.editor == COMPOSED and "digests" in self.details:
            return tuple(self.details["digests"])
        return () if self.is_empty else (self.digest,)

    @property
    def is_of_0_1(self) -> bool:
        """Whether it comes from a file of version 0.1.0, which names a model by less than all of its weights."""
        return "weights" not in self.origin

    @property
    def base(self) -> str:
        """The digest of the weights below the edits that it was found on top of."""
        return str(self.origin.get("base") or self.origin.get("weights") or self.origin["weight_hash"])

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the edits that it was found on top of, in order."""
        return tuple(self.origin.get("edits", ()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this less than an edit: no changes, or a target that stays improbable. Guards look at damage, not at that."""
        if self.is_empty:
            return ("it has no changes, and writes nothing",)
        found = [_telling(self.told)] if self.told else []
        return (*found, *self.doubts)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Of the notes, those on a change that writes too little of what was wanted, and on targets that stay improbable."""
        found = [str(self.details["unmet"])] if "unmet" in self.details else []
        for each in self.facts if self.editor != COMPOSED else ():
            p = {name: each.after.get(name, float("nan")) for name in ("p_new", "p_true")}
            if p["p_new"] < IMPROBABLE or p["p_new"] <= p["p_true"]:
                of = f" for {each.fact['subject']}" if len(self.facts) > 1 else ""
                found.append(f"it hardly took{of}: P(new) = {p['p_new']:.2g} and P(true) = {p['p_true']:.2g} after it")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """What `mechedit edit --json` writes: of one fact its fields, of several a list beside those of the first."""
        first = self.facts[0]
        record = {
            "model": self.origin["name"],
            "editor": self.editor,
            **{name: first.fact.get(name) for name in ("prompt", "subject", "target_new", "target_true", "joined")},
            "layer": self.layer,
            "before": first.before,
            "after": first.after,
            "edit": self.report,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "settings": self.settings,
            "origin": self.origin,
            "versions": self.versions,
            "changes": [
                {"weight": change.weight.name, "layer": change.weight.layer, "kind": change.kind, "norm": change.norm}
                for change in self.changes
            ],
        }
        if len(self.facts) > 1:
            record["facts"] = [each.fact | {"before": each.before, "after": each.after} for each in self.facts]
        record |= {"told": self.told} if self.told else {}
        return record | ({"parts": self.details["parts"]} if self.editor == COMPOSED else {})


def _telling(text: str) -> str:
    return (
        f"while it stands in the model, mechedit reads every prompt behind {text!r}; model.generate and other programs do not: give them "
        "edit.told + prompt"
    )


# --- files ------------------------------------------------------------------------------------------------------------

_RECORD = ("editor", "report", "origin", "settings", "versions", "seconds", "details")
_MEASURED = ("update_norm", "relative_norm")


def save(edit: Edit, path: str | Path | files.Blob) -> Path:
    """Write an edit as one safetensors file, whole or not at all.

    Raises:
        WriteError: the path is a folder, or cannot be written.
    """
    if not isinstance(path, files.Blob) and Path(path).is_dir():
        raise cache.WriteError(f"{path} is a folder; name a file in it.")
    tensors: dict[str, Tensor] = {}
    for index, change in enumerate(edit.changes):
        tensors |= {f"{index}.{name}": tensor for name, tensor in change.tensors().items()}
    tensors |= {f"vector.{name}": tensor for name, tensor in edit.vectors.items()}
    tensors |= {f"state.{name}": tensor for name, tensor in edit.state.items()}
    record = {name: getattr(edit, name) for name in _RECORD} | {"reasons": list(edit.reasons)}
    record["facts"] = [vars(each) for each in edit.facts]
    record["changes"] = [
        {"layer": change.weight.layer, "weight": change.weight.name, "kind": change.kind} | change.numbers()
        for change in edit.changes
    ]
    record |= {"told": edit.told} if edit.told else {}
    return files.write(path, "edit", tensors, record, TELLING if edit.told else FORMAT)


def load(path: str | Path | files.Blob) -> Edit:
    """Read an edit that `save` wrote, or version 0.1.0.

    Raises:
        FileError: the file is missing, truncated, something else, or holds what no edit can hold.
    """
    tensors, record = files.read(path, "edit", TELLING)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise FileError(f"{path} holds NaN or infinity; such an edit would destroy the model.")
    try:
        record = _of_0_1(record) if "method" in record else record
        check(record, _FORM)
        edit = _edit(tensors, record)
        _check_whole(edit)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ChangeError, ModelError) as error:
        raise FileError(f"{path} is an edit whose record is not whole ({type(error).__name__} {error}).") from error
    if edit.is_empty and not edit.reasons:
        raise FileError(f"{path} is an edit without changes.")
    return edit


def _edit(tensors: dict[str, Tensor], record: dict[str, Any]) -> Edit:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return Edit(
        changes=tuple(_change(each, under(f"{index}.")) for index, each in enumerate(record["changes"])),
        facts=tuple(Measured(each["fact"], each["before"], each["after"]) for each in record["facts"]),
        reasons=tuple(record["reasons"]),
        vectors=under("vector."),
        state=under("state."),
        told=record.get("told", ""),
        **{name: record[name] for name in _RECORD},
    )


_FORM = {
    "editor": str,
    "report": {str: number},
    "origin": {"name": str},
    "settings": dict,
    "versions": {str: str},
    "seconds": number,
    "details": dict,
    "reasons": [str],
    "facts": [{"fact": {"prompt": str, "subject": str}, "before": {str: number}, "after": {str: number}}],
    "changes": [{"layer": int, "weight": str, "kind": str}],
}
_FACTORS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDICES = (torch.int64, torch.int32)
LARGEST = 1 << 24  # rows or columns of a weight


def _rank_one(weight: Weight, record: dict[str, Any], own: dict[str, Tensor]) -> Change:
    if own["u"].ndim != 1 or own["step"].ndim != 1 or weight.name != "mlp.W_out":
        raise ChangeError("a rank-one change of W_out is two vectors, u and step.")
    return RankOneEdit(weight.layer, own["u"], own["step"], float(record["divisor"]))


_KINDS: dict[str, Callable[[Weight, dict[str, Any], dict[str, Tensor]], Change]] = {
    "rank_one": _rank_one,
    # copies: where numbers begin in a file, sums over them may come out otherwise in their last bit
    "low_rank": lambda weight, record, own: LowRank(weight, own["left"].clone(), own["right"].clone()),
    "rows": lambda weight, record, own: Rows(weight, own["index"], own["values"], _height(record["height"])),
    "dense": lambda weight, record, own: Dense(weight, own["delta"]),
}


def _height(value: Any) -> int:
    if type(value) is not int or not 0 < value <= LARGEST:
        raise ChangeError(f"a weight has from 1 to {LARGEST} rows; found {value!r:.40}.")
    return value


def _change(record: dict[str, Any], own: dict[str, Tensor]) -> Change:
    if any(tensor.dtype not in (_INDICES if name == "index" else _FACTORS) for name, tensor in own.items()):
        raise ChangeError("a change is floating-point numbers, at rows that are whole ones.")
    if any(not 0 < size <= LARGEST for name, each in own.items() for size in each.shape[name in ("index", "values") :]):
        raise ChangeError(f"a change has from 1 to {LARGEST} rows and columns.")
    return _KINDS[record["kind"]](Weight(record["layer"], record["weight"]), record, own)


def _of_0_1(record: dict[str, Any]) -> dict[str, Any]:
    """A record of version 0.1.0 as one of today's."""
    first = {"fact": record["fact"], "before": record["before"], "after": record["after"]}
    also = [
        {"fact": each, "before": each["before"], "after": each["after"]} for each in record["details"].get("also", [])
    ]
    changes = [each | {"kind": "rank_one", "weight": "mlp.W_out"} for each in record["changes"]]
    return record | {"editor": record["method"], "facts": [first, *also], "changes": changes}


def _check_whole(edit: Edit) -> None:
    """Raise where something is missing that is read later."""
    needed = [
        edit.origin["name"],
        edit.origin.get("weights") or edit.origin["weight_hash"],
        *edit.parents,
        *(edit.details["parts"] if edit.editor == COMPOSED else ()),
        json.dumps(edit.settings),
        json.dumps(edit.details),
    ]
    needed += [] if edit.is_empty else [edit.fact["target_new"]]  # for the lack of which a fact is refused
    if not edit.is_empty and edit.editor != COMPOSED:  # whose parts were measured, each alone
        needed += [edit.report[name] for name in _MEASURED]
        needed += [each["p_new"] for fact in edit.facts for each in (fact.before, fact.after)]
    if None in needed:
        raise TypeError("a value that may not be null is")
    for each in edit.facts:
        check([each.fact.get(name) for name in ("target_new", "target_true")], [(str, None)], "targets")
    check(list(edit.parents), [str], "origin.edits")
    digests = {name: edit.origin[name] for name in ("base", "weights", "weight_hash") if name in edit.origin}
    check(digests, {str: (str, None)}, "origin")
    if edit.editor == COMPOSED:
        check(edit.details["parts"], [{"prompt": str}], "details.parts")
        check([part.get("settings", {}) for part in edit.details["parts"]], [dict], "details.parts.settings")
        check(list(edit.parts), [str], "details.digests")
    check(edit.layer, int, "layer")
    check(edit.told, str, "told")
