"""What edits do to text that has nothing to do with them, and to the weights.

perplexity        of `guards.held_out_text`
perplexity_ratio  to that of the unedited model
next_token_kl     mean KL(edited || unedited) of the next token, in nats, at positions spread over that text
next_token_same   share of these positions whose most probable token is still the same
weight_norm_ratio |W_out| edited over unedited, of the layer where it changed most
broken            whether any of these is no finite number; such a record is not in their means
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import guards, models
from mechedit.models import Blocks, HookedModel, device_of
from mechedit.prompts import encode, pad, resolve_bos

__all__ = ["Unedited", "health", "unedited"]

TOKENS = 256  # of the held-out text
MOST, TINY = 700.0, 1e-300  # what exp and log can take
POSITIONS = 32  # whose whole distributions are compared


@dataclass(frozen=True, eq=False)
class Unedited:
    """What the model said before any edit."""

    row: Int[Tensor, "one pos"]
    perplexity: float
    log_p: Float[Tensor, "positions d_vocab"]
    norms: tuple[float, ...]  # of each layer's W_out


def unedited(model: HookedModel, *, prepend_bos: bool | None = None) -> Unedited:
    """The model as it is now."""
    ids, _ = encode(model, guards.held_out_text(model), prepend_bos=resolve_bos(model, prepend_bos))
    row = pad(model, [ids[: min(TOKENS, int(model.cfg.n_ctx))]])
    return Unedited(row.cpu(), *_read(model, row))


def health(model: HookedModel, before: Unedited) -> dict[str, float]:
    """The numbers above, of the model as it is now."""
    perplexity, log_p, norms = _read(model, before.row.to(device_of(model)))
    ratios = [now / was for now, was in zip(norms, before.norms, strict=True)]
    largest = (
        math.nan if any(map(math.isnan, ratios)) else max(ratios, key=lambda ratio: abs(math.log(max(ratio, TINY))))
    )
    same = (log_p.argmax(-1) == before.log_p.argmax(-1)).float().mean()
    kl = (log_p.exp() * (log_p - before.log_p)).sum(-1).mean()
    found = {
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / before.perplexity,
        "next_token_kl": max(float(kl), 0.0) if math.isfinite(float(kl)) else math.nan,
        "next_token_same": float(same),
        "weight_norm_ratio": largest,
    }
    finite = {name: value if math.isfinite(value) else math.nan for name, value in found.items()}
    return finite | {"broken": float(any(map(math.isnan, finite.values())))}


@torch.no_grad()
def _read(
    model: HookedModel, row: Int[Tensor, "one pos"]
) -> tuple[float, Float[Tensor, "positions d_vocab"], tuple[float, ...]]:
    blocks = Blocks(model)
    resid = blocks.final(row)[0]
    mean = float(blocks.log_p(resid[:-1], row[0, 1:, None]).double().mean())
    places = torch.linspace(1, len(resid) - 1, min(POSITIONS, len(resid) - 1)).long().to(resid.device)
    log_p = blocks.logits(resid[places]).float().log_softmax(-1).cpu()
    norms = tuple(float(models.W_out(model, layer).double().norm()) for layer in range(int(model.cfg.n_layers)))
    return math.exp(-mean) if -mean < MOST else math.inf, log_p, norms
