"""A change spread over several blocks, from the lowest up (Meng et al. 2023, section 4.3).

A change d is wanted at the last block. Before each block is written, keys are read anew on the model with the blocks below it written,
and so is what of d is still wanted; the block writes its share of that:

    left   1 / (blocks left)          MEMIT
    sqrt   1 / sqrt(blocks left)      PMET
    own    1                          every block as if it were alone
    portions p                        p_i / (p_i + ... + p_n)

What is still wanted is a change of the residual stream. Where a norm follows the MLP (Gemma 2 and 3), W_out's output o reaches the stream
as N(o) = weight * o / rms(o), whose length is not free: `through_norm` finds the o' of o's length with which N(o') is closest to
what is wanted. How much of it that meets is `met` of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit import models, weights
from mechedit.changes import Change
from mechedit.closed_form import Metric
from mechedit.editors.shaping import shaped
from mechedit.interventions import intervened, read
from mechedit.keys import Context
from mechedit.models import HookedModel
from mechedit.prompts import pad
from mechedit.settings import MemitSettings
from mechedit.values import HOOKS

__all__ = [
    "Averages", "Spread", "Subject", "Written", "added_by", "averages", "met", "normed", "outputs", "read_at", "share", "through_norm", "weight_after",
]  # fmt: skip

ROWS = 128  # contexts that are read at once
LARGE = 100.0  # a state so large that a norm's epsilon is nothing beside it
HALVINGS = 100  # of the interval that holds the multiplier


def share(rule: str, portions: Sequence[float], index: int, n: int) -> float:
    """Of what is still wanted, the part that block number `index` of `n` writes; the last writes all."""
    if portions:
        return portions[index] / sum(portions[index:])
    left = n - index
    return {"left": 1 / left, "sqrt": left**-0.5, "own": 1.0}[rule]


@dataclass(frozen=True, eq=False)
class Averages:
    """How contexts of one subject are averaged: for keys, and for what is still wanted. Both sum to 1."""

    keys: Float[Tensor, " contexts"]
    wanted: Float[Tensor, " contexts"]


def averages(contexts: int, bare: Sequence[int], how: str) -> Averages:
    """Those of a subject's contexts, of which some are bare prompts: all alike, or as published (`MemitSettings.average`)."""
    even = torch.full((contexts,), 1 / contexts, dtype=torch.float64)
    if how == "even":
        return Averages(even, even)
    is_bare = torch.zeros(contexts, dtype=torch.float64)
    is_bare[list(bare)] = 1.0
    alone = is_bare / is_bare.sum()
    others = 1 - is_bare
    keys = (alone + others / others.sum()) / 2 if bool(others.any()) else alone
    return Averages(keys, alone)


@torch.no_grad()
def read_at(
    model: HookedModel, names: Sequence[str], last: int, rows: Sequence[Context]
) -> list[Float[Tensor, "rows width"]]:
    """What hook points up to block `last` hold where each context looks up, in float64."""
    found: list[list[Tensor]] = [[] for _ in names]
    for begin in range(0, len(rows), ROWS):
        part = rows[begin : begin + ROWS]
        tokens: Int[Tensor, "rows pos"] = pad(model, [list(row.ids) for row in part])
        kept: dict[str, Tensor] = {}
        with intervened(model, *(read(name, partial(kept.__setitem__, name)) for name in dict.fromkeys(names))):
            model(tokens, stop_at_layer=last + 1)
        at = torch.tensor([row.lookup for row in part], device=tokens.device)
        for own, name in zip(found, names, strict=True):
            own.append(kept[name][torch.arange(len(part), device=tokens.device), at].cpu().double())
    return [torch.cat(own) for own in found]


@torch.no_grad()
def weight_after(model: HookedModel, layer: int) -> Float[Tensor, " d_model"] | None:
    """The weight of the norm between W_out's output and the residual stream, in float64; None where there is none."""
    norm = models.norm_after_mlp(model, layer)
    if norm is None:
        return None
    like = models.W_out(model, layer)
    return norm(torch.full((1, 1, like.shape[1]), LARGE).to(like))[0, 0].cpu().double()


def normed(output: Float[Tensor, "n d_model"], weight: Float[Tensor, " d_model"] | None) -> Float[Tensor, "n d_model"]:
    """What W_out's output adds to the residual stream."""
    return output if weight is None else weight * output / output.square().mean(1, keepdim=True).sqrt()


def through_norm(
    output: Float[Tensor, "n d_model"], added: Float[Tensor, "n d_model"], weight: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "n d_model"]:
    """The change of W_out's output after which the stream has as much of `added` more as can be, in float64.

    Behind a norm that is least squares on a sphere: of all z of rms 1, that for which weight * z is closest to y = N(o) + added is
    z = weight y / (weight^2 + m), with the one multiplier m above -min(weight^2) that gives z this length; o' is z, of o's length.
    """
    if weight is None:
        return added
    wanted = (normed(output, weight) + added) * weight
    squares = weight.square()
    low = torch.full((len(output), 1), -float(squares.min()), dtype=torch.float64)
    high = low + wanted.norm(dim=1, keepdim=True) / weight.numel() ** 0.5  # there z is no longer than it may be
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_long = (wanted / (squares + middle)).square().mean(1, keepdim=True) > 1
        low, high = torch.where(is_long, middle, low), torch.where(is_long, high, middle)
    z = wanted / (squares + high)
    return z / z.norm(dim=1, keepdim=True) * output.norm(dim=1, keepdim=True) - output


