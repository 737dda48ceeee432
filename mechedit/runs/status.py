"""How far runs are, from what their folders say; a model is not needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mechedit.runs.shards import Shards
from mechedit.runs.store import FAILURES, PLAN, SECONDS, RunError, units_of

__all__ = ["Status", "by_stage", "status"]


@dataclass(frozen=True)
class Status:
    """How far a run is, by its place in the folder asked about.

    `failed` units raised something when they were tried last. `seconds` is the median of a unit's, `left` what the missing ones would
    take one after the other; nan where none is finished.
    """

    folder: str
    finished: int
    units: int
    failed: int
    seconds: float
    left: float


def status(folder: str | Path) -> list[Status]:
    """Every run in `folder` or below it, whether it is going on or not.

    Raises:
        RunError: there is none.
    """
    if not Path(folder).is_dir():
        raise RunError(f"{folder} is no folder; give one that a run was kept in.")
    found = [each for path in sorted(Path(folder).rglob(PLAN)) if (each := _status(path, Path(folder))) is not None]
    if not found:
        raise RunError(
            f"{folder} holds no run; a folder that a run was kept in has a {PLAN}, in it or below. What stands of a sequence of edits `mechedit show` says."
        )
    return found


def _status(path: Path, folder: Path) -> Status | None:
    record = _parsed(path.read_text(errors="replace"))
    units, other = record.get("units"), record.get("folder")
    if not isinstance(units, list) or not isinstance(other, str):  # another program's
        return None
    place = Path(other) if other else path.parent
    there = Shards(units_of(place))
    finished = sum(unit in there for unit in units)
    spent = [
        float(each["seconds"]) for each in _lines(place / SECONDS) if isinstance(each.get("seconds"), (int, float))
    ]
    seconds = median(spent) if spent else math.nan
    missing = len(units) - finished
    failed = len({each["unit"] for each in _lines(place / FAILURES) if "unit" in each} & set(units) - {*there.names()})
    name = str(path.parent.relative_to(folder))
    left = missing * seconds if missing else 0.0
    return Status(name if name != "." else str(folder), finished, len(units), failed, seconds, left)


def _lines(log: Path) -> list[dict[str, Any]]:
    return [_parsed(line) for line in log.read_text(errors="replace").splitlines()] if log.is_file() else []


def _parsed(text: str) -> dict[str, Any]:
    """An object of JSON, a line of a log say; nothing where it was cut off, or is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def by_stage(found: Sequence[Status]) -> list[Status]:
    """Stages of the same name in several folders, a sweep's say, as one; those that have not begun are taken to need as long."""
    names = dict.fromkeys(Path(each.folder).name for each in found)
    own = {name: [each for each in found if Path(each.folder).name == name] for name in names}
    return [_summed(name, each) if len(each) > 1 else each[0] for name, each in own.items()]


def _summed(name: str, found: Sequence[Status]) -> Status:
    finished, units, failed = (sum(getattr(each, which) for each in found) for which in ("finished", "units", "failed"))
    told = [each.seconds for each in found if not math.isnan(each.seconds)]
    seconds = median(told) if told else math.nan
    missing = units - finished
    left = missing * seconds if missing else 0.0
    return Status(f"{name}, in {len(found)} folders", finished, units, failed, seconds, left)
