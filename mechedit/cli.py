"""The `mechedit` command: thin, its options generated from the settings that Python uses.

Nothing heavy is imported before it is needed, so help answers at once. A mistake of the caller's ends in one line on
standard error and exit status 2; Ctrl-C in 130, with the model's weights untouched.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mechedit import __version__
from mechedit.errors import MecheditError
from mechedit.settings import (
    CONSTANTS,
    KINDS,
    KNOWN_KINDS,
    PREFIXES,
    MomentSettings,
    RomeSettings,
    TraceSettings,
    TuneSettings,
    knobs,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mechedit.corruption import Statistics
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.moments import Corpus, Moment
    from mechedit.progress import Progress
    from mechedit.tracing import Trace
    from mechedit.tracing.averages import Average

__all__ = ["main"]

DEFAULT_MODEL = "gemma-3-270m"


class UsageError(MecheditError, ValueError):
    """Options that do not go together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except MecheditError as error:
        sys.stderr.write(f"mechedit: {error}\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"mechedit: interrupted; {error or 'nothing was changed and no result was written'}.\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


# --- options ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. `{self.prog} --help` lists the options.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mechedit", description="Find where a transformer recalls a fact, and rewrite it there.")
    parser.add_argument("--version", action="version", version=f"mechedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_tracing(commands)
    _add_editing(commands)
    _add_looking(commands)
    return parser


def _add_tracing(commands: Any) -> None:
    """demo, trace, sever"""
    demo = _command(commands, "demo", _demo, "trace and edit one fact, and show what happened", model=True)
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("mechedit-demo"),
        metavar="DIR",
        help="folder for pictures, trace and edit (default: mechedit-demo)",
    )

    trace = _command(commands, "trace", _trace, "find where the model recalls a fact, or many facts", model=True)
    _add_prompt(trace, required=False)
    trace.add_argument("--answer", help="the answer to measure (default: what the model says)")
    trace.add_argument("--other", help="with --corruption tokens: the subject that takes the subject's place")
    trace.add_argument(
        "--facts", metavar="FILE", help="trace every fact of a JSON file, or of `built-in`, into --out, and average"
    )
    trace.add_argument("--limit", type=int, metavar="N", help="with --facts: the first N that remain")
    trace.add_argument(
        "--unknown", action="store_true", help="with --facts: keep facts whose answer the model does not put first"
    )
    trace.add_argument(
        "--sigma-from", metavar="FILE", help="text file, or `subjects` of --facts: take sigma from its tokens"
    )
    _add_settings(trace, TraceSettings)
    trace.add_argument(
        "--out", type=Path, metavar="DIR", help="write heat maps and traces there; a run over facts resumes from it"
    )
    _add_json(trace)

    sever = _command(commands, "sever", _sever, "trace a restored state with MLPs or attention cut off", model=True)
    _add_prompt(sever)
    sever.add_argument("--answer", help="the answer to measure (default: what the model says)")
    sever.add_argument("--other", help="with --corruption tokens: the subject that takes the subject's place")
    sever.add_argument("--role", default="subject_last", help="token role that is restored (default: subject_last)")
    _add_settings(sever, TraceSettings, without=("kinds", "window", "centre", "roles"))  # of grids
    sever.add_argument("--out", type=Path, metavar="DIR", help="write the curves, as picture and as file, there")
    _add_json(sever)


def _add_editing(commands: Any) -> None:
    """edit, apply, compose, diff, export, tune, moments, merge"""
    edit = _command(commands, "edit", _edit, "rewrite a fact by a rank-one change of one W_out", model=True)
    _add_prompt(edit, required=False)
    edit.add_argument("--target", help="what the model shall say instead")
    edit.add_argument("--true", help="the answer it replaces (default: what the model says)")
    edit.add_argument(
        "--facts", type=Path, metavar="FILE", help="edit every fact of a JSON file, each alone, into --out DIR"
    )
    edit.add_argument("--limit", type=int, metavar="N", help="of --facts, the first N")
    edit.add_argument(
        "--constants", choices=CONSTANTS, help="constants of v* as published, or as the paper's text has them"
    )
    _add_settings(edit, RomeSettings)
    _add_text(edit)
    edit.add_argument("--moment", type=Path, metavar="FILE", help="C from a file of mechedit, or a published .npz")
    edit.add_argument(
        "--out", type=Path, metavar="FILE", help="write the edit there (.safetensors); with --facts a folder"
    )
    _add_json(edit)

    apply = _command(
        commands, "apply", _apply, "apply saved edits and show what the model says before and after", model=True
    )
    apply.add_argument("files", type=Path, nargs="+", metavar="FILE")
    apply.add_argument(
        "--prompt", action="append", default=[], help="also complete this prompt; may be given more than once"
    )
    apply.add_argument("--force", action="store_true", help="apply even to other weights than the edit was made for")
    _add_json(apply)

    compose = _command(commands, "compose", _compose, "make one edit file of several; no model is loaded")
    compose.add_argument("files", type=Path, nargs="+", metavar="FILE")
    compose.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it goes (.safetensors)")

    diff = _command(commands, "diff", _diff, "show how alike what two edits write is; no model is loaded")
    diff.add_argument("files", type=Path, nargs=2, metavar="FILE")
    _add_json(diff)

    export = _command(commands, "export", _export, "write an edited model, or its edits as a LoRA adapter", model=True)
    export.add_argument("files", type=Path, nargs="+", metavar="FILE")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument("--adapter", action="store_true", help="a LoRA adapter for peft, not the whole model")
    export.add_argument("--force", action="store_true", help="even from other weights than the edits were made for")

    tune = _command(commands, "tune", _tune, "propose a layer, clamp and learning rate for a model", model=True)
    tune.add_argument("--facts", metavar="FILE", default="built-in", help="facts with new targets (default: built-in)")
    tune.add_argument("--begin", type=int, default=0, metavar="N", help="leave the first N out, to report on")
    _add_settings(tune, TuneSettings)
    tune.add_argument("--out", type=Path, required=True, metavar="DIR", help="every trace and edit is kept there")
    _add_json(tune)

    moments = _command(
        commands, "moments", _moments, "estimate C, the second moment of a layer's keys, into the cache", model=True
    )
    moments.add_argument(
        "--layer", type=int, nargs="+", default=[-1], help="blocks, from 0, in one pass (default: the model's preset)"
    )
    _add_text(moments)
    moments.add_argument(
        "--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, or a folder of one, instead"
    )
    for name, default in (("config", None), ("split", "train"), ("column", "text"), ("revision", None)):
        moments.add_argument(f"--{name}", default=default, help=f"of the dataset (default: {default or 'its own'})")
    _add_settings(moments, MomentSettings)
    moments.add_argument("--out", type=Path, metavar="FILE", help="also write it there (.safetensors); of one layer")
    _add_json(moments)

    merge = _command(commands, "merge", _merge, "put second moments of parts of a text, or of several texts, together")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the whole goes (.safetensors)")
    _add_json(merge)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files to estimate C on (default: text sampled from the model)",
    )


