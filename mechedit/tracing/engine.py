"""The exact sweep behind a causal trace: every cell, computed only where it differs from the corrupted run.

A cell restores clean activations at one position i in some blocks of the corrupted run. Below the first of those blocks it
*is* the corrupted run, and so is every position before i in all blocks. So the sweep takes one position at a time and walks
up the blocks once: at each block the cells that start there join the batch, in the state of the corrupted run, and all
cells run together on positions i and later, attending to the corrupted run's keys and values for what lies before. Only the
last position is unembedded. Nothing is approximated: a cell is what one forward pass with hooks gives, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.interventions import Change, add_noise, intervened, read
from mechedit.models import Blocks, HookedModel, KeyValues, device_of
from mechedit.progress import Progress, silent

__all__ = ["Cell", "Swept", "sweep", "window"]

HOOKS = {"mlp": "hook_mlp_out", "attn": "hook_attn_out"}
ROW_TOKENS = 2048  # rows times positions in one call of a block: enough to keep a matmul busy, little enough to hold
UNEMBED_ROWS = 512


def window(layer: int, width: int, n_layers: int) -> range:
    """The blocks restored around `layer`: [layer - w//2, layer + ceil(w/2) - 1], cut to the model.

    So the published code centres it; the paper's text (appendix B.2) has it one block higher.
    """
    return range(max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2))


@dataclass(frozen=True)
class Cell:
    """One restoration: the clean output of `component` ("resid", "mlp" or "attn") of blocks `layers`, at `position`.

    "resid" is the state after a block, so restoring it in one block leaves nothing of that block to compute.
    """

    component: str
    layers: range
    position: int

    @property
    def start(self) -> int:
        """The first block that must be computed for this cell."""
        return self.layers[0] + (self.component == "resid")


@dataclass(frozen=True)
class Swept:
    """Probabilities of the answer: `clean`, `corrupted` by draw, and by cell and draw."""

    clean: float
    corrupted: Float[Tensor, " draws"]
    cells: Float[Tensor, "cells draws"]


@dataclass
class _Runs:
    """The clean run's restorable activations, and the corrupted run, block by block."""

    clean: dict[str, list[Tensor]]  # component -> by block [pos, d_model]
    corrupted: list[Tensor]  # entering each block, the last one final: [draws, pos, d_model]
    past: list[KeyValues]


@dataclass
class _Batch:
    """The rows under way: one a cell and draw, cells first."""

    rows: Tensor  # [rows, pos, d_model]
    cells: list[int] = field(default_factory=list)


@torch.no_grad()
def sweep(
    model: HookedModel,
    ids: Sequence[int],
    noise: Float[Tensor, "draws subject d_model"],
    noise_begin: int,
    answer: int,
    cells: Sequence[Cell],
    progress: Progress = silent,
) -> Swept:
    """The answer's probability in every cell, exactly. `noise` is added to the embeddings from `noise_begin` on."""
    blocks = Blocks(model)
    n_layers, draws = int(model.cfg.n_layers), len(noise)
    runs = _clean_and_corrupted(model, blocks, ids, noise, noise_begin)
    finals = torch.cat([runs.clean["resid"][-1][None, -1], runs.corrupted[-1][:, -1]])
    p = _probability(blocks, finals, answer)
    result = p[1:].repeat(len(cells), 1)  # what is not computed below is the corrupted run
    positions = sorted({cell.position for cell in cells if cell.position >= noise_begin})
    for done, position in enumerate(positions):
        progress("trace", done, len(positions))
        here = [index for index, cell in enumerate(cells) if cell.position == position]
        last = _sweep_position(model, blocks, runs, [cells[index] for index in here], position, n_layers)
        result[here] = _probability(blocks, last.flatten(0, 1), answer).view(len(here), draws)
    progress("trace", len(positions), len(positions))
    return Swept(float(p[0]), p[1:].cpu(), result.cpu())


def _clean_and_corrupted(
    model: HookedModel, blocks: Blocks, ids: Sequence[int], noise: Tensor, noise_begin: int
) -> _Runs:
    """One clean row and one corrupted row a draw, in one pass over the blocks."""
    n_layers = int(model.cfg.n_layers)
    tokens = torch.tensor([list(ids)], device=device_of(model)).expand(1 + len(noise), -1)
    with_clean = torch.cat([torch.zeros_like(noise[:1]), noise])
    runs = _Runs({"resid": [], "mlp": [], "attn": []}, [], [])
    changes = [add_noise(with_clean, noise_begin)]
    for layer in range(n_layers):
        for component, hook in HOOKS.items():
            changes.append(read(f"blocks.{layer}.{hook}", _keep_clean(runs.clean[component])))
    with intervened(model, *changes):
        resid = blocks.embed(tokens)
        for layer in range(n_layers):
            runs.corrupted.append(resid[1:])
            resid, present = blocks.run(layer, resid)
            runs.clean["resid"].append(resid[0])
            runs.past.append(present.rows(torch.arange(1, len(tokens), device=resid.device)))
    runs.corrupted.append(resid[1:])
    return runs


def _keep_clean(kept: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda activation: kept.append(activation[0].clone())


def _sweep_position(
    model: HookedModel, blocks: Blocks, runs: _Runs, cells: list[Cell], position: int, n_layers: int
) -> Float[Tensor, "cells draws d_model"]:
    """The final state at the last position of every cell that restores `position`."""
    draws = len(runs.corrupted[0])
    state = _Batch(runs.corrupted[0][:0, position:])
    now: list[int] = []  # the cell of each row in the call of a block that is under way

    def restoring(layer: int, component: str) -> Change:
        clean = runs.clean[component][layer][position]

        def apply(activation: Tensor) -> Tensor | None:
            held = [
                row
                for row, cell in enumerate(now)
                if cells[cell].component == component and layer in cells[cell].layers
            ]
            if not held:
                return None
            activation = activation.clone()
            activation[held, 0] = clean
            return activation

        return Change(f"blocks.{layer}.{HOOKS[component]}", apply)

    first = min(cell.start for cell in cells)
    components = sorted({cell.component for cell in cells} & HOOKS.keys())
    with intervened(
        model, *(restoring(layer, component) for layer in range(first, n_layers) for component in components)
    ):
        for layer in range(first, n_layers + 1):
            _join(state, runs, cells, layer, position)
            if layer == n_layers:
                break
            out = torch.empty_like(state.rows)
            past = runs.past[layer].before(position)
            step = max(1, ROW_TOKENS // state.rows.shape[1])
            for begin in range(0, len(state.rows), step):
                part = slice(begin, begin + step)
                now[:] = [state.cells[row // draws] for row in range(len(state.rows))[part]]
                index = torch.arange(len(state.rows), device=out.device)[part] % draws
                out[part], _ = blocks.run(layer, state.rows[part], past.rows(index) if position else None)
            state.rows = out
    order = torch.tensor(state.cells).argsort().to(state.rows.device)
    return state.rows[:, -1].view(len(cells), draws, -1)[order]


def _join(state: _Batch, runs: _Runs, cells: list[Cell], layer: int, position: int) -> None:
    """Add the cells that start at `layer`, in the corrupted run's state, restored where the state itself is."""
    joining = [index for index, cell in enumerate(cells) if cell.start == layer]
    if not joining:
        return
    fresh = runs.corrupted[layer][:, position:].repeat(len(joining), 1, 1)
    draws = len(runs.corrupted[layer])
    for place, index in enumerate(joining):
        if cells[index].component == "resid":
            fresh[place * draws : (place + 1) * draws, 0] = runs.clean["resid"][layer - 1][position]
    state.rows = torch.cat([state.rows, fresh])
    state.cells += joining


def _probability(blocks: Blocks, states: Float[Tensor, "rows d_model"], answer: int) -> Float[Tensor, " rows"]:
    """P(answer) for each final state, in float32."""
    targets = torch.full((len(states),), answer, device=states.device)
    return torch.cat(
        [
            blocks.log_p(*each).exp()
            for each in zip(states.split(UNEMBED_ROWS), targets.split(UNEMBED_ROWS), strict=True)
        ]
    )
