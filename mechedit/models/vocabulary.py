"""What final states say of some tokens, and how far that is from what others said, with slopes, without a row of logits [d_vocab].

    log p(t) = l_t - log sum_v exp(l_v),                   d/dx = W_t - sum_v p_v W_v
    KL(p || q) = sum_v p_v (log p_v - log q_v),            d/dx = sum_v p_v (log p_v - log q_v - KL) W_v

with l = cap(x W_U + b_U). All sums over the vocabulary come from one pass over it in parts, each relative to the highest logit so far, so
that a part of W_U is read once, for values and slopes alike, and what is done to its logits stays in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PART", "said"]

PART = 1024  # columns of the unembedding that are multiplied at once


def said(
    normed: Float[Tensor, "reads d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    cap: float,
    tokens: Int[Tensor, " reads"],
    apart: Int[Tensor, " compared"],
    q: Float[Tensor, "compared d_vocab"],
) -> tuple[Float[Tensor, " reads"], Float[Tensor, " compared"], Float[Tensor, " reads"]]:
    """log p of each read's token; KL(p || q) of the reads `apart`, whose q are log-probabilities; and how far each token's logit is below the
    highest. The first two have slopes for `normed`, states as they enter the unembedding; a cap of 0 is none."""
    found: tuple[Tensor, Tensor, Tensor] = _Said.apply(normed, W_U, b_U, cap, tokens, apart, q)  # type: ignore[no-untyped-call]
    return found


class _Said(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_U: Tensor, b_U: Tensor, cap: float, tokens: Tensor, apart: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        reads, d_vocab = len(x), W_U.shape[1]
        highest, total = torch.full((reads, 1), -torch.inf).to(x), torch.zeros(reads, 1).to(x)
        away = torch.zeros(len(apart), 1).to(x)  # the sum of p (l - log q), as total is that of p
        sums = torch.zeros(reads + len(apart), W_U.shape[0]).to(x)  # of p W, then of p (l - log q) W
        for begin in range(0, d_vocab, PART):
            part = slice(begin, min(begin + PART, d_vocab))
            W = W_U[:, part]
            logits = _capped(torch.addmm(b_U[part], x, W), cap)
            higher = torch.maximum(highest, logits.amax(1, keepdim=True))
            fade = (highest - higher).exp()
            # exp(-80) adds nothing to a sum above 1, and what lies below would be denormal numbers, which are slow
            p = (logits - higher).clamp_(min=-80.0).exp_()
            total = total * fade + p.sum(1, keepdim=True)
            over = logits[apart] - q[:, part]
            away = away * fade[apart] + (p[apart] * over).sum(1, keepdim=True)
            p = p * _slope(logits, cap)
            sums *= torch.cat([fade, fade[apart]])
            sums.addmm_(torch.cat([p, p[apart] * over]), W.T)
            highest = higher
        own = W_U[:, tokens].T
        logit = _capped((x * own).sum(1) + b_U[tokens], cap)
        log_total = highest[:, 0] + total[:, 0].log()
        means = sums / torch.cat([total, total[apart]])
        kl = (away / total[apart])[:, 0] - log_total[apart]
        of_log_p = own * _slope(logit, cap)[:, None] - means[:reads]
        of_kl = means[reads:] - (log_total[apart] + kl)[:, None] * means[apart]
        ctx.save_for_backward(of_log_p, of_kl, apart)
        below = highest[:, 0] - logit
        ctx.mark_non_differentiable(below)
        return logit - log_total, kl, below

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        of_log_p, of_kl, apart = ctx.saved_tensors
        found = slopes[0][:, None] * of_log_p
        return found.index_add(0, apart, slopes[1][:, None] * of_kl), None, None, None, None, None, None


def _capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def _slope(capped: Tensor, cap: float) -> Tensor:
    """Of the cap, by what came out of it."""
    return 1 - (capped / cap).square() if cap > 0 else torch.ones_like(capped)
