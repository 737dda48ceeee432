"""What an edit adds to a weight: a product of thin factors, some rows, or a whole matrix.

    LowRank   left^T right         left [rank, rows], right [rank, columns]
    Rows      values at `index`    index [n], values [n, columns]
    Dense     delta                delta [rows, columns]

Rows and columns are those of `mechedit.weights`: what the weight reads, and what it writes. (`rank_one.RankOneEdit` is the
simplest change, in the names of its formula.) Changes are closed under sums: all changes of one weight are added in float64
(`total`) and rounded once, when they are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import MecheditError
from mechedit.weights import Weight

__all__ = ["Change", "ChangeError", "Dense", "Factors", "LowRank", "Rows", "by_weight", "norm", "total"]

Factors = tuple[Float[Tensor, "rank rows"], Float[Tensor, "rank columns"]]


class ChangeError(MecheditError, ValueError):
    """A change whose parts do not fit each other."""


class Change(ABC):
    """What is added to one weight."""

    kind: ClassVar[str]
    weight: Weight

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @abstractmethod
    def factors(self) -> Factors | None:
        """The factors left and right, in float64, of which the change is left^T right; None of a whole matrix."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""

    @abstractmethod
    def negated(self) -> Change:
        """The change that takes this one back."""

    def numbers(self) -> dict[str, Any]:
        """What is stored beside tensors, as JSON values."""
        return {}

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The change as a matrix in float64."""
        factors = self.factors()
        assert factors is not None
        return _product(*factors)

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return max(self.inner(self), 0.0) ** 0.5  # rounding can put the square of nothing below zero; NaN stays NaN

    def inner(self, other: Change) -> float:
        """The Frobenius inner product; changes of different weights have none in common.

        Raises:
            ChangeError: changes of one weight, but of two shapes.
        """
        if self.weight != other.weight:
            return 0.0
        if self.shape != other.shape:
            raise ChangeError(
                f"changes of one weight have one shape; found {list(self.shape)} and {list(other.shape)} of {self.weight}."
            )
        mine, theirs = self.factors(), other.factors()
        if mine is None or theirs is None:
            return float((self.dense() * other.dense()).sum())
        return float(((mine[0] @ theirs[0].T) * (mine[1] @ theirs[1].T)).sum())


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """`weight += left^T right`, of rank `len(left)` or less."""

    weight: Weight
    left: Float[Tensor, "rank rows"] = field(repr=False)
    right: Float[Tensor, "rank columns"] = field(repr=False)
    kind: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or len(self.left) != len(self.right):
            raise ChangeError(
                f"factors are [rank, rows] and [rank, columns]; found {list(self.left.shape)} and {list(self.right.shape)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[1], self.right.shape[1]

    def factors(self) -> Factors:
        return _double(self.left), _double(self.right)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def negated(self) -> LowRank:
        return replace(self, right=-self.right)


@dataclass(frozen=True, eq=False)
class Rows(Change):
    """`weight[index] += values`: each row at most once, of `height` rows that the weight has."""

    weight: Weight
    index: Int[Tensor, " n"] = field(repr=False)
    values: Float[Tensor, "n columns"] = field(repr=False)
    height: int
    kind: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.values.ndim != 2 or len(self.index) != len(self.values):
            raise ChangeError(
                f"rows are an index [n] and values [n, columns]; found {list(self.index.shape)} and {list(self.values.shape)}."
            )
        if len(self.index) and not 0 <= int(self.index.min()) <= int(self.index.max()) < self.height:
            raise ChangeError(f"rows must be from 0 to {self.height - 1}; found {self.index.tolist()[:8]}.")
        if len(self.index.unique()) != len(self.index):
            raise ChangeError("each row is changed at most once; one is there twice.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.values.shape[1]

    def factors(self) -> Factors:
        left = torch.nn.functional.one_hot(self.index.cpu().long(), self.height)
        return left.double(), _double(self.values)

    def dense(self) -> Float[Tensor, "rows columns"]:
        zeros = torch.zeros(self.shape, dtype=torch.float64)
        return zeros.index_copy(0, self.index.cpu().long(), _double(self.values))

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index, "values": self.values}

    def numbers(self) -> dict[str, Any]:
        return {"height": self.height}

    def negated(self) -> Rows:
        return replace(self, values=-self.values)


@dataclass(frozen=True, eq=False)
class Dense(Change):
    """`weight += delta`."""

    weight: Weight
    delta: Float[Tensor, "rows columns"] = field(repr=False)
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.delta.ndim != 2:
            raise ChangeError(f"a dense change is a matrix [rows, columns]; found {list(self.delta.shape)}.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    def factors(self) -> None:
        return None

    def dense(self) -> Float[Tensor, "rows columns"]:
        return _double(self.delta)

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def negated(self) -> Dense:
        return replace(self, delta=-self.delta)


def by_weight(changes: Iterable[Change]) -> dict[Weight, list[Change]]:
    """The changes of each weight, in order; weights in order too."""
    found: dict[Weight, list[Change]] = {}
    for change in changes:
        found.setdefault(change.weight, []).append(change)
    return dict(sorted(found.items()))


def total(changes: Sequence[Change]) -> Float[Tensor, "rows columns"]:
    """The sum of changes of one weight, in float64: one product for all that are of low rank.

    Raises:
        ChangeError: there are none, or they are of several weights or shapes.
    """
    if len({(change.weight, change.shape) for change in changes}) != 1:
        found = sorted({f"{change.weight} {list(change.shape)}" for change in changes})
        raise ChangeError(f"a sum is of changes of one weight and shape; found {', '.join(found) or 'none'}.")
    thin = [factors for change in changes if not isinstance(change, Rows) and (factors := change.factors()) is not None]
    whole = [change.dense() for change in changes if isinstance(change, Rows) or change.factors() is None]
    if thin:
        left, right = (torch.cat(parts) for parts in zip(*thin, strict=True))
        whole.insert(0, _product(left, right))
    return reduce(torch.add, whole)


def norm(changes: Iterable[Change]) -> float:
    """The Frobenius norm of changes taken together, those of one weight added."""
    squared = 0.0
    for own in by_weight(changes).values():
        if any(change.factors() is None for change in own):
            squared += float(total(own).square().sum())
        else:
            squared += sum(a.inner(b) for a in own for b in own)
    return max(squared, 0.0) ** 0.5


def _product(left: Float[Tensor, "rank rows"], right: Float[Tensor, "rank columns"]) -> Float[Tensor, "rows columns"]:
    """left^T right, column by column in memory, as models mostly store their weights."""
    return (right.T @ left).T


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
