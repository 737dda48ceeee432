"""How many keys does C need?  python -m experiments.moments_convergence   -> figures/MODEL/moments_convergence.json and .png

C from growing numbers of keys, each a prefix of one text put together from parts by `moments.merge`. For each: its condition,
the cosine of the edit direction u = C^-1 k* with that of the most keys, averaged over facts, and the success of the edits made
with it. With --text, a text file is read beside the model's own samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.common import FIGURES, parse, progress, runs, say, short_name, write
from experiments.editing import benchmark_facts, success_of
from mechedit import applying, figures, keys, models, moments, rank_one
from mechedit.benchmarks import metrics
from mechedit.editors import rome
from mechedit.moments import Moment
from mechedit.runs.editing import edit_facts
from mechedit.settings import MomentSettings


@dataclass(frozen=True)
class MomentsConvergence:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    text: Path = Path()  # a text file, e.g. WikiText; empty: the model's own samples
    times_d_mlp: tuple[float, ...] = (1.5, 3.0, 5.0, 10.0, 20.0, 40.0)
    begin: int = 2000
    direction_facts: int = 30
    edit_facts: int = 20
    threads: int = 2


def main(settings: MomentsConvergence) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    default = replace(rome.resolve(model), guard="warn")
    texts = [settings.text] if settings.text != Path() else []
    d_mlp = models.W_out(model, default.layer).shape[0]
    growing: list[Moment] = []
    for times in settings.times_d_mlp:
        keys_wanted = MomentSettings(tokens=int(times * d_mlp), prepend_bos=default.prepend_bos)
        growing.append(moments.estimate(model, default.layer, texts or None, keys_wanted, progress=progress()))
        say(f"{growing[-1].keys} keys: cond(C) {growing[-1].cond:.3g}")
    chosen = benchmark_facts(settings.model, settings.begin, settings.direction_facts)
    before = keys.prefixes(model, default)
    subject = [keys.subject_keys(model, default.layer, keys.contexts(model, fact, before, prepend_bos=default.prepend_bos)).mean(0) for fact in chosen]  # fmt: skip
    directions = [torch.stack([rank_one.direction(key, moment.C) for key in subject]) for moment in growing]
    rows: list[dict[str, Any]] = []
    for moment, u in zip(growing, directions, strict=True):
        cosine = torch.nn.functional.cosine_similarity(u, directions[-1]).numpy()
        few = chosen[: settings.edit_facts]
        folder = runs(model, f"convergence-{'text' if texts else 'samples'}-{moment.keys}")
        found = edit_facts(
            model, few, folder, "rome", default, rome.prepare(model, default, moment), progress=progress(4)
        )
        scores = metrics.table([success_of(model, fact, edit) for fact, edit in zip(few, found, strict=True)])
        overlap = [applying.diff(edit, edit)[0].ratio for edit in found if edit.changes]
        rows.append({"keys": moment.keys, "cond_C": moment.cond, "cosine": {"mean": float(np.mean(cosine)), "low": float(np.quantile(cosine, 0.025)), "high": float(np.quantile(cosine, 0.975))}, "edits": len(overlap), "scores": {key: asdict(each) for key, each in scores.items()}})  # fmt: skip
        say(f"{moment.keys} keys: cosine of u with the last {np.mean(cosine):.3f}; S {scores['S']}")
    name = "moments_convergence" + ("_text" if texts else "")
    record = {"source": growing[-1].source, "d_mlp": d_mlp, "rows": rows}
    for path in [
        *figures.write(draw(rows, d_mlp), FIGURES / short_name(model) / name),
        write(name, model, settings, record),
    ]:
        say(f"wrote {path}")


def draw(rows: list[dict[str, Any]], d_mlp: int) -> Figure:
    """Direction and success against keys per dimension."""
    figure = Figure(figsize=(7, 3), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [row["keys"] / d_mlp for row in rows]
    left.plot(x, [row["cosine"]["mean"] for row in rows], "o-")
    left.fill_between(x, [row["cosine"]["low"] for row in rows], [row["cosine"]["high"] for row in rows], alpha=0.2)
    left.set_ylabel("cosine of u with the last")
    for score in ("ES", "PS", "NS", "S"):
        right.plot(x, [100 * row["scores"][score]["mean"] for row in rows], "o-", label=score)
    right.set_ylabel("success, percent")
    right.legend(frameon=False, bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{each:g}" for each in x])
        axes.minorticks_off()
        axes.set_xlabel("keys per dimension of the key")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(parse(MomentsConvergence))
