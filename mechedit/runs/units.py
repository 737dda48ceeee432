"""The units of a finished or unfinished run, one by one: read without its settings or its model, and written as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mechedit.cache import atomic_write
from mechedit.files import Blob
from mechedit.runs.shards import Shards
from mechedit.runs.store import RunError, units_of

__all__ = ["export", "names", "read", "read_all"]


def names(folder: str | Path) -> list[str]:
    """Of the units that are kept in a run's folder, in the order in which they were computed.

    Raises:
        RunError: none are.
    """
    return _opened(Path(folder)).names()


def read(folder: str | Path, unit: str) -> Blob:
    """A unit, which `Trace.load` or `edits.load` reads as it reads a file; by its name, its number, or the beginning of its name.

    Raises:
        RunError: no such unit, or a damaged one.
    """
    there = _opened(Path(folder))
    return _blob(Path(folder), there, _found(Path(folder), there.names(), unit))


def read_all(folder: str | Path) -> Iterator[Blob]:
    """Every unit, in order; errors as in `read`."""
    there = _opened(Path(folder))
    return (_blob(Path(folder), there, name) for name in there.names())


def export(folder: str | Path, out: str | Path, units: Sequence[str] = ()) -> list[Path]:
    """Write units (all, where none are named) as files of their own into `out`; the files. Errors as in `read`.

    Raises:
        WriteError: `out` cannot be written.
    """
    there = _opened(Path(folder))
    every, written = there.names(), []
    for name in [_found(Path(folder), every, unit) for unit in units] or every:
        data = _blob(Path(folder), there, name).data
        path = Path(out) / f"{name}.{'json' if data.startswith(b'{') else 'safetensors'}"
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        written.append(path)
    return written


def _opened(folder: Path) -> Shards:
    there = Shards(units_of(folder))
    if not len(there):
        raise RunError(f"{folder} has no units of a run; name a folder that a run was kept in, such as DIR/edits.")
    return there


def _found(folder: Path, every: Sequence[str], unit: str) -> str:
    """The name of the unit that is meant."""
    if unit not in every and unit.isdecimal() and int(unit) < len(every):
        return every[int(unit)]
    meant = [name for name in every if name == unit] or [name for name in every if name.startswith(unit)]
    if len(meant) == 1:
        return meant[0]
    raise RunError(
        f"{folder} has {len(every)} units, and {len(meant) or 'none'} of them {'begin' if len(meant) > 1 else 'begins'} with {unit!r}; "
        f"give more of a name, or a number from 0 to {len(every) - 1}."
    )


def _blob(folder: Path, there: Shards, name: str) -> Blob:
    data = there.get(name)
    if data is None:
        raise RunError(
            f"the unit {name} in {folder} was damaged after it was written; run again, and it is computed anew."
        )
    return Blob(f"the unit {name} in {folder}", data)
