"""From 1 to 10,000 edits in sequence: what stands, and what it costs.  python -m experiments.scaling --model organism

    figures/MODEL/scaling.json, .png; of another `name`, that one's

The facts that are edited are not said in the held-out text, so that its perplexity speaks of what has nothing to do with them. The first
`mixed` come in the world's order, which mixes subjects; behind them those of one subject stand together, so that few are written again. At each size: S and its parts and the generated
answer, of edits sampled over the run, beside facts of its first `mixed`, sampled too, each edited alone; ES of its first hundred; perplexity; seconds an edit, and the process's
peak memory. The run is kept in out/MODEL, with what was scored, and goes on where it was stopped; seconds are of the parts that were not there: of the
process where it has one thread, so that other work on the machine counts less, else of the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.benchmark_editing import peak
from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from experiments.editing import also_of, benchmark_facts, data, statements
from mechedit import applying, cache, figures, generation, guards, models, moments, statistics
from mechedit.benchmarks import answers, counterfact
from mechedit.editing import make_ready
from mechedit.editors import many, named
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs import sequence
from mechedit.runs.editing import attempt
from mechedit.runs.extending import run_sequence
from mechedit.scoring import log_p
from mechedit.settings import SequenceSettings
from mechedit.settings.rome import SEARCHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 100_000  # more than there are
OTHERS, STATEMENTS = 3000, 5000  # the benchmark's fact from which on statements for C are taken, and how many
PROSE, STRETCH, WINDOW = "wikitext2_valid.txt", 800, 128  # characters of a stretch, of which so many tokens are read
PARTS = ("ES", "PS", "NS")
PANELS = (("S", "S, %"), ("answer", "generated answer, %"), ("ES first", "ES of the first 100, %"), ("perplexity_ratio", "perplexity / unedited"))  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """Settings of the experiment."""

    model: str = "organism"
    editor: str = "sequential"
    sizes: tuple[int, ...] = (1, 10, 100, 1000, 10000)
    mixed: int = 1000
    together: int = 100
    scored: int = 100
    every: int = 100
    a: float = 0.0
    layer: int = -1
    clamp: float = 0.0
    fisher: float = -1.0
    informed: int = 0  # times as many keys of prose, and of what is true of others than the edited, as of sampled text, in C; and G of prose too
    spared: int = 0  # facts that statements in C do not name, from the first on, so that a run can go on to as many; 0: those that are edited
    prose: int = 0  # stretches of prose, which neither C nor G has, on which perplexity is measured as well
    search: str = "whole"  # of the values; quick, few: with fewer prompts, each left out when it is learnt
    sought_with: int = 0  # prompts of a fact; 0: as many as the search has
    rounds: int = 4  # of learning again after a batch
    again: int = 2  # facts for each of a batch, at most, that are learnt again at once
    settle: float = 0.5  # growth after which all values are found anew together; 0: never
    name: str = "scaling"
    threads: int = 2


def apart(model: HookedModel, facts: Sequence[Fact]) -> list[Fact]:
    """Those that the held-out text does not say."""
    text = guards.held_out_text(model)
    return [fact for fact in facts if not (fact.subject in text and str(fact.target_true) in text)]


def scored(model: HookedModel, facts: Sequence[Fact]) -> dict[str, float]:
    """ES, PS, NS and their harmonic mean over these facts, and the share whose generated answer is the new target."""
    rows = counterfact.scores(model, facts)
    found = {name: sum(row[name] for row in rows) / len(rows) for name in PARTS}
    found["S"] = 3 / sum(1 / max(found[name], 1e-9) for name in PARTS)
    over = partial(answers.is_over, rule="sentence")
    texts = generation.completions(model, [fact.prompt for fact in facts], answers.TOKENS, until=over)
    right = [answers.is_answered(answers.cut(text, "sentence"), str(fact.target_new), "sentence") for fact, text in zip(facts, texts, strict=True)]  # fmt: skip
    return found | {"answer": sum(right) / len(right)}


def repeated(model: HookedModel, facts: Sequence[Fact]) -> float:
    """ES of these facts, of which nothing else is read."""
    bare = [replace(fact, paraphrases=(), neighbours=(), neighbour_answers=()) for fact in facts]
    return sum(row["ES"] for row in counterfact.scores(model, bare)) / len(facts)


def alone(model: HookedModel, facts: Sequence[Fact], editor: Any, settings: Any, prepared: Any) -> dict[str, float]:
    """The same of each fact edited alone."""
    rows = []
    for fact in facts:
        with applying.edited(model, attempt(model, [fact], editor, settings, prepared)):
            rows.append(scored(model, [fact]))
    found = {name: sum(row[name] for row in rows) / len(rows) for name in (*PARTS, "answer")}
    return found | {"S": 3 / sum(1 / max(found[name], 1e-9) for name in PARTS)}


def informed(model: HookedModel, edit: Any, facts: Sequence[Fact], prepared: Any, times: int) -> Any:
    """The same with a C that is also of prose and of what is true of subjects that no prompt of these facts names, and a G that is also of prose."""
    texts = [data(PROSE), statements(model, facts, benchmark_facts(str(model.cfg.model_name), OTHERS, STATEMENTS))]
    G = prepared.fisher and prepared.fisher.merged(
        moments.fisher(model, edit.layer, texts[:1], prepared.fisher.settings)
    )
    return many.prepare(model, edit, [also_of(model, edit, texts, times=times)], prepared.prefixes, fisher=G)


def prose(model: HookedModel, n: int) -> np.ndarray:
    """Mean log p of a token in each of so many stretches, from the end of the prose, as C and G have its beginning."""
    text = data(PROSE).read_text(encoding="utf-8") if n else ""
    begins = range(len(text) - n * STRETCH, len(text), STRETCH)
    return np.array([np.mean(log_p(model, text[begin : begin + STRETCH], WINDOW)) for begin in begins[:n]])


def ratio(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Perplexity over the unedited model's, with its interval over stretches."""
    found = statistics.summary(before - after)
    return {
        "mean": float(np.exp(found.mean)),
        "low": float(np.exp(found.low)),
        "high": float(np.exp(found.high)),
        "n": len(before),
    }


