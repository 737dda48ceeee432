"""The commands edit, apply, compose, diff, export, tune, moments and merge."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.options import PRESET, add_command, add_json, add_prompt, add_settings, add_text, given_settings
from mechedit.cli.terminal import (
    UsageError,
    check_files,
    check_places,
    console_of,
    keeping,
    load_model,
    progress_bars,
    show_edit,
    show_files,
    show_moment,
    show_notes,
    show_table,
    write_json,
)
from mechedit.settings import CONSTANTS, MomentSettings, RomeSettings, TuneSettings

if TYPE_CHECKING:
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.moments import Corpus, Moment
    from mechedit.progress import Progress

__all__ = ["add_editing"]


def add_editing(commands: Any) -> None:
    """edit, apply, compose, diff, export, tune; moments and merge"""
    edit = add_command(commands, "edit", _edit, "rewrite a fact by a rank-one change of one W_out", model=True, note=PRESET.format("layer, clamp and prefixes"))  # fmt: skip
    add_prompt(edit, required=False)
    edit.add_argument("--target", help="what the model shall say instead")
    edit.add_argument("--true", help="the answer it replaces (default: what the model says)")
    edit.add_argument(
        "--facts",
        metavar="FILE",
        help="edit every fact of a JSON file, of `built-in` or of `organism`, each alone, into --out DIR",
    )
    edit.add_argument("--limit", type=int, metavar="N", help="of --facts, the first N")
    edit.add_argument(
        "--constants", choices=CONSTANTS, help="constants of v* as published, or as the paper's text has them"
    )
    add_settings(edit, RomeSettings)
    add_text(edit)
    edit.add_argument("--moment", type=Path, metavar="FILE", help="C from a file of mechedit, or a published .npz")
    edit.add_argument(
        "--out", type=Path, metavar="FILE", help="write the edit there (.safetensors); with --facts a folder"
    )
    add_json(edit)

    apply = add_command(
        commands, "apply", _apply, "apply saved edits and show what the model says before and after", model=True
    )
    apply.add_argument("files", type=Path, nargs="+", metavar="FILE")
    apply.add_argument(
        "--prompt", action="append", default=[], help="also complete this prompt; may be given more than once"
    )
    apply.add_argument("--force", action="store_true", help="apply even to other weights than the edit was made for")
    add_json(apply)

    compose = add_command(commands, "compose", _compose, "make one edit file of several; no model is loaded")
    compose.add_argument("files", type=Path, nargs="+", metavar="FILE")
    compose.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it goes (.safetensors)")

    diff = add_command(commands, "diff", _diff, "show how alike what two edits write is; no model is loaded")
    diff.add_argument("files", type=Path, nargs=2, metavar="FILE")
    add_json(diff)

    export = add_command(
        commands, "export", _export, "write an edited model, or its edits as a LoRA adapter", model=True
    )
    export.add_argument("files", type=Path, nargs="+", metavar="FILE")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--adapter", action="store_true", help="a LoRA adapter for peft, not the whole model")
    export.add_argument("--force", action="store_true", help="even from other weights than the edits were made for")

    tune = add_command(commands, "tune", _tune, "propose a layer, clamp and learning rate for a model", model=True)
    tune.add_argument("--facts", metavar="FILE", default="built-in", help="facts with new targets (default: built-in)")
    tune.add_argument("--begin", type=int, default=0, metavar="N", help="leave the first N out, to report on")
    add_settings(tune, TuneSettings)
    tune.add_argument("--out", type=Path, required=True, metavar="DIR", help="every trace and edit is kept there")
    add_json(tune)

    _add_moments(commands)


def _add_moments(commands: Any) -> None:
    """moments, merge"""
    moments = add_command(
        commands, "moments", _moments, "estimate C, the second moment of a layer's keys, into the cache", model=True
    )
    moments.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, from 0, in one pass (default: the model's preset)"
    )
    add_text(moments)
    moments.add_argument(
        "--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, or a folder of one, instead"
    )
    for name, default in (("config", None), ("split", "train"), ("column", "text"), ("revision", None)):
        moments.add_argument(f"--{name}", default=default, help=f"of the dataset (default: {default or 'its own'})")
    add_settings(moments, MomentSettings)
    moments.add_argument("--out", type=Path, metavar="FILE", help="also write it there (.safetensors); of one layer")
    add_json(moments)

    merge = add_command(
        commands, "merge", _merge, "put second moments of parts of a text, or of several texts, together"
    )
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the whole goes (.safetensors)")
    add_json(merge)


def _edit(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from mechedit import edits, models
    from mechedit.editors import rome

    given: dict[str, Any] = CONSTANTS.get(arguments.constants, {}) | given_settings(arguments, RomeSettings)
    RomeSettings(**given)  # mistakes are reported before the model is loaded
    if arguments.text and arguments.moment:
        raise UsageError("C comes from --text or from --moment, not from both.")
    if arguments.facts:
        chosen = _facts_to_edit(arguments)
    elif None in (arguments.prompt, arguments.subject, arguments.target):
        raise UsageError("edit needs PROMPT, --subject and --target, or --facts FILE and --out DIR.")
    else:
        chosen = [_fact_to_edit(arguments)]
        check_places(arguments.json, arguments.out)
    check_files(*arguments.text, arguments.moment)
    moment = _given_moment(arguments)
    model = load_model(arguments)
    known = models.preset(model)
    settings = rome.resolve(model, replace(known.rome if known else RomeSettings(), **given))
    with progress_bars() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", rome.EditWarning)  # `show_edit` has the reasons
        moment = moment or _moment(arguments, model, settings, progress)
        for note in moment.notes if moment else ():
            console_of(arguments).print(f"note on C: {note}.", markup=False, highlight=False)
        if arguments.facts:
            return _edit_facts(arguments, model, chosen, settings, moment, progress)
        edit = rome.edit(model, chosen[0], settings, moment, progress=progress)
    console = console_of(arguments)
    show_edit(console, edit.to_json())
    if arguments.out:
        show_files(console, [edits.save(edit, arguments.out)])
    write_json(arguments.json, edit.to_json())
    return None


def _fact_to_edit(arguments: argparse.Namespace) -> Fact:
    from mechedit.facts import from_prompt

    return from_prompt(
        arguments.prompt,
        arguments.subject,
        target_true=arguments.true,
        target_new=arguments.target,
        occurrence=arguments.occurrence,
    )


def _facts_to_edit(arguments: argparse.Namespace) -> list[Fact]:
    """The facts of --facts, checked before anything is loaded."""
    from mechedit import facts

    if arguments.out is None:
        raise UsageError("--facts needs --out DIR, where each edit is kept as soon as it is done.")
    alone = ("prompt", "subject", "target", "true", "occurrence")
    if any(getattr(arguments, name) is not None for name in alone):
        raise UsageError(f"--facts takes its facts from the file; leave out {', '.join(alone)}.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit must be at least 1; found {arguments.limit}.")
    chosen = list(facts.named(arguments.facts))[: arguments.limit]
    if not any(fact.target_new for fact in chosen):
        raise UsageError(f"no fact of {arguments.facts} has a new target; COUNTERFACT and zsRE files have.")
    if arguments.out.is_file():
        raise UsageError(f"--out {arguments.out} is a file; with --facts it is a folder, with a file for each fact.")
    check_places(arguments.json, arguments.out / "edits.json")
    return chosen


def _given_moment(arguments: argparse.Namespace) -> Moment | None:
    """C of --moment where its file says whose it is; None for the rest."""
    from mechedit.moments import Moment

    given = arguments.moment
    return Moment.load(given) if given and given.suffix != ".npz" else None


def _moment(
    arguments: argparse.Namespace, model: HookedModel, settings: RomeSettings, progress: Progress
) -> Moment | None:
    """C from a published file or from text, as the options say; None for the default."""
    from mechedit import moments

    if arguments.moment:
        return moments.read_published(arguments.moment, model, settings.layer)
    if arguments.text:
        windows = MomentSettings(prepend_bos=settings.prepend_bos)
        return moments.estimate(model, settings.layer, arguments.text, windows, progress=progress)
    return None


def _edit_facts(
    arguments: argparse.Namespace,
    model: HookedModel,
    chosen: list[Fact],
    settings: RomeSettings,
    moment: Moment | None,
    progress: Progress,
) -> None:
    from mechedit import edits
    from mechedit.runs.editing import edit_facts
    from mechedit.runs.tracing import unit

    with keeping(f"finished edits are kept in {arguments.out}"):
        found = edit_facts(model, chosen, arguments.out, settings, moment, progress=progress)
    console = console_of(arguments)
    rows = [
        (
            edit.fact["prompt"],
            str(edit.fact["target_new"]),
            *(f"{p['p_new']:.3f}" if p else "-" for p in (edit.before, edit.after)),
            "yes" if edit.changes else "no",
        )
        for edit in found
    ]
    show_table(console, ("prompt", "new target", "P before", "P after", "edited"), rows)
    for edit in found:
        for word in edit.reasons or edit.notes:
            console.print(f"{edit.fact['prompt']}: {word}", markup=False, highlight=False)
    done = sum(bool(edit.changes) for edit in found)
    console.print(f"{done} of {len(found)} facts edited, each alone; their files are in {arguments.out / 'units'}")
    record = [
        {"file": f"units/{unit(fact)}.safetensors"} | edit.to_json() for fact, edit in zip(chosen, found, strict=True)
    ]
    written = write_json(arguments.out / "edits.json", record)
    show_files(console, written + write_json(arguments.json, record))
    if not done:
        raise edits.EditError(f"none of the {len(found)} facts was edited; why is said above.")


def _apply(arguments: argparse.Namespace) -> None:
    from mechedit import edits, generation

    loaded = [edits.load(path) for path in arguments.files]
    check_places(arguments.json)
    model = load_model(arguments)
    if not arguments.force:
        edits.check(model, loaded)
    own = [part["prompt"] for edit in loaded for part in edit.details.get("parts", [edit.fact])]
    asked = [*dict.fromkeys([*own, *arguments.prompt])]
    before = {prompt: generation.complete(model, prompt) for prompt in asked}
    with edits.edited(model, *loaded, force=True):
        after = {prompt: generation.complete(model, prompt) for prompt in asked}
    console = console_of(arguments)
    show_table(console, ("prompt", "before", "after"), [(prompt, before[prompt], after[prompt]) for prompt in asked])
    show_notes(console, dict(zip(arguments.files, loaded, strict=True)))
    write_json(
        arguments.json,
        {
            "model": arguments.model,
            "files": [str(path) for path in arguments.files],
            "completions": [{"prompt": prompt, "before": before[prompt], "after": after[prompt]} for prompt in asked],
        },
    )


def _compose(arguments: argparse.Namespace) -> None:
    from mechedit import edits

    if arguments.out.resolve() in {path.resolve() for path in arguments.files}:
        raise UsageError(f"--out {arguments.out} is one of the edits that are composed; name another file.")
    check_places(arguments.out)
    loaded = [edits.load(path) for path in arguments.files]
    console = console_of(arguments)
    show_files(console, [edits.save(edits.compose(*loaded), arguments.out)])
    show_notes(console, dict(zip(arguments.files, loaded, strict=True)))


def _diff(arguments: argparse.Namespace) -> None:
    from mechedit import edits

    check_places(arguments.json)
    first, second = (edits.load(path) for path in arguments.files)
    found = edits.diff(first, second)
    console = console_of(arguments)
    if first.origin["weight_hash"] != second.origin["weight_hash"]:
        console.print("note: these edits were made for different weights", highlight=False)
    if not found:
        layers = [", ".join(str(change.layer) for change in edit.changes) or "none" for edit in (first, second)]
        console.print(f"they write in no layer together: {layers[0]}; {layers[1]}", highlight=False)
    else:
        rows = [
            (
                str(each.layer),
                *(f"{value:.3f}" if value == value else "" for value in (each.u, each.step, each.change, each.ratio)),
            )
            for each in found
        ]
        show_table(console, ("layer", "cos of u", "cos of step", "cos of change", "norm ratio"), rows)
    write_json(arguments.json, [vars(each) for each in found])


def _export(arguments: argparse.Namespace) -> None:
    from mechedit import edits, export

    loaded = [edits.load(path) for path in arguments.files]
    write = export.adapter if arguments.adapter else export.checkpoint
    export.check_folder(arguments.out)
    folder = write(load_model(arguments), arguments.model, loaded, arguments.out, force=arguments.force)
    show_files(console_of(arguments), sorted(folder.iterdir()))


def _tune(arguments: argparse.Namespace) -> None:
    from mechedit import facts, models, tuning

    settings = TuneSettings(**given_settings(arguments, TuneSettings))
    if arguments.begin < 0:
        raise UsageError(f"--begin must be 0 or more; found {arguments.begin}.")
    chosen = facts.named(arguments.facts)
    if arguments.begin >= len(chosen):
        raise UsageError(f"--begin {arguments.begin} leaves no fact of the {len(chosen)} in {arguments.facts}.")
    check_places(arguments.json, arguments.out / "tuned.json")
    model = load_model(arguments)
    known = models.preset(model)
    with keeping(f"finished traces and edits are kept in {arguments.out}"), progress_bars() as progress:
        found = tuning.tune(
            model,
            chosen[arguments.begin :],
            arguments.out,
            settings,
            known.rome if known else None,
            progress=progress,
        )
    console = console_of(arguments)
    console.print(f"traced {found.traced} facts; early site: {found.site}", markup=False, highlight=False)
    names = ("ES", "PS", "NS", "S", "relative_norm", "perplexity_ratio", "within")
    rows = [
        (str(row.layer), f"{row.clamp:g}", f"{row.learning_rate:g}", *(f"{getattr(row, name):.3g}" for name in names))
        for row in found.rows
    ]
    show_table(console, ("layer", "clamp", "rate", *(name.replace("_", " ") for name in names)), rows)
    best = found.settings
    console.print(
        f"proposed: --layer {best.layer} --clamp {best.clamp:g} --learning-rate {best.learning_rate:g}"
        if found.worked
        else "no edit succeeded, so nothing is proposed; give larger --clamps, or more layers (--around)",
        highlight=False,
    )
    written = write_json(arguments.out / "tuned.json", found.to_json())
    show_files(console, written + write_json(arguments.json, found.to_json()))


def _moments(arguments: argparse.Namespace) -> None:
    from mechedit import moments
    from mechedit.editors import rome

    settings = MomentSettings(**given_settings(arguments, MomentSettings))
    wanted = [RomeSettings(layer=layer) for layer in arguments.layer]
    if arguments.out and len(arguments.layer) > 1:
        raise UsageError("--out is a file for one layer; several layers are kept in the cache.")
    if arguments.dataset and arguments.text:
        raise UsageError("C comes from --text or from --dataset, not from both.")
    check_places(arguments.json, arguments.out)
    check_files(*arguments.text)
    texts: list[str | Path | Corpus] = list(arguments.text)
    if arguments.dataset:
        texts = [
            moments.Corpus(arguments.dataset, arguments.config, arguments.split, arguments.column, arguments.revision)
        ]
    model = load_model(arguments)
    layers = [rome.resolve(model, each).layer for each in wanted]
    kept = keeping("what is summed so far is kept in the cache")
    with kept, progress_bars() as progress:
        found = moments.estimate_layers(model, layers, texts, settings, progress=progress)
    console = console_of(arguments)
    for moment in found.values():
        show_moment(console, moment)
    if arguments.out:
        show_files(console, [found[layers[0]].save(arguments.out)])
    records = [moment.to_json() for moment in found.values()]
    write_json(arguments.json, records[0] if len(records) == 1 else records)


def _merge(arguments: argparse.Namespace) -> None:
    from mechedit import moments

    check_places(arguments.json, arguments.out)
    whole = moments.merge([moments.Moment.load(path) for path in arguments.files])
    console = console_of(arguments)
    show_moment(console, whole)
    show_files(console, [whole.save(arguments.out)])
    write_json(arguments.json, whole.to_json())
