"""How long one version of mechedit takes for an edit by ROME: run by benchmark_values.py, in the version that PYTHONPATH names.

python edit_worker.py MODEL FACTS THREADS [quick]      prints seconds and steps of each edit as JSON
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from dataclasses import replace
from importlib import import_module

import torch


def main(name: str, n: int, threads: int, search: str = "") -> None:
    from mechedit import models, moments
    from mechedit.editors import rome
    from mechedit.settings import RomeSettings

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    model = models.load(name)
    facts = import_module("mechedit.sources" if importlib.util.find_spec("mechedit.sources") else "mechedit.facts")
    chosen = [fact for fact in facts.named("organism" if "organism" in name else "built-in") if fact.target_new][:n]
    settings = replace(rome.resolve(model), guard="warn")
    if search:
        settings = replace(settings, **RomeSettings.bundles["search"][search])
    moments.estimate(model, settings.layer)  # kept from then on
    rome.edit(model, chosen[-1], settings)  # samples prefixes; a first edit is slow
    found = []
    for fact in chosen:
        began = clock()
        edit = rome.edit(model, fact, settings)
        found.append({"seconds": clock() - began, "steps": len(edit.details["losses"]), "p_new": edit.after["p_new"]})
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    model, n, threads, *search = sys.argv[1:]
    main(model, int(n), int(threads), *search)
