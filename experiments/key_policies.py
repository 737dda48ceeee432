"""How often does one edit break the model?  python -m experiments.key_policies

Gupta et al. 2024 found that the published ROME sometimes breaks a model by one edit, because it takes the direction from an
averaged key and divides by the bare prompt's. Compared are the default, the published policy and constants, and those constants
with one key: divisor share, relative norm, drift of the essence distribution, perplexity of held-out text, nothing refused. An
edit counts as disabling where that perplexity doubles.

The first two are the edits of `table4_counterfact`, read from its runs where they are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.common import parse, progress, say, write
from experiments.editing import NUMBERS, benchmark_facts, folder, published
from mechedit import models
from mechedit.editors import rome
from mechedit.runs.editing import edit_facts
from mechedit.settings import POLICIES

QUANTILES = (0.0, 0.01, 0.05, 0.5, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class KeyPolicies:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    begin: int = 0
    facts: int = 150
    one_key: int = 50  # facts of the third policy, whose edits no other table has
    disabling: float = 2.0  # times the perplexity of held-out text
    threads: int = 2


def main(settings: KeyPolicies) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = benchmark_facts(settings.model, settings.begin, settings.facts)
    default = rome.resolve(model)
    policies = {
        "default": (settings.facts, replace(default, guard="warn")),
        "published": (settings.facts, published(default)),
        "published constants, one key": (settings.one_key, replace(published(default), **POLICIES["averaged"])),
    }
    result: dict[str, Any] = {}
    for name, (n, wanted) in policies.items():
        place = folder(model, "table4", settings.begin, name) / "edits"
        found = edit_facts(model, chosen[:n], place, "rome", wanted, progress=progress(10))
        done = [edit for edit in found if edit.report]
        numbers = {each: np.array([edit.report[each] for edit in done]) for each in NUMBERS}
        disabling = [edit.fact["prompt"] for edit in done if not edit.report["perplexity_ratio"] < settings.disabling]
        result[name] = {
            "n": len(done),
            "not edited": [edit.reasons[0] for edit in found if not edit.report],
            "disabling": disabling,
            "out of bands": sum(bool(edit.reasons) for edit in done),
            "quantiles": {number: dict(zip(map(str, QUANTILES), np.quantile(each, QUANTILES).tolist(), strict=True)) for number, each in numbers.items()},
        }  # fmt: skip
        say(f"{name}: {len(disabling)} of {len(done)} disabling; largest perplexity ratio {numbers['perplexity_ratio'].max():.2f}")  # fmt: skip
    say(f"wrote {write('key_policies', model, settings, {'policies': result})}")


if __name__ == "__main__":
    main(parse(KeyPolicies))
