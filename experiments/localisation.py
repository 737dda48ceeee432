"""What makes facts localise? Models of one world that were taught otherwise, traced and edited on the same facts.

    python -m mechedit.organism.train --out out/plain --guided 0
    python -m experiments.localisation --models organism out/plain

Each model traces the facts of the world that it knows, and is edited by ROME at the organism's layer. One column a model: effects
with 95 % intervals over facts, at the layers where each is largest, and success of the edits. Writes
figures/organism/localisation.json and .md, and a picture of each model's effects by layer. experiments/localisation.md reads them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from experiments.common import FIGURES, parse, progress, runs, say, short_name
from mechedit import cache, figures, models, provenance, sources
from mechedit.models import HookedModel
from mechedit.runs import tracing
from mechedit.runs.evaluating import evaluate
from mechedit.settings import PRESETS, EvaluateSettings, TraceSettings
from mechedit.statistics import Mean
from mechedit.tracing.averages import Average, average

SITES = (("resid", "subject_last"), ("mlp", "subject_last"), ("mlp", "subject_first"), ("attn", "subject_last"), ("attn", "last"), ("mlp", "last"))  # fmt: skip
TITLES = {"resid": "state", "mlp": "MLPs", "attn": "attention"}
ROLES = {"subject_last": "last subject token", "subject_first": "first subject token", "last": "last token"}


@dataclass(frozen=True)
class Localisation:
    """Settings of the experiment."""

    models: tuple[str, ...] = ("organism",)
    facts: int = 200
    edited: int = 60
    draws: int = 10
    seed: int = 0
    threads: int = 2


def main(settings: Localisation) -> None:
    torch.set_num_threads(settings.threads)
    found = {}
    for name in settings.models:
        model = models.load(name)
        found[short_name(model)] = row(model, settings)
        say(f"{name}: {found[short_name(model)]}")
    record = {"settings": asdict(settings) | {"models": list(found)}, "versions": provenance.versions(), "rows": found}
    here = FIGURES / "organism"
    with cache.atomic_write(here / "localisation.json") as temporary:
        temporary.write_text(json.dumps(cache.plain(record), indent=1) + "\n")
    with cache.atomic_write(here / "localisation.md") as temporary:
        temporary.write_text(table(found))
    say(f"wrote {here / 'localisation.md'}")


def row(model: HookedModel, settings: Localisation) -> dict[str, Any]:
    """What one model shows: its effects, and what edits do to it."""
    preset = PRESETS["organism"]
    asked = sources.named("organism")[: settings.facts]
    known = tracing.known(model, asked)
    wanted = TraceSettings(draws=settings.draws, seed=settings.seed, window=preset.window)
    traces = tracing.trace_facts(model, known, runs(model, "localisation"), wanted, progress=progress(4))
    mean = average(traces, seed=settings.seed)
    figures.write(figures.role_lines(mean), FIGURES / "organism" / "localisation" / short_name(model))
    scored = evaluate(
        model,
        known[: settings.edited],
        runs(model, "localisation-edits"),
        EvaluateSettings(health=False, seed=settings.seed),
        "rome",
        replace(preset.rome, guard="warn"),
    )
    after = scored.table("after")
    return {
        "origin": provenance.origin(model),
        "known": len(known) / len(asked),
        "traced": mean.n,
        "total": mean.total.to_json(),
        "sites": {f"{TITLES[kind]}, {ROLES[role]}": best(mean, kind, role) for kind, role in SITES},
        "edits": {name: asdict(after[name]) for name in ("ES", "PS", "NS", "S")},
    }


def best(mean: Average, kind: str, role: str) -> dict[str, Any]:
    """The largest average indirect effect of a kind at a role, over layers; of the subject's states, before the last two layers."""
    layers = int(mean.indirect[kind].shape[0]) - (2 if kind == "resid" else 0)
    layer = max(range(layers), key=lambda each: mean.at(kind, each, role).mean)
    return {"layer": layer, "effect": mean.at(kind, layer, role).to_json()}


def table(found: dict[str, dict[str, Any]]) -> str:
    """One column a model."""

    def shown(values: dict[str, Any]) -> str:
        each = Mean(**{name: math.nan if value is None else value for name, value in values.items()})
        return f"{100 * each.mean:.1f} [{100 * each.low:.1f}, {100 * each.high:.1f}]"

    rows = {
        "facts known, of those asked": [f"{100 * each['known']:.1f} %" for each in found.values()],
        "traced": [str(each["traced"]) for each in found.values()],
        "total effect": [shown(each["total"]) for each in found.values()],
    }
    for site in next(iter(found.values()))["sites"]:
        cells = [each["sites"][site] for each in found.values()]
        rows[site] = [f"{shown(cell['effect'])} at layer {cell['layer']}" for cell in cells]
    for name in ("ES", "PS", "NS", "S"):
        rows[f"ROME, {name}"] = [shown(each["edits"][name]) for each in found.values()]
    lines = [["", *found], ["---"] * (1 + len(found)), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main(parse(Localisation))
