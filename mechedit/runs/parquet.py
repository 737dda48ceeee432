"""The Parquet files of an evaluation, which `runs.results` describes: written in parts that fit memory, and read with care."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mechedit.cache import atomic_write, plain
from mechedit.runs.store import RunError

__all__ = ["RESULTS", "Details", "read_details", "read_results", "write_details", "write_results"]

RESULTS, KEY = "results.parquet", b"mechedit"
PART = 20_000  # lines that are in memory at a time
FORM = 1
Details = Callable[[str], Iterator[dict[str, Any]]]
Row = Mapping[str, float]


def write_results(
    folder: Path,
    facts: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    what: Mapping[str, Any],
    seed: int,
) -> Path:
    """Write the numbers of every record at every stage, and what says how they were made; the file."""
    import pyarrow

    about = list(dict.fromkeys(name for fact in facts for name in fact))
    columns = [("stage", pyarrow.string()), *((name, pyarrow.string()) for name in about), *((name, pyarrow.float64()) for name in names)]  # fmt: skip
    said = json.dumps(plain({"form": FORM, "what": what, "seed": seed, "stages": list(rows)}))
    lines = (
        {"stage": stage, **fact, **row} for stage, own in rows.items() for fact, row in zip(facts, own, strict=True)
    )
    _write(folder / RESULTS, pyarrow.schema(columns, metadata={KEY: said.encode()}), lines)
    return folder / RESULTS


def write_details(folder: Path, details: Details) -> list[Path]:
    """Write prompts and texts, where there are any; the files. A file of an earlier run that has none any more goes."""
    import pyarrow

    text, place = pyarrow.string(), [("stage", pyarrow.string()), ("record", pyarrow.int64())]
    prompts = [("kind", text), ("prompt", text), ("target", text), ("log_p", pyarrow.list_(pyarrow.float64())), ("first", pyarrow.list_(pyarrow.bool_()))]  # fmt: skip
    written = []
    for name, own in {"prompts": prompts, "texts": [("prompt", text), ("text", text)]}.items():
        lines, path = details(name), folder / f"{name}.parquet"
        first = list(islice(lines, 1))
        if not first:
            path.unlink(missing_ok=True)
            continue
        _write(path, pyarrow.schema([*place, *own]), (each for part in (first, lines) for each in part))
        written.append(path)
    return written


def _write(path: Path, schema: Any, lines: Iterable[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    left = iter(lines)
    with atomic_write(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while part := [_whole(line) for line in islice(left, PART)]:
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


def _whole(line: dict[str, Any]) -> dict[str, Any]:
    """With half characters, which no file can hold, escaped."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in line.items()
    }


def read_results(folder: Path) -> tuple[tuple[dict[str, Any], ...], dict[str, list[dict[str, float]]], dict[str, Any], int]:  # fmt: skip
    """Facts, rows, settings and seed of an evaluation.

    Raises:
        RunError: there is none, or it is damaged.
    """
    table = _table(folder / RESULTS)
    if not {"stage", "subject", "prompt"} <= set(table.column_names):
        raise RunError(f"{folder / RESULTS} is not of an evaluation: it lacks stage, subject or prompt.")
    said = _settings(folder, table)
    numbers = [each.name for each in table.schema if str(each.type) == "double"]
    about = [each.name for each in table.schema if str(each.type) == "string" and each.name != "stage"]
    rows: dict[str, list[dict[str, float]]] = {stage: [] for stage in said.get("stages", [])}
    facts: dict[str, list[dict[str, Any]]] = {}
    for line in table.to_pylist():
        stage = line["stage"]
        rows.setdefault(stage, []).append({name: line[name] for name in numbers if line[name] is not None})
        facts.setdefault(stage, []).append({name: line[name] for name in about})
    if not facts or len({len(own) for own in rows.values()}) > 1:
        raise RunError(f"{folder / RESULTS} is not whole: its stages must have the same records.")
    return tuple(next(iter(facts.values()))), rows, said["what"], int(said["seed"])


def _settings(folder: Path, table: Any) -> dict[str, Any]:
    """What `write_results` noted; of earlier versions, what is in summary.json."""
    try:
        if KEY in (table.schema.metadata or {}):
            said = json.loads(table.schema.metadata[KEY])
            return {"what": dict(said["what"]), "seed": int(said["seed"]), "stages": list(said["stages"])}
        what = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        own = {name: value for name, value in what.items() if name not in ("facts", "stages")}
        return {"what": own, "seed": int(own["settings"].get("seed", 0))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{folder / RESULTS} does not say how it was made, and nor does summary.json ({error})."
        ) from error


def read_details(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The lines of `prompts` or `texts`; none where there is no such file."""
    from pyarrow import ArrowException, parquet

    path = folder / f"{name}.parquet"
    if not path.is_file():
        return
    try:
        with parquet.ParquetFile(path) as file:
            for part in file.iter_batches(PART):
                yield from part.to_pylist()
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged ({error}).") from error


def _table(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    if not path.is_file():
        raise RunError(f"{path.parent} holds no finished evaluation: there is no {path.name} in it.")
    try:
        return parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); run the evaluation again.") from error
