"""Store one fact in one MLP by a closed-form, rank-one change of its `W_out`.

An MLP is read as a memory: its post-activation is a `key`; `W_out` turns it into the `value` the block adds to the
residual stream. Of all changes after which `key` returns `value`, this one moves ordinary keys least (`C` is their second
moment; Meng et al. 2022, eq. 2):

    W_out += outer(u, value - (key @ W_out + b_out)) / (u @ key)          with u = C^-1 key

Several keys at once have the least change under which each returns its own value (`solve_many`):

    W_out += U^T (V - (K @ W_out + b_out))      with U = (K C^-1 K^T)^-1 K C^-1,  a row of U and of the bracket a rank-one edit

`W_out` is [d_mlp, d_model], the transpose of the paper's W. `solve` is arithmetic alone, in float64; only `write_` and
`edited` touch a model, and only its `W_out`. Nothing here sees text or runs the model. `direction` does the cubic work of an
edit; who has the factor of C already (`moments.Moment.solve`) goes on with `insert` or `insert_many`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import weights
from mechedit.changes import Change, Factors, by_weight, total
from mechedit.errors import MecheditError
from mechedit.models import HookedModel
from mechedit.weights import Weight

__all__ = [
    "RankOneEdit",
    "RankOneError",
    "check_finite",
    "check_independent",
    "check_symmetric",
    "direction",
    "edited",
    "factor",
    "insert",
    "insert_many",
    "regularised",
    "solve",
    "solve_many",
    "whitened",
    "write_",
]

MAX_CONDITION = 1e10  # of the keys' correlations; beyond, few digits are left of what solve_many finds


SYMMETRIC = 1e-6  # of its largest number, by how much C may differ from its transpose


class RankOneError(MecheditError, ValueError):
    """An edit that cannot be solved for, or does not fit the model."""


@dataclass(frozen=True, eq=False)
class RankOneEdit(Change):
    """`W_out += outer(u, step)` in block `layer`. `divisor` is u @ key, by which the step was divided."""

    layer: int
    u: Float[Tensor, " d_mlp"] = field(repr=False)
    step: Float[Tensor, " d_model"] = field(repr=False)
    divisor: float = 1.0
    kind: ClassVar[str] = "rank_one"

    @property
    def weight(self) -> Weight:  # type: ignore[override]
        return Weight(self.layer, "mlp.W_out")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.step)

    def factors(self) -> Factors:
        return self.u.detach().cpu().double()[None], self.step.detach().cpu().double()[None]

    def tensors(self) -> dict[str, Tensor]:
        return {"u": self.u, "step": self.step}

    def numbers(self) -> dict[str, Any]:
        return {"divisor": self.divisor}

    def negated(self) -> RankOneEdit:
        return replace(self, step=-self.step)


def direction(key: Float[Tensor, " d_mlp"], C: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, " d_mlp"]:
    """u = C^-1 key, in float64: the rows of `W_out` that an edit for `key` changes, and by how much.

    Raises:
        RankOneError: NaN or infinity, or a C that is not positive definite.
    """
    check_finite(key=key)
    return whitened(key[None], factor(C))[0]


def factor(C: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """The lower Cholesky factor L of C = L L^T, in float64 on the CPU: the cubic work of an edit.

    Raises:
        RankOneError: NaN or infinity, or a C that is not symmetric or not positive definite.
    """
    check_symmetric(C)
    found, failed = torch.linalg.cholesky_ex(C.detach().cpu().double())
    if failed:
        raise RankOneError(
            f"C must be positive definite, but it is not (its first {int(failed)} rows already are not). Estimate it from more "
            "than d_mlp keys; ten times d_mlp is a good number. Or add a ridge."
        )
    return found


def check_symmetric(C: Float[Tensor, "d_mlp d_mlp"]) -> None:
    """Raise where C cannot be a mean of k k^T.

    Raises:
        RankOneError: NaN or infinity, or a C that is not symmetric.
    """
    check_finite(C=C)
    apart = float((C - C.T).abs().max()) if C.shape[0] == C.shape[1] else float("inf")
    if not apart <= SYMMETRIC * float(C.abs().max()):
        raise RankOneError(
            f"C must be square and symmetric, a mean of k k^T; it is {list(C.shape)}, and differs from its transpose."
        )


def whitened(keys: Float[Tensor, "n d_mlp"], factor: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "n d_mlp"]:
    """K C^-1 in float64, from the factor of C.

    Raises:
        RankOneError: NaN or infinity.
    """
    check_finite(keys=keys)
    return torch.cholesky_solve(keys.detach().cpu().double().T, factor).T


def regularised(C: Float[Tensor, "d_mlp d_mlp"], ridge: float) -> Float[Tensor, "d_mlp d_mlp"]:
    """C with `ridge` times the mean of its diagonal added to its diagonal."""
    return C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device) if ridge else C


def solve(
    layer: int,
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    key: Float[Tensor, " d_mlp"],
    value: Float[Tensor, " d_model"],
    C: Float[Tensor, "d_mlp d_mlp"],
    *,
    at: Float[Tensor, " d_mlp"] | None = None,
) -> RankOneEdit:
    """The smallest edit, in the metric of `C`, after which `key` returns `value`.

    With `at`, the direction is still `key`'s, but it is `at` that returns `value`: the published code's mixture of an
    averaged key and the bare prompt's, whose divisor can come near zero and break a model (Gupta et al. 2024).

    Raises:
        RankOneError: NaN or infinity anywhere, a C that is not positive definite, or a divisor of zero.
    """
    return insert(layer, W_out, b_out, direction(key, C), key if at is None else at, value)


def insert(
    layer: int,
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    u: Float[Tensor, " d_mlp"],
    at: Float[Tensor, " d_mlp"],
    value: Float[Tensor, " d_model"],
) -> RankOneEdit:
    """The edit along `u` after which the key `at` returns `value`.

    Raises:
        RankOneError: NaN or infinity anywhere, or u @ at is zero.
    """
    check_finite(W_out=W_out, b_out=b_out, value=value, at=at, u=u)
    W_out, b_out, value, at, u = (tensor.detach().cpu().double() for tensor in (W_out, b_out, value, at, u))
    divisor = float(u @ at)
    if divisor == 0:
        raise RankOneError(
            "the divisor u @ key must not be zero, but it is: "
            + ("the key is zero." if not at.any() else "the direction and the key have nothing in common.")
        )
    return RankOneEdit(layer, u, (value - (at @ W_out + b_out)) / divisor, divisor)


def solve_many(
    layer: int,
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    keys: Float[Tensor, "n d_mlp"],
    values: Float[Tensor, "n d_model"],
    C: Float[Tensor, "d_mlp d_mlp"],
) -> tuple[RankOneEdit, ...]:
    """The smallest change, in the metric of `C`, after which every key returns its value: `n` edits to be written together.

    Each edit's u @ key, its divisor, is 1 for its own key and 0 for the others.

    Raises:
        RankOneError: NaN or infinity, a C that is not positive definite, or keys that depend on each other.
    """
    return insert_many(layer, W_out, b_out, whitened(keys, factor(C)), keys, values)


def insert_many(
    layer: int,
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    along: Float[Tensor, "n d_mlp"],
    keys: Float[Tensor, "n d_mlp"],
    values: Float[Tensor, "n d_model"],
) -> tuple[RankOneEdit, ...]:
    """The edits of `solve_many` from K C^-1, `along`.

    Raises:
        RankOneError: NaN or infinity, or keys that depend on each other.
    """
    check_finite(W_out=W_out, b_out=b_out, keys=keys, value=values, along=along)
    W_out, b_out, keys, values, along = (
        tensor.detach().cpu().double() for tensor in (W_out, b_out, keys, values, along)
    )
    gram = keys @ along.T
    check_independent(gram)
    directions = torch.linalg.solve(gram, along)
    steps = values - (keys @ W_out + b_out)
    return tuple(RankOneEdit(layer, u, step) for u, step in zip(directions, steps, strict=True))


def check_independent(gram: Float[Tensor, "n n"]) -> None:
    """Raise where keys are zero or depend on each other, by their products K C^-1 K^T.

    Raises:
        RankOneError: they do, or one is zero.
    """
    if zero := (gram.diagonal() <= 0).nonzero().flatten().tolist():
        raise RankOneError(
            f"keys must not be zero where a change may be, but key {zero[0]} of {len(gram)} is; leave its fact out, or allow slack."
        )
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    condition = float(torch.linalg.cond(gram / torch.outer(scale, scale)))
    if not condition < MAX_CONDITION:
        raise RankOneError(
            f"the {len(gram)} keys must not depend on each other, but the condition of their correlations is {condition:.2g}. "
            "Edit facts with the same key one at a time, or leave one out."
        )


def check_finite(**tensors: Tensor) -> None:
    """Raise where one of them, by its name, holds NaN or infinity.

    Raises:
        RankOneError: one does.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RankOneError(
                f"{name} must be finite, but it holds NaN or infinity. Compute it again; in float16, load the model in float32."
            )


def write_(model: HookedModel, *edits: RankOneEdit) -> None:
    """Add edits to the model's `W_out`s, in place: those of a layer are summed in float64 and rounded once.

    Raises:
        ModelError: the model has no such block, the block no `W_out`, or its shape is not the edit's.
    """
    sums = {weight: total(own) for weight, own in by_weight(edits).items()}
    for weight, change in sums.items():
        weights.check_shape(model, weight, tuple(change.shape))  # of all, before any is written
    for weight, change in sums.items():
        weights.write_(model, weight, weights.value(model, weight), change)


@contextmanager
def edited(model: HookedModel, *edits: RankOneEdit) -> Iterator[None]:
    """Run the body on the edited model, then put back the exact original weights."""
    with weights.restored(model, *by_weight(edits)):
        write_(model, *edits)
        yield
