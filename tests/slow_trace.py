"""The obvious way to trace, kept as the independent check: one forward pass of the whole model for every cell."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mechedit.models import HookedModel
from mechedit.tracing.engine import Cell

HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}


@torch.no_grad()
def loop(
    model: HookedModel, ids: Iterable[int], noise: torch.Tensor, begin: int, answer: int, cells: Iterable[Cell]
) -> torch.Tensor:
    """P(answer) [cells, draws], each cell by a full corrupted run with its restorations as hooks, all logits computed."""
    tokens = torch.tensor([list(ids)])
    _, clean = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(tuple(HOOKS.values())))

    def corrupt(activation: torch.Tensor, hook: object) -> torch.Tensor:
        activation = activation.clone()
        activation[:, begin : begin + noise.shape[1]] += noise
        return activation

    rows = []
    for cell in cells:
        hooks = [("hook_embed", corrupt)]
        for layer in cell.layers:
            name = f"blocks.{layer}.{HOOKS[cell.component]}"

            def restore(
                activation: torch.Tensor, hook: object, name: str = name, position: int = cell.position
            ) -> torch.Tensor:
                activation = activation.clone()
                activation[:, position] = clean[name][0, position]
                return activation

            hooks.append((name, restore))
        logits = model.run_with_hooks(tokens.expand(len(noise), -1), fwd_hooks=hooks)
        rows.append(
            logits[:, -1].double().softmax(-1)[:, answer].float()
        )  # float32 would lose digits over so many tokens
    return torch.stack(rows)
