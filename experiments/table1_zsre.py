"""zsRE, one edit at a time.  python -m experiments.table1_zsre

Rows: no edit, the default, the published policy and constants, the controls C = identity and another layer for each question, and
other editors with their presets; efficacy, paraphrase and specificity are shares of the answer's tokens that the model puts first, drift
is at the unrelated question, with 95 % intervals over questions; under each row the unedited model on the same questions, and the paired
difference. On the organism the questions are of its own world. A killed run goes on, and `--rows` adds rows to the table that is there.
Rows of GPT-2 XL are the paper's own (Meng et al. 2022, Table 1), another model on 10,000 records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from experiments.common import parse, progress, say, write
from experiments.editing import (
    LESS,
    OPPONENTS,
    TRAINED,
    Row,
    corrected,
    costs,
    data,
    folder,
    gained,
    kept_rows,
    opponent,
    paired_of,
    published,
    there,
    write_table,
)
from mechedit import models, organism, sources
from mechedit.benchmarks.zsre import Question
from mechedit.editors import rome
from mechedit.runs.evaluating import evaluate
from mechedit.settings import EvaluateSettings

COLUMNS = ("efficacy", "paraphrase", "specificity", "answer", "drift", "drift_log_p")
ROWS = ("no edit", "default", "published", "identity", "random layer", *OPPONENTS, *TRAINED)
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
    facts: int = 150
    control_facts: int = 60
    opponent_facts: int = 60
    rows: tuple[str, ...] = ROWS
    seed: int = 0
    threads: int = 2


def questions(model: str, begin: int, n: int) -> list[Question]:
    """`n` questions from `begin` on."""
    return list(sources.questions("organism" if model in organism.MODELS else data("zsre.json"))[begin : begin + n])


def main(settings: Table1) -> None:
    if unknown := set(settings.rows) - set(ROWS):
        raise SystemExit(f"rows are {', '.join(ROWS)}; found {', '.join(sorted(unknown))}.")
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = questions(settings.model, settings.begin, max(settings.unedited, settings.facts))
    default = replace(rome.resolve(model), guard="warn")  # nothing is refused, so that methods are compared
    file = "table1_zsre" if settings.begin == 0 else f"table1_zsre_from{settings.begin}"
    kept = kept_rows(model, file, settings)
    rows = {name: Row.from_json(each) for name, each in kept.get("rows", {}).items()}
    wanted = {
        "no edit": (settings.unedited, None, None),
        "default": (settings.facts, "rome", default),
        "published": (settings.facts, "rome", published(default)),
        "identity": (settings.control_facts, "rome-identity", default),
        "random layer": (settings.control_facts, "rome-random-layer", replace(default, seed=settings.seed)),
        **{
            name: (settings.opponent_facts, *opponent(model, name, settings.seed))
            for name in there(model, (*OPPONENTS, *TRAINED))
            if name in {*settings.rows, *rows}
        },
    }
    gains = {name: paired_of(own) for name, own in kept.get("paired", {}).get(LESS, {}).items()}
    for name in there(model, settings.rows):
        n, editor, edit = wanted[name]
        run = EvaluateSettings(health=False, seed=settings.seed)
        place = folder(model, "table1", settings.begin, name)
        found = evaluate(model, chosen[:n], place, run, editor, edit, progress=progress(10))
        rows[name] = Row.of(found)
        if editor:
            gains[name] = gained(found, COLUMNS)
        shown = rows[name].scores
        say(
            f"{name}, {len(chosen[:n])} questions: {', '.join(f'{key} {shown[key]}' for key in COLUMNS if key in shown)}"
        )
        rows, gains = ({row: each[row] for row in ROWS if row in each} for each in (rows, gains))
        differences = corrected({LESS: gains})
        spent = costs(
            model, {row: (editor, edit) for row, (_, editor, edit) in wanted.items() if row in rows and editor}
        )
        result = {
            "rows": {row: each.to_json() for row, each in rows.items()},
            "paired": differences,
            "costs": spent,
        }
        say(f"wrote {write(file, model, replace(settings, rows=tuple(rows)), result)}")
        say(f"wrote {write_table(model, file, COLUMNS, rows, differences, PAPER, spent)}")


if __name__ == "__main__":
    main(parse(Table1))
