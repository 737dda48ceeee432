"""How does a trace's time grow?  python -m experiments.benchmark_scaling   -> figures/MODEL/benchmark_scaling.json and .png

The exact sweep, three kinds, beside the arithmetic floor of the same cells at the matmul rate of the same run:
- against tokens and draws, on prompts about the first built-in fact's subject;
- against layers, on random GPT-2 shapes of growing depth;
- over facts that the model knows, exact and in bfloat16: what a run over many facts costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments import benchmark_tracing
from experiments.benchmark_tracing import floor_operations, matmul_rate, random_gpt2, seconds
from experiments.common import FIGURES, known_facts, parse, say, short_name, write
from mechedit import figures, models, prompts
from mechedit.facts import Fact, built_in
from mechedit.settings import TraceSettings
from mechedit.tracing import trace

SENTENCE = "is a tall tower that stands in the middle of the old city and everybody who comes to see it from"


@dataclass(frozen=True)
class BenchmarkScaling:
    """Settings of the scaling benchmark."""

    model: str = "gemma-3-270m"
    device: str = "cpu"
    tokens: tuple[int, ...] = (6, 8, 12, 16)
    draws: tuple[int, ...] = (1, 3, 10)
    layers: tuple[int, ...] = (3, 6, 12)  # of random GPT-2 shapes, 12 heads and width 768
    facts: int = 6  # known facts whose traces are timed
    seed: int = 0
    threads: int = 2


def fact_of(model: models.HookedModel, tokens: int) -> Fact:
    """A sentence of so many tokens about the first built-in fact's subject, whose last word counts as its answer."""
    subject, words = built_in()[0].subject, SENTENCE.split()
    for n in range(1, len(words)):
        fact = Fact(subject, "{} " + " ".join(words[:n]), words[n])
        if len(prompts.prepare(model, fact).ids) >= tokens:
            return fact
    raise ValueError(f"a sentence has at most {len(words)} words after its subject; {tokens} tokens were asked for.")


def timed(model: models.HookedModel, fact: Fact, settings: TraceSettings, device: str, rate: float) -> dict[str, Any]:
    """One trace's seconds and those of its floor."""
    found, took = seconds(lambda: trace(model, fact, settings), device)
    floor = floor_operations(model, found) / rate
    say(f"  {len(found.tokens)} tokens, {settings.draws} draws, {model.cfg.n_layers} layers: {took:.1f} s, {took / floor:.2f} of the floor")  # fmt: skip
    return {"tokens": len(found.tokens), "draws": settings.draws, "layers": int(model.cfg.n_layers), "seconds": took, "floor_seconds": floor}  # fmt: skip


def main(settings: BenchmarkScaling) -> None:
    torch.set_num_threads(settings.threads)
    device = settings.device
    model = benchmark_tracing.load(settings)
    base = TraceSettings(draws=max(settings.draws), seed=settings.seed)
    trace(
        model, fact_of(model, 0), replace(base, draws=1)
    )  # the first pass of a process pays for what later ones find ready
    rate = matmul_rate(device)
    middle = fact_of(model, settings.tokens[len(settings.tokens) // 2])
    result: dict[str, Any] = {
        "matmul_gflops": rate / 1e9,
        "tokens": [timed(model, fact_of(model, each), base, device, rate) for each in settings.tokens],
        "draws": [timed(model, middle, replace(base, draws=each), device, rate) for each in settings.draws],
        "layers": [],
    }
    for n_layers in settings.layers:
        shape = random_gpt2(n_layers, 12, 768, device)
        result["layers"].append(timed(shape, fact_of(shape, 8), base, device, rate))
    chosen = known_facts(model, settings.facts, settings.seed)
    for precision in ("model", "bfloat16"):
        rows = [timed(model, fact, replace(base, precision=precision), device, rate) for fact in chosen]
        total, floor = (sum(row[name] for row in rows) for name in ("seconds", "floor_seconds"))
        result[f"facts_{precision}"] = {"n": len(rows), "seconds": total, "floor_seconds": floor, "over_floor": total / floor}  # fmt: skip
        say(f"{len(rows)} facts, {precision}: {total:.0f} s, {total / floor:.2f} of the floor in float32")
    stem = FIGURES / short_name(model) / "benchmark_scaling"
    for path in [*figures.write(draw(result), stem), write("benchmark_scaling", model, settings, result)]:
        say(f"wrote {path}")


def draw(result: dict[str, Any]) -> Figure:
    """Seconds against tokens, draws and layers, with the floor."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("tokens", "draws", "layers"), strict=True):
        x = [row[name] for row in result[name]]
        axes.plot(x, [row["seconds"] for row in result[name]], "o-", label="mechedit's sweep")
        axes.plot(x, [row["floor_seconds"] for row in result[name]], "--", color="gray", label="arithmetic floor")
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None), xticks=x)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.axes[2].set_title("random GPT-2 shape, width 768", fontsize="medium")
    return figure


if __name__ == "__main__":
    main(parse(BenchmarkScaling))