def _add_looking(commands: Any) -> None:
    """inspect, audit, models, doctor"""
    inspect = _command(
        commands, "inspect", _inspect, "show what is in an edit, trace or moment file; no model is loaded"
    )
    inspect.add_argument("file", type=Path, metavar="FILE")
    _add_json(inspect)

    audit = _command(
        commands,
        "audit",
        _audit,
        "show a prompt's tokens, subject span and target ids, and what looks wrong",
        model=True,
    )
    _add_prompt(audit)
    audit.add_argument("--answer", help="the true answer")
    audit.add_argument("--target", help="a new answer")

    models = _command(
        commands, "models", _models, "list the models that can be loaded, or check one against Hugging Face"
    )
    models.add_argument("--check", metavar="NAME", help="compare this model's logits with Hugging Face's")
    _add_json(models)

    doctor = _command(commands, "doctor", _doctor, "check that this installation works")
    _add_json(doctor)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, *, model: bool = False
) -> argparse.ArgumentParser:
    described = help[0].upper() + help[1:] + "."
    if name == "edit":
        described += (
            " A model with a preset (`mechedit models`) has the preset's layer and clamp instead of the defaults below."
        )
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=described)
    parser.set_defaults(run=run)
    if model:
        parser.add_argument(
            "--model",
            default=DEFAULT_MODEL,
            help=f"local folder, packaged model or hub name (default: {DEFAULT_MODEL})",
        )
        parser.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            default="float32",
            help="number format of the weights (default: float32)",
        )
    return parser


def _add_prompt(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs=None if required else "?",
        help="the whole prompt, which contains the subject",
    )
    parser.add_argument("--subject", required=required, help="the subject, letter for letter as in the prompt")
    parser.add_argument(
        "--occurrence", type=int, help="which appearance of the subject, from 0, where there are several"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result as JSON there; - for standard output"
    )


