"""`edit --sequence`: facts written one on top of the other, and how such a run is shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import add_settings, given_settings
from mechedit.cli.terminal import UsageError, console_of, keeping, show_files, show_table, write_json
from mechedit.settings import SequenceSettings

if TYPE_CHECKING:
    from rich.console import Console

    from mechedit.editing import Editor, Prepared
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.progress import Progress
    from mechedit.runs.sequence import Sequence

__all__ = [
    "add_sequencing",
    "check_learning",
    "check_sequencing",
    "check_taking_out",
    "edit_in_sequence",
    "show_sequence",
]

# of facts that are learnt again, which not all editors do
LEARNING = ("rehearsed", "again", "rounds", "gentle", "settle")
NAMED = 20  # facts that are not written, or do not stand, that are named
LOOKS = ("success", "others", "perplexity_ratio", "next_token_kl", "change", "spectrum")


def add_sequencing(parser: argparse.ArgumentParser) -> None:
    """--sequence, and the options of sequences."""
    parser.add_argument(
        "--sequence",
        action="store_true",
        help="of --facts: each on what the ones before it left, kept in --out DIR and resumed from there (`--editor sequential` is made for it)",
    )
    parser.add_argument(
        "--take-out",
        type=int,
        nargs="+",
        metavar="I",
        default=[],
        help="take these edits, by their facts' numbers from 0, out of the finished sequence in --out again; the others stay, and those that shared a value with "
        "one of them are written again",
    )
    add_settings(parser, SequenceSettings)


def check_sequencing(arguments: argparse.Namespace) -> None:
    """Raise for options of sequences without one."""
    given = given_settings(arguments, SequenceSettings)
    SequenceSettings(**given)
    if arguments.take_out and not arguments.sequence:
        raise UsageError("--take-out is of --sequence; give it too.")
    if arguments.sequence and not arguments.facts:
        raise UsageError("--sequence is of many facts: give --facts FILE and --out DIR.")
    if given and not arguments.sequence:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} is of --sequence; give it too.")


def check_learning(arguments: argparse.Namespace, editor: Editor, settings: Any) -> None:
    """Raise for options of learning again where nothing is learnt again; 0, which asks for none, may be said of any editor."""
    from mechedit.runs.rehearsing import is_gentle
    from mechedit.runs.sequence import is_exact

    given = given_settings(arguments, SequenceSettings)
    how = SequenceSettings(**given)
    idle = [name for name in LEARNING if given.get(name)]
    if idle and not (is_exact(editor, settings) and is_gentle(settings, how)):
        raise UsageError(
            f"--{idle[0]} does nothing here: facts are learnt again by editors with loose above 0 (sequential), by one solve at one layer, with shared "
            f"values that are sought on the current model; found {editor.name}. Leave it out, or choose sequential with no more than that."
        )
    if not how.rounds and (idle := [name for name in ("rehearsed", "again") if given.get(name)]):
        raise UsageError(
            f"--{idle[0]} does nothing with rounds = 0, as nothing is learnt again. Leave one of them out."
        )
    if given.get("settle") and not settings.fisher:
        raise UsageError("--settle does nothing with fisher = 0, as it weighs G. Leave it out, or give --fisher.")


def check_taking_out(arguments: argparse.Namespace, editor: Editor, settings: Any, n: int) -> None:
    """Raise for edits to take out that a run of so many facts will not have, or of an editor that can take none out."""
    from mechedit.runs.sequence import is_exact

    if arguments.take_out and not is_exact(editor, settings):
        raise UsageError(
            f"--take-out is of editors whose change is one solve for all (sequential; alphaedit; memit with b = 1); {editor.name} with these settings "
            "adds changes up. Leave it out."
        )
    if wrong := [number for number in arguments.take_out if not 0 <= number < n]:
        raise UsageError(f"--take-out names facts by their numbers, here 0 to {n - 1}; found {wrong[0]}.")


def edit_in_sequence(
    arguments: argparse.Namespace,
    model: HookedModel,
    chosen: Several[Fact],
    editor: Editor,
    settings: Any,
    prepared: Prepared | None,
    progress: Progress,
) -> None:
    """All facts, and one edit of what stands."""
    from mechedit import edits
    from mechedit.runs.extending import run_sequence, take_out
    from mechedit.runs.sequence import TAKEN_OUT, as_edit

    how = SequenceSettings(**given_settings(arguments, SequenceSettings))
    with keeping(f"the sequence so far is kept in {arguments.out}"):
        found = run_sequence(model, chosen, arguments.out, how, editor, settings, prepared, progress=progress)
    out = {
        number for number, entry in enumerate(found.entries) if entry.why == TAKEN_OUT
    }  # a run that went back has fewer
    there = [number for number in dict.fromkeys(arguments.take_out) if number not in out]
    if there:
        found = take_out(model, there, arguments.out, how, prepared)
    written = [arguments.out / name for name in ("state.safetensors", "looks.json")]
    whole = arguments.out / "edit.safetensors"
    if found.standing:
        written.append(edits.save(as_edit(found), whole))
    else:
        whole.unlink(missing_ok=True)  # of what stood before
    console = console_of(arguments)
    for number in dict.fromkeys(arguments.take_out):
        said = "taken out" if number in there else "is out already"
        console.print(f"{said}: {number}, {found.entries[number].as_fact.prompt!r}")
    written += write_json(arguments.json, show_sequence(console, found))
    show_files(console, written)
    if not found.standing:
        why = (
            found.entries[0].why
            if found.entries
            else "the run went back to its start, where no look had found all well"
        )
        raise edits.EditError(f"none of the {len(chosen)} facts is written: {why}.")


def show_sequence(console: Console, found: Sequence) -> dict[str, Any]:
    """How many facts are written, which are not and why, which did not stand at the last look, and each look; all of it as JSON values too."""
    record = found.to_json() | {"edits": _edits(found)}
    keys = f"by {record['rows']} keys " if found.sums is not None else ""
    console.print(
        f"{record['editor']} on {record['model']}: {record['standing']} of {record['facts']} facts are written, {keys}in "
        f"{record['batches']} batches; {record['conflicts']} conflicts"
    )
    for why, n in record["why"].items():
        console.print(f"{n} not: {why}")
    missing = [
        (each, each["why"] or "written, and not above its true target at the last look")
        for each in record["edits"]
        if each["why"] or each["stands"] is False
    ]
    for each, why in missing[:NAMED]:
        console.print(f"  {each['number']}: {each['prompt']!r} -> {each['target_new']!r}: {why}")
    if len(missing) > NAMED:
        console.print(f"  and {len(missing) - NAMED} more (--json FILE has all)")
    rows = [
        (
            str(look["edits"]),
            *("" if look[name] is None else f"{look[name]:.3g}" for name in LOOKS),
            ", ".join(look["out"]),
        )
        for look in found.looks
    ]
    if rows:
        show_table(console, ("edits", *(name.replace("_", " ") for name in LOOKS), "out of its band"), rows)
    if collapse := found.collapse:
        console.print(f"it broke by edit {collapse['edits']}: {', '.join(collapse['out'])}")
    return record


def _edits(found: Sequence) -> list[dict[str, Any]]:
    """Each fact by its number: why it is not written, where it is not, and whether the last look found its new target above the true one (None: not asked)."""
    stood = {str(number): held for number, held in found.looks[-1]["row"].items()} if found.looks else {}
    return [
        {"number": number, "prompt": (fact := entry.as_fact).prompt, "target_new": str(fact.target_new), "why": "" if entry.row >= 0 else entry.why,
         "stands": stood.get(str(number)) if entry.row >= 0 else None}
        for number, entry in enumerate(found.entries)
    ]  # fmt: skip
