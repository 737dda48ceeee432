"""How long one version of mechedit takes: run by benchmark_versions.py, in the version that PYTHONPATH names.

python speed_worker.py MODEL DRAWS FACTS THREADS      prints seconds as JSON
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch


def main(name: str, draws: int, n: int, threads: int) -> None:
    from mechedit import models, moments, tracing
    from mechedit.benchmarks import counterfact
    from mechedit.editors import rome
    from mechedit.settings import TraceSettings
    from mechedit.tracing import averages

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Any:
        began = clock()
        yield
        seconds[what] = clock() - began

    with timed("load"):
        model = models.load(name)
    facts = import_module("mechedit.sources" if importlib.util.find_spec("mechedit.sources") else "mechedit.facts")
    chosen = [fact for fact in facts.named("organism" if "organism" in name else "built-in") if fact.target_new][:n]
    tracing.trace(model, chosen[0], TraceSettings(draws=1, kinds=("resid",), roles=("last",)))  # a first call is slow
    with timed("trace"):
        tracing.trace(model, chosen[0], TraceSettings(draws=draws))
    small = TraceSettings(draws=max(1, draws // 2), roles=("subject_last", "last"))
    with timed("average"):
        averages.average(list(tracing.trace_all(model, chosen, small)))
    settings = replace(rome.resolve(model), guard="warn")
    moments.estimate(model, settings.layer)  # kept from then on
    rome.edit(model, chosen[-1], settings)  # samples prefixes
    with timed("edit"):
        for fact in chosen:
            rome.edit(model, fact, settings)
    with timed("evaluate"):
        counterfact.scores(model, chosen * 8)
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    model, *numbers = sys.argv[1:]
    main(model, *map(int, numbers))
