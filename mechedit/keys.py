"""k*, the key of a subject: what the MLP's post-activation is at the subject's last token, averaged over prefixes.

    k* = 1/N sum_j k(x_j + p)        (Meng et al. 2022, eq. 3)

p is the fact's prompt; the x_j are the empty text and short texts sampled from the model. The published code samples 10 of
length 5 and 10 of length 10 with top-k 5, and joins them by ". "; its lengths count the token it starts from, ours do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.corruption import generator
from mechedit.facts import Fact
from mechedit.generation import sample
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel
from mechedit.prompts import check_length, encode, pad, resolve_bos, subject_span
from mechedit.settings import RomeSettings

__all__ = ["Context", "contexts", "prefixes", "subject_keys"]

TOP_K = 5


@dataclass(frozen=True)
class Context:
    """A fact's prompt behind a prefix: token ids, and the positions of the subject's last token and of the last token."""

    ids: tuple[int, ...]
    subject: int

    @property
    def last(self) -> int:
        return len(self.ids) - 1


def prefixes(model: HookedModel, settings: RomeSettings) -> tuple[str, ...]:
    """The empty prefix and the sampled ones, in a fixed order, seeded by the settings."""
    found = [""]
    for length, count in settings.prefixes:
        rows = sample(model, count, length, generator(settings.seed, "prefixes", str(length)), top_k=TOP_K)
        found += [model.tokenizer.decode(row, skip_special_tokens=True) + ". " for row in rows.tolist()]
    return tuple(found)


def contexts(
    model: HookedModel, fact: Fact, before: tuple[str, ...], *, prepend_bos: bool | None = None
) -> tuple[Context, ...]:
    """The fact's prompt behind each prefix. The subject is found by characters, so no prefix can shift it.

    Raises:
        FactError: a prompt is longer than the model's context.
    """
    bos = resolve_bos(model, prepend_bos)
    found = []
    for prefix in before:
        ids, offsets = encode(model, prefix + fact.prompt, prepend_bos=bos)
        check_length(model, len(ids))
        begin = len(prefix) + fact.subject_start
        found.append(Context(tuple(ids), subject_span(offsets, begin, begin + len(fact.subject))[1] - 1))
    return tuple(found)


@torch.no_grad()
def subject_keys(model: HookedModel, layer: int, rows: tuple[Context, ...]) -> Float[Tensor, "rows d_mlp"]:
    """The key of each context, in float32: input of `W_out` at the subject's last token."""
    tokens: Int[Tensor, "rows pos"] = pad(model, [list(row.ids) for row in rows])
    kept: list[Tensor] = []
    with intervened(model, read(f"blocks.{layer}.mlp.hook_post", kept.append)):
        model(tokens, stop_at_layer=layer + 1)
    at = torch.tensor([row.subject for row in rows], device=tokens.device)
    return kept[0][torch.arange(len(rows), device=tokens.device), at].float()
