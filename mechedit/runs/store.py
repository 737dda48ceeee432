"""A folder of finished work units. Each is one file, whole or not there; a killed run goes on where it stopped.

The folder's `run.json` says what the run is: settings, weights, corruption. A run that differs in any of it is refused, so
that numbers of two kinds never mix. A unit that cannot be read, cut short or changed by a byte, counts as not done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

from mechedit.cache import atomic_write
from mechedit.errors import MecheditError
from mechedit.files import FileError
from mechedit.progress import Progress, silent
from mechedit.runs.engines import Done, Engine, Task

__all__ = ["RunError", "Status", "Store", "status"]

PLAN, SECONDS = "plan.json", "seconds.jsonl"
HOPELESS = 5  # so many failures before any success end a run

Result = TypeVar("Result")


class RunError(MecheditError, RuntimeError):
    """A run that cannot go on in this folder."""


class Store(Generic[Result]):
    """Units of one run in `folder`: `read(path)` loads a result, `write(result, path)` saves it; `noun` names them in progress.

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
        noun: str = "facts",
    ) -> None:
        self.folder, self._read, self._write, self.noun = Path(folder), read, write, noun
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
        self, units: Sequence[str], task: Task[Result], engine: Engine, progress: Progress = silent
    ) -> list[Result]:
        """Each unit's result in order, computed by the engine and saved where it is not there yet.

        Raises:
            RunError: another process is at work in this folder, or units failed; what is finished is kept.
        """
        every = list(dict.fromkeys(units))
        with self._alone():
            missing = [unit for unit in every if self.get(unit) is None]
            with atomic_write(self.folder / PLAN) as temporary:
                temporary.write_text(json.dumps(every))
            failed: list[Done[Result]] = []
            finished = len(every) - len(missing)
            progress(self.noun, finished, len(every))
            for done in engine.map(task, missing):
                if done.result is None:
                    failed.append(done)
                    if len(failed) == HOPELESS and finished == len(every) - len(missing):
                        break
                    continue
                self._write(done.result, self.path(done.unit))
                with (self.folder / SECONDS).open("a") as log:
                    log.write(json.dumps({"unit": done.unit, "seconds": done.seconds}) + "\n")
                finished += 1
                progress(self.noun, finished, len(every))
        if failed:
            raise RunError(
                f"{len(failed)} of {len(every)} units in {self.folder} failed, {finished} are finished and kept; run again to "
                f"try those that are missing. The first: {failed[0].error} (unit {failed[0].unit})."
            )
        by_unit = {unit: self._read(self.path(unit)) for unit in every}  # what a resumed run would see
        return [by_unit[unit] for unit in units]

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


@dataclass(frozen=True)
class Status:
    """How far a run is. `seconds` is the median of a unit's, `left` what the missing ones would take one after the other."""

    folder: str
    finished: int
    units: int
    seconds: float
    left: float


def status(folder: str | Path) -> list[Status]:
    """Every run in `folder` or below it, whether it is going on or not.

    Raises:
        RunError: there is none.
    """
    found = []
    for plan in sorted(Path(folder).rglob(PLAN)):
        units = json.loads(plan.read_text())
        there = sum((plan.parent / "units" / f"{unit}.safetensors").is_file() for unit in units)
        log = plan.parent / SECONDS
        lines = log.read_text().splitlines() if log.is_file() else []
        seconds = median(json.loads(line)["seconds"] for line in lines) if lines else math.nan
        missing = len(units) - there
        found.append(Status(str(plan.parent), there, len(units), seconds, missing * seconds if missing else 0.0))
    if not found:
        raise RunError(f"{folder} holds no run; a folder that a run was kept in has {PLAN}.")
    return found


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    if not isinstance(value, dict):
        return {at: value}
    return {name: leaf for key, each in value.items() for name, leaf in _flat(each, f"{at}.{key}".strip(".")).items()}
