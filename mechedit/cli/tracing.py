"""The commands demo, trace and sever."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.editing import show_edit
from mechedit.cli.options import a_path, add_command, add_json, add_prompt, add_settings, an_integer, given_settings
from mechedit.cli.terminal import (
    UsageError,
    check_files,
    check_places,
    console_of,
    load_model,
    progress_bars,
    show_average,
    show_doubts,
    show_files,
    show_sites,
    show_table,
    show_trace,
    write_json,
)
from mechedit.settings import KNOWN_KINDS, ROLES, SEVERED_TITLES, STATE_KINDS, TraceSettings

if TYPE_CHECKING:
    from mechedit.corruption import Statistics
    from mechedit.facts import Fact
    from mechedit.models import HookedModel
    from mechedit.progress import Progress
    from mechedit.tracing import Trace

__all__ = ["add_tracing"]


def add_tracing(commands: Any) -> None:
    """demo, trace, sever"""
    demo = add_command(commands, "demo", _demo, "trace and edit one fact, and show what happened", model=True)
    demo.add_argument(
        "--out",
        type=a_path,
        default=Path("mechedit-demo"),
        metavar="DIR",
        help="folder for pictures, trace and edit (default: mechedit-demo)",
    )

    trace = add_command(commands, "trace", _trace, "find where the model recalls a fact, or many facts", model=True)
    add_prompt(trace, required=False)
    _add_answers(trace)
    trace.add_argument("--other", help="with --corruption tokens: the subject that takes the subject's place")
    trace.add_argument(
        "--facts",
        metavar="FILE",
        help="trace every fact of a JSON file, of `built-in` or of `organism`, into --out, and average",
    )
    trace.add_argument("--limit", type=an_integer, metavar="N", help="with --facts: the first N that remain")
    trace.add_argument(
        "--batch",
        type=an_integer,
        metavar="N",
        help="with --facts: how many share a sweep (default 1; a GPU wants more)",
    )
    trace.add_argument(
        "--unknown", action="store_true", help="with --facts: keep facts whose answer the model does not put first"
    )
    trace.add_argument(
        "--sigma-from", metavar="FILE", help="text file, or `subjects` of --facts: take sigma from its tokens"
    )
    add_settings(trace, TraceSettings)
    trace.add_argument(
        "--out", type=a_path, metavar="DIR", help="write heat maps and traces there; a run over facts resumes from it"
    )
    add_json(trace)

    sever = add_command(commands, "sever", _sever, "trace a restored state with MLPs or attention cut off", model=True)
    add_prompt(sever)
    _add_answers(sever)
    sever.add_argument("--other", help="with --corruption tokens: the subject that takes the subject's place")
    sever.add_argument(
        "--role", default="subject_last", choices=ROLES, help="token role that is restored (default: subject_last)"
    )
    add_settings(sever, TraceSettings, without=("kinds", "window", "centre", "roles"))  # of grids
    sever.add_argument("--out", type=a_path, metavar="DIR", help="write the curves, as picture and as file, there")
    add_json(sever)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answer", help="the answer to measure (default: what the model says)")
    parser.add_argument(
        "--against",
        metavar="ANSWER",
        help="with --measure logit_difference: the other answer, whose logit is taken off",
    )


def _demo(arguments: argparse.Namespace) -> None:
    from mechedit import applying, cache, edits, figures, generation, organism, provenance, scoring, sources
    from mechedit.editors import rome
    from mechedit.runs import tracing as runs

    out: Path = arguments.out
    check_places(out / "trace.safetensors")
    fact = sources.named("organism" if arguments.model in organism.MODELS else "built-in")[0]
    console = console_of(arguments)
    model = load_model(arguments)
    console.rule("1. Where does the model recall it?")
    said, _, p = scoring.top(model, fact.prompt, 1)[0]
    console.print(repr(fact.prompt))
    console.print(f"top answer {said!r} with P = {p:.3f}")
    settings, kept = TraceSettings(), out / "runs" / cache.content_key(provenance.kept_under(model))
    if runs.finished(runs.partners(model, [fact], settings), kept):
        console.print(f"its trace is kept in {kept}: delete that folder, and it is traced again")
    with progress_bars() as progress:
        (trace,) = runs.trace_facts(model, [fact], kept, settings, progress=progress)
    written = [
        trace.save(out / "trace.safetensors"),
        *figures.save(trace, out),
        *write_json(out / "trace.json", trace.to_json()),
    ]
    show_trace(console, trace, ("mlp",))
    show_sites(console, trace)

    console.rule(f"2. Rewrite it there: {fact.target_true} → {fact.target_new}")
    with progress_bars() as progress:
        edit = rome.edit(model, fact, progress=progress)
    written += [edits.save(edit, out / "edit.safetensors"), *write_json(out / "edit.json", edit.to_json())]
    console.print(
        f"The trace shows where this fact passes. ROME writes at layer {edit.settings['layer']}, where edits of other facts did best: "
        "the best layers of both need not be one.",
    )
    show_edit(console, edit.to_json())

    console.rule("3. What changed, and what did not?")
    own = scoring.score(model, [(each, str(fact.target_true)) for each in fact.neighbours])
    best = sorted(zip(fact.neighbours, own, strict=True), key=lambda each: -each[1].p)[
        :4
    ]  # where there is most to lose
    prompts = [("paraphrase", each) for each in fact.paraphrases[:2]] + [("neighbour", each) for each, _ in best]
    pairs = [(prompt, str(target)) for _, prompt in prompts for target in (fact.target_true, fact.target_new)]
    story = fact.generations[0]
    before, text_before = scoring.score(model, pairs), generation.complete(model, story, 30)
    with applying.edited(model, edit):
        after, text_after = scoring.score(model, pairs), generation.complete(model, story, 30)
    rows = []
    for index, (role, prompt) in enumerate(prompts):
        cells = [f"{scores[2 * index].p:.3f} / {scores[2 * index + 1].p:.3f}" for scores in (before, after)]
        rows.append((role, prompt, *cells))
    console.print(
        f"The {len(best)} neighbours of {len(own)} where P({fact.target_true}) was highest: an edit has most to lose there."
    )
    show_table(console, ("", "prompt", f"before: P({fact.target_true}) / P({fact.target_new})", "after"), rows)
    show_table(console, ("", f"{story} …"), [("before", text_before), ("after", text_after)])

    show_files(console, written)


def _trace(arguments: argparse.Namespace) -> None:
    from mechedit import figures, tracing
    from mechedit.tracing import accuracy

    settings = TraceSettings(**given_settings(arguments, TraceSettings))
    for kind in settings.kinds:
        if kind not in KNOWN_KINDS:
            raise UsageError(f"--kinds must be among {', '.join(KNOWN_KINDS)}; {kind!r} is not.")
    if arguments.facts:
        return _trace_facts(arguments, settings)
    if arguments.prompt is None or arguments.subject is None:
        raise UsageError("trace needs PROMPT and --subject, or --facts FILE and --out DIR.")
    if arguments.limit is not None or arguments.unknown or arguments.batch is not None:
        raise UsageError("--limit, --unknown and --batch are for --facts; leave them out.")
    _check_idle(arguments, settings)
    _check_answers(arguments, settings)
    fact = _fact(arguments)
    check_places(arguments.json, arguments.out and arguments.out / "trace.safetensors")
    check_files(arguments.sigma_from and arguments.sigma_from != "subjects" and Path(arguments.sigma_from))
    model = load_model(arguments)
    statistics = _statistics(arguments, model, [fact])
    with progress_bars() as progress:
        trace = tracing.trace(model, fact, settings, statistics=statistics, other=arguments.other, progress=progress)
    written = [trace.save(arguments.out / "trace.safetensors"), *figures.save(trace, arguments.out)] if arguments.out else []  # fmt: skip
    record, error = trace.to_json(), None
    if not accuracy.is_exact(settings):
        error = accuracy.sample_error(model, fact, settings, statistics=statistics, other=arguments.other)
        record["error"] = vars(error)
    written += write_json(arguments.json, record)
    console = console_of(arguments)
    show_doubts(console, model, fact, trace)
    show_trace(console, trace)
    show_sites(console, trace)
    if error is not None:
        console.print(f"what fewer draws or bfloat16 cost, against ten draws in the model's own format, {error}")
    show_files(console, written, "" if arguments.json else "--out DIR keeps the trace and its heat maps")
    return None


def _check_answers(arguments: argparse.Namespace, settings: TraceSettings) -> None:
    """Raise where another subject or another answer and what takes it are not given together."""
    if (settings.measure == "logit_difference") != bool(arguments.against):
        raise UsageError("--measure logit_difference and --against ANSWER belong together: give both, or neither.")
    if (settings.corruption == "tokens") != bool(arguments.other):
        raise UsageError("--corruption tokens and --other SUBJECT belong together: give both, or neither.")


def _check_idle(arguments: argparse.Namespace, settings: TraceSettings, *, grids: bool = True) -> None:
    """Raise for options that were given and would play no part."""
    given = {name: value for name, value in given_settings(arguments, TraceSettings).items() if value is not False}
    sigma_from = ["sigma_from"] if getattr(arguments, "sigma_from", None) else []
    idle: dict[str, list[str]] = {}
    if settings.corruption == "tokens":
        idle["--corruption tokens draws no noise"] = ["noise", "scale", "degrees", "replace", "extra", *sigma_from]
        if settings.draws != 1:
            idle["--corruption tokens has one corrupted run"] = ["draws"]
    elif not settings.corruption.startswith("student_t"):
        idle["only --corruption student_t has degrees of freedom"] = ["degrees"]
        if settings.scale == "absolute" and not settings.corruption.startswith("multivariate"):
            idle["--scale absolute knows no sigma"] = sigma_from
    if grids and not set(settings.kinds) - set(STATE_KINDS):
        idle["only outputs are restored in windows, and --kinds has none (mlp, attn)"] = ["window", "centre"]
    for why, names in idle.items():
        for name in names:
            if name in given or name in sigma_from:
                raise UsageError(f"--{name.replace('_', '-')} would play no part: {why}. Leave it out.")


def _fact(arguments: argparse.Namespace) -> Fact:
    from mechedit.facts import from_prompt

    return from_prompt(
        arguments.prompt,
        arguments.subject,
        target_true=arguments.answer,
        target_new=arguments.against,
        occurrence=arguments.occurrence,
        join=arguments.join or "auto",
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
    from mechedit import figures, sources
    from mechedit.runs import tracing as runs
    from mechedit.runs.results import check_kept, who
    from mechedit.tracing import accuracy
    from mechedit.tracing.averages import average

    _check_facts(arguments, settings)
    read = list(sources.named(arguments.facts))
    check_places(arguments.json, arguments.out / "average.json")
    model = load_model(arguments)
    console = console_of(arguments)
    if not arguments.sigma_from:
        runs.check_run(model, arguments.out, settings)  # before every fact is asked
    with progress_bars() as progress:
        chosen = _chosen(arguments, model, read, settings, progress)
        check_kept(arguments.out / "average.json", chosen)
        statistics = _statistics(arguments, model, chosen)
        traces = _traces(arguments, model, chosen, settings, statistics, progress)
    mean = average(traces, seed=settings.seed)
    record = mean.to_json() | {"facts": who(chosen)}
    written = write_json(arguments.out / "average.json", record) + write_json(arguments.json, record)
    written += figures.save_average(mean, arguments.out)
    if not accuracy.is_exact(settings) and settings.corruption != "tokens":
        error = accuracy.sample_error(model, chosen[0], settings, statistics=statistics)
        console.print(
            f"what fewer draws or bfloat16 cost {chosen[0].prompt!r}, against ten draws in the model's own format, {error}",
        )
    console.print(f"{mean.n} facts. clean {mean.clean}, corrupted {mean.corrupted}, total effect {mean.total}")
    if blank := sum(each.blanks > 0 for each in traces):
        console.print(
            f"note: {blank} of {mean.n} answers begin with a blank token, which is passed over; --measure p_answer reads all of them."
        )
    show_average(console, mean)
    show_sites(console, mean)
    show_files(console, written)


def _check_facts(arguments: argparse.Namespace, settings: TraceSettings) -> None:
    """Raise for options that do not go with --facts, before anything is loaded."""
    if arguments.out is None:
        raise UsageError("a run over facts is kept in a folder: give --out DIR.")
    if arguments.prompt is not None:
        raise UsageError("give PROMPT or --facts, not both.")
    if arguments.join:
        raise UsageError("--join is one prompt's; with --facts each record says it (`join`).")
    if arguments.other:
        raise UsageError("--other is one prompt's; with --facts each subject gives way to one of its relation.")
    for name in ("subject", "occurrence", "answer", "against"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} is one prompt's; with --facts each fact has its own. Leave it out.")
    _check_idle(arguments, settings)
    if arguments.limit is not None and arguments.limit < 2:
        raise UsageError(f"--limit must be at least 2 facts, which are averaged; found {arguments.limit}.")
    if arguments.batch is not None and arguments.batch < 1:
        raise UsageError(f"--batch must be at least 1 fact; found {arguments.batch}.")


def _chosen(
    arguments: argparse.Namespace, model: HookedModel, read: list[Fact], settings: TraceSettings, progress: Progress
) -> list[Fact]:
    """Of the facts in the file those that are traced; which are left out is said."""
    from mechedit.runs import tracing as runs

    console = console_of(arguments)
    chosen, others = runs.traceable(model, read, settings)
    if others:
        console.print(
            f"{len(others)} of {len(read)} facts cannot be traced and are left out. The first: {others[0][1]}"
        )
    if not arguments.unknown:
        kept = runs.known(model, chosen, prepend_bos=settings.prepend_bos, progress=progress)
        console.print(f"the model knows {len(kept)} of {len(chosen)} facts")
        chosen = kept
    chosen = chosen[: arguments.limit]
    if len(chosen) < 2:
        raise UsageError(f"an average needs at least 2 facts; {len(chosen)} of {arguments.facts} can be traced.")
    return chosen


def _traces(
    arguments: argparse.Namespace,
    model: HookedModel,
    chosen: list[Fact],
    settings: TraceSettings,
    statistics: Statistics | None,
    progress: Progress,
) -> list[Trace]:
    """The run; whoever interrupts it is told how far it is."""
    from mechedit.runs import tracing as runs

    pairs, batch = runs.partners(model, chosen, settings), arguments.batch or 1
    if there := runs.finished(pairs, arguments.out):
        console_of(arguments).print(f"{there} of {len(chosen)} facts are in {arguments.out} already")
    try:
        return runs.trace_facts(
            model, chosen, arguments.out, settings, statistics=statistics, batch=batch, progress=progress
        )
    except KeyboardInterrupt:
        there = runs.finished(pairs, arguments.out)
        raise KeyboardInterrupt(
            f"{there} of {len(chosen)} facts are kept in {arguments.out}; the same command goes on from there"
        ) from None


def _sever(arguments: argparse.Namespace) -> None:
    from mechedit import figures
    from mechedit.tracing.preparation import instead
    from mechedit.tracing.result import not_first
    from mechedit.tracing.severing import severed

    settings = TraceSettings(**given_settings(arguments, TraceSettings))
    _check_idle(arguments, settings, grids=False)
    _check_answers(arguments, settings)
    fact = _fact(arguments)
    check_places(arguments.json, arguments.out and arguments.out / "severed.safetensors")
    model = load_model(arguments)
    with progress_bars() as progress:
        found = severed(model, fact, settings, role=arguments.role, other=arguments.other, progress=progress)
    written = []
    if arguments.out:
        written = [found.save(arguments.out / "severed.safetensors"), *figures.save_severed([found], arguments.out)]
    write_json(arguments.json, found.to_json())
    console = console_of(arguments)
    show_doubts(console, model, fact, found)
    if said := instead(model, fact, prepend_bos=settings.prepend_bos):
        console.print(f"note: {not_first(found.answer, said)}")
    console.print(
        f"{found.prompt!r}, answer {found.answer.strip()!r}: {found.p_clean:.3f} clean, {found.p_corrupted:.3f} corrupted",
    )
    means = {name: curve.mean(-1).tolist() for name, curve in found.curves.items()}
    show_table(
        console,
        ("layer", *(SEVERED_TITLES[name] for name in means)),
        [(str(layer), *(f"{curve[layer]:.3f}" for curve in means.values())) for layer in range(len(means["ordinary"]))],
    )
    show_files(console, written, "" if arguments.json else "--out DIR keeps the curves")