def _add_settings(parser: argparse.ArgumentParser, settings: type, without: Sequence[str] = ()) -> None:
    """An option for each field of a settings dataclass, with its default and its sentence. An option not given is None."""
    for name, default, text in knobs(settings):
        flag = "--" + name.replace("_", "-")
        if name in without or flag in parser._option_string_actions:
            continue
        shown = "" if default is None else f" (default: {_shown(default)})"
        if default is None or isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(
                flag,
                type={tuple: _pairs, float: _numbers}.get(type(default[0]) if default else str, _names),
                metavar=_shown(default) or "NAME,…",
                help=text + (shown if default else ""),
            )
        else:
            parser.add_argument(
                flag,
                type=type(default),
                metavar=type(default).__name__.upper()[:5],
                help=(text + shown).replace("%", "%%"),
            )


def _given(arguments: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {
        name: getattr(arguments, name) for name, _, _ in knobs(settings) if getattr(arguments, name, None) is not None
    }


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in _names(text))


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    if text in PREFIXES:
        return PREFIXES[text]
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in _names(text)]
        return tuple((first, second) for first, second in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of TOKENSxHOWMANY such as 5x10,10x10, nor one of {', '.join(PREFIXES)}"
        ) from error


# --- commands ---------------------------------------------------------------------------------------------------------


def _trace(arguments: argparse.Namespace) -> None:
    from mechedit import figures, tracing
    from mechedit.tracing import accuracy

    settings = TraceSettings(**_given(arguments, TraceSettings))
    for kind in settings.kinds:
        if kind not in KNOWN_KINDS:
            raise UsageError(f"--kinds must be among {', '.join(KNOWN_KINDS)}; {kind!r} is not.")
    if arguments.facts:
        return _trace_facts(arguments, settings)
    if arguments.prompt is None or arguments.subject is None:
        raise UsageError("trace needs PROMPT and --subject, or --facts FILE and --out DIR.")
    fact = _fact(arguments)
    _check_places(arguments.json, arguments.out and arguments.out / "trace.safetensors")
    _check_files(arguments.sigma_from and arguments.sigma_from != "subjects" and Path(arguments.sigma_from))
    model = _load(arguments)
    known = _statistics(arguments, model, [fact])
    with _progress() as progress:
        trace = tracing.trace(model, fact, settings, known=known, other=arguments.other, progress=progress)
    console = _console(arguments)
    _show_trace(console, trace)
    record = trace.to_json()
    if not accuracy.is_exact(settings):
        error = accuracy.sample_error(model, fact, settings, known=known, other=arguments.other)
        console.print(f"not exact; against the model's own precision and ten draws, {error}", highlight=False)
        record["error"] = vars(error)
    written = [*figures.save(trace, arguments.out), trace.save(arguments.out / "trace.safetensors")] if arguments.out else []  # fmt: skip
    written += _write_json(arguments.json, record)
    _show_files(console, written)
    return None


def _fact(arguments: argparse.Namespace) -> Fact:
    from mechedit.facts import from_prompt

    return from_prompt(
        arguments.prompt, arguments.subject, target_true=arguments.answer, occurrence=arguments.occurrence
    )


def _statistics(arguments: argparse.Namespace, model: HookedModel, facts: Sequence[Fact]) -> Statistics | None:
    """Of the texts that --sigma-from names, or None for the vocabulary's."""
    from mechedit import corruption

    if not arguments.sigma_from:
        return None
    if arguments.sigma_from == "subjects":
        subjects = [fact.subject for fact in facts]
        return corruption.statistics(model, subjects, f"subjects of {len(subjects)} facts")
    path = Path(arguments.sigma_from)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--sigma-from must be a text file, or `subjects`; {path} cannot be read: {error}.") from error
    return corruption.statistics(model, [line for line in lines if line.strip()], f"text of {path.name}")


