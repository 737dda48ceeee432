"""Is this version as fast as another?  python -m experiments.benchmark_versions --old CHECKOUT   -> figures/benchmark_versions.json

Both versions, in processes of their own that take turns, load a model, trace one fact (all kinds and tokens), trace and average
several, edit some and score them (`counterfact.scores`). Reported are the best seconds of each, of the turns that each had: of the
process where it has one thread, so that other work on the machine counts less, else of the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common import FIGURES, commit_of, parse, say
from mechedit import cache, provenance

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class BenchmarkVersions:
    """Settings of the benchmark."""

    old: Path = Path()
    models: tuple[str, ...] = ("organism", "gemma-3-270m")
    draws: int = 3  # of the trace; half as many and two roles in the average
    facts: int = 3  # averaged, edited, scored
    turns: int = 2
    threads: int = 2


def times(settings: BenchmarkVersions, version: Path, model: str) -> dict[str, float]:
    """What the version in a folder needs, in seconds."""
    script = HERE / "experiments" / "speed_worker.py"
    numbers = [str(each) for each in (settings.draws, settings.facts, settings.threads)]
    command = [sys.executable, str(script), model, *numbers]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(version)}, cwd=version
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(settings: BenchmarkVersions) -> None:
    commit = commit_of(settings.old)
    versions = {"old": settings.old.resolve(), "new": HERE}
    result: dict[str, Any] = {}
    for model in settings.models:
        turns = {name: [] for name in versions}  # type: dict[str, list[dict[str, float]]]
        for _ in range(settings.turns):
            for name, version in versions.items():
                turns[name].append(times(settings, version, model))
                say(f"{model}, {name}: {turns[name][-1]}")
        best = {name: {key: min(each[key] for each in of) for key in of[0]} for name, of in turns.items()}
        result[model] = best | {"new over old": {key: best["new"][key] / best["old"][key] for key in best["old"]}}
        say(f"{model}: {json.dumps(result[model], indent=1)}")
    plain = {name: value for name, value in vars(settings).items() if name not in ("old", "models")}
    record = {"old": commit, "settings": plain, "versions": provenance.versions(), "models": result}
    path = FIGURES / "benchmark_versions.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(BenchmarkVersions))
