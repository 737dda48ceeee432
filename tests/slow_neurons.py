"""The obvious way to attribute an answer to neurons, kept as the independent check: a forward and a backward pass of the whole model for
every prompt, block and step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mechedit.models import HookedModel


def attributed(model: HookedModel, ids: Sequence[int], answer: Sequence[int], layer: int, steps: int) -> torch.Tensor:
    """w / m * sum over k = 1..m of dP(answer)/dw at (k/m) w: [neuron], of one block, after one prompt. P is of the whole answer."""
    name, last = f"blocks.{layer}.mlp.hook_post", len(ids) - 1
    tokens = torch.tensor([[*ids, *answer[:-1]]], device=next(model.parameters()).device)
    with torch.no_grad():
        w = model.run_with_cache(tokens)[1][name][0, last].clone()
    total = torch.zeros_like(w)
    for step in range(1, steps + 1):
        scaled = (step / steps * w).requires_grad_()

        def put(activation: torch.Tensor, hook: object, scaled: torch.Tensor = scaled) -> torch.Tensor:
            changed = activation.clone()
            changed[0, last] = scaled
            return changed

        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, put)])
        p = torch.stack([logits[0, last + place].softmax(-1)[token] for place, token in enumerate(answer)]).prod()
        total += torch.autograd.grad(p, [scaled])[0]
    return w * total / steps
