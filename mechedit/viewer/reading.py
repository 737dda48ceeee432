"""A result from a path: a file, the folder of a run, or one unit of it. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mechedit import edits, files, parsing
from mechedit.files import Blob
from mechedit.runs import units
from mechedit.runs.parquet import RESULTS
from mechedit.runs.results import Evaluation
from mechedit.runs.store import PLAN, RunError
from mechedit.tracing import Trace
from mechedit.tracing.averages import Average, average
from mechedit.tracing.severing import Severed
from mechedit.viewer.contents import Viewable

__all__ = ["HAS", "read"]

HAS = "a trace, severed or edit file, average.json, sweep.json, or a folder of trace --facts, evaluate or sweep"
"""What has a page, as a path."""


def read(path: str | Path, unit: str | None = None) -> Viewable:
    """The result that a path holds; of a run's folder the unit that is named by its number or the beginning of its name. A folder of
    severed curves is all of them, and one of traces their average.

    Raises:
        FileError: a file that is missing, damaged, or nothing that has a page.
        RunError: a folder that has none, or no such unit.
    """
    path = Path(path)
    if unit is not None:
        return _of_file(units.read(path, unit))
    if path.is_dir():
        return _of_folder(path)
    if path.name == RESULTS or path.name == "summary.json":
        return Evaluation.load(path.parent)
    return _of_json(path) if path.suffix == ".json" else _of_file(path)


def _of_folder(folder: Path) -> Viewable:
    if (folder / RESULTS).is_file():
        return Evaluation.load(folder)
    for name in ("sweep.json", "average.json"):
        if (folder / name).is_file():
            return _of_json(folder / name)
    if (folder / PLAN).is_file():
        every = list(units.read_all(folder))
        kinds = {"scores" if each.data.startswith(b"{") else files.kind(each) for each in every}
        if kinds == {"severed"}:
            return [Severed.load(each) for each in every]
        if kinds == {"trace"}:
            return average([Trace.load(each) for each in every])
        raise RunError(f"{folder} is a run of {len(every)} units; name one with --unit (`mechedit show {folder}` lists them).")  # fmt: skip
    if (folder / "before" / PLAN).is_file():
        raise RunError(f"{folder} holds an evaluation that has not ended: give its command again, and it goes on to its end.")  # fmt: skip
    here = files.names(folder, _READERS)
    raise RunError(f"{folder} is nothing that has a page: {f'name a file in it ({here})' if here else f'it must be {HAS}'}.")  # fmt: skip


def _of_json(path: Path) -> Viewable:
    try:
        record = parsing.from_file(path)
        if isinstance(record, dict) and "correlation_with_effect" in record:
            return record
        if isinstance(record, dict) and "indirect_effect" in record:
            return Average.from_json(record)
    except (parsing.ParseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise files.FileError(f"{path} is no average that can be shown ({type(error).__name__}: {error}).") from error
    raise files.FileError(f"{path} has no page: it must be {HAS}.")


_READERS: dict[str, Callable[[Path | Blob], Viewable]] = {"trace": Trace.load, "severed": Severed.load, "edit": edits.load}  # fmt: skip


def _of_file(place: Path | Blob) -> Viewable:
    if isinstance(place, Blob) and place.data.startswith(b"{"):
        raise files.FileError(f"{place} is the scores of one record; make the page of the evaluation's folder.")
    kind = files.kind(place)
    if kind in _READERS:
        return _READERS[kind](place)
    raise files.FileError(f"{place} is of kind {kind!r}, which has no page: it must be {HAS}.")
