"""The command edit: one fact, or every fact of a file, each alone or one on top of the other."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from mechedit.cli.choosing import add_editor, chosen_editor, given_edit_settings, resolved
from mechedit.cli.options import PRESET, a_path, add_command, add_json, add_prompt, add_text, an_integer
from mechedit.cli.sequencing import add_sequencing, check_learning, check_sequencing, check_taking_out, edit_in_sequence
from mechedit.cli.terminal import (
    UsageError,
    check_files,
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_files,
    show_table,
    write_json,
)
from mechedit.settings import MemitSettings, MomentSettings

if TYPE_CHECKING:
    from rich.console import Console

    from mechedit.editing import Editor, Prepared
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.moments import Moment
    from mechedit.progress import Progress

__all__ = ["add_editing", "show_edit"]

SHOWN = 10  # neurons
FACTS = 20  # of an edit of many
REPORTED = {"cond_C": "cond(C)", "divisor_share": "divisor share"}
EXPLAINED = {
    "update_norm": ", update norm {:.3g}",
    "relative_norm": " ({:.1%} of the weight's)",
    "perplexity_ratio": "; perplexity of other text x {:.3f} (1: as before)",
    "essence_kl": "; KL after '{subject} is a' {:.2f} (0: as before)",
}


def add_editing(commands: Any, editor: str) -> None:
    """edit"""
    edit = add_command(
        commands, "edit", _edit, "rewrite a fact in the weights", model=True, note=PRESET.format("layer and constants")
    )
    add_prompt(edit, required=False)
    edit.add_argument("--target", help="what the model shall say instead")
    edit.add_argument("--true", help="the answer it replaces (default: what the model says)")
    edit.add_argument(
        "--facts",
        metavar="FILE",
        help="edit every fact of a JSON file, of `built-in` or of `organism`, each alone, into --out DIR",
    )
    edit.add_argument("--limit", type=an_integer, metavar="N", help="of --facts, the first N")
    add_sequencing(edit)
    add_text(edit)
    edit.add_argument(
        "--moment",
        type=a_path,
        metavar="FILE",
        help="of ROME, and of editors of many facts in one block: C from a file of mechedit, or a published .npz",
    )
    edit.add_argument(
        "--out", type=a_path, metavar="FILE", help="write the edit there (.safetensors); with --facts a folder"
    )
    add_json(edit)
    add_editor(edit, editor)  # the last, so that it sees which names are taken


def _edit(arguments: argparse.Namespace) -> None:
    from mechedit import edits, prompts
    from mechedit.editing import EditWarning, edit

    given = given_edit_settings(arguments)  # mistakes are reported before the model is loaded
    editor = chosen_editor(arguments)
    _check_moment_options(arguments, editor)
    check_sequencing(arguments)
    if arguments.facts:
        chosen = _facts_to_edit(arguments)
    elif None in (arguments.prompt, arguments.subject, arguments.target):
        raise UsageError("edit needs PROMPT, --subject and --target, or --facts FILE and --out DIR.")
    elif arguments.limit is not None:
        raise UsageError("--limit chooses among --facts; leave it out.")
    else:
        chosen = [_fact_to_edit(arguments)]
        check_places(arguments.json, arguments.out)
    moment = _given_moment(arguments)
    model = load_model(arguments)
    settings = resolved(model, editor, given)
    with progress_bars() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # `show_edit` has the reasons
        if arguments.sequence:
            check_learning(arguments, editor, settings)
            check_taking_out(arguments, editor, settings, len(chosen))
        prepared = _prepared(arguments, model, settings, moment, progress)
        if arguments.sequence:
            return edit_in_sequence(arguments, model, chosen, editor, settings, prepared, progress)
        if arguments.facts:
            return _edit_facts(arguments, model, chosen, editor, settings, prepared, progress)
        made = edit(model, chosen[0], editor, settings, prepared=prepared, progress=progress)
    written = [edits.save(made, arguments.out)] if arguments.out else []
    found = {"neurons": made.details["neurons"][0]} if made.editor == "kn" else {}
    write_json(arguments.json, made.to_json() | found)
    console = console_of(arguments)
    for note in prompts.doubts(model, chosen[0], prepend_bos=settings.prepend_bos):
        console.print(f"note: {note}")
    show_edit(console, made.to_json())
    _show_neurons(console, found.get("neurons", []))
    show_files(console, written, "" if arguments.json else "--out FILE keeps the edit")
    return None


def show_edit(console: Console, edit: dict[str, Any]) -> None:
    """An edit as JSON: its facts, what it writes, and what was measured of both; of an edit of many less was than of one alone."""
    facts, parts, reasons = edit.get("facts", [edit]), edit.get("parts", ()), edit["reasons"]
    measured = any(fact["before"] for fact in facts)
    if not (edit["changes"] or edit.get("told") or measured):
        more = f", and {len(facts) - 1} more" if len(facts) > 1 else ""
        console.print(f"{edit['prompt']} -> {edit['target_new']}{more}: not edited; {'; '.join(reasons)}")
        return
    if len(facts) == 1 and measured:
        rows = [
            (f"P({edit[f'target_{name}']})", *(_p(edit[when], f"p_{name}") for when in ("before", "after")))
            for name in ("new", "true")
        ]
        show_table(console, (edit["prompt"], "before", "after"), rows)
    else:
        _show_facts(console, facts, measured=measured)
    if parts and measured:
        console.print("probabilities are those of each part alone, measured when it was found")
    console.print(f"{_made(edit, len(parts))}: {_writes(edit)}. docs/editing.md says what these are")
    for reason in reasons:
        console.print(f"{'of a part' if parts else 'out of its band'}: {reason}")
    for note in edit["notes"]:
        console.print(f"note: {note}.")


def _show_facts(console: Console, facts: list[dict[str, Any]], *, measured: bool) -> None:
    """A fact a row."""
    rows = [
        (fact["prompt"], str(fact["target_new"]), *measured * (_p(fact["before"], "p_new"), _p(fact["after"], "p_new")))
        for fact in facts[:FACTS]
    ]
    show_table(console, ("prompt", "new target", *measured * ("P before", "P after")), rows)
    if len(facts) > FACTS:
        console.print(f"and {len(facts) - FACTS} more")


def _p(found: dict[str, float], name: str) -> str:
    return f"{found[name]:.4f}" if name in found else "-"


def _made(edit: dict[str, Any], parts: int) -> str:
    """Who made it, of how many parts, and in which time where that was kept."""
    of = f" of {parts} edit{'s' * (parts != 1)}" if parts else ""
    return f"{edit['editor']}{of}" + (f" in {edit['seconds']:.1f} s" if edit["seconds"] == edit["seconds"] else "")


def _writes(edit: dict[str, Any]) -> str:
    """Where it writes, and every number of its report."""
    weights = ", ".join(dict.fromkeys(each["weight"] for each in edit["changes"])) or "no weight"
    layers = sorted({each["layer"] for each in edit["changes"]} or {edit["layer"]} - {-1})
    where = f"{weights} of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else weights
    report, subject = edit["edit"], "X" if "facts" in edit else edit["subject"]
    known = [text.format(report[name], subject=subject) for name, text in EXPLAINED.items() if name in report]
    own = [f"; {REPORTED.get(name, name)} {value:.4g}" for name, value in report.items() if name not in EXPLAINED]
    return "".join([where, *known, *own])


def _show_neurons(console: Console, neurons: list[dict[str, Any]]) -> None:
    """The strongest of them, one a line."""
    rows = [tuple(f"{each[name]:.3g}" for name in ("layer", "index", "attribution", "share")) for each in neurons]
    if rows:
        show_table(console, ("layer", "neuron", "attribution", "share of prompts"), rows[:SHOWN])
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} neurons more")


def _check_moment_options(arguments: argparse.Namespace, editor: Editor) -> None:
    from mechedit.editors.many import Memit
    from mechedit.editors.rome import Rome

    if arguments.text and arguments.moment:
        raise UsageError("C comes from --text or from --moment, not from both.")
    if (arguments.text or arguments.moment) and not (type(editor) is Rome or isinstance(editor, Memit)):
        raise UsageError(
            f"--text and --moment give ROME and the editors of many facts their C; the editor {editor.name} takes none."
        )
    check_files(*arguments.text, arguments.moment)


def _fact_to_edit(arguments: argparse.Namespace) -> Fact:
    from mechedit.facts import from_prompt

    return from_prompt(
        arguments.prompt,
        arguments.subject,
        target_true=arguments.true,
        target_new=arguments.target,
        occurrence=arguments.occurrence,
        join=arguments.join or "auto",
    )


def _facts_to_edit(arguments: argparse.Namespace) -> list[Fact]:
    """The facts of --facts, checked before anything is loaded."""
    from mechedit import sources
    from mechedit.runs.results import check_kept

    if arguments.out is None:
        raise UsageError("--facts needs --out DIR, where each edit is kept as soon as it is done.")
    alone = ("prompt", "subject", "target", "true", "occurrence", "join")
    if any(getattr(arguments, name) is not None for name in alone):
        raise UsageError(f"--facts takes its facts from the file; leave out {', '.join(alone)}.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit must be at least 1; found {arguments.limit}.")
    chosen = list(sources.named(arguments.facts))[: arguments.limit]
    if not any(fact.target_new for fact in chosen):
        raise UsageError(f"no fact of {arguments.facts} has a new target; COUNTERFACT and zsRE files have.")
    if arguments.out.is_file():
        raise UsageError(f"--out {arguments.out} is a file; with --facts it is a folder, of all edits.")
    check_places(arguments.json, arguments.out / "edits.json")
    if not arguments.sequence:  # which has a guard of its own
        check_kept(arguments.out / "edits.json", chosen)
    return chosen


def _given_moment(arguments: argparse.Namespace) -> Moment | None:
    """C of --moment where its file says whose it is; None for the rest."""
    from mechedit.moments import Moment

    given = arguments.moment
    return Moment.load(given) if given and given.suffix != ".npz" else None


def _prepared(
    arguments: argparse.Namespace, model: HookedModel, settings: Any, moment: Moment | None, progress: Progress
) -> Prepared | None:
    """What the editor needs with C from a file, or C and G from text, as the options say; None for what it makes itself."""
    from mechedit import moments
    from mechedit.editors import many, rome

    if moment is None and not (arguments.text or arguments.moment):
        return None
    fisher, layers = None, getattr(settings, "blocks", (settings.layer,))
    if arguments.text:
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        found = moments.estimate_layers(model, layers, arguments.text, windows, progress=progress)
        if settings.fisher:
            fisher = moments.fisher(model, settings.layer, arguments.text, windows, progress=progress)
    elif len(layers) > 1:
        raise UsageError(f"--moment gives C of one block, and the change is spread over {len(layers)}; give --text.")
    else:
        found = {settings.layer: moment or moments.read_published(arguments.moment, model, settings.layer)}
    for note in dict.fromkeys(note for each in found.values() for note in each.notes):
        console_of(arguments).print(f"note on C: {note}.")
    if isinstance(settings, MemitSettings):
        return many.prepare(model, settings, [found[layer] for layer in layers], fisher=fisher, progress=progress)
    return rome.prepare(model, settings, found[settings.layer], fisher=fisher, progress=progress)


def _edit_facts(
    arguments: argparse.Namespace,
    model: HookedModel,
    chosen: list[Fact],
    editor: Editor,
    settings: Any,
    prepared: Prepared | None,
    progress: Progress,
) -> None:
    from mechedit import edits
    from mechedit.runs.editing import edit_facts
    from mechedit.runs.tracing import unit

    with keeping(f"finished edits are kept in {arguments.out}"):
        found = edit_facts(model, chosen, arguments.out, editor, settings, prepared, progress=progress)
    record = [{"unit": unit(fact)} | edit.to_json() for fact, edit in zip(chosen, found, strict=True)]
    written = write_json(arguments.out / "edits.json", record) + write_json(arguments.json, record)
    console = console_of(arguments)
    rows = [
        (
            edit.fact["prompt"],
            str(edit.fact["target_new"]),
            *(f"{p['p_new']:.3f}" if p else "-" for p in (edit.before, edit.after)),
            "no" if edit.is_empty else "yes",
        )
        for edit in found
    ]
    show_table(console, ("prompt", "new target", "P before", "P after", "edited"), rows)
    for edit in found:
        for word in edit.reasons or edit.notes:
            console.print(f"{edit.fact['prompt']}: {word}")
    done = sum(not edit.is_empty for edit in found)
    console.print(
        f"{done} of {len(found)} facts edited, each alone; `mechedit show {arguments.out} --export DIR` writes a file each"
    )
    show_files(console, written)
    if not done:
        raise edits.EditError(f"none of the {len(found)} facts was edited; why is said above.")