def outputs(model: HookedModel, layer: int, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_model"]:
    """What a block's W_out returns for keys now, in float64."""
    W_out, b_out = (each(model, layer).detach().cpu().double() for each in (models.W_out, models.b_out))
    return keys.double() @ W_out + b_out


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject's contexts, how they are averaged, and by how much its last block is to give more: in the stream, or at the MLP's output."""

    rows: Sequence[Context]
    averages: Averages
    change: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class Written:
    """What one block had to do and did, of the subject for which it is least: keys, the change, the share of what it was to add to the
    stream that it adds, how much of all that was wanted was still to be added before it (of the most), and what steps after the solve did."""

    keys: Float[Tensor, "n d_mlp"]
    change: Change
    met: float
    left: float
    shaped: dict[str, float] = field(default_factory=dict)


class Spread:
    """Writes what subjects want over the blocks of the settings, one block after the other, into the model; whoever calls puts back."""

    def __init__(self, model: HookedModel, subjects: Sequence[Subject], settings: MemitSettings) -> None:
        self.model, self.subjects, self.settings = model, subjects, settings
        self.last = settings.blocks[-1]
        self.weight = weight_after(model, self.last)
        keys, self.stream, self.output = self._read(self.last)
        change = torch.stack([each.change for each in subjects]).double()
        if settings.parts[-1] == "mlp":
            start = self.output if settings.measured == "mlp" else outputs(model, self.last, keys)
            change = normed(start + change, self.weight) - normed(start, self.weight)
        self.change = change

    def write_(
        self,
        index: int,
        metric: Metric,
        original: Float[Tensor, "d_mlp d_model"],
        first: Float[Tensor, "d_mlp d_model"] | None = None,
    ) -> Written:
        """Write block number `index`, whose W_out was `original`, and `first` without any edit."""
        layer, blocks = self.settings.blocks[index], self.settings.blocks
        weight = weight_after(self.model, layer)
        keys, stream, output = self._read(layer)
        left = self._left(stream, output)
        wanted = share(self.settings.spread, self.settings.portions, index, len(blocks)) * left
        now = outputs(self.model, layer, keys)
        solved = metric.solve(layer, keys, through_norm(now, wanted, weight))
        change, did = shaped(solved, original, first, self.settings)
        added = normed(now + added_by(change, keys), weight) - normed(now, weight)
        weights.write_(self.model, change.weight, original, change.dense())
        share_left = float((left.norm(dim=1) / self.change.norm(dim=1)).nan_to_num(0.0).max())
        return Written(keys, change, met(added, wanted), share_left, did)

    def met(self) -> float:
        """Of the subject for which it is least, the share of all that was wanted that is there now."""
        _, stream, output = self._read(self.last)
        return met(self.change - self._left(stream, output), self.change)

    def _left(
        self, stream: Float[Tensor, "n d_model"], output: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """What of the change of the stream is still wanted."""
        if self.settings.measured == "mlp":
            return self.change - (normed(output, self.weight) - normed(self.output, self.weight))
        return self.change - (stream - self.stream)

    def _read(
        self, layer: int
    ) -> tuple[Float[Tensor, "n d_mlp"], Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """Of each subject: its key in the block, the stream behind the last block, and what the last block's W_out returns."""
        names = [
            f"blocks.{layer}.mlp.hook_post",
            HOOKS["stream"].format(self.last),
            f"blocks.{self.last}.mlp.hook_post",
        ]
        rows = [row for subject in self.subjects for row in subject.rows]
        sizes = [len(subject.rows) for subject in self.subjects]
        own, stream, last = (each.split(sizes) for each in read_at(self.model, names, self.last, rows))
        weighed = [each.averages for each in self.subjects]
        keys = torch.stack([each.keys @ found for each, found in zip(weighed, own, strict=True)])
        found = [
            torch.stack([each.wanted @ one for each, one in zip(weighed, part, strict=True)]) for part in (stream, last)
        ]
        return keys, found[0], outputs(self.model, self.last, found[1])


def added_by(change: Change, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_model"]:
    """What keys return more with a change, in float64."""
    factors = change.factors()
    return keys.double() @ change.dense() if factors is None else keys.double() @ factors[0].T @ factors[1]


def met(added: Float[Tensor, "n d_model"], wanted: Float[Tensor, "n d_model"]) -> float:
    """Of the subject for which it is least, the share of what was wanted that was added; 1 where nothing was wanted."""
    size = wanted.square().sum(1)
    shares = ((added * wanted).sum(1) / size)[size > 0]
    return float(shares.min()) if len(shares) else 1.0
