"""Texts as rows of tokens that run through the edited blocks alone: what lies below them no edit changes, and is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import prompts
from mechedit.facts import Fact
from mechedit.models import Blocks, HookedModel
from mechedit.prompts import encode, pad

__all__ = ["Line", "Rows", "line"]


@dataclass(frozen=True)
class Line:
    """A prompt and what follows it, as tokens. Each token of the target is read where it is predicted."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


def line(model: HookedModel, prompt: str, target: str, *, join: str = "auto", prepend_bos: bool) -> Line:
    """A text as a line; errors as in `prompts.continuation` and `check_length`."""
    ids, _ = encode(model, prompt, prepend_bos=prepend_bos)
    more = prompts.continuation(model, prompt, target, join)
    prompts.check_length(model, len(ids) + len(more) - 1)  # the last is not read
    return Line(tuple(ids), tuple(more))


def of_fact(model: HookedModel, fact: Fact, *, prepend_bos: bool) -> Line:
    """The prompt of a fact and its new target."""
    return line(model, fact.prompt, str(fact.target_new), join=fact.join, prepend_bos=prepend_bos)


class Rows:
    """Lines as rows of a batch, from the first edited block on."""

    def __init__(self, model: HookedModel, lines: Sequence[Line], first: int, blocks: Blocks | None = None) -> None:
        self.blocks, self.count = blocks or Blocks(model), len(lines)
        self.layers = range(first, int(model.cfg.n_layers))
        tokens = pad(model, [[*each.prompt, *each.target[:-1]] for each in lines])
        with torch.no_grad():
            self.entering = self.blocks.embed(tokens)
            for layer in range(first):
                self.entering, _ = self.blocks.run(layer, self.entering)
            if not first:  # a bridge looks once how its blocks are called, which no hook of an edit should see
                self.blocks.run(first, self.entering)
        reads = [
            (row, len(each.prompt) - 1 + step, token, 1 / len(each.target))
            for row, each in enumerate(lines)
            for step, token in enumerate(each.target)
        ]
        row, position, token, share = zip(*reads, strict=True)
        self.row, self.position, self.token = (
            torch.tensor(each, device=tokens.device) for each in (row, position, token)
        )
        self.share = torch.tensor(share, device=tokens.device)

    def final(self) -> Float[Tensor, "reads d_model"]:
        """The states that leave the last block where a token is read, with the model as it is."""
        resid = self.entering
        for layer in self.layers:
            resid, _ = self.blocks.run(layer, resid)
        return resid[self.row, self.position]

    def log_p(self, final: Float[Tensor, "reads d_model"]) -> Float[Tensor, "reads d_vocab"]:
        """log p of every token after these states. To be asked for outside of what is to see passes of these rows alone."""
        logits = self.blocks.logits(final)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def nll(self, log_p: Float[Tensor, "reads d_vocab"], smoothing: float = 0.0) -> Float[Tensor, " rows"]:
        """-log p of each row's target, the mean over its tokens. With smoothing, that share of each label goes to all tokens alike."""
        own = -log_p.gather(1, self.token[:, None])[:, 0]
        if smoothing:
            own = (1 - smoothing) * own - smoothing * log_p.mean(-1)
        return self.mean(own)

    def says(self, log_p: Float[Tensor, "reads d_vocab"]) -> Float[Tensor, " rows"]:
        """1 for each row of whose target every token is the most probable, else 0."""
        wrong = (log_p.argmax(-1) != self.token).to(log_p)
        return (self.mean(wrong) == 0).to(log_p)

    def mean(self, reads: Float[Tensor, " reads"]) -> Float[Tensor, " rows"]:
        """The mean of each row's reads."""
        return reads.new_zeros(self.count).index_add(0, self.row, reads * self.share.to(reads))
