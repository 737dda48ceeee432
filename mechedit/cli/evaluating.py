"""The commands evaluate and sweep."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechedit.cli.choosing import NONE, add_editor, chosen_editor, given_edit_settings, resolved
from mechedit.cli.options import (
    PRESET,
    a_number,
    a_path,
    add_command,
    add_json,
    add_settings,
    an_integer,
    given_settings,
)
from mechedit.cli.results import show_evaluation
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
from mechedit.settings import EvaluateSettings, SweepSettings

if TYPE_CHECKING:
    from mechedit.benchmarks.benchmark import Benchmark
    from mechedit.benchmarks.texts import References
    from mechedit.models import HookedModel
    from mechedit.runs.engines import Engine

__all__ = ["add_evaluating"]

FEW = 10  # facts, of which a bootstrap interval says little

ENGINES = ("local", "ray")


def add_evaluating(commands: Any, editor: str) -> None:
    """evaluate, sweep"""
    _add_evaluate(commands, editor)
    _add_sweep(commands, editor)


def _add_evaluate(commands: Any, editor: str) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "edit each record of a benchmark and score it, before and after",
        model=True,
        note=PRESET.format("layer and constants"),
    )
    _add_facts(evaluate)
    evaluate.add_argument(
        "--benchmark",
        default="counterfact",
        metavar="NAME",
        help="how records are scored: counterfact (ES, PS, NS, S), zsre (share of the answer's tokens put first), or package.module:object",
    )
    add_settings(evaluate, EvaluateSettings)
    evaluate.add_argument(
        "--references",
        metavar="FILE",
        help="with --generate: texts about new targets (attribute_snippets.json, {relation: {target: [text]}}, or `organism`)",
    )
    evaluate.add_argument(
        "--tfidf",
        type=a_path,
        nargs=2,
        metavar=("IDF.npy", "VOCAB.json"),
        help="with --references: published TF-IDF statistics (default: of the references)",
    )
    _add_engine(evaluate)
    evaluate.add_argument(
        "--estimate", action="store_true", help="try three records, say what all will take on --workers, and stop"
    )
    evaluate.add_argument("--out", type=a_path, metavar="DIR", help="everything is kept there; run again to resume")
    add_json(evaluate)
    add_editor(evaluate, editor, none=True)  # the last; its seed is the evaluation's


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="local", help="who computes (default: local)")
    parser.add_argument("--address", help="with --engine ray: the cluster's head (default: one started here)")
    parser.add_argument(
        "--workers", type=an_integer, metavar="N", help="with --engine ray (default, or 0: all there is room for)"
    )
    parser.add_argument("--cpus", type=a_number, metavar="N", help="of each worker (default: 1)")
    parser.add_argument("--gpus", type=a_number, metavar="N", help="of each worker (default: 0)")


def _add_sweep(commands: Any, editor: str) -> None:
    sweep = add_command(
        commands,
        "sweep",
        _sweep,
        "edit facts at every layer and token, beside their causal traces",
        model=True,
        note=PRESET.format("constants"),
    )
    _add_facts(sweep)
    add_settings(sweep, SweepSettings)
    add_editor(sweep, editor, without=("layer", "layers", "fact_token", "guard"))
    sweep.add_argument("--out", type=a_path, required=True, metavar="DIR", help="everything is kept there; run again to resume")  # fmt: skip
    add_json(sweep)


def _add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--facts",
        metavar="FILE",
        default="built-in",
        help="records: a JSON file, `built-in` or `organism` (default: built-in)",
    )
    parser.add_argument("--begin", type=an_integer, default=0, metavar="N", help="leave the first N records out")
    parser.add_argument("--limit", type=an_integer, metavar="N", help="so many records at most")


def _evaluate(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from mechedit.benchmarks import benchmark as benchmarks
    from mechedit.runs.engines import Cluster
    from mechedit.runs.estimating import estimate
    from mechedit.runs.evaluating import evaluate
    from mechedit.runs.parquet import RESULTS
    from mechedit.runs.results import check_kept
    from mechedit.runs.store import RunError

    settings = EvaluateSettings(**given_settings(arguments, EvaluateSettings))
    given = given_edit_settings(arguments)  # mistakes are reported before the model is loaded
    editor = None if arguments.editor == NONE else chosen_editor(arguments)
    _check(arguments, settings)
    benchmark = benchmarks.named(arguments.benchmark)
    chosen = _records(arguments, benchmark)
    if arguments.out and not arguments.estimate:
        check_kept(arguments.out / RESULTS, [benchmark.fact(record) for record in chosen])
    references = _references(arguments)
    began = time.perf_counter()
    model = load_model(arguments)
    load = time.perf_counter() - began
    edit_settings = resolved(model, editor, given) if editor else arguments.edit_settings(**given)
    console = console_of(arguments)
    beside: dict[str, Any] = {"benchmark": benchmark, "references": references}
    if arguments.estimate:
        workers = max(1, arguments.workers or 1)
        found = estimate(model, chosen, settings, editor, edit_settings, workers=workers, load=load, **beside)
        console.print(str(found))
        write_json(arguments.json, vars(found) | {"total": found.total})
        return
    engine = _engine(arguments, model)
    with keeping(f"what is finished is kept in {arguments.out}"), progress_bars() as progress:
        result = evaluate(
            model, chosen, arguments.out, settings, editor, edit_settings, engine=engine, progress=progress, **beside
        )
    source = {"facts": arguments.facts, "begin": arguments.begin}
    result = replace(result, what=result.what | {"source": source})
    written = [*result.save(arguments.out), *write_json(arguments.json, result.to_json())]
    show_evaluation(console, result)
    for note in engine.notes if isinstance(engine, Cluster) else ():
        console.print(f"note: {note}")
    show_files(console, written)
    if result.nothing:
        raise RunError(f"{result.nothing} The table is in {arguments.out} all the same.")


def _check(arguments: argparse.Namespace, settings: EvaluateSettings) -> None:
    """Raise for options that do not go together, before anything is loaded."""
    if arguments.out is None and not arguments.estimate:
        raise UsageError("evaluate needs --out DIR, where everything finished is kept.")
    rays = [name for name in ("address", "workers", "cpus", "gpus") if getattr(arguments, name) is not None]
    if arguments.engine == "local" and (idle := [name for name in rays if name != "workers" or not arguments.estimate]):
        raise UsageError(f"--{idle[0]} is of --engine ray.")
    if (
        (arguments.workers or 0) < 0
        or (arguments.gpus or 0) < 0
        or (arguments.cpus is not None and arguments.cpus <= 0)
    ):
        raise UsageError("--workers and --gpus must be 0 or more, and --cpus more than 0.")
    asked = given_settings(arguments, EvaluateSettings)
    if idle := [name for name in ("tokens", "top_k") if name in asked and not settings.generate]:
        raise UsageError(f"--{idle[0].replace('_', '-')} is of generated text: give --generate too.")
    if "answer_rule" in asked and not settings.answers:
        raise UsageError("--answer-rule is of answers: leave --no-answers out.")
    edits = [name for name in given_settings(arguments, arguments.edit_settings) if name not in ("seed", "prepend_bos")]
    edits += [name for name in arguments.edit_settings.bundles if getattr(arguments, name) is not None]
    edits += ["mode"] * ("mode" in asked)
    if arguments.editor == NONE and edits:
        raise UsageError(f"--{edits[0].replace('_', '-')} is of edits, and --editor none makes none.")
    if (arguments.references or arguments.tfidf) and not settings.generate:
        raise UsageError("--references and --tfidf are for generated text: give --generate too.")
    if arguments.tfidf and not arguments.references:
        raise UsageError("--tfidf gives the statistics for --references: give both.")
    check_files(*(arguments.tfidf or ()))
    check_places(arguments.json, arguments.out and arguments.out / "summary.json")


def _records(arguments: argparse.Namespace, benchmark: Benchmark) -> list[Any]:
    from mechedit.runs.checks import check_records

    if arguments.begin < 0 or (arguments.limit is not None and arguments.limit < 1):
        raise UsageError("--begin must be 0 or more, and --limit at least 1.")
    records = list(benchmark.read(arguments.facts))
    end = None if arguments.limit is None else arguments.begin + arguments.limit
    chosen = records[arguments.begin : end]
    if not chosen:
        raise UsageError(f"--begin {arguments.begin} leaves none of the {len(records)} records of {arguments.facts}.")
    check_records(chosen, benchmark)
    return chosen


def _references(arguments: argparse.Namespace) -> References | None:
    from mechedit.benchmarks.texts import References, Tfidf

    if not arguments.references:
        return None
    statistics = Tfidf.read(*arguments.tfidf) if arguments.tfidf else None
    if arguments.references != "organism":
        return References.read(arguments.references, statistics)
    from mechedit.organism.world import make

    own = make().snippets()
    texts = {(relation, target): tuple(("", text) for text in each) for relation, targets in own.items() for target, each in targets.items()}  # fmt: skip
    return References.of(texts, statistics)


def _engine(arguments: argparse.Namespace, model: HookedModel) -> Engine:
    import torch

    from mechedit import models
    from mechedit.runs.engines import Cluster, Local

    if arguments.engine == "local":
        return Local(model)
    is_folder = Path(arguments.model).is_dir()  # workers have a working folder of their own
    return Cluster(
        str(Path(arguments.model).absolute()) if is_folder else arguments.model,
        models.identity(model).whole,
        arguments.address,
        arguments.workers or 0,
        arguments.cpus or 1.0,
        arguments.gpus or 0.0,
        getattr(torch, arguments.dtype),
    )


def _sweep(arguments: argparse.Namespace) -> None:
    from mechedit import figures
    from mechedit.benchmarks.counterfact import COUNTERFACT
    from mechedit.runs import sweeping
    from mechedit.runs.results import check_kept, who

    settings = SweepSettings(**given_settings(arguments, SweepSettings))
    given = given_edit_settings(arguments)
    editor = chosen_editor(arguments)
    chosen = _records(arguments, COUNTERFACT)
    sweeping.check_complete(chosen)
    check_places(arguments.json, arguments.out / "sweep.json")
    check_kept(arguments.out / "sweep.json", chosen)
    model = load_model(arguments)
    base = editor.settings(**given)
    with keeping(f"what is finished is kept in {arguments.out}"), progress_bars() as progress:
        found = sweeping.sweep(model, chosen, arguments.out, settings, editor, base, progress=progress)
    record = found.to_json() | {"facts": who(chosen)}
    written = [*write_json(arguments.out / "sweep.json", record), found.save_csv(arguments.out / "sweep.csv")]
    written += write_json(arguments.json, record) + figures.write(sweeping.sweep_maps(found), arguments.out / "sweep")
    console = console_of(arguments)
    rows = [
        (str(layer), *(f"{100 * value:.0f}" if value == value else "" for value in line))
        for layer, line in zip(found.layers, found.mean("S"), strict=True)
    ]
    show_table(console, ("S by layer", *found.tokens), rows)
    few = f", {FEW} or more make its interval worth reading" if len(chosen) < FEW else ""
    console.print(
        f"rank correlation of S with the trace's indirect effect, over layers and tokens: {found.correlation('S')} ({len(chosen)} facts{few})",
    )
    show_files(console, written)