def _trace_facts(arguments: argparse.Namespace, settings: TraceSettings) -> None:
    from mechedit import facts, figures, sites
    from mechedit.runs import tracing as runs
    from mechedit.tracing import accuracy
    from mechedit.tracing.averages import average

    if arguments.out is None:
        raise UsageError("a run over facts is kept in a folder: give --out DIR.")
    if arguments.prompt is not None:
        raise UsageError("give PROMPT or --facts, not both.")
    chosen = list(facts.built_in() if arguments.facts == "built-in" else facts.read(arguments.facts))
    _check_places(arguments.json, arguments.out / "average.json")
    model = _load(arguments)
    console = _console(arguments)
    if not arguments.sigma_from:
        runs.check_run(model, arguments.out, settings)  # before every fact is asked
    with _progress() as progress:
        if not arguments.unknown:
            kept = runs.known(model, chosen, prepend_bos=settings.prepend_bos, progress=progress)
            console.print(f"the model knows {len(kept)} of {len(chosen)} facts", highlight=False)
            chosen = kept
        chosen = chosen[: arguments.limit]
        statistics = _statistics(arguments, model, chosen)
        there = runs.finished(chosen, arguments.out)
        if there:
            console.print(f"{there} of {len(chosen)} facts are in {arguments.out} already", highlight=False)
        try:
            traces = runs.trace_facts(model, chosen, arguments.out, settings, statistics=statistics, progress=progress)
        except KeyboardInterrupt:
            there = runs.finished(chosen, arguments.out)
            raise KeyboardInterrupt(
                f"{there} of {len(chosen)} facts are kept in {arguments.out}; the same command goes on from there"
            ) from None
    mean = average(traces, seed=settings.seed)
    if not accuracy.is_exact(settings) and settings.corruption != "tokens":
        error = accuracy.sample_error(model, chosen[0], settings, known=statistics)
        console.print(f"not exact; of {chosen[0].prompt!r}, against ten draws, {error}", markup=False, highlight=False)
    console.print(f"{mean.n} facts. clean {mean.clean}, corrupted {mean.corrupted}, total effect {mean.total}")
    _show_average(console, mean)
    for name, find in (("early", sites.early), ("late", sites.late)):
        with suppress(sites.SiteError):
            console.print(f"{name} site: {find(mean)}", markup=False, highlight=False)
    written = figures.save_average(mean, arguments.out) + _write_json(arguments.out / "average.json", mean.to_json())
    _show_files(console, written + _write_json(arguments.json, mean.to_json()))


def _show_average(console: Console, mean: Average) -> None:
    """The best layer of each kind and role, with its interval."""
    from mechedit.tracing.roles import ROLES, TITLES

    rows = []
    for role, n in zip(ROLES, mean.n_role, strict=True):
        column = ROLES.index(role)
        cells = []
        for kind, grid in mean.indirect.items():
            if grid[:, column].isnan().all():
                cells.append("")
                continue
            layer = int(grid[:, column].nan_to_num(-1e9).argmax())
            cells.append(f"{mean.at(kind, layer, role)} layer {layer}")
        if any(cells):
            rows.append((TITLES[role], str(n), *cells))
    _show_table(console, ("average indirect effect", "facts", *mean.indirect), rows)


def _sever(arguments: argparse.Namespace) -> None:
    from mechedit import figures
    from mechedit.tracing.severing import severed

    settings = TraceSettings(**_given(arguments, TraceSettings))
    fact = _fact(arguments)
    _check_places(arguments.json, arguments.out and arguments.out / "severed.safetensors")
    model = _load(arguments)
    with _progress() as progress:
        found = severed(model, fact, settings, role=arguments.role, other=arguments.other, progress=progress)
    console = _console(arguments)
    console.print(f"{found.prompt!r}: clean {found.p_clean:.3f}, corrupted {found.p_corrupted:.3f}", highlight=False)
    means = {name: curve.mean(-1).tolist() for name, curve in found.curves.items()}
    _show_table(
        console,
        ("layer", *means),
        [(str(layer), *(f"{curve[layer]:.3f}" for curve in means.values())) for layer in range(len(means["ordinary"]))],
    )
    if arguments.out:
        path = found.save(arguments.out / "severed.safetensors")
        _show_files(console, [*figures.save_severed([found], arguments.out), path])
    _write_json(arguments.json, found.to_json())


