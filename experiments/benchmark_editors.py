"""What does an edit by each editor cost?  python -m experiments.benchmark_editors   -> figures/MODEL/benchmark_editors.json

One built-in fact (of the organism's world for an organism), each editor's preset; each edit in a process of its own, which gives its peak
memory beside the loaded model too (the tables' last columns). What an editor prepares for all facts (C, prefixes) is there beforehand; what it keeps of a
fact (neurons) is not. Medians of `repeats`. Editors that are not asked for keep what was measured of them on the same weights and threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from experiments.benchmark_editing import memory, peak
from experiments.common import FIGURES, parse, say, short_name, write
from experiments.editing import OPPONENTS, TRAINED, opponent, there
from mechedit import cache, editing, editors, models, organism, provenance, sources
from mechedit.files import FileError
from mechedit.neurons import Neurons


@dataclass(frozen=True)
class BenchmarkEditors:
    """Settings of the benchmark."""

    model: str = "gemma-3-270m"
    editors: tuple[str, ...] = ("rome", *OPPONENTS, *TRAINED)  # of trained ones those whose network is there
    repeats: int = 3
    threads: int = 2
    alone: str = ""  # the editor that a process of the benchmark itself runs


def run_one(settings: BenchmarkEditors) -> dict[str, Any]:
    """One edit in this process: its settings, seconds, and peak memory in bytes beside what the process had before."""
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    fact = sources.named("organism" if settings.model in organism.MODELS else "built-in")[0]
    name, chosen = opponent(model, settings.alone, 0)
    editor = editors.named(name)
    prepared = editing.make_ready(model, editor, chosen)
    peak(reset=True)
    before, began = memory("VmRSS"), time.perf_counter()
    anew = patch.object(Neurons, "load", side_effect=FileError("as if they were never found"))
    with warnings.catch_warnings(), anew:
        warnings.simplefilter("ignore", editing.EditWarning)
        edit = editing.edit(model, fact, editor, chosen, prepared=prepared)
    numbers = {"seconds": time.perf_counter() - began, "peak": peak() - before, "p_new": edit.after["p_new"]}
    return numbers | {"edit": cache.plain(asdict(chosen))}


def measured(model: models.HookedModel, threads: int) -> dict[str, Any]:
    """What is written of editors on this model's weights with so many threads."""
    path = FIGURES / short_name(model) / "benchmark_editors.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    if not record or (record["origin"]["weights"], record["settings"]["threads"]) != (provenance.origin(model)["weights"], threads):  # fmt: skip
        return {}
    return record["editors"]


def main(settings: BenchmarkEditors) -> None:
    if settings.alone:
        sys.stdout.write(json.dumps(run_one(settings)) + "\n")
        return
    model = models.load(settings.model)
    result = measured(model, settings.threads)
    for editor in there(model, settings.editors):
        options = asdict(settings) | {"alone": editor}
        command = [sys.executable, "-m", "experiments.benchmark_editors"]
        command += [f"--{name}={options[name]}" for name in ("model", "threads", "alone")]
        runs = []
        for _ in range(settings.repeats):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{editor}: {done.stderr.strip().splitlines()[-1]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        result[editor] = {name: median(each[name] for each in runs) for name in ("seconds", "peak", "p_new")}
        result[editor]["edit"] = runs[0]["edit"]
        say(f"{editor}: {result[editor]['seconds']:.2f} s, {result[editor]['peak'] / 1e6:.0f} MB beside the model")
    say(f"wrote {write('benchmark_editors', model, settings, {'editors': result})}")


if __name__ == "__main__":
    main(parse(BenchmarkEditors))
