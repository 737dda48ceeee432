"""A folder of finished work units, each whole or not there; a killed run goes on where it stopped.

The folder's `run.json` says what the run is: settings, weights, corruption, versions. A run that differs in any of it is refused, so
that numbers of two kinds never mix. Results are in `units/`, in the shards of `runs.shards`, each as the bytes of the file that it
would be: `runs.units` reads single ones, and writes them as files. One that was changed by a byte counts as not done. What a unit raised is in
`failures.jsonl`, with its traceback, and the next run tries it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from mechedit.cache import WriteError, atomic_write
from mechedit.errors import MecheditError
from mechedit.files import Blob, FileError
from mechedit.models import HookedModel, dropping, hooked
from mechedit.progress import Progress, silent
from mechedit.runs.engines import Done, Engine, Own, Task
from mechedit.runs.shards import Shards

__all__ = ["FAILURES", "PLAN", "SECONDS", "Kept", "RunError", "Store", "check_plain", "claim", "plan", "units_of"]

PLAN, SECONDS, FAILURES = "plan.json", "seconds.jsonl", "failures.jsonl"
HOPELESS = 5  # so many failures before any success end a run that needs every unit
CHECKED = (
    1 << 28
)  # bytes of results that are looked at before a run is said to be finished; of more, each when it is read

Result = TypeVar("Result")


class RunError(MecheditError, RuntimeError):
    """A run that cannot go on in this folder."""


class Kept(Sequence[Result]):
    """Results in order, each read from the disk when it is asked for; `notes` are read without them.

    Raises:
        RunError: one that is asked for was damaged since it was written.
    """

    def __init__(self, units: Sequence[str], shards: Shards, read: Callable[[str, bytes], Result], stand_ins: Mapping[str, tuple[Result, Any]]) -> None:  # fmt: skip
        self.units = units
        self._shards, self._read, self._stand_ins = shards, read, stand_ins

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, index: int) -> Result: ...

    @overload
    def __getitem__(self, index: slice) -> Kept[Result]: ...

    def __getitem__(self, index: int | slice) -> Result | Kept[Result]:
        if isinstance(index, slice):
            return Kept(self.units[index], self._shards, self._read, self._stand_ins)
        return next(self._each([self.units[index]]))

    def __iter__(self) -> Iterator[Result]:
        return self._each(self.units)

    def __repr__(self) -> str:
        return f"<{len(self)} results of {self._shards.folder.parent}>"

    @property
    def notes(self) -> list[Any]:
        """What was noted of each."""
        return [self._stand_ins[unit][1] if unit in self._stand_ins else self._shards.note(unit) for unit in self.units]

    def _each(self, units: Sequence[str]) -> Iterator[Result]:
        held = self._shards.read(unit for unit in units if unit not in self._stand_ins)
        for unit in units:
            if unit in self._stand_ins:
                yield self._stand_ins[unit][0]
            elif (found := _decoded(self._read, unit, next(held))) is not None:
                yield found
            else:
                self._shards.forget(unit)
                raise RunError(
                    f"the unit {unit} in {self._shards.folder.parent} was damaged after it was written; run again, and it is computed "
                    "anew."
                )


class Store(Generic[Result]):
    """Units of one run in `folder`.

    `read(path)` loads a result, `write(result, path)` saves it, and both take a `files.Blob` for the path; `note(result)` is what is
    known of one without reading it. `noun` names them in progress. Where another process is at work in the folder, that is an error,
    or waited for (`waits`).

    Raises:
        RunError: the folder holds a run of other settings, or of an earlier version, or something that is no run.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        what: dict[str, Any],
        read: Callable[[Any], Result],
        write: Callable[[Result, Any], Any],
        noun: str = "facts",
        *,
        note: Callable[[Result], Any] | None = None,
        waits: bool = False,
    ) -> None:
        self.folder, self._read, self._write, self.noun, self._waits = Path(folder), read, write, noun, waits
        self._note = note
        claim(self.folder, what)
        self.shards = Shards(units_of(self.folder))

    def get(self, unit: str) -> Result | None:
        """A finished unit's result; None where it is not there, or damaged."""
        return _decoded(self._decode, unit, self.shards.get(unit))

    def run(
        self,
        units: Sequence[str],
        task: Task[Result],
        engine: Engine,
        progress: Progress = silent,
        *,
        own: Own | None = None,
        failed: Callable[[Done[Any]], Result] | None = None,
        called: Callable[[str], str] = "unit {}".format,
    ) -> Kept[Result]:
        """Each unit's result in order, computed by the engine and saved where it is not there yet. They are read as they are used.

        `own` is what travels with a unit (`runs.engines`). `failed` makes what stands in the place of a unit that raised something,
        which is not kept; without it the run ends in an error when all others are done. `called` names a unit for people.

        Raises:
            RunError: another process is at work in this folder, or units failed; what is finished is kept.
        """
        every = list(dict.fromkeys(units))
        stand_ins: dict[str, tuple[Result, Any]] = {}
        if self._missing(every):  # else there is nothing to write, nor a lock to take
            with self._alone():
                missing = self._missing(every)
                plan(self.folder, self.folder, every)
                broken = self._compute(missing, len(every), task, engine, progress, own, hopeless=failed is None)
            if broken and failed is None:
                done = len(every) - len(self._missing(every))
                raise RunError(
                    f"{len(broken)} of {len(every)} units in {self.folder} failed, {done} are finished and kept; run again to try those "
                    f"that are missing. The first: {broken[0].error} ({called(broken[0].unit)}; {FAILURES} there has more)."
                )
            if failed is not None:
                results = {each.unit: failed(each) for each in broken}
                stand_ins = {unit: (result, self._noted(result)) for unit, result in results.items()}
        return Kept(list(units), self.shards, self._decode, stand_ins)

    def finished(self, units: Sequence[str]) -> int:
        """How many of these are done."""
        return sum(unit in self.shards for unit in units)

    def _missing(self, units: Sequence[str]) -> list[str]:
        """Units that are not there, or damaged, as far as that can be seen without reading for long."""
        self.shards.refresh()
        there = [unit for unit in units if unit in self.shards]
        damaged: set[str] = set()
        if self.shards.size(there) <= CHECKED:
            damaged = {unit for unit, data in zip(there, self.shards.read(there), strict=True) if data is None}
        return [unit for unit in units if unit not in self.shards or unit in damaged]

    def _compute(
        self,
        missing: Sequence[str],
        of: int,
        task: Task[Result],
        engine: Engine,
        progress: Progress,
        own: Own | None,
        *,
        hopeless: bool,
    ) -> list[Done[Any]]:
        """Compute and keep units; those that failed."""
        broken: list[Done[Any]] = []
        finished = of - len(missing)
        progress(self.noun, finished, of)
        with self.shards.writing() as writer, self._log(SECONDS, "a") as seconds, self._log(FAILURES, "w") as failures:
            for done in engine.map(_Encoding(task, self._write, self._note), missing, own):
                if done.result is None:
                    broken.append(done)
                    failures({"unit": done.unit, "error": done.error, "traceback": done.trace})
                    if hopeless and len(broken) == HOPELESS and not finished:
                        break
                    continue
                writer.add(done.unit, *done.result)
                seconds({"unit": done.unit, "seconds": done.seconds})
                finished += 1
                progress(self.noun, finished, of)
        if not broken:
            (self.folder / FAILURES).unlink()
        return broken

    @contextmanager
    def _log(self, name: str, mode: str) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Lines of JSON, each written when it is said."""
        with _writing(self.folder):
            file = (self.folder / name).open(mode, encoding="utf-8")

        def say(record: dict[str, Any]) -> None:
            with _writing(self.folder):
                file.write(json.dumps(record) + "\n")
                file.flush()

        with file:
            yield say

    def _decode(self, unit: str, data: bytes) -> Result:
        return self._read(Blob(f"the unit {unit} in {self.folder}", data))

    def _noted(self, result: Result) -> Any:
        return self._note(result) if self._note else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with _locked(self.folder, "run.lock", -1 if self._waits else 0) as is_ours:
            if not is_ours:
                raise RunError(f"another process is at work in {self.folder}; wait for it, or choose another folder.")
            yield


@dataclass(frozen=True)
class _Encoding(Generic[Result]):
    """A task whose result is what is kept of it: bytes, and a note. What cannot be written is the unit's failure, like any other."""

    task: Task[Result]
    write: Callable[[Result, Any], Any]
    note: Callable[[Result], Any] | None

    @property
    def batch(self) -> int:
        """Units that the task takes together."""
        return int(getattr(self.task, "batch", 1))

    def __call__(self, model: HookedModel, unit: str, *own: Any) -> tuple[bytes, Any]:
        return self._encoded(unit, self.task(model, unit, *own))

    def many(self, model: HookedModel, units: Sequence[str]) -> list[tuple[bytes, Any]]:
        """Of units that the task takes together."""
        task: Any = self.task
        return [self._encoded(unit, each) for unit, each in zip(units, task.many(model, units), strict=True)]

    def _encoded(self, unit: str, result: Result) -> tuple[bytes, Any]:
        blob = Blob(unit)
        self.write(result, blob)
        return blob.data, self.note(result) if self.note else None


