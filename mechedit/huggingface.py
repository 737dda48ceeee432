"""Where Hugging Face's model of an architecture keeps a weight.

The place is found by the weight's values, not by a table of names: it is the parameter of that block, or some of its columns, that
equals the weight. A parameter is looked at as a matrix [in, out], whichever way round it is stored, and its columns as they may be
fused: one after the other (GPT-2, Phi-3), or head by head (GPT-NeoX). A bias, which may be as zero as others, is that of the module that
has its matrix, at the same columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.edits import EditError
from mechedit.models import HookedModel
from mechedit.weights import Weight, as_matrix, value

__all__ = ["Place", "place"]

WORDS = {"mlp": ("mlp", "feed_forward", "ffn", "fc"), "attn": ("attn", "attention")}


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter by its name, whether it is stored [in, out], and which of its columns (outputs) are the weight; None: all."""

    name: str
    parameter: Tensor
    in_by_out: bool
    columns: Int[Tensor, " columns"] | None

    @property
    def module(self) -> str:
        """The name of the module that has the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def _matrix(self) -> Tensor:
        return _as_in_by_out(self.parameter, self.in_by_out)

    @torch.no_grad()
    def write_(self, matrix: Float[Tensor, "rows columns"]) -> None:
        """Put a weight, as a matrix, in its place."""
        whole, own = self._matrix, matrix.to(self.parameter)
        if self.columns is None:
            whole.copy_(own)
        else:
            whole[:, self.columns] = own

    def widened(self, right: Float[Tensor, "rank columns"]) -> Float[Tensor, "rank out"]:
        """Columns of the weight as columns of the parameter, zero elsewhere."""
        if self.columns is None:
            return right
        return right.new_zeros(len(right), self._matrix.shape[1]).index_copy(1, self.columns, right)


def _as_in_by_out(parameter: Tensor, in_by_out: bool) -> Tensor:
    if parameter.ndim == 1:
        return parameter[None]
    return parameter if in_by_out else parameter.T


def place(plain: Any, model: HookedModel, weight: Weight) -> Place:
    """Where the Hugging Face model `plain` keeps a weight of its hooked twin.

    Raises:
        EditError: nowhere, or in several places that cannot be told apart.
    """
    stored = value(model, weight).detach().cpu()
    wanted = as_matrix(weight, stored)
    part, _, own = weight.name.partition(".")
    if own.startswith("b"):
        return _of_bias(plain, model, weight, place(plain, model, Weight(weight.layer, f"{part}.W{own[1:]}")), wanted)
    heads = len(stored) if stored.ndim > 1 and weight.name.startswith("attn") else 1
    found = [each for each in _candidates(plain, weight.layer, wanted, heads) if torch.equal(_part(each), wanted)]
    words = WORDS[part]
    named = [each for each in found if any(word in each.name for word in words)] or found
    if len({each.name for each in named}) > 1:
        raise EditError(
            f"{weight} of {model.cfg.model_name} is in {' and in '.join(each.name for each in named)} of the Hugging Face model, "
            "which are equal, so that its place cannot be told."
        )
    if not named:
        raise EditError(
            f"no parameter of block {weight.layer} of the Hugging Face model equals {weight.name} of {model.cfg.model_name}: it is "
            "another model, or it is edited (load it afresh), or that architecture has no such weight (a bias, say)."
        )
    return named[0]


def _of_bias(
    plain: Any, model: HookedModel, weight: Weight, matrix: Place, wanted: Float[Tensor, "1 columns"]
) -> Place:
    """Where the bias is, of the module where the matrix is."""
    name = f"{matrix.module}.bias"
    parameter = dict(plain.named_parameters()).get(name)
    if parameter is not None and torch.equal(_part(found := Place(name, parameter, True, matrix.columns)), wanted):
        return found
    raise EditError(
        f"no parameter of block {weight.layer} of the Hugging Face model equals {weight.name} of {model.cfg.model_name}: "
        + (f"{name} has other numbers, as another model's or an edited one's (load it afresh)." if parameter is not None else f"there is no {name}.")
    )  # fmt: skip


def _part(candidate: Place) -> Tensor:
    whole = candidate._matrix.detach()
    return whole if candidate.columns is None else whole[:, candidate.columns]


def _candidates(plain: Any, layer: int, wanted: Float[Tensor, "rows columns"], heads: int) -> Iterator[Place]:
    rows, columns = wanted.shape
    for name, parameter in plain.named_parameters():
        if f".{layer}." not in name or parameter.ndim != 2:
            continue
        for in_by_out in (False, True):
            shape = _as_in_by_out(parameter, in_by_out).shape
            if shape == wanted.shape:
                yield Place(name, parameter, in_by_out, None)
            elif shape[0] == rows and shape[1] > columns:
                for part in _fused(shape[1], columns, heads):
                    yield Place(name, parameter, in_by_out, part)


def _fused(out: int, columns: int, heads: int) -> Iterator[Tensor]:
    """The ways in which so many columns of a parameter can be one of its parts."""
    every = torch.arange(out)
    for begin in sorted({0, columns, 2 * columns, out - columns, out - 2 * columns} & set(range(out))):
        if begin + columns <= out:
            yield every[begin : begin + columns]
    if out == 3 * columns:  # head by head: its query, key, value
        for which in range(3):
            yield every.view(heads, 3, columns // heads)[:, which].reshape(-1)
