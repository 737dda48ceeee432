"""What edits do to text that has nothing to do with them, and to the weights.

perplexity        of `guards.held_out_text`
perplexity_ratio  to that of the unedited model
next_token_kl     mean KL(edited || unedited) of the next token, in nats, at positions spread over that text
next_token_same   share of these positions whose most probable token is still the same
weight_norm_ratio |W_out| edited over unedited, of the layer where it changed most
broken            whether any of these is no finite number; such a record is not in their means

What a model is told before its prompts (`Edit.told`) stands before this text too. It takes room in the context, so that both models are
compared on as much of the text as fits behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import guards, models
from mechedit.models import Blocks, HookedModel, device_of
from mechedit.prompts import check_length, own_tokens, pad, resolve_bos

__all__ = ["Unedited", "health", "unedited"]

TOKENS = 256  # of the held-out text
MOST, TINY = 700.0, 1e-300  # what exp and log can take
POSITIONS = 32  # whose whole distributions are compared


@dataclass(frozen=True, eq=False)
class Unedited:
    """What the model said before any edit: of each token of the text but the first, and at some positions all that could follow."""

    row: Int[Tensor, "one pos"]
    text: Float[Tensor, " tokens"]
    log_p: Float[Tensor, "positions d_vocab"]
    norms: tuple[float, ...]  # of each layer's W_out


def unedited(model: HookedModel, *, prepend_bos: bool | None = None) -> Unedited:
    """The model as it is now."""
    row, told = _row(model, prepend_bos)
    return Unedited(row.cpu(), *_read(model, row, told, row.shape[1] - told))


def health(model: HookedModel, before: Unedited) -> dict[str, float]:
    """The numbers above, of the model as it is now."""
    bos = before.row[0, 0] == model.tokenizer.bos_token_id
    row, told = _row(model, bool(bos)) if models.told(model) else (before.row.to(device_of(model)), 0)
    text, log_p, norms = _read(model, row, told, len(before.text) + 1)
    was, compared = before.text[: len(text)], before.log_p[: len(log_p)]
    ratios = [now / was for now, was in zip(norms, before.norms, strict=True)]
    largest = (
        math.nan if any(map(math.isnan, ratios)) else max(ratios, key=lambda ratio: abs(math.log(max(ratio, TINY))))
    )
    same = (log_p.argmax(-1) == compared.argmax(-1)).float().mean()
    kl = (log_p.exp() * (log_p - compared)).sum(-1).mean()
    perplexity = _perplexity(text)
    found = {
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / _perplexity(was),
        "next_token_kl": max(float(kl), 0.0) if math.isfinite(float(kl)) else math.nan,
        "next_token_same": float(same),
        "weight_norm_ratio": largest,
    }
    finite = {name: value if math.isfinite(value) else math.nan for name, value in found.items()}
    return finite | {"broken": float(any(map(math.isnan, finite.values())))}


def _row(model: HookedModel, prepend_bos: bool | None) -> tuple[Int[Tensor, "one pos"], int]:
    """The held-out text as the model reads it, and how many tokens that it is told stand before it."""
    ids, told = own_tokens(model, guards.held_out_text(model), prepend_bos=resolve_bos(model, prepend_bos))
    check_length(model, told + 2)
    return pad(model, [ids[: min(TOKENS + told, int(model.cfg.n_ctx))]]), told


@torch.no_grad()
def _read(
    model: HookedModel, row: Int[Tensor, "one pos"], told: int, size: int
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "positions d_vocab"], tuple[float, ...]]:
    """log P of each token of the text, behind `told` tokens; at positions spread over `size` of them, where there is room for them, all
    that could follow; each layer's norm."""
    blocks = Blocks(model)
    resid = blocks.final(row)[0]
    text = blocks.log_p(resid[told:-1], row[0, told + 1 :, None])[:, 0].cpu().double()
    places = told + torch.linspace(1, size - 1, min(POSITIONS, size - 1)).long().to(resid.device)
    log_p = blocks.logits(resid[places[places < len(resid)]]).float().log_softmax(-1).cpu()
    norms = tuple(
        float(models.W_out(model, layer).detach().cpu().double().norm()) for layer in range(int(model.cfg.n_layers))
    )
    return text, log_p, norms


def _perplexity(log_p: Float[Tensor, " tokens"]) -> float:
    mean = float(log_p.mean())
    return math.exp(-mean) if -mean < MOST else math.inf
