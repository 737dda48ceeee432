"""The commands inspect, audit, models, fetch and doctor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechedit.benchmarks.fetch import FILES
from mechedit.cli.options import a_path, add_command, add_json, add_prompt
from mechedit.cli.terminal import (
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_table,
    write_json,
)
from mechedit.wording import visible

__all__ = ["add_looking"]


def add_looking(commands: Any) -> None:
    """inspect, audit, models, fetch, doctor"""
    inspect = add_command(
        commands,
        "inspect",
        _inspect,
        "show what is in a file of an edit, trace, moment or trained editor; no model is loaded",
    )
    inspect.add_argument("file", type=a_path, metavar="FILE")
    add_json(inspect)

    audit = add_command(
        commands,
        "audit",
        _audit,
        "show a prompt's tokens, subject span and target ids, and what looks wrong",
        model=True,
    )
    add_prompt(audit)
    audit.add_argument("--answer", help="the true answer")
    audit.add_argument("--target", help="a new answer")

    models = add_command(
        commands, "models", _models, "list the models that can be loaded, or check one against Hugging Face"
    )
    models.add_argument("--check", metavar="NAME", help="compare this model's logits with Hugging Face's")
    add_json(models)

    fetch = add_command(commands, "fetch", _fetch, "download published data sets from their official address")
    fetch.add_argument("names", nargs="+", choices=tuple(FILES), metavar="NAME", help=f"any of {', '.join(FILES)}")
    fetch.add_argument("--out", type=a_path, default=Path(), metavar="DIR", help="where they go (default: here)")

    doctor = add_command(commands, "doctor", _doctor, "check that this installation works")
    add_json(doctor)


def _inspect(arguments: argparse.Namespace) -> None:
    from mechedit import edits, files
    from mechedit.editors.trained import state as trained
    from mechedit.moments import Moment
    from mechedit.tracing import Trace
    from mechedit.tracing.severing import Severed

    kind = files.kind(arguments.file)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "edit": lambda path: edits.load(path).to_json(),
        "trace": lambda path: {
            name: value for name, value in Trace.load(path).to_json().items() if name not in {"effects", "seconds"}
        },
        "severed": lambda path: Severed.load(path).to_json(),
        "moment": lambda path: Moment.load(path).to_json(),
        trained.KIND: lambda path: trained.load(path).record,
    }
    if kind not in readers:
        raise files.FileError(
            f"{arguments.file} is of kind {kind!r}, and inspect reads {', '.join(readers)}; `mechedit show` says what is in other results."
        )
    record = {"kind": kind, **readers[kind](arguments.file)}
    show_table(
        console_of(arguments),
        ("", str(arguments.file)),
        [(name, json.dumps(value, ensure_ascii=False)) for name, value in record.items()],
    )
    write_json(arguments.json, record)


def _audit(arguments: argparse.Namespace) -> None:
    from mechedit import prompts
    from mechedit.facts import from_prompt

    fact = from_prompt(
        arguments.prompt,
        arguments.subject,
        target_true=arguments.answer,
        target_new=arguments.target,
        occurrence=arguments.occurrence,
        join=arguments.join or "auto",
    )
    console = console_of(arguments)
    found = prompts.audit(load_model(arguments), fact)
    for line in found.lines:
        console.print(line)
    console.print("* marks the subject" + ("" if found.notes else "; nothing looks wrong"))


def _models(arguments: argparse.Namespace) -> None:
    from rich.text import Text

    from mechedit import models

    console = console_of(arguments)
    if arguments.check:
        with console.status(Text(f"comparing {visible(arguments.check)} with Hugging Face")):
            largest = models.parity(arguments.check)
        verdict = "equal" if largest <= models.PARITY else "DIFFERENT"
        console.print(
            f"{arguments.check}: largest difference of logits {largest:.2g} ({verdict}; tolerance {models.PARITY:g})"
        )
        write_json(
            arguments.json, {"model": arguments.check, "largest_difference": largest, "tolerance": models.PARITY}
        )
        if largest > models.PARITY:
            raise models.ModelError(f"the logits of {arguments.check} are not Hugging Face's.")
        return
    rows = [
        (each.name, each.source, "yes" if each.here else "no", _size(each.preset), _preset_line(each.preset))
        for each in models.listing()
    ]
    show_table(
        console,
        ("name", "from", "here", "blocks x width", "editing preset"),
        [*rows, ("FOLDER", "any folder in Hugging Face's format", "", "", "")],
    )
    write_json(
        arguments.json, [dict(zip(("name", "source", "here", "size", "preset"), row, strict=True)) for row in rows]
    )


def _size(preset: Any) -> str:
    return f"{preset.shape[0]} x {preset.shape[1]}" if preset else ""


def _preset_line(preset: Any) -> str:
    return (
        f"layer {preset.rome.layer}, clamp {preset.rome.clamp:g}, {'BOS' if preset.prepend_bos else 'no BOS'}; {preset.sources['rome']}"
        if preset
        else "none"
    )


def _fetch(arguments: argparse.Namespace) -> None:
    from mechedit.benchmarks.fetch import fetch

    with keeping("what came is kept"), progress_bars() as progress:
        paths = [fetch(name, arguments.out, progress=progress) for name in arguments.names]
    show_files(console_of(arguments), paths)


def _doctor(arguments: argparse.Namespace) -> None:
    import os
    import shutil

    from mechedit import cache, models, provenance

    root = cache.root()
    cache.check_writable(root / "doctor")
    root.mkdir(parents=True, exist_ok=True)
    import torch

    rows = [(f"version of {name}", found) for name, found in provenance.versions().items()]
    rows += [
        ("cores, torch threads", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        ("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("cache", f"{root} (writable, {shutil.disk_usage(root).free / 1e9:.0f} GB free)"),
        ("data", os.environ.get("MECHEDIT_DATA", "MECHEDIT_DATA is not set")),
        *(
            (f"model {each.name}", "here" if each.here else f"not here; from the {each.source}")
            for each in models.listing()
        ),
    ]
    show_table(console_of(arguments), ("", "found"), rows)
    write_json(arguments.json, dict(rows))
