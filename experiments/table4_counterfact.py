"""COUNTERFACT, one edit at a time, by every editor, beside controls.  python -m experiments.table4_counterfact

Rows, each with ES, PS, NS, S and their magnitudes, and 95 % intervals over facts; under each the unedited model on the same
records, and the paired difference, with p corrected for the number of comparisons:
- no edit; known: facts that the unedited model knows, their true answer in the new one's place, which is what generalisation looks
  like where nobody edited; the default; the published policy and constants;
- controls: C = identity, another layer for each fact, a random key in place of k*;
- the default at the layers around the causal trace's peak;
- other editors with their presets: ft, ft-l, attention-edit, kn, and told, the new fact in front of every prompt;
- editors that are trained, mend and ke, on text and on sets of facts (mend-set, …): each where its network ships or is in out/MODEL/trained/;
- with `--rows text --text FILE`, the default with C estimated on that text, in place of text sampled from the model.

On the organism the facts are of its own world. Edits and scores are kept in out/ as soon as they are found, so a killed run
goes on. Rows of GPT-2 XL are the paper's own (Meng et al. 2022, Table 4), another model on 7,500 records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, progress, say, write
from experiments.editing import (
    LESS,
    LESS_DEFAULT,
    OPPONENTS,
    TRAINED,
    Row,
    benchmark_facts,
    corrected,
    costs,
    folder,
    gained,
    less_default,
    opponent,
    published,
    swapped,
    there,
    write_table,
)
from mechedit import models, moments
from mechedit.benchmarks.metrics import SUCCESSES
from mechedit.editors import rome
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation
from mechedit.runs.tracing import known
from mechedit.settings import EvaluateSettings

COLUMNS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "answer", "N+", "SR", "drift", "drift_log_p")
PAPER = (
    ("GPT-2 XL, no edit (paper)", "7500", "30.5", "22.2", "-4.8", "24.7", "-5.0", "78.1", "5.0"),
    ("GPT-2 XL, FT (paper)", "7500", "65.1", "100.0", "98.8", "87.9", "46.6", "40.4", "-6.2"),
    ("GPT-2 XL, FT+L (paper)", "7500", "66.9", "99.1", "91.5", "48.7", "28.9", "70.3", "3.5"),
    ("GPT-2 XL, KN (paper)", "7500", "35.6", "28.7", "-3.4", "28.0", "-3.3", "72.9", "3.7"),
    ("GPT-2 XL, KE (paper)", "7500", "52.2", "84.3", "33.9", "75.4", "14.6", "30.9", "-11.0"),
    ("GPT-2 XL, KE-CF (paper)", "7500", "18.1", "99.9", "97.0", "95.8", "59.2", "6.9", "-63.2"),
    ("GPT-2 XL, MEND (paper)", "7500", "57.9", "99.1", "70.9", "65.4", "12.2", "37.9", "-11.6"),
    ("GPT-2 XL, MEND-CF (paper)", "7500", "14.9", "100.0", "99.2", "97.0", "65.6", "5.5", "-69.9"),
    ("GPT-2 XL, ROME (paper)", "7500", "89.2", "100.0", "97.9", "96.4", "62.7", "75.4", "4.2"),
)
CONTROLS = ("identity", "random layer", "random key", "layers")
ROWS = ("no edit", "known", "default", "published", *CONTROLS, *OPPONENTS, *TRAINED)


@dataclass(frozen=True)
class Table4:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    unedited: int = 1000  # facts of the row without edits
    known_among: int = 1000  # facts among which those of the row "known" are looked for
    facts: int = 150  # of the default and the published row
    control_facts: int = 60  # of the controls and the layers
    opponent_facts: int = 60  # of other editors
    layers: tuple[int, ...] = (3, 4, 5, 6, 7)  # of the row "layers": around the peak of Gemma's average trace
    rows: tuple[str, ...] = ROWS
    text: Path = Path()  # of the row "text": WikiText, say
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True)
class Wanted:
    """A row: its facts, and how they are edited, if they are; `edits` names another row whose edits it has."""

    name: str
    facts: Sequence[Fact]
    editor: str = ""
    edit: Any = None
    edits: str = ""
    texts: tuple[Path, ...] = ()


def wanted(settings: Table4, model: HookedModel) -> Iterator[Wanted]:
    """The rows of the table. Nothing is refused (`guard`), so that methods are compared."""
    chosen = benchmark_facts(
        settings.model, settings.begin, max(settings.unedited, settings.known_among, settings.facts)
    )
    many, few = chosen[: settings.facts], chosen[: settings.control_facts]
    default = replace(rome.resolve(model), guard="warn")
    drawn = replace(default, seed=settings.seed)  # of controls that draw something
    for name in there(model, settings.rows):
        match name:
            case "no edit":
                yield Wanted(name, chosen[: settings.unedited])
            case "known":
                yield Wanted(name, [swapped(fact) for fact in known(model, chosen[: settings.known_among])])
            case "default":
                yield Wanted(name, many, "rome", default)
            case "published":
                yield Wanted(name, many, "rome", published(default))
            case "identity":
                yield Wanted(name, few, "rome-identity", default)
            case "random layer" | "random key":
                yield Wanted(name, few, f"rome-{name.replace(' ', '-')}", drawn)
            case "layers":
                for layer in settings.layers:
                    same = "default" if layer == default.layer else ""
                    yield Wanted(f"layer {layer}", few, "rome", replace(default, layer=layer), same)
            case "text":
                yield Wanted("C of the text", few, "rome", default, texts=(settings.text,))
            case _:
                yield Wanted(name, chosen[: settings.opponent_facts], *opponent(model, name, settings.seed))


def evaluated(settings: Table4, model: HookedModel, row: Wanted) -> Evaluation:
    """The row's scores, from out/ as far as they are there."""
    prepared = None
    if row.texts:
        moment = moments.estimate(model, row.edit.layer, row.texts, progress=progress())
        prepared = rome.prepare(model, row.edit, moment)
    place, run = folder(model, "table4", settings.begin, row.name), EvaluateSettings(health=False, seed=settings.seed)
    found = evaluate(model, row.facts, place, run, row.editor or None, row.edit, prepared, edits_in=edits_of(settings, model, row), progress=progress(10))  # fmt: skip
    shown = found.table("after" if row.editor else "before")
    say(f"{row.name}, {len(row.facts)} facts: {', '.join(f'{key} {shown[key]}' for key in (*SUCCESSES, 'S') if key in shown)}")  # fmt: skip
    return found


