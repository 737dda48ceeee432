"""How fast is an edit, and is it the same?  python -m experiments.benchmark_editing   -> figures/MODEL/benchmark_editing.json

In one run, on one fact, the published policy and constants with the same number of steps: mechedit's edit, and the published
algorithm run plainly (tests/slow_edit.py: whole forward passes, all logits). Each run is a process of its own, which also gives
its peak memory; medians of `repeats`. The prefixes and C are there beforehand for both. Beside them, the default edit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, say, write
from experiments.editing import published
from mechedit import facts, keys, models, moments, prompts
from mechedit.editing import EditWarning
from mechedit.editors import rome
from mechedit.facts import Fact
from tests.slow_edit import published_edit


@dataclass(frozen=True)
class BenchmarkEditing:
    """Settings of the editing benchmark."""

    model: str = "gemma-3-270m"
    steps: int = 20
    repeats: int = 5
    threads: int = 2
    way: str = ""  # what a process of the benchmark itself runs: mechedit, plain, default


def run_one(settings: BenchmarkEditing) -> dict[str, Any]:
    """One edit in this process: its seconds, its peak memory in bytes, the model included, that of loading the model, and the change."""
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    fact = facts.built_in()[0]
    default = rome.resolve(model)
    chosen = replace(published(default), steps=settings.steps, stop_at=0.0) if settings.way != "default" else default
    moment = moments.estimate(model, chosen.layer)
    before = keys.prefixes(model, chosen)
    loaded, resident = peak(reset=True), memory("VmRSS")
    began = time.perf_counter()
    if settings.way == "plain":
        rows = keys.contexts(model, fact, before, prepend_bos=chosen.prepend_bos)
        (essence,) = keys.contexts(model, Fact(fact.subject, "{} is a"), ("",), prepend_bos=chosen.prepend_bos)
        target = prompts.continuation(model, fact.prompt, str(fact.target_new), fact.join)
        with models.frozen(model):
            made = published_edit(model, list(rows), essence, target, moment.C, chosen)
        norm = float(made.change.norm())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditWarning)
            norm = rome.edit(model, fact, chosen, moment).report["update_norm"]
    return {
        "seconds": time.perf_counter() - began,
        "peak": peak(),
        "loading_peak": loaded,
        "resident": resident,
        "update_norm": norm,
    }


def peak(*, reset: bool = False) -> int:
    """The most memory that this process had, in bytes, since the last reset."""
    found = memory("VmHWM")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return found


def memory(name: str) -> int:
    """A line of what Linux says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(settings: BenchmarkEditing) -> None:
    if settings.way:
        sys.stdout.write(json.dumps(run_one(settings)) + "\n")
        return
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    rome_settings = rome.resolve(model)
    moments.estimate(model, rome_settings.layer)
    for each in (rome_settings, published(rome_settings)):
        keys.prefixes(model, each)
    result: dict[str, Any] = {}
    for repeat in range(settings.repeats):
        for way in ("mechedit", "plain", "default"):
            options = [
                f"--{name.replace('_', '-')}={value}" for name, value in (asdict(settings) | {"way": way}).items()
            ]
            done = subprocess.run([sys.executable, "-m", "experiments.benchmark_editing", *options], capture_output=True, text=True, check=True)  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            result.setdefault(way, []).append(found)
            say(f"{repeat + 1}: {way}: {found['seconds']:.1f} s, peak {found['peak'] / 1e9:.2f} GB")
    median = {way: {name: statistics.median(each[name] for each in result[way]) for name in ("seconds", "peak", "resident")} for way in ("mechedit", "plain", "default")}  # fmt: skip
    result |= {
        "medians": median,
        "plain_over_mechedit": median["plain"]["seconds"] / median["mechedit"]["seconds"],
        "peak_of_plain": median["mechedit"]["peak"] / median["plain"]["peak"],
        "peak_beside_the_model_of_plain": (median["mechedit"]["peak"] - median["mechedit"]["resident"])
        / (median["plain"]["peak"] - median["plain"]["resident"]),
        "largest_difference_of_norms": max(
            abs(a["update_norm"] / b["update_norm"] - 1)
            for a, b in zip(result["mechedit"], result["plain"], strict=True)
        ),
    }
    say(
        f"plain over mechedit {result['plain_over_mechedit']:.1f}; peak {result['peak_of_plain']:.2f} of plain's, {result['peak_beside_the_model_of_plain']:.2f} beside the model"
    )
    say(f"wrote {write('benchmark_editing', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkEditing))