def _edit(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from mechedit import edits, models
    from mechedit.editors import rome

    given: dict[str, Any] = CONSTANTS.get(arguments.constants, {}) | _given(arguments, RomeSettings)
    RomeSettings(**given)  # mistakes are reported before the model is loaded
    if arguments.text and arguments.moment:
        raise UsageError("C comes from --text or from --moment, not from both.")
    if arguments.facts:
        chosen = _facts_to_edit(arguments)
    elif None in (arguments.prompt, arguments.subject, arguments.target):
        raise UsageError("edit needs PROMPT, --subject and --target, or --facts FILE and --out DIR.")
    else:
        chosen = [_fact_to_edit(arguments)]
        _check_places(arguments.json, arguments.out)
    _check_files(*arguments.text, arguments.moment)
    model = _load(arguments)
    known = models.preset(model)
    settings = rome.resolve(model, replace(known.rome if known else RomeSettings(), **given))
    with _progress() as progress:
        moment = _moment(arguments, model, settings, progress)
        if arguments.facts:
            return _edit_facts(arguments, model, chosen, settings, moment, progress)
        edit = rome.edit(model, chosen[0], settings, moment, progress=progress)
    console = _console(arguments)
    _show_edit(console, edit.to_json())
    if arguments.out:
        _show_files(console, [edits.save(edit, arguments.out)])
    _write_json(arguments.json, edit.to_json())
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
    if arguments.prompt is not None or arguments.target is not None:
        raise UsageError("--facts takes its prompts and targets from the file; leave PROMPT and --target out.")
    chosen = list(facts.read(arguments.facts))[: arguments.limit]
    if not any(fact.target_new for fact in chosen):
        raise UsageError(f"no fact of {arguments.facts} has a new target; COUNTERFACT and zsRE files have.")
    _check_places(arguments.json, arguments.out / "edits.json")
    return chosen


def _moment(
    arguments: argparse.Namespace, model: HookedModel, settings: RomeSettings, progress: Progress
) -> Moment | None:
    """C from where the options say; None for the default."""
    from mechedit import moments

    if arguments.moment:
        if arguments.moment.suffix == ".npz":
            return moments.read_published(arguments.moment, model, settings.layer)
        return moments.Moment.load(arguments.moment)
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
    from mechedit.runs.editing import edit_facts

    found = edit_facts(model, chosen, arguments.out, settings, moment, progress=progress)
    console = _console(arguments)
    rows = [
        (
            edit.fact["prompt"],
            str(edit.fact["target_new"]),
            f"{edit.before['p_new']:.3f}",
            f"{edit.after['p_new']:.3f}",
            "; ".join(edit.reasons),
        )
        for edit in found
    ]
    _show_table(console, ("prompt", "new target", "P before", "P after", "why not"), rows)
    done = sum(bool(edit.changes) for edit in found)
    console.print(f"{done} of {len(found)} facts edited, each alone; their files are in {arguments.out / 'units'}")
    record = [edit.to_json() for edit in found]
    written = _write_json(arguments.out / "edits.json", record)
    _show_files(console, written + _write_json(arguments.json, record))


def _apply(arguments: argparse.Namespace) -> None:
    from mechedit import edits, generation

    loaded = [edits.load(path) for path in arguments.files]
    _check_places(arguments.json)
    model = _load(arguments)
    if not arguments.force:
        edits.check(model, loaded)
    asked = [*dict.fromkeys([*(str(edit.fact["prompt"]) for edit in loaded), *arguments.prompt])]
    before = {prompt: generation.complete(model, prompt) for prompt in asked}
    with edits.edited(model, *loaded, force=True):
        after = {prompt: generation.complete(model, prompt) for prompt in asked}
    console = _console(arguments)
    _show_table(console, ("prompt", "before", "after"), [(prompt, before[prompt], after[prompt]) for prompt in asked])
    _write_json(
        arguments.json,
        {
            "model": arguments.model,
            "files": [str(path) for path in arguments.files],
            "completions": [{"prompt": prompt, "before": before[prompt], "after": after[prompt]} for prompt in asked],
        },
    )


def _compose(arguments: argparse.Namespace) -> None:
    from mechedit import edits

    _check_places(arguments.out)
    whole = edits.compose(*(edits.load(path) for path in arguments.files))
    _show_files(_console(arguments), [edits.save(whole, arguments.out)])


def _diff(arguments: argparse.Namespace) -> None:
    from mechedit import edits

    _check_places(arguments.json)
    first, second = (edits.load(path) for path in arguments.files)
    found = edits.diff(first, second)
    console = _console(arguments)
    if first.origin["weight_hash"] != second.origin["weight_hash"]:
        console.print("note: these edits were made for different weights", highlight=False)
    if not found:
        console.print(f"they write in different layers: {first.layer} and {second.layer}", highlight=False)
    else:
        rows = [
            (str(each.layer), *(f"{value:.3f}" for value in (each.u, each.step, each.change, each.ratio)))
            for each in found
        ]
        _show_table(console, ("layer", "cos of u", "cos of step", "cos of change", "norm ratio"), rows)
    _write_json(arguments.json, [vars(each) for each in found])


def _export(arguments: argparse.Namespace) -> None:
    from mechedit import edits, export

    loaded = [edits.load(path) for path in arguments.files]
    write = export.adapter if arguments.adapter else export.checkpoint
    folder = write(_load(arguments), arguments.model, loaded, arguments.out, force=arguments.force)
    _show_files(_console(arguments), sorted(folder.iterdir()))


def _inspect(arguments: argparse.Namespace) -> None:
    from mechedit import edits, files
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
    }
    if kind not in readers:
        raise files.FileError(f"{arguments.file} is of kind {kind!r}; this version shows {', '.join(readers)}.")
    record = {"kind": kind, **readers[kind](arguments.file)}
    _show_table(
        _console(arguments),
        ("", str(arguments.file)),
        [(name, json.dumps(value, ensure_ascii=False)) for name, value in record.items()],
    )
    _write_json(arguments.json, record)


