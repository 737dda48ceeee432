"""The obvious way to trace, kept as the independent check: one forward pass of the whole model for every cell."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mechedit.models import HookedModel
from mechedit.tracing.cells import Cell, Patch


@torch.no_grad()
def loop(
    model: HookedModel, ids: Iterable[int], corrupted: torch.Tensor, answer: int, cells: Iterable[Cell]
) -> torch.Tensor:
    """P(answer) [cells, draws], each cell by a full corrupted run with hooks, all logits computed.

    `corrupted` [draws, pos, d_model] are the embeddings of the corrupted runs.
    """
    tokens = torch.tensor([list(ids)], device=corrupted.device)
    many = tokens.expand(len(corrupted), -1)
    corruption = ("hook_embed", lambda activation, hook: corrupted.to(activation))
    _, clean = model.run_with_cache(tokens)
    held = {}
    with model.hooks(fwd_hooks=[corruption]):
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