def _decoded(read: Callable[[str, bytes], Result], unit: str, data: bytes | None) -> Result | None:
    try:
        return None if data is None else read(unit, data)
    except FileError:
        return None


def units_of(folder: Path) -> Path:
    """Where a run's results are.

    Raises:
        RunError: they are in the form of an earlier version, a file each.
    """
    own = folder / "units"
    if next(own.glob("*.safetensors"), None) is not None:
        raise RunError(
            f"{folder} holds a run in the form of an earlier version, a file a unit; finish it with that version, or choose another "
            "folder."
        )
    return own


def check_plain(model: HookedModel) -> None:
    """Raise where there are hooks on the model: what is kept is kept under its parameters, and hooks are none.

    Raises:
        RunError: there are, or dropout is at work.
    """
    if name := dropping(model):
        raise RunError(
            f"{model.cfg.model_name} is in training mode: its dropout {name} draws anew in every run, and nothing could be kept. Call model.eval() first."
        )
    if hooked(model):
        raise RunError(
            f"there are hooks on {model.cfg.model_name}, and a run would keep what it says with them as if it said so without. "
            "Take them off (model.reset_hooks()), or compute without a run."
        )


def claim(folder: Path, what: dict[str, Any]) -> None:
    """Make `folder` this run's: `run.json` there says `what`, or is written. Of several processes at once, one writes it.

    Raises:
        RunError: the folder holds a run of other settings, or something that is no run.
        WriteError: the folder cannot be written.
    """
    description, now = folder / "run.json", _flat(json.loads(json.dumps(what)))  # as it will read back
    if not description.exists():
        with _locked(folder, "claim.lock", -1):
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
def _locked(folder: Path, name: str, timeout: float) -> Iterator[bool]:
    """Hold a lock in the folder, which is made; whether it was to be had."""
    import filelock

    lock = filelock.FileLock(folder / name, timeout=timeout)
    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Let what the disk refuses say so."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (WriteError, TimeoutError)):
            raise
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys joined by dots."""
    if not isinstance(value, dict):
        return {at: value}
    return {name: leaf for key, each in value.items() for name, leaf in _flat(each, f"{at}.{key}".strip(".")).items()}
