"""What do gradient steps cost beside the passes they need?  python -m experiments.benchmark_fine_tuning   -> figures/MODEL/benchmark_fine_tuning.json

One fact (of the organism's world for an organism), `steps` steps, none of which ends early, at each of `layers`; without them, at the layer
of each editor's preset and at the top one, whose passes are the fewest: the seconds of `ft`, `ft-l` and
`attention-edit` in finding their changes, and those of as many bare passes, forward and backward from the edited block up, of the same
tokens with gradients of the same weights, in turn in one process. Seconds are the process's own, which other work on the machine does
not stop. Medians of `repeats`, and of the ratios of neighbours in time. Editors that are
trained, where their network ships (`set`) or is in out/MODEL/trained, beside one pass forward and one backward of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from experiments.common import parse, say, write
from experiments.editing import TRAINED, opponent, there
from mechedit import editing, editors, models, organism, prompts, sources, weights
from mechedit.editors.attention_edit import tuned
from mechedit.editors.descent import Rows
from mechedit.facts import Fact
from mechedit.models import HookedModel
from mechedit.settings import AttentionEditSettings, BoundedSettings, DescentSettings, FineTuningSettings
from mechedit.weights import Weight

EDITORS: dict[str, type[DescentSettings]] = {
    "ft": FineTuningSettings,
    "ft-l": BoundedSettings,
    "attention-edit": AttentionEditSettings,
}


@dataclass(frozen=True)
class BenchmarkFineTuning:
    """Settings of the benchmark."""

    model: str = "gemma-3-270m"
    layers: tuple[int, ...] = (-1,)  # -1: of each editor's preset, and the top one
    steps: int = 25
    repeats: int = 5
    threads: int = 1


def main(settings: BenchmarkFineTuning) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model)
    fact = sources.named("organism" if settings.model in organism.MODELS else "built-in")[0]
    result: dict[str, Any] = {}
    for name, chosen in wanted(model, settings):
        editor = editors.named(name)
        result[f"{name}, layer {chosen.layer}"] = compared(
            lambda editor=editor, chosen=chosen: editor.find(model, [fact], chosen, None, {}),
            lambda chosen=chosen: bare(model, fact, chosen),
            settings.repeats,
        )
    for name in there(model, TRAINED):
        title, chosen = opponent(model, name, 0)
        editor, prepared = editors.named(title), editing.make_ready(model, editors.named(title), chosen)
        result[name] = compared(
            lambda editor=editor, chosen=chosen, prepared=prepared: editor.find(model, [fact], chosen, prepared, {}),
            lambda chosen=chosen, prepared=prepared: both_ways(model, fact, prepared.weights, bool(chosen.prepend_bos)),
            settings.repeats,
        )
    path = write("benchmark_fine_tuning", model, settings, {"editors": result})
    for name, row in result.items():
        say(f"{name}: {row['ratio']:.2f} times the bare passes")
    say(f"wrote {path}")


def wanted(model: HookedModel, settings: BenchmarkFineTuning) -> Iterator[tuple[str, DescentSettings]]:
    """Each editor with its settings at each layer, in which no step ends early."""
    steady = {"steps": settings.steps, "stop_at": 0.0, "learning_rate": 1e-5}
    for name, kind in EDITORS.items():
        layers = settings.layers
        if layers == (-1,):
            own = models.preset(model)
            at = own.settings[name].layer if own is not None and name in own.settings else 0
            layers = tuple(dict.fromkeys((at, int(model.cfg.n_layers) - 1)))
        for layer in layers:
            yield name, editors.named(name).resolve(model, kind(layer=layer, **steady))


def compared(edit: Callable[[], Any], passes: Callable[[], float], repeats: int) -> dict[str, float]:
    """Medians of the seconds of both, run in turn, and of their ratio; the first of each is not counted."""
    rows = []
    for _ in range(repeats + 1):
        began = time.process_time()
        edit()
        rows.append((time.process_time() - began, passes()))
    kept = rows[1:]
    return {
        "edit_seconds": median(whole for whole, _ in kept),
        "bare_seconds": median(alone for _, alone in kept),
        "ratio": median(whole / alone for whole, alone in kept),
    }


def both_ways(model: HookedModel, fact: Fact, names: Sequence[Weight], prepend_bos: bool) -> float:
    """The seconds of one pass forward and one backward, of the prompt and its new target, with gradients of these weights."""
    ids, target = prompts.joined(model, fact.prompt, str(fact.target_new), fact.join, prepend_bos=prepend_bos)
    row = torch.tensor([[*ids, *target]])
    with models.frozen(model):
        parameters = [weights.parameter_of(model, weight).requires_grad_(True) for weight in names]
        began = time.process_time()
        log_p = model(row[:, :-1])[0, -len(target) :].log_softmax(-1)
        torch.autograd.grad(-log_p.gather(1, row[0, -len(target) :, None]).sum(), parameters)
        return time.process_time() - began


def bare(model: HookedModel, fact: Fact, settings: DescentSettings) -> float:
    """The seconds of as many passes as there are steps, with gradients of the weights that the editor tunes."""
    names = (
        tuned(model, settings) if isinstance(settings, AttentionEditSettings) else [Weight(settings.layer, "mlp.W_out")]
    )
    with models.frozen(model):
        rows = Rows(model, [fact], settings)
        parameters = [weights.parameter_of(model, weight).requires_grad_(True) for weight in names]
        began = time.process_time()
        for _ in range(settings.steps):
            torch.autograd.grad(rows.loss(), parameters)
        return time.process_time() - began


if __name__ == "__main__":
    main(parse(BenchmarkFineTuning))
