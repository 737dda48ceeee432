"""Gradients instead of runs: attribution patching and integrated gradients, on the grid of a causal trace.

Attribution patching (Nanda 2023) takes a cell's effect to first order at the corrupted run: the derivative of the measure as
all that the cell restores moves from its corrupted towards its clean values. For one activation that is the measure's gradient g
times what restoring changes, and one backward pass serves every cell. In a window of outputs a_1 … a_w at one position a later
one is replaced whatever an earlier one does to it, so paths from one member through another do not count:
    d measure = sum_i g_i (change_i - what a_i itself would change by, with the members before it replaced)
where the second term needs the blocks of the window at this one position, once more, and is again a gradient.

Integrated gradients (Sundararajan et al. 2017; the paper's figure 16) follow all states of one layer from their corrupted to
their clean values, in 50 Gauss-Legendre steps, and give each position its share. Over positions the shares add up to the
total effect, whatever the layer: that is their check.

Both are estimates. `agreement` is their rank correlation to the exact trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit.corruption import Family, Statistics
from mechedit.facts import Fact
from mechedit.interventions import Change, intervened
from mechedit.models import Blocks, HookedModel, KeyValues, check_plain, device_of, frozen
from mechedit.progress import Progress, silent
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing.cells import RESID_POST, STATES, WINDOWED, Component, resolve, restored_blocks
from mechedit.tracing.measures import measured
from mechedit.tracing.preparation import Prepared, prepare
from mechedit.tracing.result import Trace
from mechedit.tracing.tracer import check_finite, in_precision, wanted_positions

__all__ = ["agreement", "attribution_patching", "integrated_gradients"]


def attribution_patching(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    family: Family | None = None,
    statistics: Statistics | None = None,
    other: str | None = None,
) -> dict[str, Float[Tensor, "layer position draw"]]:
    """Every kind's grid of estimated indirect effects: first order in what is restored, from each draw's corrupted run.

    Positions that `settings.roles` leaves out are nan.
    """
    check_plain(model)
    settings = resolve(model, settings)
    components = {kind: _component(kind) for kind in settings.kinds}
    prepared = prepare(model, fact, settings, family=family, statistics=statistics, other=other)
    positions = wanted_positions(settings, prepared.prompt)
    with in_precision(model, settings), frozen(model):
        slopes = _slopes(model, prepared, list(components.values()))
        grids = {}
        for kind, component in components.items():
            windows = [restored_blocks(kind, layer, slopes.n_layers, settings) for layer in range(slopes.n_layers)]
            filled = torch.full((slopes.n_layers, len(prepared.prompt.ids), len(prepared.corrupted)), torch.nan)
            for position in positions:
                filled[:, position] = slopes.of(component, windows, position)
            grids[kind] = filled
    return grids


@dataclass(eq=False)
class _Slopes:
    """The corrupted runs, and what the measure does to first order as activations leave them for their clean values."""

    blocks: Blocks
    n_layers: int
    corrupted: dict[str, Tensor]  # by hook name, [draw, pos, d_model], as all that follows
    change: dict[str, Tensor]
    gradient: dict[str, Tensor]
    states: list[Tensor]  # that enter each block
    past: list[KeyValues]  # [draw, …] of each block

    def of(self, component: Component, windows: Sequence[range], position: int) -> Float[Tensor, "window draw"]:
        """The derivative of each draw's measure as the component moves in all blocks of a window at this position."""
        if all(len(window) == 1 for window in windows):
            return torch.stack([self._single(component.at(window[0]), position) for window in windows])
        return self._joint(component, windows, position)

    def _single(self, name: str, position: int) -> Float[Tensor, " draw"]:
        return (self.gradient[name] * self.change[name])[:, position].float().sum(-1).cpu()

    def _joint(self, component: Component, windows: Sequence[range], position: int) -> Float[Tensor, "window draw"]:
        """All windows walk up together, a row a window and draw, each in the blocks that are its own."""
        draws = len(self.states[0])
        moved = torch.zeros(len(windows), draws, device=self.states[0].device, requires_grad=True)
        total, rows, active = moved.new_zeros(()), self.states[0][:0, :1], range(0)
        every = torch.arange(draws, device=moved.device)
        model = self.blocks.model
        with torch.enable_grad():
            for layer in range(self.n_layers):
                now = [index for index, window in enumerate(windows) if layer in window]
                kept = [each for place, index in enumerate(active) if index in now for each in _rows(place, draws)]
                fresh = self.states[layer][:, position : position + 1].repeat(len(now) - len(kept) // draws, 1, 1)
                rows, active = torch.cat([rows[kept], fresh]), range(now[0], now[-1] + 1) if now else range(0)
                if not now:
                    continue
                replaced = _Replaced(self, component.at(layer), position, moved[active.start : active.stop])
                past = self.past[layer].before(position).rows(every.repeat(len(now))) if position else None
                with intervened(model, Change(replaced.name, replaced)):
                    rows, _ = self.blocks.run(layer, rows, past)
                total = total + replaced.slope
            (found,) = torch.autograd.grad(total, [moved])
        return found.cpu()


def _rows(place: int, draws: int) -> range:
    return range(place * draws, (place + 1) * draws)


class _Replaced:
    """A member of windows, moved by so much of its change; `slope` is what its gradient says to its leaving what it would be."""

    def __init__(self, slopes: _Slopes, name: str, position: int, moved: Float[Tensor, "window draw"]) -> None:
        self.name, self.moved = name, moved
        self.corrupted, self.change, self.gradient = (
            each[name][:, position].float() for each in (slopes.corrupted, slopes.change, slopes.gradient)
        )
        self.slope = moved.new_zeros(())

    def __call__(self, activation: Tensor) -> Tensor:
        replaced = self.corrupted + self.moved[..., None] * self.change
        itself = rearrange(activation.float(), "(window draw) 1 d_model -> window draw d_model", draw=len(self.change))
        self.slope = (self.gradient * (replaced - itself)).sum()
        return rearrange(replaced, "window draw d_model -> (window draw) 1 d_model").to(activation)


def _slopes(model: HookedModel, prepared: Prepared, components: list[Component]) -> _Slopes:
    """Both runs, and one backward pass: each draw's measure depends on its own row, so it differentiates them all."""
    blocks = Blocks(model)
    clean, value = _kept(model, prepared, components, clean=True)
    check_finite(model, value)
    corrupted, value = _kept(model, prepared, components, clean=False)
    gradients = torch.autograd.grad(value, list(corrupted.values()), torch.ones_like(value))
    kept = {name: activation.detach() for name, activation in corrupted.items()}
    change = {name: clean[name].detach() - activation for name, activation in kept.items()}
    states, past = _entering(model, blocks, prepared)
    gradient = dict(zip(kept, gradients, strict=True))
    return _Slopes(blocks, int(model.cfg.n_layers), kept, change, gradient, states, past)


@torch.no_grad()
def _entering(model: HookedModel, blocks: Blocks, prepared: Prepared) -> tuple[list[Tensor], list[KeyValues]]:
    """The states that enter each block in the corrupted runs, and its keys and values."""
    corrupted = prepared.corrupted.to(device_of(model), next(model.parameters()).dtype)
    tokens = torch.tensor([list(prepared.ids)], device=device_of(model)).expand(len(corrupted), -1)
    states, past = [], []
    with intervened(model, Change("hook_embed", lambda activation: corrupted.clone())):
        resid = blocks.embed(tokens)
        for layer in range(int(model.cfg.n_layers)):
            states.append(resid)
            resid, present = blocks.run(layer, resid)
            past.append(present)
    return states, past


def integrated_gradients(
    model: HookedModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    steps: int = 50,
    family: Family | None = None,
    statistics: Statistics | None = None,
    other: str | None = None,
    progress: Progress = silent,
) -> Float[Tensor, "layer position draw"]:
    """Each state's share of the total effect, layer by layer; over positions the shares of a layer add up to it.

    Positions are the prompt's and, where the whole answer is measured, those of its tokens but the last, whose states differ
    too. Kinds and windows play no part; what `settings.roles` leaves out is nan.

    Raises:
        SettingsError: fewer than one step.
    """
    check_plain(model)
    if steps < 1:
        raise SettingsError(f"integrated gradients need at least 1 step; found {steps}.")
    settings = resolve(model, settings)
    prepared = prepare(model, fact, settings, family=family, statistics=statistics, other=other)
    positions = wanted_positions(settings, prepared.prompt)
    with in_precision(model, settings), frozen(model):
        shares = _integrated(model, prepared, steps, progress)
    left_out = [each for each in range(len(prepared.prompt.ids)) if each not in positions]
    shares[:, left_out] = torch.nan
    return shares


def _integrated(
    model: HookedModel, prepared: Prepared, steps: int, progress: Progress
) -> Float[Tensor, "layer position draw"]:
    n_layers, n_positions = int(model.cfg.n_layers), len(prepared.ids)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas = torch.tensor((nodes + 1) / 2, dtype=torch.float32, device=device_of(model))
    shares = torch.tensor(weights / 2, dtype=torch.float32, device=device_of(model))
    blocks = Blocks(model)
    result = torch.zeros(n_layers, n_positions, len(prepared.corrupted))
    begin = prepared.prompt.subject[0]  # before it both runs are alike: a share of zero, keys and values shared
    with torch.no_grad():
        clean, value = _kept(model, prepared, [RESID_POST], clean=True)
        check_finite(model, value)
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
            result[layer, begin:, draw] = share.cpu()
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
