"""What every experiment does: a command line from its settings, one result file with settings, versions and seed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from mechedit import cache, provenance
from mechedit.models import HookedModel

FIGURES = Path(__file__).parents[1] / "figures"
Settings = TypeVar("Settings")


def parse(settings: type[Settings], argv: list[str] | None = None) -> Settings:
    """The settings, each field an option with its default."""
    parser = argparse.ArgumentParser(
        description=settings.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for each in fields(settings):  # type: ignore[arg-type]
        kind = Path if isinstance(each.default, Path) else type(each.default)
        parser.add_argument("--" + each.name.replace("_", "-"), type=kind, default=each.default)
    return settings(**vars(parser.parse_args(argv)))


def write(name: str, model: HookedModel, settings: Any, result: dict[str, Any]) -> Path:
    """Write a result as JSON under figures/MODEL/, with all that made it."""
    plain = {key: value.name if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    record = {"settings": plain, "origin": provenance.origin(model), "versions": provenance.versions(), **result}
    path = FIGURES / str(model.cfg.model_name).rsplit("/", 1)[-1] / f"{name}.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def say(text: str) -> None:
    """A line for whoever watches."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def progress(every: int = 20) -> Callable[[str, int, int], None]:
    """A line now and then."""

    def report(what: str, done: int, of: int) -> None:
        if of and done % max(1, of // every) == 0:
            say(f"  {what}: {done} of {of}")

    return report
