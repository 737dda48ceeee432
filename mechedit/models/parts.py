"""One block of a HookedTransformer by its own parts: norms, projections and MLP are its modules; what lies between is here.

The block's own forward pass copies the keys and values of earlier positions for every row, and computes every position it is
given. Here rows of one batch share those keys and values, and only positions from `begin` on are computed, from the keys and
values of all. Hooks fire where the block has them, but for those of rotated keys, scores and patterns, which have other shapes.

    scores[c, n, i, j] = cap(q[c, n, i] . k[n, j] / scale)        c copies of n rows that share what lies before

`fits` says whether a block is one of those that are so made; whoever runs one compares the two ways once (`baseline`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

__all__ = ["Earlier", "fits", "reaches", "run"]

HOOKS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_z", "mlp.", "ln1", "ln2", "hook_")

SWITCHES = "use_attn_in use_split_qkv_input use_attn_result use_hook_mlp_in attn_only load_in_4bit use_attention_sinks use_logn_attn clip_qkv use_dynamic_ntk_rope"


@dataclass(frozen=True, eq=False)
class Earlier:
    """Keys and values [n, earlier, heads, d_head] of the positions before, shared by the rows c n of a batch, c of each."""

    keys: Float[Tensor, "n earlier heads d_head"]
    values: Float[Tensor, "n earlier heads d_head"]


def fits(block: Any) -> bool:
    """Whether a block of a HookedTransformer is of the kind that `run` computes."""
    cfg = block.cfg
    plain = not any(getattr(cfg, name, None) for name in SWITCHES.split())
    return (
        plain
        and cfg.positional_embedding_type in ("standard", "rotary")
        and cfg.attention_dir == "causal"
        and getattr(block.attn, "_attention_dir_override", None) in (None, "causal")
        and not str(cfg.original_architecture).startswith("Olmo")
        and hasattr(block, "mlp")
    )


def reaches(hook: str) -> bool:
    """Whether `run` passes a hook point, by its name inside the block, with the activation that the block gives it."""
    return hook.startswith(HOOKS)


def run(
    block: Any, resid: Float[Tensor, "rows pos d_model"], earlier: list[tuple[Any, Earlier]], begin: int
) -> Float[Tensor, "rows late d_model"]:
    """The residual stream after the block, at positions from `begin` on. `earlier` has which rows share what."""
    resid = block.hook_resid_pre(resid)
    attn = block.attn
    normed = block.ln1(resid)
    late = normed[:, begin:]
    q, k, v = attn.calculate_qkv_matrices(late, normed, normed)
    z = torch.empty_like(q)
    for rows, each in earlier:
        z[rows] = _attended(attn, q[rows], k[rows], v[rows], each)
    out = F.linear(attn.hook_z(z).flatten(2), rearrange(attn.W_O, "head d_head d -> d (head d_head)"), attn.b_O)
    if block.cfg.use_normalization_before_and_after:
        out = block.ln1_post(out)
    out = block.hook_attn_out(out)
    resid = resid[:, begin:]
    if block.cfg.parallel_attn_mlp:
        return block.hook_resid_post(resid + out + block.apply_mlp(block.ln2(resid)))
    middle = block.hook_resid_mid(resid + out)
    return block.hook_resid_post(middle + block.apply_mlp(block.ln2(middle)))


def _attended(
    attn: Any,
    q: Float[Tensor, "rows late heads d_head"],
    k: Float[Tensor, "rows pos kv_heads d_head"],
    v: Float[Tensor, "rows pos kv_heads d_head"],
    earlier: Earlier,
) -> Float[Tensor, "rows late heads d_head"]:
    """What attention reads, heads apart: softmax(scores) v over the shared positions and each row's own."""
    n, past, late, heads = len(earlier.keys), earlier.keys.shape[1], q.shape[1], k.shape[2]
    before = earlier.keys
    if attn.cfg.positional_embedding_type == "rotary":
        q = attn.hook_rot_q(attn.apply_rotary(q, past + k.shape[1] - late))
        k, before = attn.apply_rotary(k, past), attn.apply_rotary(before, 0)
    q = rearrange(q, "(c n) i (h g) d -> n h c i g d", n=n, h=heads) / attn.attn_scale
    k, v = (rearrange(each, "(c n) j h d -> n h c j d", n=n) for each in (k, v))
    own = torch.einsum("nhcigd,nhcjd->nhcigj", q, k)
    shared = torch.einsum("nhcigd,njhd->nhcigj", q, before)
    scores = torch.cat([shared, own], -1)
    if (cap := attn.cfg.attn_scores_soft_cap) > 0:
        scores = cap * torch.tanh(scores / cap)
    seen = _seen(attn, late, scores.shape[-1], scores.device)[:, None]
    pattern = scores.masked_fill_(~seen, -torch.inf).softmax(-1).to(v.dtype)
    z = torch.einsum("nhcigj,nhcjd->nhcigd", pattern[..., past:], v)
    if past:
        z += torch.einsum("nhcigj,njhd->nhcigd", pattern[..., :past], earlier.values)
    return rearrange(z, "n h c i g d -> (c n) i (h g) d")


def _seen(attn: Any, late: int, length: int, device: torch.device) -> Tensor:
    """[late, length]: which keys each of the last `late` of `length` positions may look at."""
    at = torch.arange(length, device=device)
    distance = at[length - late :, None] - at
    seen = distance >= 0
    return seen & (distance < attn.cfg.window_size) if attn.attn_type == "local" else seen
