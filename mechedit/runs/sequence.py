"""A running sequence of edits as one object: what was written, in which order, and all that the next edit needs.

    Entry      a fact of the sequence: its batch, the row that stands for it, or why none does
    Row        a key and a value that the layer was made to return for it, for one fact or several about one subject
    Sequence   entries, rows, P and Q of `mechedit.recursive`, the change of each weight, and looks at the model's health

An editor of one block whose earlier keys weigh as much as new ones (`sequential`, `alphaedit`, `memit` with b = 1) is exact: the change is the one
solve for all rows, so that `reverted` takes an edit out as if it had not been there. Of other editors changes are added up.

The file is written whole or not at all and carries a digest of all of it. It grows by a key, a value and a fact's texts an edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import isclose, nan
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import applying, cache, files, models, provenance
from mechedit.changes import Change, Dense, norm
from mechedit.closed_form import Metric
from mechedit.editing import Editor, Prepared, described
from mechedit.editors import named
from mechedit.editors.earlier import EARLIER, FACTOR, latest
from mechedit.editors.many import Memit
from mechedit.edits import COMPOSED, Edit, Measured
from mechedit.errors import MecheditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.parsing import check
from mechedit.recursive import Sums, least_squares
from mechedit.settings import SequenceSettings, from_json
from mechedit.weights import Weight

__all__ = [
    "KIND", "TAKEN_OUT", "Entry", "Row", "Sequence", "SequenceError", "as_edit", "begin", "check_of", "editor_of", "is_exact", "load",
    "parts_of", "reverted", "save", "solved", "without", "written",
]  # fmt: skip

KIND = "sequence"
TAKEN_OUT = "taken out again"
WAITS = "it shared a value with an edit that was taken out, and waits to be written again"
MOST_REASONS = 12  # that are told


class SequenceError(MecheditError, ValueError):
    """A sequence that does not belong to a model or to settings, or that cannot do what it is asked."""


@dataclass(frozen=True)
class Entry:
    """A fact of a sequence. `row` is -1 where nothing stands for it any more, and `why` says why."""

    fact: dict[str, Any]
    batch: int
    row: int
    why: str = ""

    @property
    def as_fact(self) -> Fact:
        """The fact itself."""
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.fact.items()
        }
        return Fact(**own)

    @property
    def about(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Subject and relation, and the whole prompt: facts of which one of both is equal are about the same."""
        subject, template = self.fact["subject"], self.fact["template"]
        return (subject, self.fact["relation"] or template), ("", template.replace("{}", subject, 1))


@dataclass(frozen=True, eq=False)
class Row:
    """A key, and the value that it is to return."""

    key: Float[Tensor, " d_mlp"]
    value: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class Sequence:
    """All of a run so far. It is never changed: each step makes another."""

    editor: str
    settings: dict[str, Any]
    origin: dict[str, Any]
    prepared: str
    how: dict[str, Any] = field(default_factory=dict)  # the settings of sequences that decide what is written
    place: str = ""  # of the editor's class, as package.module:Class
    versions: dict[str, str] = field(default_factory=dict)  # of what numbers depend on
    entries: tuple[Entry, ...] = ()
    rows: Mapping[int, Row] = field(default_factory=dict)
    sums: Sums | None = None
    totals: Mapping[Weight, Float[Tensor, "rows columns"]] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    looks: tuple[dict[str, Any], ...] = ()
    batches: int = 0
    made: int = 0  # rows, those that are gone among them
    conflicts: int = 0

    @property
    def changes(self) -> list[Change]:
        """What it adds to the model without edits."""
        return [Dense(weight, total) for weight, total in self.totals.items()]

    @property
    def standing(self) -> dict[int, Entry]:
        """The facts that a row stands for, by their number."""
        return {index: entry for index, entry in enumerate(self.entries) if entry.row >= 0}

    @property
    def waiting(self) -> dict[int, Entry]:
        """The facts that `extending.extend` writes again, by their number: they shared a row with an edit that was taken out."""
        return {index: entry for index, entry in enumerate(self.entries) if entry.row < 0 and entry.why == WAITS}

    @property
    def empty(self) -> Sequence:
        """The same before any edit."""
        sums = None if self.sums is None else Sums.none(*self.sums.Q.shape)
        return Sequence(self.editor, self.settings, self.origin, self.prepared, self.how, self.place, self.versions, sums=sums)  # fmt: skip

    @property
    def collapse(self) -> dict[str, Any] | None:
        """The first look at which a measure was out of its band."""
        return next((look for look in self.looks if look["out"]), None)

    def to_json(self) -> dict[str, Any]:
        """What there is to know of it, without tensors, as JSON values."""
        why: dict[str, int] = {}
        for entry in self.entries:
            if entry.row < 0:
                why[entry.why] = why.get(entry.why, 0) + 1
        return {
            "editor": self.editor,
            "model": self.origin["name"],
            "facts": len(self.entries),
            "standing": len(self.standing),
            "rows": len(self.rows) or len({entry.row for entry in self.standing.values()}),
            "batches": self.batches,
            "conflicts": self.conflicts,
            "why": dict(sorted(why.items(), key=lambda each: -each[1])[:MOST_REASONS]),
            "settings": self.settings,
            "how": self.how,
            "origin": self.origin,
            "looks": list(self.looks),
        }

    @property
    def earlier(self) -> Mapping[str, Tensor]:
        """What the editor's next edit is to know."""
        return self.state if self.sums is None else {EARLIER: self.sums.P} | dict(self.state)