def edits_of(settings: Table4, model: HookedModel, row: Wanted) -> Path:
    """Where the row's edits are kept."""
    return folder(model, "table4", settings.begin, row.edits or row.name) / "edits"


def main(settings: Table4) -> None:
    if unknown := set(settings.rows) - {*ROWS, "text"}:
        raise SystemExit(f"rows are {', '.join(ROWS)} and text; found {', '.join(sorted(unknown))}.")
    if "text" in settings.rows and not settings.text.is_file():
        raise SystemExit(f"the row text needs --text FILE; found {settings.text}.")
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    default = rome.resolve(model)
    every = [row for row in wanted(settings, model) if row.facts]  # a model may know none
    found = {row.name: evaluated(settings, model, row) for row in every}
    spent = costs(model, {row.name: (row.editor, row.edit) for row in every if row.editor})
    rows = {name: Row.of(each) for name, each in found.items()}
    edited = {name: each for name, each in found.items() if name not in ("no edit", "known")}
    comparisons = {LESS: {name: gained(each, COLUMNS) for name, each in edited.items()}}
    comparisons[LESS_DEFAULT] = less_default(edited, COLUMNS)
    differences = corrected(comparisons)
    result: dict[str, Any] = {"rows": {name: each.to_json() for name, each in rows.items()}, "paired": differences, "edit": vars(default), "costs": spent}  # fmt: skip
    file = "table4_counterfact" if settings.begin == 0 else f"table4_counterfact_from{settings.begin}"
    say(f"wrote {write(file, model, settings, result)}")
    say(f"wrote {write_table(model, file, COLUMNS, rows, differences, PAPER, spent)}")


if __name__ == "__main__":
    main(parse(Table4))
