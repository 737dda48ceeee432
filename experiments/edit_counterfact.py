"""ROME on COUNTERFACT, one fact at a time, beside its controls.  python -m experiments.edit_counterfact

Rows of the table, each with ES, PS, NS, S and bootstrap intervals over facts:
- no edit; the default; the published policy and constants;
- controls: C = identity, a random layer for each fact, a random key in place of k* (written with the default's v*);
- the default at the layers around the causal trace's peak.

Each edit is kept in out/ as soon as it is found, so a killed run goes on. `--begin` chooses other rows of the file, to tune on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, progress, runs, say, write
from experiments.editing import counterfact_facts, success_of
from mechedit import keys, models, moments, rank_one
from mechedit.benchmarks import counterfact, metrics
from mechedit.corruption import generator
from mechedit.editors import rome
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.moments import Moment
from mechedit.runs.editing import edit_facts
from mechedit.settings import CONSTANTS, PREFIXES, RomeSettings


@dataclass(frozen=True)
class EditCounterfact:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    facts: int = 150  # of the main rows
    control_facts: int = 60  # of the controls and the layers
    around: int = 2  # layers on each side of the preset's
    rows: tuple[str, ...] = ("no edit", "default", "published", "identity", "random layer", "random key", "layers")
    seed: int = 0
    threads: int = 2


def folder(model: models.HookedModel, begin: int, name: str) -> Path:
    """Where the edits of a row of the table are kept."""
    return runs(model, f"counterfact{begin}-{name.replace(' ', '-')}")


def published(default: RomeSettings) -> RomeSettings:
    """The published policy, constants and prefixes at the default's layer; what is out of its bands is kept."""
    constants: dict[str, Any] = CONSTANTS["published"]
    return replace(default, policy="published", prefixes=PREFIXES["published"], guard="warn", **constants)


def identity(moment: Moment) -> Moment:
    """C = I, as if every direction of keys were as common."""
    return replace(moment, C=torch.eye(len(moment.C), dtype=torch.float64), cond=1.0, source="identity")


def at_random_key(model: models.HookedModel, edit: Edit, fact: Fact, moment: Moment, seed: int) -> Edit:
    """The edit's v*, written at a random key of the length of k* instead."""
    (change,) = edit.changes
    weight, bias = models.W_out(model, edit.layer).detach(), models.b_out(model, edit.layer)
    rows = keys.contexts(model, fact, tuple(edit.details["prefixes"]), prepend_bos=edit.settings["prepend_bos"])
    key = keys.subject_keys(model, edit.layer, rows).mean(0).double()
    value = key @ weight.double() + bias.double() + change.step * float(change.u @ key)
    other = torch.randn(len(key), generator=generator(seed, "random key", fact.prompt), dtype=torch.float64)
    other *= key.norm() / other.norm()
    return replace(edit, changes=(rank_one.solve(edit.layer, weight, bias, other, value, moment.C),))


def main(settings: EditCounterfact) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = counterfact_facts(settings.begin, settings.facts)
    few = chosen[: settings.control_facts]
    default = replace(rome.resolve(model), guard="rollback")
    near = range(
        max(0, default.layer - settings.around), min(int(model.cfg.n_layers), default.layer + settings.around + 1)
    )
    numbers = random.Random(settings.seed)  # noqa: S311 (a sample)
    anywhere = [numbers.randrange(int(model.cfg.n_layers)) for _ in few]
    Cs = moments.estimate_layers(model, sorted({default.layer, *near, *anywhere}), progress=progress())
    C = Cs[default.layer]

    def edited(name: str, facts: Sequence[Fact], chosen: RomeSettings, moment: Moment) -> list[Edit]:
        return edit_facts(model, facts, folder(model, settings.begin, name), chosen, moment, progress=progress(10))

    result: dict[str, Any] = {"first_row": settings.begin}

    def row(name: str, scores: list[dict[str, float]]) -> None:
        found = metrics.table(scores, settings.seed)
        result[name] = {key: asdict(each) for key, each in found.items()}
        shown = ", ".join(f"{key} {found[key]}" for key in (*metrics.SUCCESSES, "S"))
        say(f"{name}, {len(scores)} facts: {shown}")

    def scored(facts: Sequence[Fact], found: Sequence[Edit]) -> list[dict[str, float]]:
        return [success_of(model, fact, edit) for fact, edit in zip(facts, found, strict=True)]

    if "no edit" in settings.rows:
        row("no edit", counterfact.scores(model, chosen))
        row("no edit, controls' facts", counterfact.scores(model, few))
    if "default" in settings.rows:
        row("default", scored(chosen, edited("default", chosen, default, C)))
    if "published" in settings.rows:
        row("published", scored(chosen, edited("published", chosen, published(default), C)))
    if "identity" in settings.rows:
        row("C = identity", scored(few, edited("identity", few, replace(default, guard="warn"), identity(C))))
    if "random layer" in settings.rows:
        found = [
            edited(f"layer{layer}", [fact], replace(default, layer=layer, guard="warn"), Cs[layer])[0]
            for fact, layer in zip(few, anywhere, strict=True)
        ]
        row("random layer", scored(few, found))
    if "random key" in settings.rows:
        made = [
            (fact, edit) for fact, edit in zip(few, edited("default", few, default, C), strict=True) if edit.changes
        ]
        row("random key", [success_of(model, fact, at_random_key(model, edit, fact, C, settings.seed)) for fact, edit in made])  # fmt: skip
    if "layers" in settings.rows:
        for layer in near:
            found = edited(f"layer{layer}", few, replace(default, layer=layer, guard="warn"), Cs[layer])
            row(f"layer {layer}", scored(few, found))
    name = "edit_counterfact" if settings.begin == 0 else f"edit_counterfact_from{settings.begin}"
    say(f"wrote {write(name, model, settings, {'rows': result})}")


if __name__ == "__main__":
    main(parse(EditCounterfact))
