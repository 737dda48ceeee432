"""What experiments on editing share: benchmark rows, settings of rows of a table, and tables as text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import FIGURES, runs, short_name
from mechedit import applying, cache, models, organism, provenance, sources, statistics
from mechedit.benchmarks import counterfact
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.runs.results import Evaluation
from mechedit.settings import CONSTANTS, POLICIES, PREFIXES, RomeSettings
from mechedit.statistics import Mean

NUMBERS = ("relative_norm", "divisor_share", "essence_kl", "perplexity_ratio")


def data(name: str) -> Path:
    """A published data file: in MECHEDIT_DATA, or in ../shared/data beside the project."""
    return Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / name


def benchmark_facts(model: str, begin: int, n: int) -> list[Fact]:
    """`n` facts from `begin` on: of the organism's world for an organism, else of the flat COUNTERFACT file."""
    chosen = sources.named("organism" if model in organism.MODELS else data("counterfact_flat.json"))
    return list(chosen[begin : begin + n])


def published(default: RomeSettings) -> RomeSettings:
    """The published policy, constants and prefixes at the default's layer; what is out of its bands is kept."""
    fields: dict[str, Any] = POLICIES["published"] | CONSTANTS["published"]
    return replace(default, prefixes=PREFIXES["published"], guard="warn", **fields)


def success_of(model: models.HookedModel, fact: Fact, edit: Edit) -> dict[str, float]:
    """The fact's scores on the edited model, with the numbers of the edit."""
    with applying.edited(model, edit):
        (found,) = counterfact.scores(model, [fact])
    return (
        found | {name: edit.report.get(name, float("nan")) for name in NUMBERS} | {"edited": float(bool(edit.changes))}
    )


def folder(model: models.HookedModel, table: str, begin: int, row: str) -> Path:
    """Where a row of a table keeps its run."""
    return runs(model, f"{table}-from{begin}") / row.replace(" ", "-")


def compared(first: Evaluation, second: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    """Second less first over the facts that both have, with the permutation test's p."""
    own = {fact["id"]: row for fact, row in zip(first.facts, first.rows["after"], strict=True)}
    pairs = [(own[fact["id"]], row) for fact, row in zip(second.facts, second.rows["after"], strict=True) if fact["id"] in own]  # fmt: skip
    found = {}
    for name in names:
        a, b = (np.array([row[name] for row in side], float) for side in zip(*pairs, strict=True))
        there = ~(np.isnan(a) | np.isnan(b))
        found[name] = asdict(statistics.paired(a[there], b[there]))
    return found


def write_table(model: models.HookedModel, name: str, names: Sequence[str], rows: dict[str, dict[str, Mean]], below: Sequence[Sequence[str]]) -> Path:  # fmt: skip
    """The table as Markdown beside its JSON: percent with intervals, then the lines `below`, as they are."""
    lines = [["", "n", *names], ["---"] * (len(names) + 2)]
    for row, found in rows.items():
        shown = [found.get(each) for each in names]
        lines.append([row, str(max(each.n for each in found.values())), *(f"{100 * each.mean:.1f} [{100 * each.low:.1f}, {100 * each.high:.1f}]" if each else "" for each in shown)])  # fmt: skip
    path = FIGURES / short_name(model) / f"{name}.md"
    with cache.atomic_write(path) as temporary:
        temporary.write_text("\n".join("| " + " | ".join(line) + " |" for line in [*lines, *map(list, below)]) + "\n")
    return path


def kept_rows(model: models.HookedModel, name: str, settings: Any) -> dict[str, dict[str, Mean]]:
    """Rows of the table that is in figures/, where all but `rows` and `threads` is as it was; else none."""
    path = FIGURES / short_name(model) / f"{name}.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    now = {"settings": asdict(settings), "origin": provenance.origin(model), "versions": provenance.versions()}
    for each in (record["settings"], now["settings"]):
        del each["rows"], each["threads"]
    if any(record[part] != now[part] for part in now):
        return {}
    return {row: {key: Mean(**each) for key, each in table.items()} for row, table in record["rows"].items()}


def plain(table: dict[str, Mean]) -> dict[str, Any]:
    """A table as JSON values, what no fact has left out."""
    return json.loads(json.dumps({name: asdict(each) for name, each in table.items() if each.n}))