def _audit(arguments: argparse.Namespace) -> None:
    from mechedit import prompts
    from mechedit.facts import from_prompt

    fact = from_prompt(
        arguments.prompt,
        arguments.subject,
        target_true=arguments.answer,
        target_new=arguments.target,
        occurrence=arguments.occurrence,
    )
    console = _console(arguments)
    found = prompts.audit(_load(arguments), fact)
    console.print(str(found), markup=False, highlight=False)
    console.print("* marks the subject" + ("" if found.notes else "; nothing looks wrong"), highlight=False)


def _moments(arguments: argparse.Namespace) -> None:
    from mechedit import moments
    from mechedit.editors import rome

    settings = MomentSettings(**_given(arguments, MomentSettings))
    if arguments.out and len(arguments.layer) > 1:
        raise UsageError("--out is a file for one layer; several layers are kept in the cache.")
    if arguments.dataset and arguments.text:
        raise UsageError("C comes from --text or from --dataset, not from both.")
    _check_places(arguments.json, arguments.out)
    _check_files(*arguments.text)
    texts: list[str | Path | Corpus] = list(arguments.text)
    if arguments.dataset:
        texts = [
            moments.Corpus(arguments.dataset, arguments.config, arguments.split, arguments.column, arguments.revision)
        ]
    model = _load(arguments)
    layers = [rome.resolve(model, RomeSettings(layer=layer)).layer for layer in arguments.layer]
    with _progress() as progress:
        found = moments.estimate_layers(model, layers, texts, settings, progress=progress)
    console = _console(arguments)
    for moment in found.values():
        _show_moment(console, moment)
    if arguments.out:
        _show_files(console, [found[layers[0]].save(arguments.out)])
    records = [moment.to_json() for moment in found.values()]
    _write_json(arguments.json, records[0] if len(records) == 1 else records)


def _tune(arguments: argparse.Namespace) -> None:
    from mechedit import facts, models, tuning

    settings = TuneSettings(**_given(arguments, TuneSettings))
    chosen = facts.built_in() if arguments.facts == "built-in" else facts.read(arguments.facts)
    _check_places(arguments.json, arguments.out / "tuned.json")
    model = _load(arguments)
    known = models.preset(model)
    with _progress() as progress:
        found = tuning.tune(
            model,
            chosen[arguments.begin :],
            arguments.out,
            settings,
            known.rome if known else None,
            progress=progress,
        )
    console = _console(arguments)
    console.print(f"traced {found.traced} facts; early site: {found.site}", markup=False, highlight=False)
    names = ("ES", "PS", "NS", "S", "relative_norm", "perplexity_ratio")
    rows = [
        (str(row.layer), f"{row.clamp:g}", f"{row.learning_rate:g}", *(f"{getattr(row, name):.3g}" for name in names))
        for row in found.rows
    ]
    _show_table(console, ("layer", "clamp", "rate", *names), rows)
    best = found.settings
    console.print(
        f"proposed: --layer {best.layer} --clamp {best.clamp:g} --learning-rate {best.learning_rate:g}",
        highlight=False,
    )
    written = _write_json(arguments.out / "tuned.json", found.to_json())
    _show_files(console, written + _write_json(arguments.json, found.to_json()))


def _show_moment(console: Console, moment: Moment) -> None:
    _show_table(console, ("", "second moment"), [(name, json.dumps(value)) for name, value in moment.to_json().items()])


