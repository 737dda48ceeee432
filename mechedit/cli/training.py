"""The command train-editor."""

from __future__ import annotations

import argparse
from typing import Any

from mechedit.cli.options import Parser, a_path, add_command, add_json, add_settings, given_settings
from mechedit.cli.terminal import (
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_table,
    write_json,
)
from mechedit.settings import TRAINING

__all__ = ["add_training"]

NAMES = {"mend": "MEND (Mitchell et al. 2022)", "ke": "KE (De Cao et al. 2021)"}


def add_training(commands: Any) -> None:
    """train-editor"""
    said = "train an editor for a model: MEND or KE"
    parser = commands.add_parser("train-editor", help=said, description=said[0].upper() + said[1:] + ".")
    editors = parser.add_subparsers(title="editors", metavar="EDITOR", required=True, parser_class=Parser)
    for editor, settings in TRAINING.items():
        own = add_command(editors, editor, _train, f"train {NAMES[editor]} for a model; stopped, it goes on", model=True)  # fmt: skip
        own.add_argument(
            "--data",
            required=True,
            metavar="DATA",
            help="facts with both targets (a file, organism, built-in); or, for an editor that is not trained on the facts it is "
            "judged on, text: FILE.txt, or sampled, which is text from the model",
        )
        own.add_argument("--policy", choices=tuple(settings.bundles["policy"]), help="form and constants by a name")
        add_settings(own, settings)
        own.add_argument("--out", type=a_path, required=True, metavar="DIR", help="checkpoint, network, log and curves")
        add_json(own)
        own.set_defaults(trains=editor, training=settings)


def _train(arguments: argparse.Namespace) -> None:
    from mechedit.editors.trained import data, training
    from mechedit.editors.trained.state import load

    chosen = arguments.training.bundles["policy"].get(str(arguments.policy), {})
    settings = arguments.training(**(chosen | given_settings(arguments, arguments.training)))
    check_places(arguments.json, arguments.out / "training.json")
    model = load_model(arguments)
    with keeping(f"the last checkpoint is kept in {arguments.out}"), progress_bars() as progress:
        read = data.read(model, arguments.data, settings, progress=progress)
        path = training.train(model, arguments.trains, read, arguments.out, settings, progress=progress)
    trained = load(path)
    outcome, console = trained.record["training"], console_of(arguments)
    for part, of in outcome["report"].items():
        counts = of if isinstance(of, int) else ", ".join(f"{n} {what}" for what, n in of.items())
        console.print(f"{part}: {counts}")
    best = outcome["best"]
    rows = [("validation", *(f"{best[name]:.3g}" for name in ("edit", "locality", "success")))]
    show_table(console, ("", "-log p of the target", "KL elsewhere", "says the target"), rows)
    console.print(f"the network of step {best['step']}, of {outcome['steps']} taken; digest {trained.key[:12]}")
    written = [path, arguments.out / "training.json", *(arguments.out / f"training.{kind}" for kind in ("png", "svg"))]
    show_files(console, [*written, *write_json(arguments.json, trained.record)])
