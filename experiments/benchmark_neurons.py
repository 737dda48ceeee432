"""How fast are attributions, and are they the same?  python -m experiments.benchmark_neurons   -> figures/MODEL/benchmark_neurons.json

In one run, on one fact that the model knows, all blocks, prompts and steps:
- mechedit's attributions, all steps and prompts of one length as rows of one batch, in w's block and those above alone;
- the same function, one prompt and one step at a time: what lies below is shared, rows are not;
- the loop: a forward and a backward pass of the whole model for every prompt, block and step, all logits, as the published code does it
  (tests/slow_neurons.py), with the norm after an MLP free, which the batch is compared with in the same way.

The two slow ways run some prompts of some blocks, the same ones, and `cells` says how many; their times are scaled up to all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.benchmark_tracing import sample, seconds
from experiments.common import known_facts, parse, say, write
from mechedit import keys, models, neurons
from mechedit.facts import Fact
from mechedit.settings import KnowledgeNeuronsSettings
from tests.slow_neurons import attributed


@dataclass(frozen=True)
class BenchmarkNeurons:
    """Settings of the benchmark of knowledge neurons."""

    model: str = "gemma-3-270m"
    device: str = "cpu"
    repeats: int = 3  # of the batches; their median is reported
    cells: int = 12  # of prompts and blocks that the slow ways run; 0 means all
    steps: int = 20
    seed: int = 0  # of the fact
    threads: int = 2


def fact_of(model: models.HookedModel, seed: int) -> Fact:
    """A fact that the model knows."""
    return known_facts(model, 1, seed)[0]


def slowly(cells: list[tuple[int, int]], of: int, one: Callable[[int, int], torch.Tensor], found: torch.Tensor, device: str) -> dict[str, Any]:  # fmt: skip
    """A slow way over some (prompt, block): seconds for all, and its largest difference from `found`, as a share of the largest number."""
    slow, took = seconds(lambda: torch.stack([one(prompt, layer).cpu() for prompt, layer in cells]), device)
    fast = torch.stack([found[prompt, layer] for prompt, layer in cells])
    return {
        "cells": len(cells),
        "of": of,
        "seconds_for_all": took * of / len(cells),
        "largest_difference": float((slow - fast).abs().max()),
        "largest_difference_of_largest": float((slow - fast).abs().max() / slow.abs().max()),
    }


def main(settings: BenchmarkNeurons) -> None:
    torch.set_num_threads(settings.threads)
    model, device = models.load(settings.model, device=settings.device), settings.device
    fact, wanted = fact_of(model, settings.seed), KnowledgeNeuronsSettings(steps=settings.steps)
    rows = [list(row.ids) for row in keys.contexts(model, fact, keys.prefixes(model, wanted))]
    answer = neurons.answer_ids(model, fact, str(fact.target_true), wanted)
    n_layers, taken = int(model.cfg.n_layers), []
    for _ in range(settings.repeats):
        (found, p), took = seconds(lambda: neurons.attributions(model, rows, answer, wanted), device)
        taken.append(took)
        say(f"batches: {took:.2f} s")
    every = [(prompt, layer) for prompt in range(len(rows)) for layer in range(n_layers)]
    cells = sample(every, settings.cells)
    free, _ = neurons.attributions(model, rows, answer, replace(wanted, norm="moving"))

    def one_row(prompt: int, layer: int) -> torch.Tensor:
        alone = replace(wanted, layers=(layer,))
        return neurons.attributions(model, [rows[prompt]], answer, alone, most_rows=1)[0][0, 0]

    def whole_model(prompt: int, layer: int) -> torch.Tensor:
        with models.frozen(model):
            return attributed(model, rows[prompt], answer, layer, settings.steps)

    result: dict[str, Any] = {
        "prompt": fact.prompt,
        "answer": fact.target_true,
        "prompts": len(rows),
        "steps": settings.steps,
        "p_answer": p,
        "batch_seconds": taken,
        "one_row": slowly(cells, len(every), one_row, found, device),
        "loop": slowly(cells, len(every), whole_model, free, device),
    }
    fast = sorted(taken)[len(taken) // 2]
    for name in ("one_row", "loop"):
        result[f"{name}_over_batch"] = result[name]["seconds_for_all"] / fast
        say(
            f"{name.replace('_', ' ')}: {result[name]['seconds_for_all']:.1f} s for all, {result[f'{name}_over_batch']:.1f} times the batches'; "
            f"differs by {result[name]['largest_difference_of_largest']:.1e} of the largest attribution"
        )
    say(f"wrote {write('benchmark_neurons', model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkNeurons))
