"""COUNTERFACT, one edit at a time, beside its controls.  python -m experiments.table4_counterfact

Rows, each with ES, PS, NS, S and their magnitudes, and 95 % intervals over facts; under each the unedited model on the same
records, and the paired difference, with p corrected for the number of comparisons:
- no edit; the default; the published policy and constants;
- controls: C = identity, another layer for each fact, a random key in place of k*;
- the default at the layers around the causal trace's peak;
- with `--rows text --text FILE`, the default with C estimated on that text, in place of text sampled from the model.

On the organism the facts are of its own world. Edits and scores are kept in out/ as soon as they are found, so a killed run
goes on. Rows of GPT-2 XL are the paper's own (Meng et al. 2022, Table 4), another model on 7,500 records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, progress, say, write
from experiments.editing import LESS, Row, benchmark_facts, compared, corrected, folder, gained, published, write_table
from mechedit import models, moments
from mechedit.benchmarks.metrics import SUCCESSES
from mechedit.editors import rome
from mechedit.facts import Fact
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation
from mechedit.settings import EvaluateSettings, RomeSettings

COLUMNS = ("S", "ES", "EM", "PS", "PM", "NS", "NM")
PAPER = (
    ("GPT-2 XL, no edit (paper)", "7500", "30.5", "22.2", "-4.8", "24.7", "-5.0", "78.1", "5.0"),
    ("GPT-2 XL, ROME (paper)", "7500", "89.2", "100.0", "97.9", "96.4", "62.7", "75.4", "4.2"),
)
ROWS = ("no edit", "default", "published", "identity", "random layer", "random key", "layers")


@dataclass(frozen=True)
class Table4:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    unedited: int = 1000  # facts of the row without edits
    facts: int = 150  # of the default and the published row
    control_facts: int = 60  # of the controls and the layers
    layers: tuple[int, ...] = (3, 4, 5, 6, 7)  # of the row "layers": around the peak of Gemma's average trace
    rows: tuple[str, ...] = ROWS
    text: Path = Path()  # of the row "text": WikiText, say
    seed: int = 0
    threads: int = 2


def main(settings: Table4) -> None:
    if unknown := set(settings.rows) - {*ROWS, "text"}:
        raise SystemExit(f"rows are {', '.join(ROWS)} and text; found {', '.join(sorted(unknown))}.")
    if "text" in settings.rows and not settings.text.is_file():
        raise SystemExit(f"the row text needs --text FILE; found {settings.text}.")
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = benchmark_facts(settings.model, settings.begin, max(settings.unedited, settings.facts))
    default = replace(rome.resolve(model), guard="warn")  # nothing is refused, so that methods are compared
    drawn = replace(default, seed=settings.seed)  # of controls that draw something
    few, many = chosen[: settings.control_facts], chosen[: settings.facts]
    found: dict[str, Evaluation] = {}

    def row(
        name: str,
        facts: list[Fact],
        edit: RomeSettings | None,
        editor: str = "rome",
        edits: str = "",
        texts: Sequence[Path] = (),
    ) -> None:
        wanted = EvaluateSettings(health=False, seed=settings.seed)
        prepared = None
        if edit and texts:
            moment = moments.estimate(model, edit.layer, texts, progress=progress())
            prepared = rome.prepare(model, edit, moment)
        place = folder(model, "table4", settings.begin, name)
        edits_in = folder(model, "table4", settings.begin, edits or name) / "edits"
        found[name] = evaluate(model, facts, place, wanted, editor if edit else None, edit, prepared, edits_in=edits_in, progress=progress(10))  # fmt: skip
        shown = found[name].table("after" if edit else "before")
        say(f"{name}, {len(facts)} facts: {', '.join(f'{key} {shown[key]}' for key in (*SUCCESSES, 'S'))}")

    def layers() -> None:
        for layer in settings.layers:
            row(f"layer {layer}", few, replace(default, layer=layer), edits="default" if layer == default.layer else "")

    every: dict[str, Callable[[], None]] = {
        "no edit": lambda: row("no edit", chosen[: settings.unedited], None),
        "default": lambda: row("default", many, default),
        "published": lambda: row("published", many, published(default)),
        "identity": lambda: row("identity", few, default, "rome-identity"),
        "random layer": lambda: row("random layer", few, drawn, "rome-random-layer"),
        "random key": lambda: row("random key", few, drawn, "rome-random-key"),
        "layers": layers,
        "text": lambda: row("C of the text", few, default, texts=[settings.text]),
    }
    for name in settings.rows:
        every[name]()
    rows = {name: Row.of(each) for name, each in found.items()}
    edited = {name: each for name, each in found.items() if name != "no edit"}
    comparisons = {LESS: {name: gained(each, COLUMNS) for name, each in edited.items()}}
    if "default" in found:
        others = {name: each for name, each in edited.items() if name != "default"}
        comparisons["less the default"] = {name: compared(found["default"], each, (*SUCCESSES, "S")) for name, each in others.items()}  # fmt: skip
    differences = corrected(comparisons)
    result: dict[str, Any] = {"rows": {name: each.to_json() for name, each in rows.items()}, "paired": differences, "edit": vars(default)}  # fmt: skip
    file = "table4_counterfact" if settings.begin == 0 else f"table4_counterfact_from{settings.begin}"
    say(f"wrote {write(file, model, settings, result)}")
    say(f"wrote {write_table(model, file, COLUMNS, rows, differences, PAPER)}")


if __name__ == "__main__":
    main(parse(Table4))