def begin(
    model: HookedModel, editor: Editor, settings: Any, prepared: Prepared | None, how: SequenceSettings
) -> Sequence:
    """A sequence without edits, for settings as `resolve` gives them.

    Raises:
        SequenceError: values are to be sought on the model without edits, and their slack is not that of one solve for all; or the editor cannot
            be made anew by its class alone, as it is where the run goes on.
    """
    if with_ := editor.key.get("with"):
        raise SequenceError(
            f"a sequence keeps its editor as a class that is made without arguments; {editor.name} was made with {', '.join(with_)}. Make a class "
            "that has them set, or knobs of its settings."
        )
    exact = is_exact(editor, settings)
    if exact and how.sought == "unedited" and (settings.loose or not isclose(settings.b * settings.slack, 1.0)):
        raise SequenceError(
            f"values that are sought on the model without edits (sought = unedited) are met up to a slack of 1/b; found slack = {settings.slack:g} and "
            f"loose = {settings.loose:g}. Give slack = {1 / settings.b:g} and loose = 0, or leave sought at current."
        )
    if not exact and (how.sought != "current" or not how.shared):
        what = (
            "values that no other edit bears on (sought = unedited)"
            if how.shared
            else "values of each fact's own (no-shared)"
        )
        raise SequenceError(f"{what} are of editors whose change is one solve for all (sequential, alphaedit, memit with b = 1, none of them shaped after the solve); found {editor.name}. Leave it out.")  # fmt: skip
    sums = Sums.none(*models.W_out(model, settings.layer).shape) if exact else None
    own, plain = cache.plain(how.writing), cache.plain(asdict(settings))
    key, place = prepared.key if prepared else "", f"{type(editor).__module__}:{type(editor).__qualname__}"
    versions = provenance.kept_under(model)["versions"]
    return Sequence(editor.name, plain, provenance.origin(model), key, own, place, versions, sums=sums)


def is_exact(editor: Editor, settings: Any) -> bool:
    """Whether the change of a sequence is the one solve for all its keys, so that edits can be taken out, learnt again and settled."""
    if not isinstance(editor, Memit) or settings.layers:
        return False
    # what is done to a change after its solve is no part of one solve for all
    return settings.b > 0 and settings.parts == ("mlp",) and not settings.is_shaped


def check_of(model: HookedModel, sequence: Sequence, like: Sequence) -> None:
    """Raise unless a sequence goes on where `like`, an empty one, begins.

    Raises:
        SequenceError: it is of another model, editor, settings, C or prefixes, or versions, or does not say of which.
    """
    for name in ("weights", "configuration", "tokenizer", "dtype"):
        if sequence.origin[name] != like.origin[name]:
            raise SequenceError(
                f"the sequence was begun on {sequence.origin['name']} with another {name}; {model.cfg.model_name} as it is now cannot go on with it. "
                "Load the model it was begun on, without edits, or begin another."
            )
    editor_of(sequence)
    if (sequence.editor, sequence.place) != (like.editor, like.place):
        of, not_of = (each.editor if sequence.editor != like.editor else each.place for each in (sequence, like))
        raise SequenceError(f"the sequence is of the editor {of}, not of {not_of}; begin another.")
    before = sequence.settings | sequence.how | sequence.versions
    here = like.settings | like.how | like.versions
    if other := [name for name in here if before.get(name) != here[name]]:
        was, now = before.get(other[0], "unknown"), here[other[0]]
        raise SequenceError(
            f"the sequence was begun with {other[0]} = {was!r}, and this is {now!r}; give the same, or begin another."
        )
    if sequence.prepared != like.prepared:
        raise SequenceError(
            "the sequence was begun with another C or other prefixes; give the same (--text or --moment on the command line), or begin another."
        )


