"""The commands moments and merge."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import a_path, add_command, add_json, add_settings, add_text, an_integer, given_settings
from mechedit.cli.terminal import (
    UsageError,
    check_apart,
    check_files,
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_moment,
    write_json,
)
from mechedit.settings import MomentSettings, RomeSettings

if TYPE_CHECKING:
    from mechedit.moments import Corpus

__all__ = ["add_moments"]

OF_A_DATASET: dict[str, str | None] = {"config": None, "split": "train", "column": "text", "revision": None}


def add_moments(commands: Any) -> None:
    """moments, merge"""
    moments = add_command(
        commands, "moments", _moments, "estimate C, the second moment of a layer's keys, into the cache", model=True
    )
    moments.add_argument(
        "--layer",
        type=an_integer,
        nargs="+",
        default=[-1],
        help="blocks, from 0, in one pass (default: the model's preset)",
    )
    add_text(moments)
    moments.add_argument(
        "--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, or a folder of one, instead"
    )
    for name, default in OF_A_DATASET.items():
        moments.add_argument(f"--{name}", help=f"of the dataset (default: {default or 'its own'})")
    add_settings(moments, MomentSettings)
    moments.add_argument("--out", type=a_path, metavar="FILE", help="also write it there (.safetensors); of one layer")
    add_json(moments)

    merge = add_command(
        commands, "merge", _merge, "put second moments of parts of a text, or of several texts, together"
    )
    merge.add_argument("files", nargs="+", type=a_path, metavar="FILE")
    merge.add_argument("--out", type=a_path, required=True, metavar="FILE", help="where the whole goes (.safetensors)")
    add_json(merge)


def _moments(arguments: argparse.Namespace) -> None:
    from mechedit import moments
    from mechedit.editors import rome

    settings = MomentSettings(**given_settings(arguments, MomentSettings))
    if min(arguments.layer) < -1:
        raise UsageError(f"--layer must be blocks from 0, or -1 for the preset's; found {min(arguments.layer)}.")
    if arguments.out and len(arguments.layer) > 1:
        raise UsageError("--out is a file for one layer; several layers are kept in the cache.")
    if arguments.dataset and arguments.text:
        raise UsageError("C comes from --text or from --dataset, not from both.")
    given = {name: value for name in OF_A_DATASET if (value := getattr(arguments, name)) is not None}
    if given and not arguments.dataset:
        raise UsageError(f"--{min(given)} is of a dataset: give --dataset too.")
    check_places(arguments.json, arguments.out)
    check_files(*arguments.text)
    texts: list[str | Path | Corpus] = list(arguments.text)
    if arguments.dataset:
        texts = [moments.Corpus(arguments.dataset, **(OF_A_DATASET | given))]
    model = load_model(arguments)
    layers = [rome.resolve(model, RomeSettings(layer=layer)).layer for layer in arguments.layer]
    kept = keeping("what is summed so far is kept in the cache")
    with kept, progress_bars() as progress:
        found = moments.estimate_layers(model, layers, texts or None, settings, progress=progress)
    written = [found[layers[0]].save(arguments.out)] if arguments.out else []
    records = [moment.to_json() for moment in found.values()]
    write_json(arguments.json, records[0] if len(records) == 1 else records)
    console = console_of(arguments)
    for moment in found.values():
        show_moment(console, moment)
    show_files(console, written)


def _merge(arguments: argparse.Namespace) -> None:
    from mechedit import moments

    check_apart(arguments.out, arguments.files)
    check_places(arguments.json, arguments.out)
    whole = moments.merge([moments.Moment.load(path) for path in arguments.files])
    written = [whole.save(arguments.out)]
    write_json(arguments.json, whole.to_json())
    console = console_of(arguments)
    show_moment(console, whole)
    show_files(console, written)
