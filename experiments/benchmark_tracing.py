"""How fast is a trace, and is it the same?  python -m experiments.benchmark_tracing   -> figures/MODEL/benchmark_tracing.json
(benchmark_tracing_bridge.json for a TransformerBridge).

In one run, on one fact, all kinds, layers and tokens:
- mechedit's sweep, exact, and in bfloat16;
- the loop: one forward pass of the whole model for every cell, all logits, as the published code does it
  (tests/slow_trace.py), on the same model;
- the same loop on some cells, with the weights laid out as TransformerLens itself loads them, which copies each in every
  forward pass (`mechedit.models.load` stores them so that nothing is copied); a bridge has no such copies;
- TransformerLens's own `patching` functions, on some cells of the grids that they can do: one state, one output;
- the arithmetic floor: the multiplications of every cell on its own, at the rate of a large matrix product measured in the
  same run.

`--model random-gpt2` and `random-gpt2-xl` are random weights of those shapes. Where only some cells are run, `cells` says so and
the time is scaled up.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.common import parse, say, write
from mechedit import facts, models
from mechedit.models.names import NAMES, find_weight
from mechedit.settings import KINDS, TraceSettings
from mechedit.tracing import Cell, Prepared, Trace, prepare, trace
from mechedit.tracing import grid as cells_of
from tests.slow_trace import loop

SHAPES = {"random-gpt2": (12, 12, 768), "random-gpt2-xl": (48, 25, 1600)}  # layers, heads, width


@dataclass(frozen=True)
class BenchmarkTracing:
    """Settings of the tracing benchmark."""

    model: str = "gemma-3-270m"
    device: str = "cpu"
    draws: int = 10
    repeats: int = 3  # of the sweep; its median is reported
    loop_cells: int = 0  # cells a kind that the loop runs; 0 means all of them
    plain_cells: int = 10  # cells a kind of the loop with TransformerLens's own layout, and of its patching functions
    threads: int = 2


def load(settings: Any) -> models.HookedModel:
    """The model that the settings name, or random weights of a published shape."""
    if settings.model not in SHAPES:
        return models.load(settings.model, device=settings.device)
    model = random_gpt2(*SHAPES[settings.model], settings.device)
    model.cfg.model_name = settings.model
    return model


def random_gpt2(n_layers: int, n_heads: int, width: int, device: str) -> models.HookedModel:
    """A GPT-2 of that shape with random weights."""
    from tests.conftest import make_random_gpt2

    with tempfile.TemporaryDirectory() as folder:
        make_random_gpt2(Path(folder), n_layers, n_heads, width)
        return models.load(folder, device=device)


def floor_operations(model: models.HookedModel, found: Trace) -> float:
    """Multiply-adds times two of every cell on its own: block matrices for each token-layer, an unembedding row a cell and draw.

    All positions of the last block are counted, though one alone is read there: `floor_of_what_is_read` leaves the others out.
    """
    return _operations(model, found, whole_last_block=True)


def floor_of_what_is_read(model: models.HookedModel, found: Trace) -> float:
    """The same without what nobody reads: in the last block, at positions but the last, no more than keys and values."""
    return _operations(model, found, whole_last_block=False)


def _operations(model: models.HookedModel, found: Trace, *, whole_last_block: bool) -> float:
    cfg = model.cfg
    keys_and_values = 2 * int(cfg.d_model) * int(cfg.n_key_value_heads or cfg.n_heads) * int(cfg.d_head)
    # by name, for a bridge has some of them twice among its parameters
    there = [find_weight(model, 0, name) for name in NAMES if ".W_" in name]
    matrices = sum(weight.numel() for weight in there if weight is not None)
    n_layers, n_positions, begin = int(cfg.n_layers), len(found.tokens), found.subject_range[0]
    total = 0.0
    for kind in found.settings.kinds:
        for layer in range(n_layers):
            start = layer + 1 if kind == "resid" else max(0, layer - found.settings.window // 2)
            for position in range(begin, n_positions):
                token_layers = (n_positions - position) * (n_layers - start)
                products = token_layers * matrices + int(cfg.d_model) * int(cfg.d_vocab)
                if start < n_layers and not whole_last_block:
                    products -= (n_positions - position - 1) * (matrices - keys_and_values)
                total += 2.0 * found.settings.draws * products
    return total


def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a 2048-cubed product, the best of ten, or of those that begin within two seconds: a processor may have no bfloat16."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    taken: list[float] = []
    while len(taken) < 10 and sum(taken) < 2:
        taken.append(seconds(lambda: a @ b, device)[1])
    return 2 * 2048**3 / min(taken)


def seconds(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What the work returns, and how long it took, the device's queue included."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def sample(cells: list[Any], n: int) -> list[Any]:
    """`n` of the cells, the same ones each time, in order; all of them for 0. A stride would keep meeting the same tokens."""
    if not 0 < n < len(cells):
        return cells
    return [cells[index] for index in sorted(random.Random(0).sample(range(len(cells)), n))]  # noqa: S311 (a sample)


def run_loop(
    model: models.HookedModel, prepared: Prepared, found: Trace, kind: str, n: int, device: str
) -> dict[str, Any]:
    """The loop over `n` cells of a kind (0: all), scaled to all; and its largest difference from the sweep."""
    only = replace(found.settings, kinds=(kind,))
    whole = cells_of(only, (), int(model.cfg.n_layers), prepared.prompt)
    chosen = sample(whole, n)
    cells: list[Cell] = [cell for _, cell in chosen]
    slow, took = seconds(
        lambda: loop(model, prepared.ids, prepared.corrupted.to(device), prepared.answer_ids[0], cells), device
    )
    fast = torch.stack([found.draws[kind][layer, position] for (_, layer, position), _ in chosen])
    return {
        "cells": len(chosen),
        "of": len(whole),
        "seconds_for_all": took * len(whole) / len(chosen),
        **compared(slow.cpu(), fast, found.p_corrupted),
    }


def compared(theirs: torch.Tensor, ours: torch.Tensor, corrupted: float) -> dict[str, float]:
    """How far two ways differ over cells, as probabilities and as log P, beside the largest effect that there was to get wrong.

    Random weights give probabilities of 1e-5, whose differences are small whatever they are; those of log P are not.
    """
    return {
        "largest_difference": float((theirs - ours).abs().max()),
        "largest_difference_of_log_p": float((theirs.log() - ours.log()).abs().max()),
        "largest_effect_on_log_p": float((ours.log() - math.log(corrupted)).abs().max()),
    }


def run_patching(
    model: models.HookedModel, prepared: Prepared, found: Trace, n: int, device: str
) -> dict[str, Any] | None:
    """TransformerLens's `generic_activation_patch` on some cells of each grid it has; None where this version lacks it."""
    try:
        import pandas as pd
        from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter
    except ImportError:
        return None
    n_layers, n_positions = int(model.cfg.n_layers), len(prepared.ids)
    places = [(layer, position) for layer in range(n_layers) for position in range(n_positions)]
    chosen = sample(places, n)
    corrupted = prepared.corrupted.to(device)
    tokens = torch.tensor([list(prepared.ids)], device=device).expand(len(corrupted), -1)
    index = pd.DataFrame(chosen, columns=["layer", "pos"])
    exact = trace(model, prepared.fact, replace(found.settings, kinds=("resid_pre", "mlp", "attn"), window=1))
    result = {}
    for kind, name in (("resid_pre", "resid_pre"), ("mlp", "mlp_out"), ("attn", "attn_out")):
        _, clean = model.run_with_cache(tokens)

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, -1].double().softmax(-1)[:, prepared.answer_ids[0]].mean()

        def grid(name: str = name, clean: Any = clean) -> torch.Tensor:
            with torch.no_grad(), model.hooks(fwd_hooks=[("hook_embed", lambda activation, hook: corrupted)]):
                return generic_activation_patch(
                    model, tokens, clean, metric, layer_pos_patch_setter, name, index_df=index
                )

        theirs, took = seconds(grid, device)
        ours = torch.stack([exact.effects[kind][layer, position] for layer, position in chosen])
        result[name] = {
            "cells": len(chosen),
            "of": len(places),
            "seconds_for_all": took * len(places) / len(chosen),
            **compared(theirs.float().cpu(), ours, exact.p_corrupted),
        }
        say(f"TransformerLens's patching, {name}: {result[name]['seconds_for_all']:.0f} s for all cells")
    return {"grids": result, "sweep_seconds": exact.seconds}


