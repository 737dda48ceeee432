"""The obvious way to trace, kept as the independent check: one forward pass of the whole model for every cell."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mechedit.models import HookedModel
from mechedit.tracing.cells import Cell, Patch


@torch.no_grad()
def loop(
    model: HookedModel,
    ids: Iterable[int],
    corrupted: torch.Tensor,
    answer: int,
    cells: Iterable[Cell],
    held_shift: int = 0,
) -> torch.Tensor:
    """P(answer) [cells, draws], each cell by a full corrupted run with hooks, all logits computed.

    `corrupted` [draws, pos, d_model] are the embeddings of the corrupted runs; what is held is of the draw `held_shift` on.
    """
    tokens = torch.tensor([list(ids)], device=corrupted.device)
    many = tokens.expand(len(corrupted), -1)
    corruption = ("hook_embed", lambda activation, hook: corrupted.to(activation))
    _, clean = model.run_with_cache(tokens)
    held = {}
    of_another = ("hook_embed", lambda activation, hook: corrupted.roll(-held_shift, 0).to(activation))
    with model.hooks(fwd_hooks=[of_another]):
        _, held = model.run_with_cache(many)
    rows = []
    for cell in cells:
        writes = [(patch, held) for patch in cell.held] + [(patch, clean) for patch in cell.restored]
        hooks = [corruption]
        for name in dict.fromkeys(patch.component.at(patch.layer) for patch, _ in writes):
            hooks.append((name, writing([each for each in writes if each[0].component.at(each[0].layer) == name])))
        logits = model.run_with_hooks(many, fwd_hooks=hooks)
        rows.append(
            logits[:, -1].double().softmax(-1)[:, answer].float()
        )  # float32 would lose digits over so many tokens
    return torch.stack(rows)


@torch.no_grad()
def severed_loop(
    model: HookedModel, ids: Iterable[int], corrupted: torch.Tensor, answer: int, at: int, held: str | None, shift: int
) -> torch.Tensor:
    """P(answer) [layer, draws] as section 2.3 of Meng et al. (2022) tells it: in one corrupted run, collect the outputs of the
    modules at the hook points `held` (with {layer}) at one position, in every block; then, in each corrupted run in which the
    state after one block is restored there, put all of them in, those below that block too.

    The first run's noise is that of the draw `shift` places on.
    """
    tokens = torch.tensor([list(ids)]).expand(len(corrupted), -1)
    n_layers = int(model.cfg.n_layers)
    clean: dict[str, torch.Tensor] = {}
    other: dict[str, torch.Tensor] = {}

    def collecting(into: dict[str, torch.Tensor]) -> object:
        return lambda activation, hook: into.update({hook.name: activation[:, at].clone()})

    def putting(run: dict[str, torch.Tensor]) -> object:
        def put(activation: torch.Tensor, hook: object) -> torch.Tensor:
            activation = activation.clone()
            activation[:, at] = run[hook.name]
            return activation

        return put

    def corrupting(rows: torch.Tensor) -> tuple[str, object]:
        return ("hook_embed", lambda activation, hook: rows)

    states = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    modules = [held.format(layer=layer) for layer in range(n_layers)] if held else []
    model.run_with_hooks(tokens, fwd_hooks=[(name, collecting(clean)) for name in states])
    first = [corrupting(corrupted.roll(-shift, 0))] + [(name, collecting(other)) for name in modules]
    model.run_with_hooks(tokens, fwd_hooks=first)
    rows = []
    for state in states:
        hooks = [corrupting(corrupted), (state, putting(clean))] + [(name, putting(other)) for name in modules]
        rows.append(model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1].double().softmax(-1)[:, answer].float())
    return torch.stack(rows)


def writing(writes: list[tuple[Patch, dict[str, torch.Tensor]]]) -> object:
    """A hook that writes the given runs' values at the patches' places."""

    def write(activation: torch.Tensor, hook: object) -> torch.Tensor:
        activation = activation.clone()
        for patch, run in writes:
            value = run[patch.component.at(patch.layer)][:, patch.position]
            if patch.index is None:
                activation[:, patch.position] = value
            else:
                for part in patch.index:
                    activation[:, patch.position, part] = value[:, part]
        return activation

    return write