def _merge(arguments: argparse.Namespace) -> None:
    from mechedit import moments

    _check_places(arguments.json, arguments.out)
    whole = moments.merge([moments.Moment.load(path) for path in arguments.files])
    console = _console(arguments)
    _show_moment(console, whole)
    _show_files(console, [whole.save(arguments.out)])
    _write_json(arguments.json, whole.to_json())


def _models(arguments: argparse.Namespace) -> None:
    from mechedit import models

    console = _console(arguments)
    if arguments.check:
        with console.status(f"comparing {arguments.check} with Hugging Face"):
            largest = models.parity(arguments.check)
        verdict = "equal" if largest <= models.PARITY else "DIFFERENT"
        console.print(
            f"{arguments.check}: largest difference of logits {largest:.2g} ({verdict}; tolerance {models.PARITY:g})"
        )
        _write_json(
            arguments.json, {"model": arguments.check, "largest_difference": largest, "tolerance": models.PARITY}
        )
        if largest > models.PARITY:
            raise models.ModelError(f"the logits of {arguments.check} are not Hugging Face's.")
        return
    rows = [
        (each.name, each.source, "yes" if each.here else "no", _preset_line(each.preset)) for each in models.listing()
    ]
    _show_table(
        console,
        ("name", "from", "here", "editing preset"),
        [*rows, ("FOLDER", "any folder in Hugging Face's format", "", "")],
    )
    _write_json(arguments.json, [dict(zip(("name", "source", "here", "preset"), row, strict=True)) for row in rows])


def _preset_line(preset: Any) -> str:
    return (
        f"layer {preset.rome.layer}, clamp {preset.rome.clamp:g}, {'BOS' if preset.prepend_bos else 'no BOS'}; {preset.source}"
        if preset
        else "none"
    )


def _doctor(arguments: argparse.Namespace) -> None:
    import os
    import shutil

    from mechedit import cache, models, provenance

    root = cache.root()
    cache.check_writable(root / "doctor")
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
    _show_table(_console(arguments), ("", "found"), rows)
    _write_json(arguments.json, dict(rows))


# --- demo -------------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from mechedit import edits, facts, figures, generation, scoring, sites, tracing
    from mechedit.editors import rome

    out: Path = arguments.out
    _check_places(out / "trace.safetensors")
    fact = facts.built_in()[0]
    console = _console(arguments)
    model = _load(arguments)
    console.rule("1. Where does the model recall it?")
    said, _, p = scoring.top(model, fact.prompt, 1)[0]
    console.print(f"{fact.prompt!r}\ntop answer {said!r} with P = {p:.3f}", markup=False, highlight=False)
    with _progress() as progress:
        trace = tracing.trace(model, fact, progress=progress)
    _show_trace(console, trace, ("mlp",))
    console.print(f"early site: {sites.early(trace)}\n late site: {sites.late(trace)}", markup=False, highlight=False)

    console.rule(f"2. Rewrite it there: {fact.target_true} → {fact.target_new}")
    with _progress() as progress:
        edit = rome.edit(model, fact, progress=progress)
    _show_edit(console, edit.to_json())

    console.rule("3. What changed, and what did not?")
    prompts = [("paraphrase", each) for each in fact.paraphrases[:2]] + [
        ("neighbour", each) for each in fact.neighbours[:4]
    ]
    pairs = [(prompt, str(target)) for _, prompt in prompts for target in (fact.target_true, fact.target_new)]
    story = fact.generations[0]
    before, text_before = scoring.score(model, pairs), generation.complete(model, story, 30)
    with edits.edited(model, edit):
        after, text_after = scoring.score(model, pairs), generation.complete(model, story, 30)
    rows = []
    for index, (role, prompt) in enumerate(prompts):
        cells = [f"{scores[2 * index].p:.3f} / {scores[2 * index + 1].p:.3f}" for scores in (before, after)]
        rows.append((role, prompt, *cells))
    _show_table(console, ("", "prompt", f"before: P({fact.target_true}) / P({fact.target_new})", "after"), rows)
    _show_table(console, ("", f"{story} …"), [("before", text_before), ("after", text_after)])

    written = [
        *figures.save(trace, out),
        trace.save(out / "trace.safetensors"),
        edits.save(edit, out / "edit.safetensors"),
    ]
    for name, record in (("trace.json", trace.to_json()), ("edit.json", edit.to_json())):
        _write_json(out / name, record)
        written.append(out / name)
    _show_files(console, written)


# --- terminal ---------------------------------------------------------------------------------------------------------