def sample(facts: Sequence[Fact], n: int) -> list[Fact]:
    """`n` of them, spread evenly."""
    return (
        [facts[int(index * len(facts) / n)] for index in range(min(n, len(facts)))] if len(facts) > n else list(facts)
    )


def picture(rows: Sequence[dict[str, Any]], once: dict[str, float]) -> Figure:
    """A panel a number, over the number of edits; dashed, facts edited alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), dpi=150, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        scale = 1.0 if name == "perplexity_ratio" else 100.0
        axes.plot([row["edits"] for row in rows], [scale * row[name] for row in rows], "o-", color="tab:green")
        if name in once:
            axes.axhline(scale * once[name], color="0.6", linestyle="--", label="edited alone")
        axes.set_xscale("log")
        axes.set_xticks([row["edits"] for row in rows], [f"{row['edits']:,}" for row in rows], fontsize=7, rotation=45)
        axes.minorticks_off()
        axes.set_xlabel("edits", fontsize=9)
        axes.set_title(title, fontsize=9)
        if scale > 1:
            axes.set_ylim(0, 103)
    figure.axes[0].legend(fontsize=8, loc="lower left")
    return figure


def main(settings: Scaling) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    editor = named(settings.editor)
    unset = {"a": 0.0, "layer": -1, "clamp": 0.0, "fisher": -1.0}
    own = {name: getattr(settings, name) for name, none in unset.items() if getattr(settings, name) != none}
    search = SEARCHES[settings.search] | ({"sought_with": settings.sought_with} if settings.sought_with else {})
    edit = editor.resolve(model, editor.settings(guard="warn", **search, **own))
    facts = apart(model, benchmark_facts(settings.model, 0, MANY))
    rank = {subject: index for index, subject in enumerate(dict.fromkeys(fact.subject for fact in facts))}
    facts = facts[: settings.mixed] + sorted(facts[settings.mixed :], key=lambda fact: rank[fact.subject])
    how = SequenceSettings(together=settings.together, every=settings.every, keep=settings.together, rounds=settings.rounds, again=settings.again, settle=settings.settle)  # fmt: skip
    prepared: Any = make_ready(model, editor, edit)
    if settings.informed:
        prepared = informed(model, edit, facts[: settings.spared or max(settings.sizes)], prepared, settings.informed)
    before = prose(model, settings.prose)
    folder = runs(model, f"scaling-{cache.content_key(f'{edit}{how}{prepared.key}')}")
    single = folder / f"alone-{settings.scored}-{settings.mixed}.json"
    if not single.is_file():
        found_alone = alone(model, sample(facts[: settings.mixed], settings.scored), editor, edit, prepared)
        folder.mkdir(parents=True, exist_ok=True)
        _keep(single, found_alone)
    once = json.loads(single.read_text())
    say(f"alone: {once}")
    kept = folder / f"scored-{settings.scored}-{settings.mixed}-{settings.prose}.json"
    rows, stand = json.loads(kept.read_text()) if kept.is_file() else ([], [])
    at = {each["edits"]: each for each in stand}  # a run that goes on forgets the look that it ended with
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    state = folder / "state.safetensors"
    had = len(sequence.load(state).entries) if state.exists() else 0
    if gone := [n for n in settings.sizes if n < had and n not in (row["edits"] for row in rows)]:
        raise SystemExit(
            f"the run in {folder} has {had} edits, and was not scored so at {gone}: leave those sizes out, or delete the folder."
        )
    for n in settings.sizes:
        if n in (row["edits"] for row in rows):
            continue
        had = len(sequence.load(state).entries) if state.exists() else 0
        began = clock()
        found = run_sequence(model, facts[:n], folder, how, editor, edit, prepared, progress=progress(20))
        spent = clock() - began
        with sequence.written(model, found):
            row: dict[str, Any] = scored(model, sample(facts[:n], settings.scored))
            row["ES first"] = repeated(model, facts[: min(n, 100)])
            row["prose"] = ratio(before, prose(model, settings.prose)) if settings.prose else None
        row |= {name: found.looks[-1][name] for name in ("success", "others", "perplexity_ratio", "next_token_kl", "change", "spectrum")}  # fmt: skip
        row |= {"edits": n, "standing": len(found.standing), "rows": len(found.rows), "conflicts": found.conflicts}
        row |= {"seconds": spent, "seconds_an_edit": spent / (n - had) if n > had else None, "peak": peak()}
        say(str(row))
        rows.append(cache.plain(row))
        at |= {each["edits"]: each for each in _stand(found.looks)}
        _keep(kept, [rows, [*at.values()]])
    rows = [row for row in rows if row["edits"] in settings.sizes]
    result = {"alone": once, "rows": rows, "forgetting": [*at.values()], "edit": vars(edit), "facts": len(facts)}
    for path in [*figures.write(picture(rows, once), FIGURES / short_name(model) / settings.name), write(settings.name, model, settings, cache.plain(result))]:  # fmt: skip
        say(f"wrote {path}")


def _keep(path: Path, found: Any) -> None:
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found))


def _stand(looks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the forgetting matrix: at each look, which of the sampled earlier edits stand (1 or 0, by their numbers)."""
    return [{"edits": look["edits"], "stand": {str(index): int(held) for index, held in look["row"].items()}} for look in looks]  # fmt: skip


if __name__ == "__main__":
    main(parse(Scaling))
