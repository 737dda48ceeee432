"""Does it matter how the subject is corrupted, and how wide the window is? (figures 13 to 15).  python -m experiments.figure13_noise

The same facts, traced at the subject's last token and the prompt's last, under several corruptions and window widths. Each
condition's average indirect effects have intervals, and are compared with the default's at the default's own early and late sites,
pair by pair: a layer chosen for each condition would favour it. Every condition is a run of its own in out/, and resumes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from experiments.common import FIGURES, known_facts, parse, progress, runs, say, short_name, write
from mechedit import figures, models, sites
from mechedit.runs import tracing
from mechedit.settings import TraceSettings
from mechedit.tracing import Trace
from mechedit.tracing.averages import AverageError, average, compare

ROLES = ("subject_last", "last")


@dataclass(frozen=True)
class NoiseAndWindows:
    """Settings of the experiment."""

    model: str = "gemma-3-270m"
    facts: int = 60
    draws: int = 10
    seed: int = 0
    threads: int = 2


def conditions(settings: NoiseAndWindows) -> dict[str, TraceSettings]:
    """The default first, then one change at a time."""
    base = TraceSettings(kinds=("mlp", "attn"), draws=settings.draws, seed=settings.seed, roles=ROLES)
    return {
        "gaussian, 3 sigma": base,
        "gaussian, 1 sigma": replace(base, noise=1.0),
        "gaussian, 5 sigma": replace(base, noise=5.0),
        "uniform, 3 sigma": replace(base, corruption="uniform"),
        "multivariate, 1": replace(base, corruption="multivariate", noise=1.0),
        "Student-t, 1": replace(base, corruption="student_t", noise=1.0),
        "replaced, 1 sigma": replace(base, replace=True, noise=1.0),
        "other tokens": replace(base, corruption="tokens"),
        "window 1": replace(base, window=1),
        "window 3": replace(base, window=3),
        "window 5": replace(base, window=5),
        "window 15": replace(base, window=15),
    }


def main(settings: NoiseAndWindows) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    chosen = known_facts(model, settings.facts, settings.seed)
    found: dict[str, list[Trace]] = {}
    result, chosen_once = {}, None
    for number, (name, wanted) in enumerate(conditions(settings).items()):
        say(name)
        folder = runs(model, f"noise{number:02d}")
        found[name] = tracing.trace_facts(model, chosen, folder, wanted, progress=progress(4))
        try:
            mean = average(found[name], seed=settings.seed)
        except AverageError as error:
            result[name] = {"settings": asdict(wanted), "error": str(error)}
            continue
        early, late = sites.early(mean), sites.late(mean)
        chosen_once = chosen_once or (early, late)
        result[name] = {
            "settings": asdict(wanted),
            "n": mean.n,
            "clean": mean.clean.to_json(),
            "corrupted": mean.corrupted.to_json(),
            "total_effect": mean.total.to_json(),
            "early_site": vars(early) | {"effect": mean.at(early.kind, early.layer, "subject_last").to_json()},
            "late_site": vars(late) | {"effect": mean.at(late.kind, late.layer, "last").to_json()},
            "against_default": _paired(found, name, chosen_once, settings.seed),
        }
        figures.write(figures.role_lines(mean, ROLES), FIGURES / short_name(model) / "figure13_noise" / f"{number:02d}")
        say(f"  n {mean.n}, total effect {mean.total}; {early}; {late}")
    say(f"wrote {write('figure13_noise', model, settings, {'conditions': result})}")


def _paired(
    found: dict[str, list[Trace]], name: str, chosen: tuple[sites.Site, sites.Site], seed: int
) -> dict[str, object]:
    """This condition's effects at the default's sites less the default's own, over the facts that both have."""
    theirs = {each.prompt: each for each in found["gaussian, 3 sigma"]}
    mine = found[name]
    base = [theirs[each.prompt] for each in mine]
    return {
        site.role: {"layer": site.layer} | compare(base, mine, site.kind, site.layer, site.role, seed=seed).to_json()
        for site in chosen
    }


if __name__ == "__main__":
    main(parse(NoiseAndWindows))
