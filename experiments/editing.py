"""What experiments on editing share: benchmark rows, settings of rows of a table, and tables as text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.common import FIGURES, runs, short_name
from mechedit import applying, cache, editors, models, moments, organism, provenance, sources, statistics, writing
from mechedit.benchmarks import counterfact, metrics
from mechedit.editors.trained.state import shipped
from mechedit.edits import Edit
from mechedit.facts import Fact
from mechedit.moments import Moment
from mechedit.progress import Progress, silent
from mechedit.runs.results import Evaluation
from mechedit.settings import CONSTANTS, POLICIES, PREFIXES, MomentSettings, RomeSettings
from mechedit.statistics import Mean, Paired

NUMBERS = ("relative_norm", "divisor_share", "essence_kl", "perplexity_ratio")
LESS = "less the unedited model"
LESS_DEFAULT = "less the default"
DRIFTS = ("drift", "drift_log_p")  # from the unedited model, in which they are 0
OPPONENTS = ("ft", "ft-l", "attention-edit", "kn", "told")
TRAINED = tuple(f"{editor}{variant}" for editor in ("mend", "ke") for variant in ("", "-set", "-zsre", "-cf"))
"""Rows of editors that are trained: on text, and on sets of facts."""


def data(name: str) -> Path:
    """A published data file: in MECHEDIT_DATA, or in ../shared/data beside the project."""
    return Path(os.environ.get("MECHEDIT_DATA", Path(__file__).parents[2] / "shared" / "data")) / name


def benchmark_facts(model: str, begin: int, n: int) -> list[Fact]:
    """`n` facts from `begin` on: of the organism's world for an organism, else of the flat COUNTERFACT file."""
    chosen = sources.named("organism" if model in organism.MODELS else data("counterfact_flat.json"))
    return list(chosen[begin : begin + n])


def also_of(model: models.HookedModel, settings: RomeSettings, texts: Sequence[Path], progress: Progress = silent, times: int = 1) -> Moment:  # fmt: skip
    """C of text sampled from the model and of so many times as many keys of each of these texts."""
    windows = MomentSettings(prepend_bos=settings.prepend_bos)
    own = moments.estimate(model, settings.layer, settings=windows, progress=progress)
    more = [moments.estimate(model, settings.layer, [text], replace(windows, tokens=times * own.keys), progress=progress) for text in texts]  # fmt: skip
    return moments.merge([own, *more])


def stated(fact: Fact) -> str:
    """The fact as a sentence."""
    return "".join(writing.seam(fact.prompt, str(fact.target_true), fact.join)) + "."


def statements(model: models.HookedModel, edited: Sequence[Fact], others: Sequence[Fact]) -> Path:
    """A file in out/MODEL of what is true of others, without those that stand in a prompt of facts that are edited."""
    asked = " ".join(prompt for fact in edited for prompt in (fact.prompt, *fact.paraphrases, *fact.neighbours))
    text = "\n".join(stated(fact) for fact in others if fact.subject not in asked)
    path = runs(model, "statements") / f"{cache.content_key(text)}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def published(default: RomeSettings) -> RomeSettings:
    """The published policy, constants and prefixes at the default's layer; what is out of its bands is kept."""
    fields: dict[str, Any] = POLICIES["published"] | CONSTANTS["published"]
    return replace(default, prefixes=PREFIXES["published"], guard="warn", **fields)


def opponent(model: models.HookedModel, name: str, seed: int) -> tuple[str, Any]:
    """An editor that is no ROME, with its preset for the model; what is out of its bands is kept."""
    editor = editors.named(name.partition("-")[0] if name in TRAINED else name)
    own = editor.settings(checkpoint=checkpoint(model, name)) if name in TRAINED else None
    return editor.name, replace(editor.resolve(model, own), guard="warn", seed=seed)


def checkpoint(model: models.HookedModel, name: str) -> str:
    """The network of a trained editor's row: in out/MODEL/trained/NAME, or one that ships; empty where there is none."""
    editor, _, variant = name.partition("-")
    own = runs(model, "trained") / name
    if (own / f"{editor}.safetensors").is_file():
        return os.path.relpath(own)
    return (variant or "generic") if (variant or "generic") in shipped(model, editor) else ""


def there(model: models.HookedModel, names: Sequence[str]) -> list[str]:
    """The rows, without those of trained editors whose network is not there."""
    return [name for name in names if name not in TRAINED or checkpoint(model, name)]


