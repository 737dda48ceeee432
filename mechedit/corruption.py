"""What "corrupted" means: noise on the embeddings of the subject's tokens.

The noise is Gaussian, `noise` standard deviations of the vocabulary's embeddings, added at `hook_embed` (before positions;
Meng et al. 2022, section 2.1). It depends on (seed, fact) alone: not on the place in a batch, not on what ran before, not
on the device. The published code draws the same noise for all subjects of equal shape; here facts differ.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.facts import Fact

__all__ = ["gaussian", "generator"]


def generator(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator whose stream is fixed by the seed and the labels."""
    digest = hashlib.sha256("\x00".join([str(seed), *labels]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def gaussian(
    fact: Fact, *, draws: int, tokens: int, d_model: int, scale: float, seed: int
) -> Float[Tensor, "draws subject d_model"]:
    """Noise for each draw and subject token, in float32 on the CPU; `scale` is its standard deviation."""
    stream = generator(seed, "noise", fact.prompt, fact.subject)
    return scale * torch.randn(draws, tokens, d_model, generator=stream)
