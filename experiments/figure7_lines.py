"""Average effects by layer, a line a token role (figure 7).  python -m experiments.figure7_lines

Averages the traces that `figure2_average_effects` kept in out/MODEL/traces; no model is loaded. Also says how often each role
has the fact's best layer, and the mean over facts of the best probability, as the paper's appendix does.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from experiments.common import FIGURES, OUT, parse, say
from mechedit import cache, figures
from mechedit.runs import units
from mechedit.tracing import Trace
from mechedit.tracing.averages import average
from mechedit.tracing.roles import ROLES


@dataclass(frozen=True)
class Lines:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"  # the model's name without its owner
    seed: int = 0


def main(settings: Lines) -> None:
    traces = [Trace.load(unit) for unit in units.read_all(OUT / settings.model / "traces")]
    mean = average(traces, seed=settings.seed)
    folder = FIGURES / settings.model
    for path in figures.write(figures.role_lines(mean), folder / "figure7_lines"):
        say(f"wrote {path}")
    best = {
        kind: {
            role: {"mean_of_best_layer": float(mean.best[kind][column]), "best_layer_of_mean": int(grid[:, column].nan_to_num(-1.0).argmax()), "largest_mean": float(grid[:, column].nan_to_num(-1.0).max())}
            for column, role in enumerate(ROLES)
            if mean.n_role[column]
        }
        for kind, grid in mean.restored.items()
    }  # fmt: skip
    first = traces[0]
    record = {
        "settings": asdict(settings),
        "trace_settings": asdict(first.settings),
        "origin": first.origin,
        "versions": first.versions,
        "n": mean.n,
        "n_role": dict(zip(ROLES, mean.n_role, strict=True)),
        "roles": best,
    }
    path = folder / "figure7_lines.json"
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    say(f"wrote {path}")


if __name__ == "__main__":
    main(parse(Lines))