def _console(arguments: argparse.Namespace) -> Console:
    """Where people read: standard output, or standard error where standard output is for JSON."""
    from rich.console import Console

    return Console(stderr=str(getattr(arguments, "json", None)) == "-", soft_wrap=False)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error for each step that lasts, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield report


def _load(arguments: argparse.Namespace) -> HookedModel:
    from rich.console import Console

    # The stream itself, because loading silences standard error.
    with Console(file=sys.stderr).status(f"loading {arguments.model} (the first time converts or downloads it)"):
        import torch

        from mechedit import models

        return models.load(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))


def _show_trace(console: Console, trace: Trace, kinds: Sequence[str] = KINDS) -> None:
    """P in percent by token and layer, darker where restoring helps more."""
    from rich.table import Table
    from rich.text import Text

    console.print(
        f"P({trace.answer.strip()}) = {trace.p_clean:.3f} clean, {trace.p_corrupted:.3f} corrupted; traced in {trace.seconds:.1f} s",
        markup=False,
        highlight=False,
    )
    begin, end = trace.subject_range
    for kind, grid in trace.effects.items():
        if kind not in kinds:
            continue
        fits = max(1, (console.width - max(len(repr(token)) for token in trace.tokens) - 6) // 3)
        layers = range(0, len(grid), -(-len(grid) // fits))
        table = Table(
            title=f"{kind}: P(answer) in percent, by token and layer",
            box=None,
            padding=(0, 1, 0, 0),
            title_justify="left",
        )
        table.add_column("token")
        for layer in layers:
            table.add_column(str(layer), justify="right", min_width=2)
        highest = max(float(grid.nan_to_num(0.0).max()), 1e-9)
        for position, token in enumerate(trace.tokens):
            cells = []
            for layer in layers:
                p = float(grid[layer, position])
                if p != p:  # not traced
                    cells.append(Text(""))
                    continue
                share = min(1.0, p / highest)
                cells.append(
                    Text(
                        f"{100 * p:.0f}",
                        style=f"{'bold white' if share > 0.5 else 'default'} {f'on color({_SHADES[int(share * (len(_SHADES) - 1))]})' if share > 0.1 else ''}",
                    )
                )
            table.add_row(Text(repr(token) + ("*" if begin <= position < end else "")), *cells)
        console.print(table)


_SHADES = (22, 28, 34, 34, 40)


def _show_edit(console: Console, edit: dict[str, Any]) -> None:
    before, after, report = edit["before"], edit["after"], edit["edit"]
    rows = [
        (f"P({edit['target_new']})", f"{before['p_new']:.4f}", f"{after['p_new']:.4f}"),
        (f"P({edit['target_true']})", f"{before['p_true']:.4f}", f"{after['p_true']:.4f}"),
    ]
    _show_table(console, (edit["prompt"], "before", "after"), rows)
    console.print(
        f"{edit['method']} at layer {edit['layer']} in {edit['seconds']:.1f} s: divisor {report['divisor']:.4g}, "
        f"update norm {report['update_norm']:.3g} ({report['relative_norm']:.1%} of W_out's), cond(C) {report['cond_C']:.2g}; "
        f"perplexity of other text x {report['perplexity_ratio']:.3f}, KL after '{edit['subject']} is a' {report['essence_kl']:.2f}",
        markup=False,
        highlight=False,
    )
    for reason in edit["reasons"]:
        console.print(f"out of its band: {reason}", markup=False, highlight=False)


def _show_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    names = max((len(row[0]) for row in rows), default=0) <= 30  # short first cells are names, which are copied whole
    for index, name in enumerate(header):
        table.add_column(Text(name), overflow="fold", no_wrap=names and index == 0)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console.print(table)


def _show_files(console: Console, paths: Sequence[Path]) -> None:
    if paths:
        console.print("wrote")
    for path in paths:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


def _check_places(*paths: Path | None) -> None:
    """Raise for a result that could not be written, before anything is computed."""
    from mechedit.cache import check_writable

    for path in paths:
        if path is not None and str(path) != "-":
            check_writable(path)


def _check_files(*paths: Path | None) -> None:
    """Raise for a text file that is not there, before a model is loaded."""
    for path in paths:
        if path and not path.is_file():
            raise UsageError(f"{path} cannot be read: there is no such file.")


def _write_json(path: Path | None, record: Any) -> list[Path]:
    """Write the result as JSON, where it is wanted; the file written, if any."""
    if path is None:
        return []
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return []
    from mechedit.cache import atomic_write

    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [path]


if __name__ == "__main__":
    sys.exit(main())
