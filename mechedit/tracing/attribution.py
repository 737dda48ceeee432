"""Gradients instead of runs: attribution patching and integrated gradients, on the grid of a causal trace.

Attribution patching (Nanda 2023) takes a cell's effect to first order at the corrupted run: gradient of the measure with
respect to the activations that are restored, times what restoring changes. One backward pass serves every cell.

Integrated gradients (Sundararajan et al. 2017; the paper's figure 16) follow all states of one layer from their corrupted to
their clean values, in 50 Gauss-Legendre steps, and give each position its share. Over positions the shares add up to the
total effect, whatever the layer: that is their check.

Both are estimates. `agreement` is their rank correlation to the exact trace.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from mechedit.corruption import Statistics
from mechedit.facts import Fact
from mechedit.interventions import Change, intervened
from mechedit.models import Blocks, HookedModel, KeyValues, check_plain, device_of, frozen
from mechedit.progress import Progress, silent
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing.cells import RESID_POST, STATES, WINDOWED, Component, resolve, restored_blocks
from mechedit.tracing.measures import measured
from mechedit.tracing.preparation import Prepared, prepare
from mechedit.tracing.result import Trace

__all__ = ["agreement", "attribution_patching", "integrated_gradients"]


def attribution_patching(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    statistics: Statistics | None = None,
    other: str | None = None,
) -> dict[str, Float[Tensor, "layer position draw"]]:
    """Every kind's grid of estimated indirect effects: first order in what is restored, from each draw's corrupted run."""
    check_plain(model)
    settings = resolve(model, settings)
    prepared = prepare(model, fact, settings, statistics=statistics, other=other)
    components = [_component(kind) for kind in settings.kinds]
    n_layers, n_positions = int(model.cfg.n_layers), len(prepared.prompt.ids)
    with frozen(model):
        clean, _ = _kept(model, prepared, components, clean=True)
        corrupted, value = _kept(model, prepared, components, clean=False)
        names = list(corrupted)
        # each draw's measure depends on its own row so one pass differentiates them all
        gradients = torch.autograd.grad(value.sum(), [corrupted[name] for name in names])
    first_order = {
        name: reduce((gradient * (clean[name] - corrupted[name])).detach(), "draw pos d_model -> draw pos", "sum")
        .float()
        .cpu()
        for name, gradient in zip(names, gradients, strict=True)
    }
    grids = {}
    for kind, component in zip(settings.kinds, components, strict=True):
        rows = []
        for layer in range(n_layers):
            layers = restored_blocks(kind, layer, n_layers, settings)
            rows.append(torch.stack([first_order[component.at(each)] for each in layers]).sum(0).T)
        grids[kind] = torch.stack(rows)[:, :n_positions]
    return grids


def integrated_gradients(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    steps: int = 50,
    statistics: Statistics | None = None,
    progress: Progress = silent,
) -> Float[Tensor, "layer position draw"]:
    """Each state's share of the total effect, layer by layer; over positions the shares of a layer add up to it."""
    check_plain(model)
    settings = resolve(model, settings)
    prepared = prepare(model, fact, settings, statistics=statistics)
    n_layers, n_positions = int(model.cfg.n_layers), len(prepared.prompt.ids)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=device_of(model))
    shares = torch.tensor(weights / 2, dtype=torch.float32, device=device_of(model))
    blocks = Blocks(model)
    result = torch.zeros(n_layers, n_positions, len(prepared.corrupted))
    begin = prepared.prompt.subject[
        0
    ]  # what stands before it is alike in both runs: a share of zero, keys and values shared
    with frozen(model):
        with torch.no_grad():
            clean, _ = _kept(model, prepared, [RESID_POST], clean=True)
            corrupted, _ = _kept(model, prepared, [RESID_POST], clean=False)
            past = _past(model, blocks, prepared, begin, rows=steps)
        for layer in range(n_layers):
            progress("integrated gradients", layer, n_layers)
            start, end = (run[RESID_POST.at(layer)].detach()[:, begin:] for run in (corrupted, clean))
            for draw in range(len(start)):
                change = end[0] - start[draw]
                path = (start[draw] + alphas[:, None, None].to(change) * change).requires_grad_()
                with torch.enable_grad():
                    resid = path
                    for above in range(layer + 1, n_layers):
                        resid, _ = blocks.run(above, resid, past[above])
                    (gradient,) = torch.autograd.grad(_measure(blocks, prepared, resid, begin).sum(), [path])
                share = einsum(shares, gradient.float(), change.float(), "step, step pos d_model, pos d_model -> pos")
                result[layer, begin:, draw] = share[: n_positions - begin].cpu()
    progress("integrated gradients", n_layers, n_layers)
    return result


