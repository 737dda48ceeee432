"""What a page shows of an evaluation, or of two side by side: the table of means, every record's numbers, and what these are made of.

Records of two are matched by what they say, as `runs.comparing` does. A column is a result at a stage. Numbers of records, and their
prompts and texts by blocks of fifty, are compressed; the browser unpacks a block when a record of it is looked at. What a column has
in common with one before it (the unedited model's texts in both results) is that column's number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from mechedit.benchmarks.metrics import metric
from mechedit.cache import plain
from mechedit.runs.comparing import compare, places
from mechedit.runs.results import Evaluation
from mechedit.viewer.packing import Words, packed

__all__ = ["DETAILED", "of_evaluations"]

BLOCK = 50  # records whose prompts and texts are unpacked together
DETAILED = 2_000  # records whose prompts and texts are in a page; more would be slow to open
ABOUT = ("id", "subject", "prompt", "target_new", "target_true", "relation")


def of_evaluations(results: Sequence[Evaluation], names: Sequence[str] = ()) -> dict[str, Any]:
    """The page of one evaluation, or of several with common records.

    Raises:
        RunError: results of different benchmarks, or without a common record.
    """
    labels = _labels(results, names)
    compared = compare(results, labels) if len(results) > 1 else None
    keys = [places(each) for each in results]
    every = list(dict.fromkeys(key for own in keys for key in own))
    found = list(dict.fromkeys(name for each in results for name in each.names))
    columns = [{"result": index, "stage": stage} for index, each in enumerate(results) for stage in each.rows]
    records = [_about(results, keys, key) for key in every]
    return {
        "kind": "evaluation",
        "title": f"{' and '.join(dict.fromkeys(labels))}: {results[0].what['model']['name']}, {len(every)} record{'s' if len(every) != 1 else ''}",
        "name": "Evaluation" if len(results) == 1 else "Two evaluations",
        "model": str(results[0].what["model"]["name"]),
        "benchmark": str(results[0].what.get("benchmark", "")),
        "results": [_result(each, label) for each, label in zip(results, labels, strict=True)],
        "metrics": [asdict(each) | {"label": each.label, "scale": each.scale} for each in map(metric, found)],
        "columns": columns,
        "records": records,
        "numbers": packed(_numbers(results, keys, every, columns, found).tobytes()),
        "differences": [
            {"name": each.name, "p": each.p_corrected, **each.difference.to_json()} for each in compared.overall
        ]
        if compared
        else [],
        "compared": {"records": compared.common, "stages": list(compared.stages)} if compared else None,
        "block": BLOCK,
        **_details(results, keys, every[:DETAILED], columns),
        "made": [
            [f"{label}: {name}" if len(results) > 1 else name, value]
            for each, label in zip(results, labels, strict=True)
            for name, value in _said("", each.what)
        ],
    }


def _labels(results: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """What each is called: by its editor; where these are the same by its name, and by a letter where it has none of its own."""
    editors = [str(each.what.get("editor") or "none") for each in results]
    found = ["unedited" if each == "none" else each for each in editors]
    if len(set(found)) < len(found) == len(names):
        found = list(names)
    return [f"{each} {'AB'[index]}" for index, each in enumerate(found)] if len(set(found)) < len(found) else found


def _result(result: Evaluation, label: str) -> dict[str, Any]:
    tables = {stage: {name: [each.mean, each.low, each.high, each.n] for name, each in result.table(stage).items()} for stage in result.rows}  # fmt: skip
    return {"label": label, "editor": str(result.what.get("editor")), "mode": str(result.what["settings"].get("mode", "")), "caption": result.caption, "nothing": result.nothing, "n": len(result.facts), "tables": tables}  # fmt: skip


def _about(results: Sequence[Evaluation], keys: Sequence[Mapping[Any, int]], key: Any) -> list[Any]:
    """Who and what a record is about, and its note in each result; null where a result lacks it."""
    own = [each.facts[places[key]] if key in places else None for each, places in zip(results, keys, strict=True)]
    first: Mapping[str, Any] = next(each for each in own if each is not None)
    return [*(str(first.get(name) or "") for name in ABOUT), *(None if each is None else str(each.get("reason") or "") for each in own)]  # fmt: skip


def _numbers(results: Any, keys: Any, every: Any, columns: Any, names: Sequence[str]) -> np.ndarray:
    """[column, name, record] in float32, nan where there is none."""
    found = np.full((len(columns), len(names), len(every)), np.nan, "<f4")
    for at, column in enumerate(columns):
        rows, own = results[column["result"]].rows[column["stage"]], keys[column["result"]]
        for place, key in enumerate(every):
            if key in own:
                found[at, :, place] = [rows[own[key]].get(name, np.nan) for name in names]
    return found


def _details(results: Sequence[Evaluation], keys: Sequence[Mapping[Any, int]], every: Sequence[Any], columns: Any) -> dict[str, Any]:  # fmt: skip
    """Of each record [prompts, texts], in packed blocks, and the words that these are coded with. A prompt is [kind, prompt, targets,
    log-probabilities by column], a text [prompt, texts by column]."""
    found: list[tuple[dict[Any, Any], dict[Any, Any]]] = [({}, {}) for _ in every]
    at = {(each["result"], each["stage"]): column for column, each in enumerate(columns)}
    for index, result in enumerate(results):
        place = {keys[index][key]: row for row, key in enumerate(every) if key in keys[index]}
        for name, add in (("prompts", _add_prompt), ("texts", _add_text)):
            seen: dict[Any, int] = {}
            for line in result.details(name):
                if line["record"] in place and (index, line["stage"]) in at:
                    add(found[place[line["record"]]], line, at[index, line["stage"]], len(columns), seen)
    if not any(prompts or texts for prompts, texts in found):
        return {"details": [], "words": ""}
    lines = iter([[[*key, targets, _once(values)] for key, (targets, values) in prompts.items()], [[key[0], _once(value)] for key, value in texts.items()]] for prompts, texts in found)  # fmt: skip
    blocks = []
    while block := list(islice(lines, BLOCK)):
        text = json.dumps(plain(block), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        blocks.append(text.encode("utf-8", "backslashreplace").decode())
    words = Words(blocks)
    return {"details": [packed(words.coded(each)) for each in blocks], "words": words.packed()}


def _once(values: Sequence[Any]) -> list[Any]:
    """Values by column, with the number of the first column that has the same in the place of a repeated one."""
    return [first if each and (first := values.index(each)) < at else each for at, each in enumerate(values)]


def _add_prompt(own: Any, line: Any, column: int, columns: int, seen: dict[Any, int]) -> None:
    targets, values = own[0].setdefault((line["kind"], line["prompt"]), ([], [[] for _ in range(columns)]))
    if line["target"] not in targets:
        targets.append(line["target"])
    log_p, into = line["log_p"], values[column]
    into += [None] * (len(targets) - len(into))
    mean = sum(log_p) / len(log_p) if log_p else float("nan")
    into[targets.index(line["target"])] = _rounded(mean) if mean == mean else None


def _rounded(log_p: float) -> float:
    """As exactly as its probability is shown: in percent with a decimal, and where it is small in two figures."""
    return round(log_p, 4 if log_p > -2.5 else 3 if log_p > -5 else 2)


def _add_text(own: Any, line: Any, column: int, columns: int, seen: dict[Any, int]) -> None:
    """A prompt may have several texts, which are told apart by their number at a stage."""
    key = line["record"], line["stage"], line["prompt"]
    number = seen[key] = seen.get(key, -1) + 1
    own[1].setdefault((line["prompt"], number), [None] * columns)[column] = line["text"]


def _said(name: str, value: Any) -> list[list[str]]:
    """Settings in each other as names and texts."""
    if isinstance(value, Mapping):
        return [each for key, inner in value.items() for each in _said(f"{name} {key}".strip().replace("_", " "), inner)]  # fmt: skip
    return [] if value in (None, "", [], ()) else [[name, str(value)]]
