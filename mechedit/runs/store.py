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

from mechedit.cache import WriteError, atomic_write
from mechedit.errors import MecheditError
from mechedit.files import FileError
from mechedit.models import HookedModel, hooked
from mechedit.progress import Progress, silent
from mechedit.runs.engines import Done, Engine, Task

__all__ = ["PLAN", "RunError", "Status", "Store", "by_stage", "check_plain", "claim", "plan", "status"]

PLAN, SECONDS = "plan.json", "seconds.jsonl"
HOPELESS = 5  # so many failures before any success end a run

Result = TypeVar("Result")


class RunError(MecheditError, RuntimeError):
    """A run that cannot go on in this folder."""


class Store(Generic[Result]):
    """Units of one run in `folder`.

    `read(path)` loads a result, `write(result, path)` saves it; `noun` names them in progress. Where another process is at work in
    the folder, that is an error, or waited for (`waits`).

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
        *,
        waits: bool = False,
    ) -> None:
        self.folder, self._read, self._write, self.noun, self._waits = Path(folder), read, write, noun, waits
        claim(self.folder, what)
        with _writing(self.folder):
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
        there = {unit: self.get(unit) for unit in every}
        if None not in there.values():  # nothing to write, nor a lock to take
            return [there[unit] for unit in units]  # type: ignore[misc]
        with self._alone():
            missing = [unit for unit in every if there[unit] is None and self.get(unit) is None]
            plan(self.folder, self.folder, every)
            failed: list[Done[Result]] = []
            finished = len(every) - len(missing)
            progress(self.noun, finished, len(every))
            for done in engine.map(task, missing):
                if done.result is None:
                    failed.append(done)
                    if len(failed) == HOPELESS and not finished:
                        break
                    continue
                self._write(done.result, self.path(done.unit))
                with _writing(self.folder), (self.folder / SECONDS).open("a") as log:
                    log.write(json.dumps({"unit": done.unit, "seconds": done.seconds}) + "\n")
                finished += 1
                progress(self.noun, finished, len(every))
        if failed:
            raise RunError(
                f"{len(failed)} of {len(every)} units in {self.folder} failed, {finished} are finished and kept; run again to "
                f"try those that are missing. The first: {failed[0].error} (unit {failed[0].unit})."
            )
        fresh = {unit: self._read(self.path(unit)) for unit in every if there[unit] is None}  # as a resumed run sees it
        whole = there | fresh
        return [whole[unit] for unit in units]  # type: ignore[misc]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        import filelock

        lock = filelock.FileLock(self.folder / "run.lock", timeout=-1 if self._waits else 0)
        try:
            with _writing(self.folder):
                lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"another process is at work in {self.folder}; wait for it, or choose another folder."
            ) from error
        try:
            yield
        finally:
            lock.release()


def check_plain(model: HookedModel) -> None:
    """Raise where there are hooks on the model: what is kept is kept under its parameters, and hooks are none.

    Raises:
        RunError: there are.
    """
    if hooked(model):
        raise RunError(
            f"there are hooks on {model.cfg.model_name}, and a run would keep what it says with them as if it said so without. "
            "Take them off (model.reset_hooks()), or compute without a run."
        )


def claim(folder: Path, what: dict[str, Any]) -> None:
    """Make `folder` this run's: `run.json` there says `what`, or is written.

    Raises:
        RunError: the folder holds a run of other settings, or something that is no run.
        WriteError: the folder cannot be written.
    """
    description, now = folder / "run.json", _flat(json.loads(json.dumps(what)))  # as it will read back
    if not description.exists():
        with atomic_write(description) as temporary:
            temporary.write_text(json.dumps(what, indent=1))
        return
    try:
        before = _flat(json.loads(description.read_text()))
    except ValueError as error:
        raise RunError(f"{description} is damaged ({error}); choose another folder, or delete it.") from error
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    differing.sort(key=lambda key: (key.count("."), key))  # what is said of the whole first
    if differing:
        changes = ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing[:5])
        raise RunError(f"{folder} holds a run of other settings ({changes}). Use the same settings, or another folder.")


def plan(folder: Path, place: Path, units: Sequence[str]) -> None:
    """Note in `folder`, for `status`, which units are being computed into `place`."""
    with atomic_write(folder / PLAN) as temporary:
        own = place.absolute() == folder.absolute()  # such a folder may be moved
        temporary.write_text(json.dumps({"folder": "" if own else str(place.absolute()), "units": list(units)}))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Let what the disk refuses say so."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (WriteError, TimeoutError)):
            raise
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _parsed(text: str) -> dict[str, Any]:
    """An object of JSON, a line of a log say; nothing where it was cut off, or is something else."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


@dataclass(frozen=True)
class Status:
    """How far a run is, by its place in the folder asked about.

    `seconds` is the median of a unit's, `left` what the missing ones would take one after the other; nan where none is finished.
    """

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
    if not Path(folder).is_dir():
        raise RunError(f"{folder} is no folder; give one that a run was kept in.")
    found = []
    for path in sorted(Path(folder).rglob(PLAN)):
        record = _parsed(path.read_text())
        if "units" not in record:  # another program's
            continue
        units, place = record["units"], Path(record["folder"]) if record["folder"] else path.parent
        there = sum((place / "units" / f"{unit}.safetensors").is_file() for unit in units)
        log = place / SECONDS
        lines = log.read_text().splitlines() if log.is_file() else []
        spent = [float(each["seconds"]) for each in map(_parsed, lines) if "seconds" in each]
        seconds = median(spent) if spent else math.nan
        missing = len(units) - there
        name = str(path.parent.relative_to(folder))
        found.append(
            Status(
                name if name != "." else str(folder), there, len(units), seconds, missing * seconds if missing else 0.0
            )
        )
    if not found:
        raise RunError(f"{folder} holds no run; a folder that a run was kept in has a {PLAN}, in it or below.")
    return found


def by_stage(found: Sequence[Status]) -> list[Status]:
    """Stages of the same name in several folders, a sweep's say, as one; those that have not begun are taken to need as long."""
    names = dict.fromkeys(Path(each.folder).name for each in found)
    own = {name: [each for each in found if Path(each.folder).name == name] for name in names}
    return [_summed(name, each) if len(each) > 1 else each[0] for name, each in own.items()]


def _summed(name: str, found: Sequence[Status]) -> Status:
    finished, units = (sum(getattr(each, which) for each in found) for which in ("finished", "units"))
    told = [each.seconds for each in found if not math.isnan(each.seconds)]
    seconds = median(told) if told else math.nan
    missing = units - finished
    return Status(f"{name}, in {len(found)} folders", finished, units, seconds, missing * seconds if missing else 0.0)


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    if not isinstance(value, dict):
        return {at: value}
    return {name: leaf for key, each in value.items() for name, leaf in _flat(each, f"{at}.{key}".strip(".")).items()}
