"""KE's network: from words that say the edit, how to mask the gradient and what to add to it (De Cao et al. 2021).

    c = tanh(A [last state forwards; last state backwards] + a)        of a bidirectional LSTM over the condition's embeddings
    (p, q, r, s, e) = H2 tanh(H1 c)        of each weight [d_in, d_out]; p, r of d_in, q, s of d_out numbers; H1, H2 weight-normed
    W += max_scale sigmoid(e) (gradient * outer(softmax(p), q) + outer(softmax(r), s))

The gradient is sum_t outer(u_t, delta_t), so that the whole is of rank tokens + 1: factors u_t * softmax(p) and delta_t * q, and
softmax(r) and s. q carries the sign. The condition is `true target >> new target || prompt` (paper), or prompt and new target (published).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mechedit.editors.trained.factors import Factors, Term
from mechedit.settings import KeTraining
from mechedit.weights import Weight

__all__ = ["Condition", "Ke", "Normed"]

Condition: TypeAlias = Shaped[Tensor, "..."]
"""The tokens of an edit's condition [pos], or their embeddings [pos, d_model]."""


class Normed(nn.Module):
    """A linear layer each row of whose weight is a length times a direction (weight norm)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        drawn = nn.Linear(d_in, d_out)
        self.direction, self.bias = nn.Parameter(drawn.weight.detach()), nn.Parameter(drawn.bias.detach())
        self.length = nn.Parameter(self.direction.detach().norm(dim=1, keepdim=True))

    def forward(self, x: Float[Tensor, "edits d_in"]) -> Float[Tensor, "edits d_out"]:
        """The layer's output."""
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Ke(nn.Module):
    """The network of all edited weights. `embeddings` are those that it learns, if it does."""

    def __init__(
        self,
        shapes: Mapping[Weight, tuple[int, int]],
        settings: KeTraining,
        d_model: int,
        embeddings: Float[Tensor, "d_vocab d_model"] | None = None,
    ) -> None:
        super().__init__()
        self.shapes, self.max_scale = dict(shapes), settings.max_scale
        self.embeddings = None if embeddings is None else nn.Parameter(embeddings.detach().float().clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.lstm = nn.LSTM(d_model, settings.lstm, batch_first=True, bidirectional=True)
            self.condense = nn.Linear(2 * settings.lstm, settings.condition)
            self.heads = nn.ModuleList(
                nn.Sequential(
                    Normed(settings.condition, settings.hidden),
                    nn.Tanh(),
                    Normed(settings.hidden, 2 * sum(shape) + 1),
                )
                for shape in self.shapes.values()
            )

    def condition(self, conditions: Sequence[Condition]) -> Float[Tensor, "edits condition"]:
        """What the LSTM makes of the tokens of each edit's condition: their ids where it has embeddings of its own, else the
        model's embeddings of them."""
        weight = self.condense.weight
        read = [
            (each if self.embeddings is None else self.embeddings[each.to(weight.device)]).to(weight)
            for each in conditions
        ]
        packed = nn.utils.rnn.pack_sequence(read, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.condense(torch.cat([last[0], last[1]], -1)).tanh()

    def observe(self, factors: Mapping[Weight, Factors]) -> None:
        """Nothing: there are no statistics."""

    def terms(self, factors: Mapping[Weight, Factors], conditions: Sequence[Condition]) -> dict[Weight, Term]:
        """What each edit adds to each weight."""
        c, found = self.condition(conditions), {}
        for head, (weight, own) in zip(self.heads, factors.items(), strict=True):
            d_in, d_out = self.shapes[weight]
            p, q, r, s, e = (each[:, None] for each in head(c).split([d_in, d_out, d_in, d_out, 1], -1))
            scale = self.max_scale * e.sigmoid()
            left = torch.cat([own.u * p.softmax(-1), r.softmax(-1)], 1)
            found[weight] = Term(left, scale * torch.cat([own.delta * q, s], 1))
        return found
