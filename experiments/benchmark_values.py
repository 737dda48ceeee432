"""How much faster are the values of many facts sought together?  python -m experiments.benchmark_values   -> figures/MODEL/benchmark_values.json

In one run, with one number of threads: v* of each fact, by the model's own settings of ROME, one after another, all together, and all together in pieces
that one thread after another runs with all threads (as before pieces were run side by side), in turns; of each way the fastest of `repeats`. C, prefixes and keys are there beforehand. Seconds are the process's own where it has one thread, so that
other work on the machine does not count, else those of the clock. With `--old CHECKOUT` also one edit after another by that version, by this
one, and by this one with `--search quick` and `--search few`, in processes of their own that take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from experiments.common import commit_of, parse, say, write
from experiments.editing import benchmark_facts
from mechedit import above, editing, models, values
from mechedit.editors import named, rome
from mechedit.settings import RomeSettings
from mechedit.settings.rome import SEARCHES
from mechedit.values import Sought, Value

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class BenchmarkValues:
    """Settings of the values' benchmark."""

    model: str = "organism"
    facts: int = 64
    repeats: int = 2
    threads: int = 2
    old: Path = Path()
    edits: int = 8  # of the old version and of this one
    name: str = "benchmark_values"


def sought(model: models.HookedModel, settings: RomeSettings, n: int) -> list[Sought]:
    """The first facts of the benchmark that can be edited, as ROME seeks their values."""
    editor = named("rome")
    assert isinstance(editor, rome.Rome)
    candidates = (
        fact
        for fact in benchmark_facts(str(model.cfg.model_name), 0, 4 * n)
        if not editing.refusal(model, fact, editor, settings)
    )
    chosen = {fact.subject: fact for fact in candidates}
    prepared = editing.make_ready(model, editor, settings)
    assert isinstance(prepared, rome.Prepared)
    return [each.sought for each in editor.begun(model, list(chosen.values())[:n], settings, prepared)]


def timed(run: Callable[[], list[Value]], threads: int) -> tuple[float, list[Value]]:
    """Seconds, and what was found."""
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    found = run()
    return clock() - began, found


def furthest(some: Sequence[Value], others: Sequence[Value]) -> float:
    """The largest difference of two facts' values, in lengths of the value."""
    pairs = zip(some, others, strict=True)
    return max(float((one.value - other.value).norm() / one.value.norm()) for one, other in pairs)


def edits(settings: BenchmarkValues) -> dict[str, Any]:
    """Of single edits by both versions: the fastest turn of each fact, and what of the old one's seconds the new one takes."""
    searches = [name for name in SEARCHES if name != "whole"]
    versions = {"old": (settings.old.resolve(), []), "new": (HERE, [])} | {name: (HERE, [name]) for name in searches}
    turns: dict[str, list[list[dict[str, float]]]] = {name: [] for name in versions}
    for _ in range(settings.repeats):
        for name, (version, search) in versions.items():
            command = [sys.executable, str(HERE / "experiments" / "edit_worker.py"), settings.model, str(settings.edits), str(settings.threads), *search]  # fmt: skip
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(version)}, cwd=version)  # fmt: skip
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{name}: {[round(each['seconds'], 1) for each in turns[name][-1]]}")
    best = {name: [min(own, key=lambda each: each["seconds"]) for own in zip(*of, strict=True)] for name, of in turns.items()}  # fmt: skip
    seconds = {name: sum(each["seconds"] for each in own) / len(own) for name, own in best.items()}
    return {"commit": commit_of(settings.old), "edits": best, "seconds": seconds, "of the old": {name: seconds[name] / seconds["old"] for name in ("new", *searches)}}  # fmt: skip


def main(settings: BenchmarkValues) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    edit = rome.resolve(model)
    every = sought(model, edit, settings.facts)
    alone, together, in_turn = (list[tuple[float, list[Value]]]() for _ in range(3))
    for _ in range(settings.repeats):
        for way, most in ((together, above.MOST), (in_turn, 1)):
            with mock.patch.object(above, "MOST", most):
                way.append(timed(lambda: values.optimise_all(model, every, edit.layer, edit), settings.threads))
        alone.append(timed(lambda: [values.optimise_all(model, [each], edit.layer, edit)[0] for each in every], settings.threads))  # fmt: skip
        say(
            f"one after another {alone[-1][0]:.1f} s, together {together[-1][0]:.1f} s, not side by side {in_turn[-1][0]:.1f} s"
        )
    one_by_one, at_once, apart = (min(seconds for seconds, _ in each) for each in (alone, together, in_turn))
    found = together[0][1]
    result: dict[str, Any] = {
        "facts": len(every),
        "seconds": {"one after another": one_by_one, "together": at_once, "not side by side": apart},
        "times faster": one_by_one / at_once,
        "by threads side by side": apart / at_once,
        "largest difference": max(furthest(way[0][1], found) for way in (alone, in_turn)),
        "steps": {"mean": sum(len(each.losses) for each in found) / len(found), "most": max(len(each.losses) for each in found)},
    }  # fmt: skip
    say(f"{result['times faster']:.1f} times faster, {result['largest difference']:.1e} apart")
    if settings.old != Path():
        result["single edit"] = edits(settings)
        say(f"of the old version's time a single edit takes {result['single edit']['of the old']}")
    say(f"wrote {write(settings.name, model, settings, result)}")
    return result


if __name__ == "__main__":
    main(parse(BenchmarkValues))
