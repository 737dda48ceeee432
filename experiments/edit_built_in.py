"""Does an edit hold, generalise, and spare its neighbours?  python -m experiments.edit_built_in

Edits built-in facts one at a time and undoes each; writes figures/MODEL/edit_built_in.json. Efficacy, paraphrase and
neighbourhood success are COUNTERFACT's: the new target is more probable per token than the true one (on neighbours the other way
round), averaged over a fact's prompts, then over facts. Rows: no edit; the default; C from Wikipedia text instead of text sampled
from the model (if --text is given); the published constants and key policy. Facts `offset`, `offset + every`, … are edited; the
preset was tuned on offset 7.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, say, write
from mechedit import edits, facts, models, moments
from mechedit.benchmarks import counterfact
from mechedit.editors import rome
from mechedit.settings import RomeSettings


@dataclass(frozen=True)
class EditBuiltIn:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    every: int = 19
    offset: int = 0
    text: Path = Path()  # a text file, e.g. WikiText
    rows: str = "default,text,published"
    threads: int = 2


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over facts in percent, and S, the harmonic mean of the three."""
    means = {name: 100 * statistics.mean(row[name] for row in rows) for name in ("ES", "PS", "NS", "p_new")}
    return means | {"S": statistics.harmonic_mean([means["ES"], means["PS"], means["NS"]]), "n": len(rows)}


def main(settings: EditBuiltIn) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = facts.built_in()[settings.offset :: settings.every]
    default = rome.resolve(model)
    published = replace(RomeSettings(policy="published"), layer=default.layer, prepend_bos=default.prepend_bos)
    variants: dict[str, tuple[RomeSettings, list[Path]]] = {"default": (default, []), "published": (published, [])}
    if settings.text != Path():
        variants["text"] = (default, [settings.text])
    result: dict[str, Any] = {
        "facts": [fact.id for fact in chosen],
        "no edit": {"rows": counterfact.scores(model, chosen)},
    }
    for name in [name for name in settings.rows.split(",") if name in variants]:
        rome_settings, texts = variants[name]
        moment = moments.estimate(model, rome_settings.layer, texts)
        rows = []
        for fact in chosen:
            try:
                edit = rome.edit(model, fact, rome_settings, moment)
            except edits.EditError as error:
                say(f"{name}: {fact.prompt}: refused: {error}")
                rows.append(counterfact.scores(model, [fact])[0] | {"refused": str(error)})
                continue
            with edits.edited(model, edit):
                rows.append(
                    counterfact.scores(model, [fact])[0]
                    | {
                        "relative_norm": edit.report["relative_norm"],
                        "seconds": edit.seconds,
                        "steps": len(edit.details["losses"]),
                    }
                )
            say(f"{name}: {fact.prompt} -> {fact.target_new}: {rows[-1]}")
        result[name] = {"rows": rows, "cond_C": moment.cond, "keys": moment.keys, "source": moment.source}
    for name, row in result.items():
        if name != "facts":
            row["summary"] = summary(row["rows"])
            say(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row["summary"].items()))
    say(f"wrote {write('edit_built_in', model, settings, result)}")


if __name__ == "__main__":
    main(parse(EditBuiltIn))
