"""How often does one edit break the model?  python -m experiments.key_policies

Gupta et al. 2024 found that the published ROME sometimes breaks a model by one edit, because it takes the direction from an
averaged key and divides by the bare prompt's. Each fact is edited by each policy with the same constants (the published ones and
the preset's), nothing refused, and measured: divisor share, relative norm, drift of the essence distribution, perplexity of
held-out text. An edit counts as disabling where that perplexity doubles.

Reads COUNTERFACT rows behind those of the tables, so that the bands of `mechedit.guards` are set on facts held apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.common import parse, progress, runs, say, write
from experiments.edit_counterfact import published
from experiments.editing import counterfact
from mechedit import models, moments
from mechedit.editors import rome
from mechedit.guards import BANDS
from mechedit.runs.editing import edit_facts
from mechedit.settings import POLICIES, RomeSettings

QUANTILES = (0.0, 0.01, 0.05, 0.5, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class KeyPolicies:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 2000
    facts: int = 100
    disabling: float = 2.0  # times the perplexity of held-out text
    threads: int = 2


def main(settings: KeyPolicies) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = counterfact(settings.begin, settings.facts)
    default = rome.resolve(model)
    C = moments.estimate(model, default.layer, progress=progress())
    constants: dict[str, RomeSettings] = {"preset": default, "published": published(default)}
    result: dict[str, Any] = {}
    for name, base in constants.items():
        for policy in POLICIES:
            wanted = replace(base, policy=policy, guard="warn")
            found = edit_facts(
                model, chosen, runs(model, f"policies-{name}-{policy}"), wanted, C, progress=progress(10)
            )
            done = [edit for edit in found if edit.changes]
            numbers = {band: np.array([edit.report[band] for edit in done]) for band in BANDS if band != "cond_C"}
            disabling = [
                edit.fact["prompt"] for edit in done if not edit.report["perplexity_ratio"] < settings.disabling
            ]
            result[f"{name} constants, {policy}"] = {
                "n": len(done),
                "not edited": [edit.reasons[0] for edit in found if not edit.changes],
                "disabling": disabling,
                "out of bands": sum(bool(edit.reasons) for edit in done),
                "quantiles": {band: dict(zip(map(str, QUANTILES), np.quantile(each, QUANTILES).tolist(), strict=True)) for band, each in numbers.items()},
            }  # fmt: skip
            say(f"{name} constants, {policy}: {len(disabling)} of {len(done)} disabling; largest perplexity ratio {numbers['perplexity_ratio'].max():.2f}")  # fmt: skip
    say(f"wrote {write('key_policies', model, settings, {'policies': result})}")


if __name__ == "__main__":
    main(parse(KeyPolicies))
