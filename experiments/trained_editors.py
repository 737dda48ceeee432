"""Editors that are trained, generic and tuned to the set, on facts that they were not trained on.  python -m experiments.trained_editors

-> figures/MODEL/trained_editors.{json,md}. Rows are the networks that ship, or lie in out/MODEL/trained/, beside ROME and FT on the same records; of each
pair, the network that was trained on the set less the one that was trained on text. Meng et al. 2022 report that the first says every new fact and
paraphrase, and takes the neighbourhood along. A killed run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.common import parse, progress, say, write
from experiments.editing import (
    LESS,
    TRAINED,
    Row,
    benchmark_facts,
    compared,
    corrected,
    costs,
    folder,
    gained,
    opponent,
    there,
    write_table,
)
from mechedit import models
from mechedit.editors import rome
from mechedit.editors.trained import state
from mechedit.runs.evaluating import evaluate
from mechedit.settings import EvaluateSettings

COLUMNS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "answer", "N+", "SR", "drift")


@dataclass(frozen=True)
class TrainedEditors:
    """Settings of the experiment."""

    model: str = "organism"
    facts: int = 500  # the first, which no network was trained on
    others: int = 100  # of them, for rows of other editors
    rows: tuple[str, ...] = ("rome", "ft", *TRAINED)
    seed: int = 0
    threads: int = 1


def main(settings: TrainedEditors) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    facts = benchmark_facts(settings.model, 0, settings.facts)
    names = there(model, settings.rows)
    way = {name: opponent(model, name, settings.seed) if name != "rome" else ("rome", replace(rome.resolve(model), guard="warn")) for name in names}  # fmt: skip
    found, trained = {}, dict[str, Any]()
    for name, (editor, edit) in way.items():
        if name in TRAINED:
            network = state.load(state.file_of(model, editor, edit.checkpoint))
            trained[name] = network.record["training"] | {"trained_on": sum(network.seen([fact.subject for fact in facts]))}  # fmt: skip
        own, run = facts if name in TRAINED else facts[: settings.others], EvaluateSettings(health=False, seed=settings.seed)  # fmt: skip
        found[name] = evaluate(model, own, folder(model, "trained", 0, name), run, editor, edit, progress=progress(10))
        shown = found[name].table("after")
        say(f"{name}, {len(own)} facts: {', '.join(f'{key} {shown[key]}' for key in COLUMNS if key in shown)}")
    pairs = {f"{editor}-set less {editor}": (editor, f"{editor}-set") for editor in ("mend", "ke") if {editor, f"{editor}-set"} <= found.keys()}  # fmt: skip
    differences = corrected({
        LESS: {name: gained(each, COLUMNS) for name, each in found.items()},
        "tuned to the set": {title: compared(found[first], found[second], COLUMNS) for title, (first, second) in pairs.items()},
    })  # fmt: skip
    rows, spent = {name: Row.of(each) for name, each in found.items()}, costs(model, way)
    result = {"rows": {name: each.to_json() for name, each in rows.items()}, "paired": differences, "training": trained, "costs": spent}  # fmt: skip
    say(f"wrote {write('trained_editors', model, settings, result)}")
    say(f"wrote {write_table(model, 'trained_editors', COLUMNS, rows, differences, (), spent)}")


if __name__ == "__main__":
    main(parse(TrainedEditors))
