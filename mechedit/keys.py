"""k*, the key of a subject: what the MLP's post-activation is at the subject's last token, averaged over prefixes.

    k* = 1/N sum_j k(x_j + p)        (Meng et al. 2022, eq. 3)

p is the fact's prompt; the x_j are the empty text and short texts sampled from the model. The published code samples 10 of
length 5 and 10 of length 10 with top-k 5, and joins them by ". "; its lengths count the token it starts from, ours do not. Another
token than the subject's last can be chosen, by its position in the whole text.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import cache
from mechedit.corruption import generator
from mechedit.facts import Fact, FactError
from mechedit.generation import sample
from mechedit.interventions import intervened, read
from mechedit.models import HookedModel, hooked, identity, plainly
from mechedit.parsing import ParseError, check, from_file
from mechedit.prompts import behind, check_length, encode, pad, resolve_bos, subject_span
from mechedit.settings import KnowledgeNeuronsSettings, RomeSettings, SettingsError

__all__ = ["Context", "contexts", "prefixes", "subject_keys"]

TOP_K = 5
ROWS = 256  # contexts that are read at once: a few MB for each thousand neurons
RULE = "top 5, joined by full stops"  # of the prefixes; part of the cache's key


@dataclass(frozen=True)
class Context:
    """A fact's prompt behind a prefix: token ids, and the position whose key is looked up."""

    ids: tuple[int, ...]
    lookup: int

    @property
    def last(self) -> int:
        return len(self.ids) - 1


def prefixes(model: HookedModel, settings: RomeSettings | KnowledgeNeuronsSettings) -> tuple[str, ...]:
    """The empty prefix and the sampled ones, in a fixed order, seeded by the settings; sampled once, and kept in the cache.

    Raises:
        SettingsError: a prefix alone is longer than the model's context.
    """
    if not settings.prefixes:
        return ("",)
    if (longest := max(length for length, _ in settings.prefixes)) > (context := int(model.cfg.n_ctx)):
        raise SettingsError(
            f"prefixes must fit the context of {context} tokens of {model.cfg.model_name}, the prompt behind them; one has {longest}."
        )
    path = (
        cache.root()
        / "prefixes"
        / f"{cache.content_key(RULE, identity(model).whole, settings.prefixes, settings.seed)}.json"
    )
    keep = not hooked(model)  # what it says now is not what its parameters say
    if keep and path.is_file():
        with suppress(ParseError):  # damaged: sampled again below
            check(found := from_file(path), [str])
            return tuple(found)
    found = [""]
    for length, count in settings.prefixes:
        with plainly(model):
            rows = sample(model, count, length, generator(settings.seed, "prefixes", str(length)), top_k=TOP_K)
        found += [model.tokenizer.decode(row, skip_special_tokens=True) + ". " for row in rows.tolist()]
    if keep:
        cache.keep(path, json.dumps(found))
    return tuple(found)


def contexts(
    model: HookedModel,
    fact: Fact,
    before: tuple[str, ...],
    place: str = "subject_last",
    *,
    prepend_bos: bool | None = None,
) -> tuple[Context, ...]:
    """The fact's prompt behind each prefix. The subject is found by characters, so no prefix can shift it.

    Raises:
        FactError: a prompt is longer than the model's context, or has no token of that choice.
    """
    bos = resolve_bos(model, prepend_bos)
    found = []
    for prefix in before:
        text, begin = behind(model, prefix, fact)
        ids, offsets = encode(model, text, prepend_bos=bos)
        check_length(model, len(ids))
        first, end = subject_span(offsets, begin, begin + len(fact.subject))
        if place == "after_first" and end == len(ids):
            raise FactError(f"the subject ends {fact.prompt!r}, so no token comes after it; choose another fact_token.")
        at = {"subject_last": end - 1, "subject_first": first, "after_first": end, "last": len(ids) - 1}[place]
        found.append(Context(tuple(ids), at))
    return tuple(found)


@torch.no_grad()
def subject_keys(model: HookedModel, layer: int, rows: tuple[Context, ...]) -> Float[Tensor, "rows d_mlp"]:
    """The key of each context, in float32: input of `W_out` at the position that it looks up."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))  # so that little is padded
    found = [_read(model, layer, [rows[index] for index in order[begin : begin + ROWS]]) for begin in range(0, len(rows), ROWS)]  # fmt: skip
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]


def _read(model: HookedModel, layer: int, rows: list[Context]) -> Float[Tensor, "rows d_mlp"]:
    tokens: Int[Tensor, "rows pos"] = pad(model, [list(row.ids) for row in rows])
    kept: list[Tensor] = []
    with intervened(model, read(f"blocks.{layer}.mlp.hook_post", kept.append)):
        model(tokens, stop_at_layer=layer + 1)
    at = torch.tensor([row.lookup for row in rows], device=tokens.device)
    return kept[0][torch.arange(len(rows), device=tokens.device), at].float()