def _check_exact(sequence: Sequence) -> Sums:
    if sequence.sums is None:
        raise SequenceError(
            f"the editor {sequence.editor} with these settings adds changes up, and none can be taken out of the middle; `sequential` can."
        )
    return sequence.sums


@contextmanager
def written(model: HookedModel, sequence: Sequence) -> Iterator[None]:
    """Run the body on the model with all edits of the sequence, then put back what was."""
    with applying.written(model, sequence.changes):
        yield


def solved(sequence: Sequence, sums: Sums, metric: Metric, keys: Float[Tensor, "n d_mlp"] | None = None) -> Sequence:
    """The sequence with other sums, and the change that they give. Where they have these keys more, and nothing else, M's factor is updated
    if they are few; it is kept where it was updated, so that a run that goes on has the same bits."""
    assert sequence.sums is not None
    layer, factor = int(sequence.settings["layer"]), sequence.state.get(FACTOR)
    now = metric.at(metric.terms, sequence.sums.P, factor)
    if keys is not None:
        now = now.plus(keys, sums.P)
    elif sums.P is not sequence.sums.P:
        now = metric.at(metric.terms, sums.P)
    total = least_squares(now, sums)
    state = {FACTOR: now.factor} if now.is_updated else {}
    return replace(sequence, sums=sums, totals={Weight(layer, "mlp.W_out"): total}, state=state)


def parts_of(model: HookedModel, layer: int, rows: Several[Row]) -> tuple[Tensor, Tensor]:
    """Keys and residuals of rows, on the model without edits: the residual is what the value is more than the key returns there."""
    W_out, b_out = (each(model, layer).detach().cpu().double() for each in (models.W_out, models.b_out))
    keys, values = (torch.stack([getattr(row, name) for row in rows]).double() for name in ("key", "value"))
    return keys, values - (keys @ W_out + b_out)


