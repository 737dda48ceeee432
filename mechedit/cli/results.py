"""The commands show, compare and status: what is in a result, how results differ, how far a run is. No model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.calibrating import show_bands
from mechedit.cli.editing import show_edit
from mechedit.cli.options import a_path, add_command, add_json
from mechedit.cli.sequencing import show_sequence
from mechedit.cli.terminal import (
    UsageError,
    check_places,
    console_of,
    show_files,
    show_moment,
    show_sites,
    show_table,
    show_trace,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mechedit.files import Blob
    from mechedit.runs.comparing import Difference
    from mechedit.runs.results import Evaluation
    from mechedit.statistics import Mean

__all__ = ["add_results", "show_evaluation"]

MANY_RUNS = 12  # of which `status` shows each stage's sum
FEW = 100  # records, of which intervals are explained
SHORT = 14  # characters of a result's name in the head of a column
MANY_UNITS = 20  # of a run, that `show` names
KINDS = ("edit", "trace", "severed", "moment")  # of files
SHOWN = "an edit, sequence, trace, severed or moment file, or a folder of evaluate, sweep, tune, calibrate, trace --facts or edit --facts (--sequence)"


def add_results(commands: Any) -> None:
    """show, compare, status"""
    show = add_command(commands, "show", _show, "show a result, a file or a folder; no model is loaded")
    show.add_argument("result", type=a_path, metavar="RESULT", help=SHOWN)
    show.add_argument("--unit", metavar="NAME", help="of a folder of a run: one unit, by its name, its number, or the beginning of its name")  # fmt: skip
    show.add_argument("--export", type=a_path, metavar="DIR", help="of a folder of a run: write its units (or --unit) there, a file each")  # fmt: skip
    add_json(show)

    compare = add_command(commands, "compare", _compare, "compare evaluations record by record with the first, overall and by relation")  # fmt: skip
    compare.add_argument("results", type=a_path, nargs="+", metavar="DIR", help="folders of evaluate, two or more")
    compare.add_argument("--stage", metavar="NAME", help="which is compared (default: after, where there is one, else before)")  # fmt: skip
    add_json(compare)

    status = add_command(commands, "status", _status, "show how far the runs in a folder are; of a sweep, each stage over all cells")  # fmt: skip
    status.add_argument("folder", type=a_path, metavar="DIR")
    add_json(status)


def _show(arguments: argparse.Namespace) -> None:
    console, place = console_of(arguments), arguments.result
    check_places(arguments.json)
    if arguments.unit is not None or arguments.export is not None:
        return _show_units(arguments, console)
    written = write_json(arguments.json, (_of_folder if place.is_dir() else _of_file)(console, place))
    return show_files(console, written)


def _show_units(arguments: argparse.Namespace, console: Console) -> None:
    from mechedit.runs import units

    if arguments.export is not None and arguments.json is not None:
        raise UsageError("--export writes a file for each unit, and nothing to --json: give one of the two.")
    chosen = [] if arguments.unit is None else [arguments.unit]
    if arguments.export is not None:
        return show_files(console, units.export(arguments.result, arguments.export, chosen))
    return show_files(
        console, write_json(arguments.json, _of_blob(console, units.read(arguments.result, arguments.unit)))
    )


def _of_folder(console: Console, folder: Path) -> dict[str, Any]:
    """What is in a folder: the first of the tables that it holds, else the runs."""
    from mechedit.runs.parquet import RESULTS
    from mechedit.runs.results import Evaluation

    if (folder / RESULTS).is_file():
        found = Evaluation.load(folder)
        show_evaluation(console, found)
        return found.to_json()
    if (folder / "state.safetensors").is_file():
        return _of_blob(console, folder / "state.safetensors")
    for name in ("sweep.json", "tuned.json", "bands.json", "average.json"):
        if (folder / name).is_file():
            return _of_json(console, folder / name)
    return _of_run(console, folder)


def _of_file(console: Console, path: Path) -> dict[str, Any]:
    from mechedit import files
    from mechedit.runs.results import Evaluation

    if path.suffix == ".parquet" or path.name == "summary.json":
        found = Evaluation.load(path.parent)
        show_evaluation(console, found)
        return found.to_json()
    if path.suffix == ".json":
        return _of_json(console, path)
    return _of_blob(console, path) if files.kind(path) else {}


def _of_blob(console: Console, place: Path | Blob) -> dict[str, Any]:
    """An edit, a sequence, a trace, severed curves, a second moment, or the scores of a record."""
    import json

    from mechedit import edits, files
    from mechedit.moments import Moment
    from mechedit.runs import sequence
    from mechedit.tracing import Trace
    from mechedit.tracing.severing import Severed

    if isinstance(place, files.Blob) and place.data.startswith(b"{"):
        return _plain(console, place, json.loads(place.data))
    kind = files.kind(place)
    if kind == "edit":
        edit = edits.load(place).to_json()
        show_edit(console, edit)
        return edit
    if kind == "trace":
        trace = Trace.load(place)
        show_trace(console, trace)
        show_sites(console, trace)
        return trace.to_json()
    if kind == sequence.KIND and isinstance(place, Path):
        return show_sequence(console, sequence.load(place))
    if kind == "severed":
        return _plain(console, place, Severed.load(place).to_json())
    if kind == "moment" and isinstance(place, Path):
        moment = Moment.load(place)
        show_moment(console, moment)
        return moment.to_json()
    raise files.FileError(f"{place} is of kind {kind!r}; this version shows {SHOWN}.")


def _of_json(console: Console, path: Path) -> dict[str, Any]:
    """A sweep, settings that were tuned, bands with their evidence, or any object with its names."""
    from mechedit import parsing
    from mechedit.files import FileError

    try:
        record = parsing.from_file(path)
        if not isinstance(record, dict):
            raise parsing.ParseError("it must be an object")
        if "correlation_with_effect" in record:
            _of_sweep(console, record)
        elif "rows" in record and "site" in record:
            _of_tuned(console, record)
        elif "bands" in record and "judged" in record:
            show_bands(console, record)
        else:
            _plain(console, path, record)
    except (parsing.ParseError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"{path} is no result that can be shown ({type(error).__name__}: {error}).") from error
    return record


def _of_sweep(console: Console, record: Mapping[str, Any]) -> None:
    rows = [
        (str(layer), *("" if value is None else f"{100 * value:.0f}" for value in line))
        for layer, line in zip(record["layers"], record["mean"]["S"], strict=True)
    ]
    show_table(console, ("S by layer", *record["tokens"]), rows)
    found = record["correlation_with_effect"]["S"]
    console.print(f"rank correlation of S with the trace's indirect effect: {_number(found['mean'])} ({record['n']} facts)")  # fmt: skip


def _of_tuned(console: Console, record: Mapping[str, Any]) -> None:
    tried = list(record["rows"][0].get("tried", {}))
    names = [name for name in ("ES", "PS", "NS", "S", "within", "n") if name in record["rows"][0]]
    rows = [
        (
            str(row["layer"]),
            *(str(row["tried"].get(name, "")) for name in tried),
            *(_number(row[name]) for name in names),
        )
        for row in record["rows"]
    ]
    show_table(console, ("layer", *(name.replace("_", " ") for name in (*tried, *names))), rows)
    settings = record["settings"]
    console.print(
        "proposed: " + ", ".join(f"{name} {settings[name]}" for name in ("layer", *tried) if name in settings)
    )


def _plain(console: Console, place: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    import json

    shown = {str(name): value for name, value in record.items() if name != "facts"}  # which may be many
    show_table(console, ("", str(place)), [(name, json.dumps(value, ensure_ascii=False)) for name, value in shown.items()])  # fmt: skip
    return dict(record)


def _of_run(console: Console, folder: Path) -> dict[str, Any]:
    """How far runs are, and of a run what its units are."""
    from mechedit import files
    from mechedit.runs import units
    from mechedit.runs.shards import Shards
    from mechedit.runs.status import status
    from mechedit.runs.store import PLAN, RunError, units_of

    here = files.names(folder, KINDS)
    try:
        found = status(folder)
    except RunError as error:
        must = f"name a file in it ({here})" if here else f"it must be {SHOWN}"
        raise RunError(f"{folder} is nothing that can be shown: {must}.") from error
    _show_status(console, found)
    if here:
        console.print(f"files in it that are shown by their names: {here}")
    record: dict[str, Any] = {"runs": [vars(each) for each in found]}
    names = Shards(units_of(folder)).names() if (folder / PLAN).is_file() else []
    if names:  # else they are somewhere else: below, or in the cache
        record["units"] = names
        rows = [(str(index), name, _line(units.read(folder, name))) for index, name in enumerate(names[:MANY_UNITS])]
        show_table(console, ("", "unit", "of"), rows)
        more = f"; {len(names) - MANY_UNITS} more are not listed" if len(names) > MANY_UNITS else ""
        console.print(f"--unit NUMBER shows one, and --export DIR writes them as files{more}")
    return record


def _line(blob: Blob) -> str:
    """A unit in a line."""
    from mechedit import edits, files
    from mechedit.tracing import Trace
    from mechedit.tracing.severing import Severed

    if blob.data.startswith(b"{"):
        return "scores"
    readers: dict[str, Callable[[Blob], str]] = {
        "edit": lambda blob: "{prompt} -> {target_new}".format(**edits.load(blob).fact),
        "trace": lambda blob: f"{(trace := Trace.load(blob)).prompt} {trace.answer.strip()}",
        "severed": lambda blob: Severed.load(blob).prompt,
    }
    kind = files.kind(blob)
    return f"{kind}: {readers[kind](blob)}" if kind in readers else kind


def show_evaluation(console: Console, result: Evaluation) -> None:
    """A row for each number, a column for each stage: tables of many numbers are too wide for a terminal."""
    from mechedit.benchmarks.metrics import metric

    console.print(result.caption)
    header, rows = result.cells()
    labels = [metric(name).label for name in header[1:]]
    turned = [list(column) for column in zip(*rows, strict=True)]
    show_table(console, (header[0], *turned[0]), list(zip(labels, *zip(*turned[1:], strict=True), strict=True)))
    if 1 < len(result.facts) < FEW:
        console.print(f"Intervals over {len(result.facts)} records are wide, because they allow for one more that is as bad, or as good, as can be. More records narrow them.")  # fmt: skip
    without = [fact for fact in result.facts if fact.get("reason")]
    if without:
        have = "record has" if len(without) == 1 else "records have"
        console.print(f"{len(without)} {have} a note; the first is about {without[0]['subject']}: {without[0]['reason']}")  # fmt: skip
    console.print("docs/measuring.md says what each name means (`mechedit docs` opens it)")


def _compare(arguments: argparse.Namespace) -> None:
    from mechedit.runs.comparing import compare
    from mechedit.runs.results import Evaluation

    if len(arguments.results) < 2:
        raise UsageError(f"compare takes two folders or more; found {len(arguments.results)}.")
    check_places(arguments.json)
    names = [str(path) for path in arguments.results]
    results = [Evaluation.load(path) for path in arguments.results]
    found = compare(results, names, stage=arguments.stage)
    written, console = write_json(arguments.json, found.to_json()), console_of(arguments)
    console.print(str(found))
    called = _called(names)
    for short, name, stage, result in zip(called, names, found.stages, results, strict=True):
        console.print(f"{short} is {name}, {stage}: {result.subject}")
    for other in range(1, len(names)):
        of = (called[0], called[other])
        _show_differences(console, ("", *of, f"{of[1]} - {of[0]}", "could see", "p", "p corr."), [each for each in found.overall if each.result == other], lambda each: each.name, found.common)  # fmt: skip
        if own := [each for each in found.by_relation if each.result == other]:
            _show_differences(console, ("by relation", *of, f"{of[1]} - {of[0]}", "could see", "p", "p corr."), own, lambda each: f"{each.relation} {each.name}", 0)  # fmt: skip
    counted = [sum(each.p == each.p for each in own) for own in (found.overall, found.by_relation)]
    console.print(f"p: sign-flip test over records; p corr.: corrected for the {counted[0]} comparisons of all records, and for the {counted[1]} by relation (Holm); could see: the smallest difference that so many records show in 80 of 100 repetitions, two-sided at 5 %, empty where none that is possible is large enough. An interval also allows for what so few records may have missed, and so can hold 0 where p is small: then report both")  # fmt: skip
    show_files(console, written)


def _show_differences(
    console: Console, header: Sequence[str], found: Sequence[Difference], named: Callable[[Difference], str], n: int
) -> None:
    from mechedit.benchmarks.metrics import metric

    def alone(name: str, value: float) -> str:
        return metric(name).shown(_bare(value))

    rows = [
        (
            named(each) + (", %" if metric(each.name).unit == "%" else ""),
            alone(each.name, each.first),
            alone(each.name, each.second),
            metric(each.name).shown(each.difference, n),
            alone(each.name, each.could_see) if each.could_see == each.could_see else "",
            *("" if p != p else "<.001" if p < 0.001 else f"{p:.3f}" for p in (each.p, each.p_corrected)),
        )
        for each in found
    ]
    show_table(console, header, rows)


def _bare(value: float) -> Mean:
    """A value without an interval."""
    from mechedit.statistics import Mean

    return Mean(value, float("nan"), float("nan"), 1)


def _called(names: Sequence[str]) -> list[str]:
    """What results are called in a table: the names of their folders where these are short and differ, else letters."""
    own = [Path(name).name for name in names]
    if len(set(own)) == len(own) and max(map(len, own)) <= SHORT:
        return own
    return [chr(ord("A") + index) if index < 26 else f"R{index + 1}" for index in range(len(names))]


def _status(arguments: argparse.Namespace) -> None:
    from mechedit.runs.status import status

    whole = status(arguments.folder)
    _show_status(console_of(arguments), whole)
    write_json(arguments.json, [vars(each) for each in whole])


def _show_status(console: Console, whole: Sequence[Any]) -> None:
    from mechedit.runs.status import by_stage

    found = by_stage(whole) if len(whole) > MANY_RUNS else whole
    rows = [
        (each.folder, f"{each.finished} of {each.units}", str(each.failed or ""), *map(_number, (each.seconds, each.left / 60)))
        for each in found
    ]  # fmt: skip
    if len(found) > 1:
        finished, units, failed = (
            sum(getattr(each, name) for each in found) for name in ("finished", "units", "failed")
        )
        known = sum(each.left for each in found if each.left == each.left)
        more = "more than " * any(each.left != each.left for each in found)  # a stage of which no unit is finished
        rows.append(("all of these", f"{finished} of {units}", str(failed or ""), "", more + _number(known / 60)))
    show_table(console, ("run", "finished", "failed", "s a unit", "minutes left, one by one"), rows)


def _number(value: float | None) -> str:
    """Nothing where it is not known."""
    return "" if value is None or value != value else f"{value:.2f}"
