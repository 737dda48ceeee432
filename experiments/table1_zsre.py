"""zsRE, one edit at a time.  python -m experiments.table1_zsre

Rows: no edit; known, questions that the unedited model answers, their true answer in the new one's place; the default, the published
policy and constants, the controls C = identity and another layer for each question, and other editors with their presets. Efficacy,
paraphrase and specificity are shares of the answer's tokens that the model puts first, drift is at the unrelated question, with 95 %
intervals over questions; under each row the unedited model on the same questions, and the paired differences from it and from the
default. On the organism the questions are of its own world. A killed run goes on, and `--rows` adds rows to the table that is there.
Rows of GPT-2 XL are the paper's own (Meng et al. 2022, Table 1), another model on 10,000 records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.common import parse, progress, say, write
from experiments.editing import (
    LESS,
    LESS_DEFAULT,
    OPPONENTS,
    TRAINED,
    Row,
    corrected,
    costs,
    data,
    folder,
    gained,
    kept_rows,
    less_default,
    opponent,
    paired_of,
    published,
    swapped,
    there,
    write_table,
)
from mechedit import models, organism, sources
from mechedit.benchmarks.zsre import Question
from mechedit.editors import rome
from mechedit.models import HookedModel
from mechedit.runs.evaluating import evaluate
from mechedit.runs.results import Evaluation
from mechedit.runs.tracing import known
from mechedit.settings import EvaluateSettings
from mechedit.statistics import Paired

COLUMNS = ("efficacy", "paraphrase", "specificity", "answer", "drift", "drift_log_p")
ROWS = ("no edit", "known", "default", "published", "identity", "random layer", *OPPONENTS, *TRAINED)
PAPER = (
    ("GPT-2 XL, no edit (paper)", "10000", "22.2", "21.3", "24.2"),
    ("GPT-2 XL, FT (paper)", "10000", "99.6", "82.1", "23.2"),
    ("GPT-2 XL, FT+L (paper)", "10000", "92.3", "47.2", "23.4"),
    ("GPT-2 XL, KE (paper)", "10000", "65.5", "61.4", "24.9"),
    ("GPT-2 XL, KE-zsRE (paper)", "10000", "92.4", "90.0", "23.8"),
    ("GPT-2 XL, MEND (paper)", "10000", "75.9", "65.3", "24.1"),
    ("GPT-2 XL, MEND-zsRE (paper)", "10000", "99.4", "99.3", "24.1"),
    ("GPT-2 XL, ROME (paper)", "10000", "99.8", "88.1", "24.2"),
)


@dataclass(frozen=True)
class Table1:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    unedited: int = 1000
    known_among: int = 1000  # questions among which those of the row "known" are looked for
    facts: int = 150
    control_facts: int = 60
    opponent_facts: int = 60
    rows: tuple[str, ...] = ROWS
    seed: int = 0
    threads: int = 2


def questions(model: str, begin: int, n: int) -> list[Question]:
    """`n` questions from `begin` on."""
    return list(sources.questions("organism" if model in organism.MODELS else data("zsre.json"))[begin : begin + n])


def wanted(settings: Table1, model: HookedModel) -> Iterator[tuple[str, Sequence[Question], str | None, Any]]:
    """The rows of the table: their questions, and how they are edited, if they are. Nothing is refused (`guard`), so that methods are
    compared."""
    chosen = questions(settings.model, settings.begin, max(settings.unedited, settings.known_among, settings.facts))
    default = replace(rome.resolve(model), guard="warn")
    many, few = chosen[: settings.facts], chosen[: settings.control_facts]
    for name in sorted(set(there(model, settings.rows)), key=ROWS.index):
        match name:
            case "no edit":
                yield name, chosen[: settings.unedited], None, None
            case "known":
                among = {each.fact: each for each in chosen[: settings.known_among]}
                yield name, [replace(among[fact], fact=swapped(fact)) for fact in known(model, list(among))], None, None
            case "default":
                yield name, many, "rome", default
            case "published":
                yield name, many, "rome", published(default)
            case "identity":
                yield name, few, "rome-identity", default
            case "random layer":
                yield name, few, "rome-random-layer", replace(default, seed=settings.seed)
            case _:
                yield name, chosen[: settings.opponent_facts], *opponent(model, name, settings.seed)


def main(settings: Table1) -> None:
    if unknown := set(settings.rows) - set(ROWS):
        raise SystemExit(f"rows are {', '.join(ROWS)}; found {', '.join(sorted(unknown))}.")
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    file = "table1_zsre" if settings.begin == 0 else f"table1_zsre_from{settings.begin}"
    kept = kept_rows(model, file, settings)
    rows = {name: Row.from_json(each) for name, each in kept.get("rows", {}).items()}
    comparisons = {
        kind: {name: paired_of(own) for name, own in kept.get("paired", {}).get(kind, {}).items()}
        for kind in (LESS, LESS_DEFAULT)
    }
    edited: dict[str, Evaluation] = {}
    spent = dict(kept.get("costs", {}))
    beside = ("default",) if "default" in rows and folder(model, "table1", settings.begin, "default").is_dir() else ()
    for name, some, editor, edit in wanted(replace(settings, rows=(*settings.rows, *beside)), model):
        if not some:  # a model may know none
            continue
        run = EvaluateSettings(health=False, seed=settings.seed)
        place = folder(model, "table1", settings.begin, name)
        found = evaluate(model, some, place, run, editor, edit, progress=progress(10))
        rows[name] = Row.of(found)
        if editor:
            edited[name] = found
            comparisons[LESS][name] = gained(found, COLUMNS)
            comparisons[LESS_DEFAULT].pop(name, None)  # of an earlier run of this row
            comparisons[LESS_DEFAULT] |= less_default(edited, COLUMNS)
            spent |= costs(model, {name: (editor, edit)})
        shown = rows[name].scores
        say(f"{name}, {len(some)} questions: {', '.join(f'{key} {shown[key]}' for key in COLUMNS if key in shown)}")
        keep(model, file, settings, rows, comparisons, spent)


def keep(model: HookedModel, file: str, settings: Table1, rows: dict[str, Row], comparisons: dict[str, dict[str, dict[str, Paired]]], spent: dict[str, dict[str, float]]) -> None:  # fmt: skip
    """Write the table as it is now, its rows in their order."""
    rows = {row: rows[row] for row in ROWS if row in rows}
    differences = corrected({kind: {row: own[row] for row in rows if row in own} for kind, own in comparisons.items()})
    result = {"rows": {row: each.to_json() for row, each in rows.items()}, "paired": differences, "costs": spent}
    say(f"wrote {write(file, model, replace(settings, rows=tuple(rows)), result)}")
    say(f"wrote {write_table(model, file, COLUMNS, rows, differences, PAPER, spent)}")


if __name__ == "__main__":
    main(parse(Table1))