def returned(model: HookedModel, sequence: Sequence, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_model"]:
    """What keys return with all edits of the sequence, the model without edits given."""
    layer = int(sequence.settings["layer"])
    W_out, b_out = (each(model, layer).detach().cpu().double() for each in (models.W_out, models.b_out))
    total = sequence.totals.get(Weight(layer, "mlp.W_out"))
    return keys.double() @ (W_out if total is None else W_out + total.double()) + b_out


def without(model: HookedModel, sequence: Sequence, rows: Several[int], metric: Metric) -> Sequence:
    """The sequence without these rows; the entries are left to the caller."""
    if not rows:
        return sequence
    sums = _check_exact(sequence)
    gone = parts_of(model, int(sequence.settings["layer"]), [sequence.rows[row] for row in rows])
    left = {row: each for row, each in sequence.rows.items() if row not in rows}
    return solved(replace(sequence, rows=left), sums.minus(*gone), metric)


def reverted(model: HookedModel, sequence: Sequence, index: int, prepared: Any) -> Sequence:
    """The sequence with edit `index` (a fact's number, from 0) taken out again, the model without edits given.

    P and Q lose the row's part, and W is the one solve for the rows that are left: what a sequence would have that was given the
    other keys and values alone, up to rounding in float64. (A sequence made anew without the edit finds somewhat other values, as each is
    sought on the model as it then is.) Other facts of the row go out with it and wait (`waiting`): `extending.extend` and `take_out` write them
    again, with a value of their own.

    Raises:
        SequenceError: no such edit, one that is not there any more, or an editor whose edits cannot be taken out; a model that is not as it was
            before any edit, or another C.
    """
    if not 0 <= index < len(sequence.entries):
        raise SequenceError(f"the sequence has edits 0 to {len(sequence.entries) - 1}; found {index}.")
    row = sequence.entries[index].row
    if row < 0 and index not in sequence.waiting:
        raise SequenceError(f"nothing stands for edit {index} any more: {sequence.entries[index].why}.")
    _check_exact(sequence)
    check_of(model, sequence, replace(sequence, origin=provenance.origin(model), prepared=prepared.key))
    if row >= 0:
        settings: Any = from_json(editor_of(sequence).settings, sequence.settings)
        sequence = without(model, sequence, [row], latest(prepared, settings))
    entries = [replace(each, row=-1, why=WAITS) if each.row == row >= 0 else each for each in sequence.entries]
    entries[index] = replace(entries[index], row=-1, why=TAKEN_OUT)
    return replace(sequence, entries=tuple(entries))


def editor_of(sequence: Sequence) -> Editor:
    """The editor that writes it, made anew.

    Raises:
        SequenceError: an earlier version of mechedit kept the sequence, and did not say who writes it.
    """
    if not sequence.place:
        raise SequenceError("the sequence is of an earlier version of mechedit, and cannot go on; begin another.")
    return named(sequence.place)


def as_edit(sequence: Sequence) -> Edit:
    """All edits of the sequence as one, for `applying` and files of edits.

    Raises:
        SequenceError: nothing is written yet.
    """
    if not sequence.totals or not sequence.standing:
        raise SequenceError("the sequence has no edit that stands; there is nothing to write.")
    told = [described(entry.as_fact) for entry in sequence.standing.values()]
    facts = tuple(Measured(fact, {}, {}) for fact in told)
    return Edit(COMPOSED, tuple(sequence.changes), facts, {"update_norm": norm(sequence.changes)}, sequence.origin, sequence.settings, provenance.versions(), nan, details={"parts": [{"prompt": each["prompt"], "settings": {"prepend_bos": sequence.settings.get("prepend_bos")}} for each in told]})  # fmt: skip


def save(sequence: Sequence, path: str | Path) -> Path:
    """Write the state, whole or not at all."""
    tensors: dict[str, Tensor] = {
        f"total.{weight.layer}.{weight.name}": each for weight, each in sequence.totals.items()
    }
    tensors |= {f"state.{name}": each for name, each in sequence.state.items()}
    if sequence.sums is not None:
        tensors |= {"P": sequence.sums.P, "Q": sequence.sums.Q}
    if sequence.rows:
        tensors |= {f"{name}s": torch.stack([getattr(row, name) for row in sequence.rows.values()]) for name in ("key", "value")}  # fmt: skip
    record = {name: getattr(sequence, name) for name in _RECORD}
    record |= {"entries": [asdict(entry) for entry in sequence.entries], "rows": list(sequence.rows)}
    return files.write(path, KIND, tensors, cache.plain(record))


def load(path: str | Path) -> Sequence:
    """Read a state that `save` wrote.

    Raises:
        FileError: the file is missing, cut off, changed, or something else.
    """
    tensors, record = files.read(path, KIND)
    record = {"how": {}, "place": "", "versions": {}} | record  # of an earlier form, which is shown and does not go on
    try:
        check(record, _FORM)
        rows = record["rows"]
        own = zip(tensors["keys"], tensors["values"], strict=True) if rows else ()
        sums = Sums(tensors["P"], tensors["Q"]) if "P" in tensors else None
        places = {name: name.split(".", 2) for name in tensors if name.startswith("total.")}
        return Sequence(
            entries=tuple(Entry(**entry) for entry in record["entries"]),
            rows={row: Row(key, value) for row, (key, value) in zip(rows, own, strict=True)},
            sums=sums,
            totals={Weight(int(layer), weight): tensors[name] for name, (_, layer, weight) in places.items()},
            state={name[6:]: tensor for name, tensor in tensors.items() if name.startswith("state.")},
            looks=tuple(record["looks"]),
            **{name: record[name] for name in _RECORD if name != "looks"},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise files.FileError(
            f"{path} is a sequence whose record is not whole ({type(error).__name__} {error})."
        ) from error


_RECORD = ("editor", "settings", "origin", "prepared", "how", "place", "versions", "looks", "batches", "made", "conflicts")  # fmt: skip
_FORM = {
    "editor": str,
    "settings": dict,
    "origin": {"name": str, "weights": str, "configuration": str, "tokenizer": str, "dtype": str},
    "prepared": str,
    "how": dict,
    "place": str,
    "versions": {str: str},
    "looks": [{"edits": int, "out": [str]}],
    "batches": int,
    "made": int,
    "conflicts": int,
    "rows": [int],
    "entries": [{"fact": {"subject": str, "template": str}, "batch": int, "row": int, "why": str}],
}
