"""Do ROME's numbers move from one version of mechedit to this one?  python -m experiments.compare_versions --old CHECKOUT

Both versions, each in a process of its own, edit the same facts with the preset, score them and trace the first two. Compared are C, u,
the step (so v*), probabilities, reports, scores and traces: the largest difference of each, relative to the old tensor's norm, or to
the old number where that is above 1. Seconds of an edit are the medians; the versions take turns, model by model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.common import FIGURES, commit_of, parse, say
from experiments.editing import data
from mechedit import cache, provenance, shipped

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class CompareVersions:
    """Settings of the experiment."""

    old: Path = Path()
    models: tuple[str, ...] = ("organism", "gemma-3-270m")
    facts: int = 20
    threads: int = 2


def run(settings: CompareVersions, version: Path, model: str, out: Path) -> None:
    """What the version in a folder gives, into files named `out`."""
    source = "" if model in shipped.MODELS else str(data("counterfact_flat.json"))
    script = HERE / "experiments" / "version_worker.py"
    command = [sys.executable, str(script), model, source, str(settings.facts), str(settings.threads), str(out)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(version)}, cwd=version)


def flat(value: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dictionaries, by their path; those in lists under their list's."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flat(each, f"{at}.{key}".strip("."))
    elif isinstance(value, (int, float)) and not at.endswith("seconds"):
        yield at, float(value)


def compare(old: Path, new: Path) -> dict[str, Any]:
    """The largest difference of each kind of tensor and number."""
    from safetensors.torch import load_file

    mine, theirs = (load_file(f"{each}.safetensors") for each in (new, old))
    if mine.keys() != theirs.keys():
        raise SystemExit(f"the versions did not give the same: {sorted(mine.keys() ^ theirs.keys())}.")
    largest: dict[str, float] = {}
    for name, tensor in theirs.items():
        there = tensor.double().nan_to_num()
        difference = float((mine[name].double().nan_to_num() - there).norm() / there.norm())
        kind = name.partition(".")[2] or name
        largest[kind] = max(largest.get(kind, 0.0), difference)
    records = [json.loads(Path(f"{each}.json").read_text()) for each in (old, new)]
    for before, after in zip(*records, strict=True):
        numbers = dict(flat(after))
        for name, value in flat(before):
            if name in numbers and value == value:
                difference = abs(numbers[name] - value) / max(1.0, abs(value))
                largest[name] = max(largest.get(name, 0.0), difference)
    seconds = {name: median(each["seconds"] for each in of if "seconds" in each) for name, of in zip(("old", "new"), records, strict=True)}  # fmt: skip
    edited = sum("seconds" in each for each in records[1])
    return {"edited": edited, "largest difference": largest, "median seconds of an edit": seconds}


def main(settings: CompareVersions) -> None:
    commit = commit_of(settings.old)
    result: dict[str, Any] = {}
    for model in settings.models:
        with tempfile.TemporaryDirectory() as folder:
            for name, version in (("old", settings.old.resolve()), ("new", HERE)):
                run(settings, version, model, Path(folder) / name)
            result[model] = compare(Path(folder) / "old", Path(folder) / "new")
        say(f"{model}: {json.dumps(result[model], indent=1)}")
    record = {
        "old": commit,
        "facts": settings.facts,
        "threads": settings.threads,
        "versions": provenance.versions(),
    }
    path = FIGURES / "compare_versions.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record | {"models": result}, indent=1) + "\n")
    say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(CompareVersions))
