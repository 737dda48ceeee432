"""From 1 to 10,000 edits in sequence: what stands, and what it costs.  python -m experiments.scaling --model organism

    figures/MODEL/scaling.json, .png

The facts that are edited are not said in the held-out text, so that its perplexity speaks of what has nothing to do with them. Up to `singles`
edits come one by one; more in a run of its own, in batches of `together`. At each size: S and its parts and the generated answer, of edits
sampled over the run and of its first hundred, beside the same facts edited alone; perplexity; seconds an edit, and the process's peak memory.
Runs are kept in out/MODEL/scaling, and go on where they were stopped; seconds are of the parts that were not there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.benchmark_editing import peak
from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from mechedit import applying, cache, figures, generation, guards, models, sources
from mechedit.benchmarks import answers, counterfact
from mechedit.editing import make_ready
from mechedit.editors import named
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.runs import sequence
from mechedit.runs.editing import attempt
from mechedit.runs.extending import run_sequence
from mechedit.settings import SequenceSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("ES", "PS", "NS")
PANELS = (("S", "S, %"), ("answer", "generated answer, %"), ("ES first", "ES of the first 100, %"), ("perplexity_ratio", "perplexity / unedited"))  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """Settings of the experiment."""

    model: str = "organism"
    editor: str = "sequential"
    sizes: tuple[int, ...] = (1, 10, 100, 1000, 10000)
    singles: int = 1000
    together: int = 100
    scored: int = 100
    every: int = 100
    a: float = 0.0
    layer: int = -1
    clamp: float = 0.0
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
    texts = generation.completions(model, [fact.prompt for fact in facts], answers.TOKENS)
    right = [answers.is_answered(answers.cut(text, "sentence"), str(fact.target_new), "sentence") for fact, text in zip(facts, texts, strict=True)]  # fmt: skip
    return found | {"answer": sum(right) / len(right)}


def alone(model: HookedModel, facts: Sequence[Fact], editor: Any, settings: Any, prepared: Any) -> dict[str, float]:
    """The same of each fact edited alone."""
    rows = []
    for fact in facts:
        with applying.edited(model, attempt(model, [fact], editor, settings, prepared)):
            rows.append(scored(model, [fact]))
    found = {name: sum(row[name] for row in rows) / len(rows) for name in (*PARTS, "answer")}
    return found | {"S": 3 / sum(1 / max(found[name], 1e-9) for name in PARTS)}


def sample(facts: Sequence[Fact], n: int) -> list[Fact]:
    """`n` of them, spread evenly."""
    return (
        [facts[int(index * len(facts) / n)] for index in range(min(n, len(facts)))] if len(facts) > n else list(facts)
    )


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel a number, over the number of edits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9), dpi=150, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        scale = 1.0 if name == "perplexity_ratio" else 100.0
        for kind, colour in (("one by one", "tab:green"), ("in batches", "tab:purple")):
            own = [row for row in rows if row["kind"] == kind and name in row]
            axes.plot([row["edits"] for row in own], [scale * row[name] for row in own], "o-", color=colour, label=kind)
        axes.set_xscale("log")
        axes.set_xlabel("edits", fontsize=9)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(*((0, 103) if scale > 1 else (None, None)))
    figure.axes[0].legend(fontsize=8, loc="lower left")
    return figure


def main(settings: Scaling) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    editor = named(settings.editor)
    own = {
        name: getattr(settings, name) for name in ("a", "layer", "clamp") if getattr(settings, name) not in (0.0, -1)
    }
    edit = editor.resolve(model, editor.settings(guard="warn", **own))
    prepared = make_ready(model, editor, edit)
    facts = apart(model, sources.named("organism"))
    place = runs(model, f"scaling-{cache.content_key(str(edit))}")
    rows: list[dict[str, Any]] = []
    once = alone(model, sample(facts[: settings.singles], settings.scored), editor, edit, prepared)
    say(f"alone: {once}")
    for n in settings.sizes:
        batches = n > settings.singles
        how = SequenceSettings(together=settings.together if batches else 1, every=settings.every * (10 if batches else 1), keep=50)  # fmt: skip
        folder = place / ("batches" if batches else "singles")
        had = len(sequence.load(folder / "state.safetensors").entries) if (folder / "state.safetensors").exists() else 0
        began = time.perf_counter()
        found = run_sequence(model, facts[:n], folder, how, editor, edit, prepared, progress=progress(20))
        spent = time.perf_counter() - began
        with sequence.written(model, found):
            row = scored(model, sample(facts[:n], settings.scored))
            row["ES first"] = scored(model, sample(facts[: min(n, 100)], settings.scored))["ES"]
        look = found.looks[-1]
        row |= {name: look[name] for name in ("success", "others", "perplexity_ratio", "next_token_kl", "change", "spectrum")}  # fmt: skip
        row |= {"kind": "in batches" if batches else "one by one", "edits": n, "standing": len(found.standing), "conflicts": found.conflicts}  # fmt: skip
        row |= {"seconds": spent, "seconds_an_edit": spent / (n - had) if n > had else None, "peak": peak()}
        say(str(row))
        rows.append(row)
        result = {"alone": once, "rows": rows, "forgetting": {kind: _looks(place / kind) for kind in ("singles", "batches")}}  # fmt: skip
        result |= {"edit": cache.plain(vars(edit)), "facts": len(facts)}
        for path in [*figures.write(picture(rows), FIGURES / short_name(model) / "scaling"), write("scaling", model, settings, cache.plain(result))]:  # fmt: skip
            say(f"wrote {path}")


def _looks(folder: Path) -> list[dict[str, Any]]:
    """Rows of the forgetting matrix: at each look, which of the sampled earlier edits stand (1 or 0, by their numbers)."""
    state = folder / "state.safetensors"
    looks = sequence.load(state).looks if state.exists() else ()
    return [
        {"edits": look["edits"], "stand": {index: int(held) for index, held in look["row"].items()}} for look in looks
    ]


if __name__ == "__main__":
    main(parse(Scaling))