def main(settings: BenchmarkTracing) -> None:
    torch.set_num_threads(settings.threads)
    model, device = load(settings), settings.device
    fact, chosen = facts.built_in()[0], TraceSettings(draws=settings.draws)
    times: dict[str, list[float]] = {"model": [], "bfloat16": []}
    traces: dict[str, Trace] = {}
    for _ in range(settings.repeats):
        for precision, taken in times.items():
            traces[precision], took = seconds(lambda p=precision: trace(model, fact, replace(chosen, precision=p)), device)  # fmt: skip
            taken.append(took)
            say(f"sweep, {precision}: {took:.2f} s")
    found, half = traces["model"], traces["bfloat16"]
    prepared = prepare(model, fact, found.settings)
    loops = {kind: run_loop(model, prepared, found, kind, settings.loop_cells, device) for kind in KINDS}
    for kind, each in loops.items():
        wrong, there = each["largest_difference_of_log_p"], each["largest_effect_on_log_p"]
        say(
            f"loop, {kind}: {each['seconds_for_all']:.0f} s; log P differs by {wrong:.1e} at most, effects reach {there:.1e}"
        )
    patching = run_patching(model, prepared, found, settings.plain_cells, device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data.contiguous()
    plain = {kind: run_loop(model, prepared, found, kind, settings.plain_cells, device) for kind in KINDS}
    median = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    rate = matmul_rate(device)
    floor, read = floor_operations(model, found) / rate, floor_of_what_is_read(model, found) / rate
    whole = {name: sum(each["seconds_for_all"] for each in rows.values()) for name, rows in (("loop", loops), ("plain", plain))}  # fmt: skip
    result = {
        "sweep_seconds": times["model"],
        "bfloat16_seconds": times["bfloat16"],
        "bfloat16_largest_cell_error": max(
            float((half.effects[kind] - found.effects[kind]).abs().max()) for kind in KINDS
        ),
        "loop": loops,
        "loop_in_transformerlens_layout": plain,
        "transformerlens_patching": patching,
        "matmul_gflops": rate / 1e9,
        "matmul_gflops_bfloat16": matmul_rate(device, torch.bfloat16) / 1e9,
        "floor_seconds": floor,
        "floor_of_what_is_read_seconds": read,
        "loop_over_sweep": whole["loop"] / median["model"],
        "plain_loop_over_sweep": whole["plain"] / median["model"],
        "sweep_over_floor": median["model"] / floor,
        "sweep_over_floor_of_what_is_read": median["model"] / read,
        "exact_over_bfloat16": median["model"] / median["bfloat16"],
        "p_clean": found.p_clean,
        "p_corrupted": found.p_corrupted,
    }
    for name in ("loop_over_sweep", "plain_loop_over_sweep", "sweep_over_floor", "exact_over_bfloat16"):
        say(f"{name.replace('_', ' ')}: {result[name]:.2f}")
    name = "benchmark_tracing" + ("_bridge" if models.is_bridge(model) else "")
    say(f"wrote {write(name, model, settings, result)}")


if __name__ == "__main__":
    main(parse(BenchmarkTracing))
