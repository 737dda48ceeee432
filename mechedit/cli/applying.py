"""The commands on saved edits: apply, compose, diff, export."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import DEFAULT_MODEL, a_path, add_command, add_json, an_integer
from mechedit.cli.terminal import (
    UsageError,
    check_apart,
    check_places,
    console_of,
    load_model,
    show_files,
    show_notes,
    show_table,
    write_json,
)

if TYPE_CHECKING:
    from mechedit.edits import Edit

__all__ = ["add_applying", "model_of"]


def add_applying(commands: Any) -> None:
    """apply, compose, diff, export"""
    of_edits = {"model": None}  # that of the edits, unless another is named
    apply = add_command(
        commands, "apply", _apply, "apply saved edits and show what the model says before and after", model=True
    )
    apply.set_defaults(**of_edits)
    apply.add_argument("files", type=a_path, nargs="+", metavar="FILE")
    apply.add_argument(
        "--prompt", action="append", default=[], help="also complete this prompt; may be given more than once"
    )
    apply.add_argument("--force", action="store_true", help="apply even to other weights than the edit was made for")
    add_json(apply)

    compose = add_command(commands, "compose", _compose, "make one edit file of several; no model is loaded")
    compose.add_argument("files", type=a_path, nargs="+", metavar="FILE")
    compose.add_argument("--out", type=a_path, required=True, metavar="FILE", help="where it goes (.safetensors)")

    diff = add_command(commands, "diff", _diff, "show how alike what two edits write is; no model is loaded")
    diff.add_argument("files", type=a_path, nargs=2, metavar="FILE")
    add_json(diff)

    export = add_command(
        commands, "export", _export, "write an edited model, or its edits as a LoRA adapter", model=True
    )
    export.set_defaults(**of_edits)
    export.add_argument("files", type=a_path, nargs="+", metavar="FILE")
    export.add_argument("--out", type=a_path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--adapter", action="store_true", help="a LoRA adapter for peft, not the whole model")
    export.add_argument(
        "--rank", type=an_integer, metavar="N", help="with --adapter: approximate changes of higher rank by this one"
    )
    export.add_argument("--force", action="store_true", help="even from other weights than the edits were made for")


def _apply(arguments: argparse.Namespace) -> None:
    from mechedit import applying, edits, generation

    loaded = [edits.load(path) for path in arguments.files]
    check_places(arguments.json)
    arguments.model = arguments.model or model_of(loaded)
    model = load_model(arguments)
    if not arguments.force:
        applying.check(model, loaded)
    asked = _own_prompts(loaded)
    asked |= {prompt: None for prompt in arguments.prompt if prompt not in asked}
    before = {prompt: generation.complete(model, prompt, prepend_bos=bos) for prompt, bos in asked.items()}
    with applying.edited(model, *loaded, force=True):
        after = {prompt: generation.complete(model, prompt, prepend_bos=bos) for prompt, bos in asked.items()}
    write_json(
        arguments.json,
        {
            "model": arguments.model,
            "files": [str(path) for path in arguments.files],
            "completions": [{"prompt": prompt, "before": before[prompt], "after": after[prompt]} for prompt in asked],
        },
    )
    console = console_of(arguments)
    show_table(console, ("prompt", "before", "after"), [(prompt, before[prompt], after[prompt]) for prompt in asked])
    show_notes(console, dict(zip(arguments.files, loaded, strict=True)))


def _own_prompts(loaded: Sequence[Edit]) -> dict[str, bool | None]:
    """The prompts that the edits were made for, and whether BOS stood before each."""
    parts = [(part, edit) for edit in loaded for part in edit.details.get("parts", [{"prompt": edit.fact["prompt"]}])]
    return {part["prompt"]: part.get("settings", edit.settings).get("prepend_bos") for part, edit in parts}


def model_of(loaded: Sequence[Edit]) -> str:
    """The name of the model that the edits were found on; the default where they are of a folder, whose place nobody knows.

    Raises:
        UsageError: they are of several models.
    """
    from mechedit.models import listing

    names = sorted({str(edit.origin["name"]) for edit in loaded})
    if len(names) > 1:
        raise UsageError(f"these edits are of {' and '.join(names)}; name the model with --model.")
    return names[0] if names[0] in {each.name for each in listing()} else DEFAULT_MODEL


def _compose(arguments: argparse.Namespace) -> None:
    from mechedit import applying, edits

    check_apart(arguments.out, arguments.files)
    check_places(arguments.out)
    loaded = [edits.load(path) for path in arguments.files]
    console = console_of(arguments)
    show_files(console, [edits.save(applying.compose(*loaded), arguments.out)])
    show_notes(console, dict(zip(arguments.files, loaded, strict=True)))


def _diff(arguments: argparse.Namespace) -> None:
    from mechedit import applying, edits
    from mechedit.changes import by_weight

    check_places(arguments.json)
    first, second = (edits.load(path) for path in arguments.files)
    found = applying.diff(first, second)
    write_json(arguments.json, [each.to_json() for each in found])
    console = console_of(arguments)
    if first.base != second.base:
        console.print("note: these edits were made for different weights")
    if not found:
        written = [
            ", ".join([*map(str, by_weight(edit.changes)), *(["text before prompts"] if edit.told else [])])
            or "nothing"
            for edit in (first, second)
        ]
        console.print(f"they write into no weight together: {written[0]}; {written[1]}")
    else:
        rows = [
            (
                str(each.layer),
                each.weight.name,
                *(f"{value:.3f}" if value == value else "" for value in (each.u, each.step, each.change, each.ratio)),
            )
            for each in found
        ]
        show_table(console, ("layer", "weight", "cos of u", "cos of step", "cos of change", "norm ratio"), rows)


def _export(arguments: argparse.Namespace) -> None:
    from mechedit import edits, export

    loaded = [edits.load(path) for path in arguments.files]
    if arguments.rank is not None and (not arguments.adapter or arguments.rank < 1):
        raise UsageError("--rank N, at least 1, is of --adapter.")
    export.check_folder(arguments.out)
    arguments.model = arguments.model or model_of(loaded)
    model, more = load_model(arguments), {"rank": arguments.rank} if arguments.adapter else {}
    write = export.adapter if arguments.adapter else export.checkpoint
    folder = write(model, arguments.model, loaded, arguments.out, force=arguments.force, **more)
    show_files(console_of(arguments), sorted(folder.iterdir()))
