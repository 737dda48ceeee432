"""Bands of an editor's numbers, as `mechedit calibrate` found them on a model: read from its file, or from those that ship."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from mechedit.settings.base import SettingsError

__all__ = ["NO_EDGE", "Bands", "read_bands", "shipped_bands"]

Bands = tuple[tuple[str, float, float], ...]
"""Name of a number, from, to."""

NO_EDGE = 1e300  # where a number has no upper edge; a number that JSON has


def read_bands(path: str | Path) -> Bands:
    """The bands of a calibration's file.

    Raises:
        SettingsError: it is not there, or is none.
    """
    try:
        return _bands(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(
            f"{path} is no file of `mechedit calibrate`, which has bands with name, low and high."
        ) from error


def shipped_bands(model: str, editor: str) -> Bands:
    """The bands that ship for a model by its name, empty where none do."""
    place = resources.files("mechedit").joinpath("data", "bands", f"{model}.{editor}.json")
    return _bands(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else ()


def _bands(record: dict[str, Any]) -> Bands:
    return tuple((str(each["name"]), float(each["low"]), float(each["high"])) for each in record["bands"])