def swapped(fact: Fact) -> Fact:
    """The fact with its true answer in the new one's place: where the model knows it, it is as if edited by whoever trained it. Its
    neighbours, whose answer is the same, are left out."""
    return replace(fact, target_new=fact.target_true, target_true=fact.target_new, target_new_id=None, neighbours=(), neighbour_answers=(), id=f"{fact.id} swapped")  # fmt: skip


def success_of(model: models.HookedModel, fact: Fact, edit: Edit) -> dict[str, float]:
    """The fact's scores on the edited model, with the numbers of the edit."""
    with applying.edited(model, edit):
        (found,) = counterfact.scores(model, [fact])
    return (
        found | {name: edit.report.get(name, float("nan")) for name in NUMBERS} | {"edited": float(not edit.is_empty)}
    )


def folder(model: models.HookedModel, table: str, begin: int, row: str) -> Path:
    """Where a row of a table keeps its run."""
    return runs(model, f"{table}-from{begin}") / row.replace(" ", "-")


def costs(model: models.HookedModel, rows: Mapping[str, tuple[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds and peak memory (bytes beside the model) of an edit, of rows whose editor `benchmark_editors` measured with the row's own
    settings; rows are an editor's name and its settings, by name."""
    path = FIGURES / short_name(model) / "benchmark_editors.json"
    record = json.loads(path.read_text()) if path.is_file() else {"origin": {}, "editors": {}}
    if record["origin"].get("weights") != provenance.origin(model)["weights"]:
        return {}
    found = {}
    for row, (editor, edit) in rows.items():
        measured = record["editors"].get(row) or record["editors"].get(editor)
        if measured and measured["edit"] == cache.plain(asdict(edit)):
            found[row] = {name: measured[name] for name in ("seconds", "peak")}
    return found


def compared(first: Evaluation, second: Evaluation, names: Sequence[str]) -> dict[str, Paired]:
    """Second less first after their edits, over the facts that both have."""
    own = {fact["id"]: row for fact, row in zip(first.facts, first.rows["after"], strict=True)}
    pairs = [(own[fact["id"]], row) for fact, row in zip(second.facts, second.rows["after"], strict=True) if fact["id"] in own]  # fmt: skip
    return among(names, metrics.differences(*zip(*pairs, strict=True)))


def gained(found: Evaluation, names: Sequence[str]) -> dict[str, Paired]:
    """What edits change: each record after its edit less the same record before it."""
    before = [row | {name: 0.0 for name in DRIFTS if name in after} for row, after in zip(found.rows["before"], found.rows["after"], strict=True)]  # fmt: skip
    return among(names, metrics.differences(before, found.rows["after"]))


def less_default(found: Mapping[str, Evaluation], names: Sequence[str]) -> dict[str, dict[str, Paired]]:
    """Each evaluation less the one called "default", by name; nothing where there is none."""
    others = {name: each for name, each in found.items() if name != "default" and "default" in found}
    return {name: compared(found["default"], each, names) for name, each in others.items()}


def among(names: Sequence[str], found: dict[str, Paired]) -> dict[str, Paired]:
    """Those of these names that any record has."""
    return {name: found[name] for name in names if name in found and found[name].difference.n}


def corrected(comparisons: dict[str, dict[str, dict[str, Paired]]]) -> dict[str, Any]:
    """Comparisons as JSON: of each [kind][row][number] the difference, p, and p corrected for the number of them all (Holm)."""
    every = [(kind, row, name, each) for kind, rows in comparisons.items() for row, own in rows.items() for name, each in own.items()]  # fmt: skip
    found: dict[str, Any] = {"comparisons": len(every)}
    for (kind, row, name, each), p in zip(every, statistics.holm([each.p for *_, each in every]), strict=True):
        own = found.setdefault(kind, {}).setdefault(row, {})
        own[name] = {
            "difference": each.difference.to_json(),
            "p": each.p,
            "p_corrected": p,
            "could_see": None if each.could_see != each.could_see else each.could_see,
        }
    return found


def paired_of(record: dict[str, Any]) -> dict[str, Paired]:
    """Of a row what `corrected` made JSON of."""
    return {
        name: Paired(
            Mean(**_nans(each["difference"])),
            each["p"],
            float("nan") if each.get("could_see") is None else each["could_see"],
        )
        for name, each in record.items()
    }


@dataclass(frozen=True)
class Row:
    """A row of a table: a method's scores, and those of the unedited model on the same records (none where nothing is edited)."""

    scores: dict[str, Mean]
    unedited: dict[str, Mean]

    @classmethod
    def of(cls, found: Evaluation) -> Row:
        """The last stage of an evaluation, and the first where that is another."""
        stages = list(found.rows)
        return cls(found.table(stages[-1]), found.table(stages[0]) if len(stages) > 1 else {})

    def to_json(self) -> dict[str, Any]:
        """As JSON values, what no fact has left out."""
        return {"scores": plain(self.scores), "unedited": plain(self.unedited)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Row:
        """What `to_json` gave."""
        return cls(*({name: Mean(**_nans(each)) for name, each in record[part].items()} for part in ("scores", "unedited")))  # fmt: skip


def _nans(record: dict[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if value is None else value for name, value in record.items()}


def write_table(model: models.HookedModel, name: str, names: Sequence[str], rows: dict[str, Row], differences: dict[str, Any], below: Sequence[Sequence[str]], spent: Mapping[str, Mapping[str, float]]) -> Path:  # fmt: skip
    """The table as Markdown beside its JSON, in percent with intervals: under each method the unedited model on the same records, the
    paired differences from it and from the default, and the smallest from it that could have been seen; then the lines `below`, as they
    are. A column that no row has is left out. `differences` is what `corrected` gave, `spent` what `costs` gave."""
    given = max((len(line) - 2 for line in below), default=0)  # columns that the lines below have
    names = [each for at, each in enumerate(names) if at < given or any(each in row.scores for row in rows.values())]
    more = ["s an edit", "MB an edit"] if spent else []
    lines = [["", "n", *names, *more], ["---"] * (len(names) + 2 + len(more))]
    for row, found in rows.items():
        less = [paired_of(differences.get(each, {}).get(row, {})) for each in (LESS, LESS_DEFAULT)]
        own, other = ({each: value.difference for each, value in pairs.items()} for pairs in less)
        parts = [(row, found.scores), ("unedited, same records", found.unedited), ("difference", own), (LESS_DEFAULT, other)]  # fmt: skip
        for title, means in parts:
            if means:
                cost = [f"{spent[row]['seconds']:.2f}", f"{spent[row]['peak'] / 1e6:.0f}"] if title == row in spent else []  # fmt: skip
                lines.append([title, *_cells(names, means), *cost])
        if seen := {each: Mean(value.could_see, math.nan, math.nan, 1) for each, value in less[0].items() if value.could_see > 0}:  # fmt: skip
            lines.append(["could see", "", *_cells(names, seen)[1:]])
    text = "\n".join(
        "| " + " | ".join(line) + " |"
        for line in ([*line, *[""] * (len(lines[0]) - len(line))] for line in [*lines, *below])
    )
    said = {
        f"{row}: {each}" for row, own in differences.get(LESS, {}).items() for each, value in own.items() if value["p_corrected"] > 0.05
    }  # fmt: skip
    note = (
        f"In percent, with 95 % intervals over facts. Differences are paired, record by record; of the table's {differences.get('comparisons', 0)} "
        f"comparisons, corrected for their number (Holm), those with p > 0.05 to the unedited model: {', '.join(sorted(said)) or 'none'}. "
        "p is of random signs; an interval also allows for values that so many records may have missed, and can hold 0 where p is small; "
        "drift, a divergence, is never below 0, so that its p says nothing."
    )
    path = FIGURES / short_name(model) / f"{name}.md"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n\n{note}\n")
    return path


def _cells(names: Sequence[str], means: Mapping[str, Mean]) -> list[str]:
    """How many records a row has, and its numbers, each with how many it has where that is not as many."""
    most = max(each.n for each in means.values())
    return [str(most), *(metrics.metric(each).shown(means[each], most) if each in means else "" for each in names)]


def kept_rows(model: models.HookedModel, name: str, settings: Any) -> dict[str, Any]:
    """The table that is in figures/, where all but `rows` and `threads` is as it was; else nothing."""
    path = FIGURES / short_name(model) / f"{name}.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    now = {"settings": asdict(settings), "origin": provenance.origin(model), "versions": provenance.versions()}
    for each in (record["settings"], now["settings"]):
        del each["rows"], each["threads"]
    return {} if any(record[part] != now[part] for part in now) else dict(record)


def plain(table: dict[str, Mean]) -> dict[str, Any]:
    """A table as JSON values, what no fact has left out."""
    return {name: each.to_json() for name, each in table.items() if each.n}
