"""How fast is a trace, and is it the same?  python -m experiments.benchmark_tracing   -> figures/MODEL/benchmark_tracing.json

Three times in one run, on one fact, all kinds, layers and tokens:
- the loop: one forward pass of the whole model for every cell, all logits, as the published code and TransformerLens's
  patching functions do it (tests/slow_trace.py), over all cells, on the same model;
- the same loop on some cells, with the weights laid out as TransformerLens itself loads them, which copies each in every
  forward pass (`mechedit.models.load` stores them so that nothing is copied); a bridge has no such copies;
- mechedit's sweep;
- the arithmetic floor: the multiplications that no exact method can avoid, at the rate of a large matrix product measured
  in the same run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from experiments.common import parse, say, write
from mechedit import corruption, facts, models, prompts
from mechedit.settings import KINDS, TraceSettings
from mechedit.tracing import engine, trace
from tests.slow_trace import loop


@dataclass(frozen=True)
class BenchmarkTracing:
    """Settings of the tracing benchmark."""

    model: str = "gemma-3-270m"
    draws: int = 10
    repeats: int = 3  # of the sweep; its median is reported
    loop_cells: int = 0  # cells the loop runs, evenly spread; 0 means all of them, about a quarter of an hour
    plain_cells: int = 10  # cells a kind of the loop with TransformerLens's own layout
    threads: int = 2


def floor_operations(model: models.HookedModel, n_positions: int, begin: int, draws: int, window: int) -> float:
    """Multiply-adds times two of the cells of all kinds: block matrices for each token-layer, an unembedding row a cell and draw."""
    cfg, block = model.cfg, model.blocks[0]
    matrices = sum(weight.numel() for weight in block.parameters() if weight.ndim >= 2)
    n_layers = int(cfg.n_layers)
    total = 0.0
    for kind in KINDS:
        for layer in range(n_layers):
            start = layer + 1 if kind == "resid" else engine.window(layer, window, n_layers)[0]
            for position in range(begin, n_positions):
                total += (
                    2.0
                    * draws
                    * ((n_positions - position) * (n_layers - start) * matrices + int(cfg.d_model) * int(cfg.d_vocab))
                )
    return total


def matmul_rate() -> float:
    """Operations a second of a 2048-cubed float32 product, the best of several."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def main(settings: BenchmarkTracing) -> None:
    torch.set_num_threads(settings.threads)
    model = models.load(settings.model, device="cpu")
    fact = facts.built_in()[0]
    chosen = TraceSettings(draws=settings.draws)
    seconds = []
    for _ in range(settings.repeats):
        began = time.perf_counter()
        found = trace(model, fact, chosen)
        seconds.append(time.perf_counter() - began)
        say(f"sweep {seconds[-1]:.1f} s")
    begin, end = found.subject_range
    prompt = prompts.prepare(model, fact)
    n_layers, n_positions = int(model.cfg.n_layers), len(prompt.ids)
    noise = corruption.gaussian(
        fact, draws=settings.draws, tokens=end - begin, d_model=int(model.cfg.d_model), scale=found.noise_std, seed=0
    )
    differences, loop_seconds, plain_seconds = {}, {}, {}
    grids = {}
    for kind in KINDS:
        layers = [
            range(layer, layer + 1) if kind == "resid" else engine.window(layer, chosen.window, n_layers)
            for layer in range(n_layers)
        ]
        grids[kind] = [engine.Cell(kind, each, position) for each in layers for position in range(n_positions)]

    def run(kind: str, step: int) -> tuple[torch.Tensor, float]:
        """The loop over every `step`-th cell of a kind, and the seconds all cells would take."""
        began = time.perf_counter()
        slow = loop(model, prompt.ids, noise, begin, found.answer_ids[0], grids[kind][::step])
        return slow, (time.perf_counter() - began) * len(grids[kind]) / len(grids[kind][::step])

    for kind in KINDS:
        step = max(1, len(grids[kind]) // settings.loop_cells) if settings.loop_cells else 1
        slow, loop_seconds[kind] = run(kind, step)
        differences[kind] = float((slow - found.draws[kind].flatten(0, 1)[::step]).abs().max())
        say(
            f"loop, {kind}: {loop_seconds[kind]:.0f} s for {len(grids[kind])} cells; largest difference {differences[kind]:.1e}"
        )
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.contiguous()
    for kind in KINDS:
        _, plain_seconds[kind] = run(kind, max(1, len(grids[kind]) // settings.plain_cells))
        say(f"loop, {kind}, TransformerLens's own layout: {plain_seconds[kind]:.0f} s (from some cells)")
    rate = matmul_rate()
    median = sorted(seconds)[len(seconds) // 2]
    floor = floor_operations(model, n_positions, begin, settings.draws, chosen.window) / rate
    result = {
        "sweep_seconds": seconds,
        "loop_seconds": loop_seconds,
        "plain_loop_seconds": plain_seconds,
        "plain_loop_over_sweep": sum(plain_seconds.values()) / median,
        "loop_over_sweep": sum(loop_seconds.values()) / median,
        "largest_difference": differences,
        "matmul_gflops": rate / 1e9,
        "floor_seconds": floor,
        "sweep_over_floor": median / floor,
        "p_clean": found.p_clean,
        "p_corrupted": found.p_corrupted,
    }
    say(
        f"loop / sweep = {result['loop_over_sweep']:.1f}; sweep / floor = {result['sweep_over_floor']:.2f}; wrote {write('benchmark_tracing', model, settings, result)}"
    )


if __name__ == "__main__":
    main(parse(BenchmarkTracing))
