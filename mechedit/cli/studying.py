"""The command study: make a human study of what editors write, read what came back, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import a_path, add_command, add_json, add_settings, an_integer, given_settings
from mechedit.cli.terminal import (
    UsageError,
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_table,
    write_json,
)
from mechedit.settings import UNEDITED, StudySettings

if TYPE_CHECKING:
    from mechedit.study.texts import Scenario

__all__ = ["add_studying"]


def add_studying(commands: Any) -> None:
    """study make, study read, study report"""
    study = commands.add_parser(
        "study",
        help="ask people whose texts are more consistent and more fluent: blinded forms, responses, report",
        description="Ask people whose texts are more consistent and more fluent.",
    )
    parts = study.add_subparsers(title="steps", metavar="STEP", required=True)
    make = add_command(
        parts,
        "make",
        _make,
        "write texts by each editor, and a form for each participant",
        model=True,
        note="Run again to resume. key.json says whose text is whose: do not give it to participants.",
    )
    make.add_argument("--facts", metavar="FILE", default="built-in", help="facts with new targets: a JSON file, `built-in` or `organism` (default: built-in)")  # fmt: skip
    make.add_argument("--begin", type=an_integer, default=0, metavar="N", help="leave the first N facts out")
    make.add_argument("--texts", type=a_path, metavar="FILE", help='texts that were written elsewhere: a list of {"statement": …, "texts": {editor: text}}; no model is loaded')  # fmt: skip
    add_settings(make, StudySettings)
    make.add_argument("--out", type=a_path, required=True, metavar="DIR", help="texts, key and forms go there")

    read = add_command(parts, "read", _read, "check what participants sent, and keep what can be used")
    read.add_argument("study", type=a_path, metavar="STUDY", help="the folder of `study make`")
    read.add_argument("responses", type=a_path, nargs="+", metavar="FILE", help="all responses: files, or folders of them")  # fmt: skip
    read.add_argument("--partial", action="store_true", help="take the finished pages of unfinished responses too")
    add_json(read)

    report = add_command(parts, "report", _report, "wins with intervals, strengths, agreement, places and time")
    report.add_argument("study", type=a_path, metavar="STUDY", help="the folder of `study make`")
    report.add_argument("--out", type=a_path, metavar="DIR", help="report.json and report.md go there (default: the study's folder)")  # fmt: skip
    add_json(report)


def _make(arguments: argparse.Namespace) -> None:
    from mechedit import study

    settings = _settings(arguments)
    check_places(arguments.out / "study.json")
    scenarios, about = _given(arguments, settings) if arguments.texts else _written(arguments, settings)
    made = study.make(scenarios, arguments.out, settings, about)
    console = console_of(arguments)
    for note in _notes(scenarios):
        console.print(f"note: {note}.")
    own = made.settings
    console.print(
        f"{len(made.forms)} forms of {own.pages} pages: {own.scenarios} facts, {own.raters} raters each, texts by {', '.join(made.editors)}"
    )
    show_files(console, [made.folder / "study.json", made.folder / "key.json", made.folder / "texts.json", *made.files()])  # fmt: skip


def _notes(scenarios: list[Scenario]) -> list[str]:
    """What whoever made the study should look at before forms go out."""
    noted = {name: sum(bool(each.notes.get(name)) for each in scenarios) for name in scenarios[0].texts}
    found = [f"{n} of {len(scenarios)} edits by {name} have notes (texts.json)" for name, n in noted.items() if n]
    if alike := sum(len(set(each.texts.values())) < len(each.texts) for each in scenarios):
        found.append(f"{alike} of {len(scenarios)} scenarios have a text twice, whose order people can only guess")
    return found


def _settings(arguments: argparse.Namespace) -> StudySettings:
    """The settings; texts from a file say themselves how many there are, and whose."""
    given = given_settings(arguments, StudySettings)
    if not arguments.texts:
        return StudySettings(**given)
    for name in ("editors", "tokens", "top_k"):
        if name in given:
            raise UsageError(f"--{name.replace('_', '-')} is of texts that are written here, and --texts names a file of them.")  # fmt: skip
    return StudySettings(**given | {"scenarios": given.get("scenarios") or len(_file(arguments))})


def _file(arguments: argparse.Namespace) -> list[Scenario]:
    from mechedit import study

    found = study.read_scenarios(arguments.texts)
    if not 0 <= arguments.begin < len(found):
        raise UsageError(f"--begin must be from 0 to {len(found) - 1}; found {arguments.begin}.")
    return found[arguments.begin :]


def _given(arguments: argparse.Namespace, settings: StudySettings) -> tuple[list[Scenario], dict[str, Any]]:
    from mechedit import study

    return study.sampled(_file(arguments), settings), {"texts": arguments.texts.name}


def _written(arguments: argparse.Namespace, settings: StudySettings) -> tuple[list[Scenario], dict[str, Any]]:
    from mechedit import provenance, sources, study
    from mechedit.editors import named

    for name in settings.editors:
        if name != UNEDITED:
            named(name)
    facts = sources.named(arguments.facts, need=("target_new",))
    if arguments.begin < 0:
        raise UsageError(f"--begin must be 0 or more; found {arguments.begin}.")
    chosen = study.sampled(facts[arguments.begin :], settings)
    model = load_model(arguments)
    with keeping(f"finished texts are kept in {arguments.out}"), progress_bars() as progress:
        scenarios = study.write_scenarios(model, chosen, arguments.out / "writing", settings, progress=progress)
    return scenarios, {"origin": provenance.origin(model), "facts": arguments.facts, "begin": arguments.begin}


def _read(arguments: argparse.Namespace) -> None:
    from mechedit import study

    check_places(arguments.json)
    own = study.load(arguments.study)
    found = study.read(own, arguments.responses, partial=arguments.partial)
    console = console_of(arguments)
    rows = [(Path(each.file).name, each.form, "accepted") for each in found.accepted]
    rows += [(Path(name).name, "", why) for name, why in found.refused]
    show_table(console, ("file", "form", ""), rows)
    console.print(f"{len(found.accepted)} of {len(own.forms)} forms")
    written = [found.save(own)] if found.accepted else []
    show_files(console, written + write_json(arguments.json, _said(found)))
    if found.refused:
        sys.stdout.flush()
        kept = f"the {len(found.accepted)} others are kept" if found.accepted else "none is left, and nothing was kept"
        raise study.StudyError(f"{len(found.refused)} of {len(found.accepted) + len(found.refused)} files were refused; {kept}.")  # fmt: skip


def _said(found: Any) -> dict[str, Any]:
    return {
        "accepted": [{"file": each.file, "form": each.form} for each in found.accepted],
        "refused": [{"file": name, "why": why} for name, why in found.refused],
    }


def _report(arguments: argparse.Namespace) -> None:
    from mechedit import study
    from mechedit.study.report import LEGEND

    out = arguments.out or arguments.study
    check_places(arguments.json, out / "report.json")
    found = study.report(study.load(arguments.study))
    console = console_of(arguments)
    console.print(found.summary)
    for title, header, rows in found.tables():
        console.print(title)
        show_table(console, header, rows)
    console.print(LEGEND)
    for comment in found.numbers["comments"]:
        console.print(f"comment: {comment}")
    show_files(console, [*found.save(out), *write_json(arguments.json, found.to_json())])
