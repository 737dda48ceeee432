"""What a Ray cluster costs beside this process alone.  python -m experiments.benchmark_engines

The same evaluation by this process, and by one worker of a Ray cluster on this machine with as many cores; folders are new, and
the unedited model's scores are computed by both. Seconds exclude loading the model here, and include starting the cluster and
loading it in the worker, which are also given alone. The two summaries are compared.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, progress, say, write
from mechedit import models, sources
from mechedit.editing import make_ready
from mechedit.editors.rome import Rome
from mechedit.runs.engines import Cluster, Done, Engine, Local
from mechedit.runs.evaluating import evaluate
from mechedit.settings import EvaluateSettings


@dataclass(frozen=True)
class BenchmarkEngines:
    """Settings of the experiment."""

    model: str = "organism"
    records: int = 1000
    threads: int = 2


def nothing(model: models.HookedModel, unit: str) -> str:
    """A task that takes no time, so that a map of it is what starting costs."""
    return unit


def main(settings: BenchmarkEngines) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = sources.named("organism" if settings.model == "organism" else "built-in")[: settings.records]
    editor = Rome()
    wanted = replace(editor.resolve(model), guard="rollback")
    prepared = make_ready(model, editor, wanted, progress=progress())
    cluster = Cluster(settings.model, models.identity(model).whole, workers=1, cpus=float(settings.threads))
    began = time.perf_counter()
    started: list[Done[str]] = list(cluster.map(nothing, ["a"]))
    start = time.perf_counter() - began
    result: dict[str, Any] = {"start": start, "started": len(started)}
    summaries = {}
    engines: dict[str, Engine] = {"local": Local(model), "ray": cluster}
    for name, engine in engines.items():
        with tempfile.TemporaryDirectory() as place:
            kept = os.environ.get("MECHEDIT_CACHE")
            os.environ["MECHEDIT_CACHE"] = place  # so that both score the unedited model
            began = time.perf_counter()
            try:
                found = evaluate(
                    model, chosen, Path(place) / "run", EvaluateSettings(), editor, wanted, prepared, engine=engine
                )
            finally:
                os.environ.pop("MECHEDIT_CACHE")
                if kept is not None:
                    os.environ["MECHEDIT_CACHE"] = kept
            result[name] = time.perf_counter() - began
            summaries[name] = found.to_json()["stages"]
            say(f"{name}: {result[name]:.1f} s")
    result["overhead"] = result["ray"] / result["local"] - 1
    result["same_summary"] = json.dumps(summaries["local"]) == json.dumps(summaries["ray"])
    say(f"overhead {100 * result['overhead']:.1f} %, of which starting {100 * start / result['local']:.1f} %; same summary: {result['same_summary']}")  # fmt: skip
    say(f"wrote {write('benchmark_engines', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkEngines))
