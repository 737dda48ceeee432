"""When does editing in sequence break a model?  python -m experiments.collapse --model organism

    figures/MODEL/collapse.json, .png

Published ROME and published MEMIT, which know nothing of the edits before, published AlphaEdit, which does, and ROME's default, one edit at a time;
and `sequential`, the default for long runs, `together` at a time. All write the same facts; none of them is said in the held-out text. The published ones have their policies and constants, at the model's
layer, with its clamp, and MEMIT with the weight of C that it has on GPT-2 XL for each unit of the MLP's width. Every `every` edits a look (`mechedit.runs.watching`); a run ends where a measure
leaves its band, by the defaults of SequenceSettings, and the edit and the measure are told. Runs are kept in out/MODEL/collapse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from experiments.editing import benchmark_facts, published
from experiments.scaling import MANY, apart
from mechedit import cache, figures, models
from mechedit.editing import make_ready
from mechedit.editors import named
from mechedit.models import HookedModel
from mechedit.runs.extending import run_sequence
from mechedit.settings import AlphaEditSettings, MemitSettings, SequenceSettings
from mechedit.settings.many import MANY_CONSTANTS, MANY_POLICIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"ROME, published": "tab:red", "MEMIT, published": "tab:orange", "AlphaEdit, published": "tab:blue", "ROME, default": "tab:pink", "sequential": "tab:green"}  # fmt: skip
MEMIT_A = 20000 / 6400  # of GPT-2 XL, whose MLP is 6400 wide
ALPHA = {"a": 0.0, "b": 1.0, "c": 10.0, "null": 0.02}  # all given, so that no preset's take their place
PANELS = {"success": "earlier edits that stand", "others": "facts never edited that stand", "perplexity_ratio": "perplexity / unedited", "change": "|W - W0| / |W0|"}  # fmt: skip


@dataclass(frozen=True)
class Collapse:
    """Settings of the experiment."""

    model: str = "organism"
    edits: int = 1000
    every: int = 20
    sampled: int = 64
    together: int = 50  # of sequential, facts that are written at once
    rows: tuple[str, ...] = tuple(COLOURS)
    layer: int = -1
    threads: int = 2


def ways(model: HookedModel, layer: int) -> dict[str, tuple[str, Any]]:
    """Editors and settings by the names of the rows."""
    own: dict[str, Any] = {"layer": layer} if layer >= 0 else {}
    rome, sequential = (each.resolve(model, each.settings(**own)) for each in map(named, ("rome", "sequential")))
    fitted = {"layer": rome.layer, "clamp": rome.clamp, "guard": "warn"}
    memit = MANY_POLICIES["memit"] | MANY_CONSTANTS["memit"] | fitted
    a = MEMIT_A * models.W_out(model, rome.layer).shape[0]
    return {
        "ROME, published": ("rome", published(rome)),
        "MEMIT, published": ("memit", named("memit").resolve(model, MemitSettings(**memit | {"a": a}))),
        "AlphaEdit, published": ("alphaedit", named("alphaedit").resolve(model, AlphaEditSettings(**memit | ALPHA))),
        "ROME, default": ("rome", replace(rome, guard="warn")),
        "sequential": ("sequential", replace(sequential, guard="warn")),
    }


def picture(found: dict[str, dict[str, Any]]) -> Figure:
    """A panel a measure, a line a method, a cross where it broke."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(11, 2.9), dpi=150, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for row, each in found.items():
            own = [(look["edits"], look[name]) for look in each["looks"] if look[name] is not None]
            if own:
                axes.plot(*zip(*own, strict=True), color=COLOURS[row], label=row)
                if each["broke"]:
                    axes.plot(*own[-1], "x", color=COLOURS[row])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("edits", fontsize=9)
        axes.tick_params(which="both", labelsize=8)
        if name in ("success", "others"):
            axes.set_ylim(0, 1.03)
        else:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else NullFormatter())
    figure.axes[0].legend(fontsize=8)
    return figure


def main(settings: Collapse) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    facts = apart(model, benchmark_facts(settings.model, 0, MANY))[: settings.edits]
    how = SequenceSettings(every=settings.every, sampled=settings.sampled, on_collapse="stop")
    found: dict[str, dict[str, Any]] = {}
    for row, (name, edit) in ways(model, settings.layer).items():
        if row not in settings.rows:
            continue
        editor = named(name)
        prepared = make_ready(model, editor, edit)
        own = replace(how, together=settings.together if name == "sequential" else 1)
        place = runs(model, "collapse") / f"{row.replace(', ', '-')}-{cache.content_key(str(edit), asdict(own))}"
        done = run_sequence(model, facts, place, own, editor, edit, prepared, progress=progress(20))
        looks = [{key: value for key, value in look.items() if key not in ("row", "singular")} for look in done.looks]
        broke = {"edit": done.collapse["edits"], "by": done.collapse["out"]} if done.collapse else None
        found[row] = {"looks": looks, "broke": broke, "edits": len(done.entries), "standing": len(done.standing), "together": own.together, "edit": vars(edit)}  # fmt: skip
        told = f"broke by edit {broke['edit']}: {broke['by']}" if broke else f"whole after {len(done.entries)} edits"
        say(f"{row}: {told}")
        for path in [*figures.write(picture(found), FIGURES / short_name(model) / "collapse"), write("collapse", model, settings, cache.plain({"rows": found}))]:  # fmt: skip
            say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(Collapse))
