"""The command calibrate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import nan
from typing import TYPE_CHECKING, Any

from mechedit.cli.choosing import add_editor, chosen_editor, given_edit_settings, resolved
from mechedit.cli.options import PRESET, a_path, add_command, add_json, add_settings, an_integer, given_settings
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
from mechedit.settings import NO_EDGE, CalibrateSettings

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_calibrating", "show_bands"]


def add_calibrating(commands: Any, editor: str) -> None:
    """calibrate"""
    calibrate = add_command(
        commands,
        "calibrate",
        _calibrate,
        "measure what sound and broken edits of a model look like, and set the bands of an editor",
        model=True,
        note=PRESET.format("layer and constants"),
    )
    calibrate.add_argument("--facts", metavar="FILE", default="built-in", help="facts with new targets, paraphrases and neighbours (default: built-in)")  # fmt: skip
    calibrate.add_argument(
        "--begin", type=an_integer, default=0, metavar="N", help="leave the first N out, to report on"
    )
    add_settings(calibrate, CalibrateSettings, without=("facts", "seed"))
    calibrate.add_argument("--limit", type=an_integer, default=CalibrateSettings().facts, metavar="N", help="facts that are edited, each in every way (default: 20)")  # fmt: skip
    calibrate.add_argument("--out", type=a_path, required=True, metavar="DIR", help="every number is kept there, and bands.json, for --bands")  # fmt: skip
    add_json(calibrate)
    add_editor(
        calibrate, editor, without=("layer", "layers", "guard", "bands")
    )  # the last; its seed is the calibration's


def _calibrate(arguments: argparse.Namespace) -> None:
    from mechedit import calibration, sources

    own = {name: each for name, each in given_settings(arguments, CalibrateSettings).items() if name != "facts"}
    settings = CalibrateSettings(facts=arguments.limit, **own)
    given = given_edit_settings(arguments)
    editor = chosen_editor(arguments)
    chosen = sources.named(arguments.facts)
    if not 0 <= arguments.begin < len(chosen):
        raise UsageError(
            f"--begin must leave some of the {len(chosen)} facts in {arguments.facts}; found {arguments.begin}."
        )
    check_places(arguments.json, arguments.out / "bands.json")
    model = load_model(arguments)
    if settings.layers and hasattr(editor.settings, "layer"):
        given["layer"] = settings.layers[0]
    with keeping(f"finished edits are kept in {arguments.out}"), progress_bars() as progress:
        found = calibration.calibrate(
            model,
            chosen[arguments.begin :],
            arguments.out,
            settings,
            editor,
            resolved(model, editor, given),
            progress=progress,
        )
    written = [found.save(arguments.out / "bands.json"), *write_json(arguments.json, found.to_json())]
    console = console_of(arguments)
    show_bands(console, found.to_json())
    show_files(console, written)


def show_bands(console: Console, record: Mapping[str, Any]) -> None:
    """Bands with their rates, from what `Calibration.to_json` has, and how edits were judged in each way."""
    rows = [
        (each["name"], *(_edge(each[name]) for name in ("low", "high", "sound", "broken")), *map(_rate, (each["false_alarms"], each["misses"])))
        for each in record["bands"]
    ]  # fmt: skip
    rows.append(("all together", "", "", "", "", *(_rate(record["together"][name]) for name in ("false_alarms", "misses"))))  # fmt: skip
    show_table(console, ("number", "from", "to", "sound, 99 %", "broken beyond, 10 %", "false alarms", "misses"), rows)
    ways: dict[str, list[str]] = {}
    for edit in record["edits"]:
        ways.setdefault(edit["way"], []).append(edit["verdict"])
    verdicts = list(record["judged"])
    show_table(console, ("edits", *verdicts), [(way, *(str(found.count(each)) for each in verdicts)) for way, found in ways.items()])  # fmt: skip
    console.print(", ".join(f"{n} {verdict}" for verdict, n in record["judged"].items()) + " edits")


def _edge(value: float | None) -> str:
    return "" if value is None or value >= NO_EDGE else f"{value:.3g}"


def _rate(found: Mapping[str, Any]) -> str:
    from mechedit.statistics import Mean

    mean, low, high = (nan if found[name] is None else found[name] for name in ("mean", "low", "high"))
    return str(Mean(mean, low, high, found["n"]))
