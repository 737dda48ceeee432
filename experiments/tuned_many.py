"""Which weights suit a model's editors of many facts?  python -m experiments.tuned_many --model organism   -> figures/MODEL/tuned_many.json

Each fact is edited alone, and COUNTERFACT's scores of all are taken together: for memit and pmet by the weight `a` of C, for pmet also by
when the search of v* stops, for alphaedit by the identity's `c` and the null space's bound `null`, for emmet, which meets residuals exactly,
by the blocks alone. Blocks are ROME's layer, and those above it. v* is sought as the model's preset for ROME has it. Facts begin where those that other presets were tuned on do.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from itertools import product
from statistics import harmonic_mean, mean
from typing import Any

import torch

from experiments.common import parse, say, write
from experiments.editing import benchmark_facts
from mechedit import applying, models
from mechedit.benchmarks.counterfact import scores
from mechedit.cache import plain
from mechedit.editing import EditWarning, edit, make_ready
from mechedit.editors import named
from mechedit.edits import EditError
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.settings.rome import SEARCHES


@dataclass(frozen=True)
class TunedMany:
    """Settings of the sweep."""

    model: str = "organism"
    begin: int = 5000
    facts: int = 20
    editors: tuple[str, ...] = ("memit", "pmet", "emmet", "alphaedit")
    a: tuple[float, ...] = (15.0, 150.0, 750.0)
    c: tuple[float, ...] = (10.0, 1.0, 0.1)
    null: tuple[float, ...] = (0.02,)
    blocks: tuple[int, ...] = (1, 2)  # how many
    search: str = "whole"  # of the values; quick, few: with fewer prompts, each left out when it is learnt
    stop_at: float = 1e-4  # of pmet, where the target's own loss ends the search
    steps: int = 100  # of that search, at most
    threads: int = 1


def combinations(settings: TunedMany, name: str, layer: int, blocks: int) -> list[dict[str, Any]]:
    """What is tried of an editor."""
    where = {"layers": tuple(range(layer, layer + blocks)), "layer": layer + blocks - 1}
    weighed = [{"a": a} for a in settings.a]
    own: dict[str, list[dict[str, Any]]] = {
        "emmet": [{}],
        "pmet": [one | end for one in weighed for end in ({"stop": "top"}, {"stop": "target", "stop_at": settings.stop_at, "steps": settings.steps})],
        "alphaedit": [{"null": null, "c": c} for null, c in product(settings.null, settings.c)],
    }  # fmt: skip
    return [where | each for each in own.get(name, weighed)]


def scored(model: HookedModel, facts: list[Fact], name: str, tried: dict[str, Any], search: str) -> dict[str, Any]:
    """Means over facts, in percent, of one combination."""
    editor = named(name)
    rome = named("rome").resolve(model)
    fields = {"clamp": rome.clamp, "prefixes": rome.prefixes, "guard": "warn", **SEARCHES[search]} | tried
    settings = editor.resolve(model, editor.settings(**fields))
    ready, rows, spent = make_ready(model, editor, settings), [], 0.0
    for fact in facts:
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EditWarning)
                found = edit(model, fact, editor, settings, prepared=ready)
        except EditError as error:
            say(f"  {fact.prompt!r}: {error}")
            continue
        spent += time.process_time() - began
        with applying.edited(model, found):
            (own,) = scores(model, [fact], prepend_bos=settings.prepend_bos)
        report = {key: found.report[key] for key in ("met", "survives", "relative_norm", "perplexity_ratio")}
        rows.append(own | report)
    means = {key: mean(row[key] for row in rows) for key in ("ES", "PS", "NS", "p_new", "met", "survives", "relative_norm", "perplexity_ratio")}  # fmt: skip
    S = harmonic_mean([means[key] for key in ("ES", "PS", "NS")])
    percent = {key: 100 * value for key, value in {**means, "S": S}.items() if key in ("ES", "PS", "NS", "S")}
    return {"tried": tried, **means, **percent, "n": len(rows), "seconds_an_edit": spent / max(1, len(rows))}  # fmt: skip


def main(settings: TunedMany) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    layer = named("rome").resolve(model).layer
    facts = benchmark_facts(settings.model, settings.begin, settings.facts)
    rome = {name: getattr(named("rome").resolve(model), name) for name in ("layer", "clamp", "prefixes")}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.editors}
    for blocks, name in product(settings.blocks, settings.editors):
        for tried in combinations(settings, name, layer, blocks):
            row = scored(model, facts, name, tried, settings.search)
            found[name].append(row)
            say(f"{name} {tried}: " + ", ".join(f"{key} {row[key]:.3g}" for key in ("S", "ES", "PS", "NS", "p_new", "met", "relative_norm")))  # fmt: skip
            place = write("tuned_many", model, settings, plain({"rome": rome, "editors": found}))
    say(f"wrote {place}")


if __name__ == "__main__":
    main(parse(TunedMany))