def agreement(estimate: Float[Tensor, "layer position"], exact: Float[Tensor, "layer position"]) -> float:
    """Spearman's rank correlation over the cells that both have."""
    from scipy.stats import spearmanr

    both = ~(estimate.isnan() | exact.isnan())
    return float(spearmanr(estimate[both].numpy(), exact[both].numpy()).statistic)


def exact_cells(found: Trace, kind: str) -> Float[Tensor, "layer position"]:
    """A trace's indirect effects at positions from the subject on, nan before it, where nothing was computed."""
    grid = found.effects[kind] - found.p_corrupted
    grid[:, : found.subject_range[0]] = torch.nan
    return grid


def _component(kind: str) -> Component:
    component = STATES.get(kind) or WINDOWED.get(kind)
    if component is None:
        raise SettingsError(f"attribution knows the kinds {', '.join([*STATES, *WINDOWED])}; {kind!r} is not one.")
    return component


def _kept(
    model: HookedModel, prepared: Prepared, components: list[Component], *, clean: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations by hook name, attached to the graph, and the measure of each row, in the clean run or the corrupted ones."""
    blocks = Blocks(model)
    n_layers = int(model.cfg.n_layers)
    rows = 1 if clean else len(prepared.corrupted)
    tokens = torch.tensor([list(prepared.ids)], device=device_of(model)).expand(rows, -1)
    kept: dict[str, Tensor] = {}
    corrupted = prepared.corrupted.to(device_of(model), next(model.parameters()).dtype)

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def into(activation: Tensor) -> Tensor:
            kept[name] = activation if activation.requires_grad else activation.clone().requires_grad_()
            return kept[name]

        return into

    names = [component.at(layer) for component in components for layer in range(n_layers)]
    changes = [Change(name, keep(name)) for name in names]
    if not clean:
        changes.append(Change("hook_embed", lambda activation: corrupted.clone().requires_grad_()))
    with intervened(model, *changes), torch.enable_grad():
        resid = blocks.embed(tokens)
        for layer in range(n_layers):
            resid, _ = blocks.run(layer, resid)
    with torch.enable_grad():  # after the hooks are gone: a bridge unembeds by a forward pass of its own
        return kept, _measure(blocks, prepared, resid)


def _past(model: HookedModel, blocks: Blocks, prepared: Prepared, begin: int, rows: int) -> list[KeyValues | None]:
    """Every block's keys and values at the positions before `begin`, for so many rows."""
    if begin == 0:
        return [None] * int(model.cfg.n_layers)
    device = device_of(model)
    resid = blocks.embed(torch.tensor([list(prepared.ids[:begin])], device=device))
    found: list[KeyValues | None] = []
    for layer in range(int(model.cfg.n_layers)):
        resid, present = blocks.run(layer, resid)
        found.append(present.rows(torch.zeros(rows, dtype=torch.long, device=device)))
    return found


def _measure(
    blocks: Blocks, prepared: Prepared, final: Float[Tensor, "rows pos d_model"], begin: int = 0
) -> Float[Tensor, " rows"]:
    """The measure from final states of the positions from `begin` on, differentiably."""
    columns = [
        blocks.logits(final[:, read.position - begin]).float().log_softmax(-1)[:, list(read.targets)]
        for read in prepared.reads
    ]
    return measured(prepared.settings, torch.cat(columns, 1))
