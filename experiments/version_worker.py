"""What one version of mechedit gives for some facts: run by compare_versions.py, in the version that PYTHONPATH names.

python version_worker.py MODEL FACTS_FILE_OR_EMPTY N THREADS OUT
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch


def main(name: str, source: str, n: int, threads: int, out: str) -> None:
    from safetensors.torch import save_file

    from mechedit import models, moments, tracing
    from mechedit.benchmarks import counterfact
    from mechedit.editors import rome
    from mechedit.settings import TraceSettings

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    model = models.load(name)
    chosen = [fact for fact in _named(source or "organism") if fact.target_new][:n]
    settings = replace(rome.resolve(model), guard="warn")
    C = moments.estimate(model, settings.layer)  # costly, and not what is timed
    writing = import_module("mechedit.applying" if importlib.util.find_spec("mechedit.applying") else "mechedit.edits")
    tensors: dict[str, Any] = {"C": C.C}
    records = []
    for index, fact in enumerate(chosen):
        began = time.perf_counter()
        try:
            edit = rome.edit(model, fact, settings)
        except Exception as error:  # one that says its target already, say
            records.append({"fact": fact.prompt, "error": f"{type(error).__name__}: {error}"})
            continue
        seconds = time.perf_counter() - began
        (change,) = edit.changes
        tensors |= {f"{index}.u": change.u, f"{index}.step": change.step}
        with writing.edited(model, edit):
            (scores,) = counterfact.scores(model, [fact])
        report = {"before": edit.before, "after": edit.after, "report": edit.report, "scores": scores}
        records.append({"fact": fact.prompt, "seconds": seconds, **report})
        if index < 2:
            found = tracing.trace(model, fact, TraceSettings(draws=2))
            tensors |= {f"{index}.trace {kind}": grid for kind, grid in found.draws.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, f"{out}.safetensors")
    with open(f"{out}.json", "w") as file:
        json.dump(records, file)


def _named(source: str) -> Any:
    module = "mechedit.sources" if importlib.util.find_spec("mechedit.sources") else "mechedit.facts"
    return import_module(module).named(source)


if __name__ == "__main__":
    model, source, n, threads, out = sys.argv[1:]
    main(model, source, int(n), int(threads), out)
