"""A folder of finished work units. Each is one file, whole or not there; a killed run goes on where it stopped.

The folder's `run.json` says what the run is: settings, weights, corruption. A run that differs in any of it is refused, so
that numbers of two kinds never mix. A unit that cannot be read, cut short or changed by a byte, counts as not done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from mechedit.cache import atomic_write
from mechedit.errors import MecheditError
from mechedit.files import FileError
from mechedit.progress import Progress, silent

__all__ = ["RunError", "Store"]

Result = TypeVar("Result")


class RunError(MecheditError, RuntimeError):
    """A run that cannot go on in this folder."""


class Store(Generic[Result]):
    """Units of one run in `folder`: `read(path)` loads a result, `write(result, path)` saves it.

    Raises:
        RunError: the folder holds a run of other settings, or something that is no run.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        what: dict[str, Any],
        read: Callable[[Path], Result],
        write: Callable[[Result, Path], Any],
    ) -> None:
        self.folder, self._read, self._write = Path(folder), read, write
        self.what = json.loads(json.dumps(what))  # as it will read back
        description = self.folder / "run.json"
        if description.exists():
            self._compare(description)
        else:
            with atomic_write(description) as temporary:
                temporary.write_text(json.dumps(self.what, indent=1))
        (self.folder / "units").mkdir(exist_ok=True)

    def path(self, unit: str) -> Path:
        """Where a unit's result is, or will be."""
        return self.folder / "units" / f"{unit}.safetensors"

    def get(self, unit: str) -> Result | None:
        """A finished unit's result; None where it is not there, or damaged."""
        try:
            return self._read(self.path(unit))
        except FileError:
            return None

    def run(
        self, units: Sequence[str], compute: Callable[[str], Result], progress: Progress = silent
    ) -> Iterator[Result]:
        """Each unit's result in order, computed and saved where it is not there yet.

        Raises:
            RunError: another process is at work in this folder.
        """
        with self._alone():
            for done, unit in enumerate(units):
                progress("facts", done, len(units))
                result = self.get(unit)
                if result is None:
                    began = time.perf_counter()
                    self._write(compute(unit), self.path(unit))
                    with (self.folder / "seconds.jsonl").open("a") as log:
                        log.write(json.dumps({"unit": unit, "seconds": time.perf_counter() - began}) + "\n")
                    result = self._read(self.path(unit))  # what a resumed run would see
                yield result
            progress("facts", len(units), len(units))

    def _compare(self, description: Path) -> None:
        try:
            before = json.loads(description.read_text())
        except ValueError as error:
            raise RunError(f"{description} is damaged ({error}); choose another folder, or delete it.") from error
        differing = sorted(key for key in _flat(before).keys() | _flat(self.what).keys() if _flat(before).get(key) != _flat(self.what).get(key))  # fmt: skip
        if differing:
            changes = ", ".join(f"{key}: {_flat(before).get(key)!r} there, {_flat(self.what).get(key)!r} now" for key in differing[:5])  # fmt: skip
            raise RunError(
                f"{self.folder} holds a run of other settings ({changes}). Use the same settings, or another folder."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        import filelock

        lock = filelock.FileLock(self.folder / "run.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"another process is at work in {self.folder}; wait for it, or choose another folder."
            ) from error
        try:
            yield
        finally:
            lock.release()


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    if not isinstance(value, dict):
        return {at: value}
    return {name: leaf for key, each in value.items() for name, leaf in _flat(each, f"{at}.{key}".strip(".")).items()}
