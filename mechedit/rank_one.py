"""Store one fact in one MLP by a closed-form, rank-one change of its `W_out`.

An MLP is read as a memory: its post-activation is a `key`; `W_out` turns it into the `value` the block adds to the
residual stream. Of all changes after which `key` returns `value`, this one moves ordinary keys least (`C` is their second
moment; Meng et al. 2022, eq. 2):

    W_out += outer(u, value - (key @ W_out + b_out)) / (u @ key)          with u = C^-1 key

Several keys at once have the least change under which each returns its own value (`solve_many`):

    W_out += U^T (V - (K @ W_out + b_out))      with U = (K C^-1 K^T)^-1 K C^-1,  a row of U and of the bracket a rank-one edit

`W_out` is [d_mlp, d_model], the transpose of the paper's W. `solve` is arithmetic alone, in float64; only `write_` and
`edited` touch a model, and only its `W_out`. Nothing here sees text or runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import models
from mechedit.errors import MecheditError
from mechedit.models import HookedModel

__all__ = [
    "RankOneEdit",
    "RankOneError",
    "direction",
    "edited",
    "insert",
    "regularised",
    "solve",
    "solve_many",
    "write_",
]

MAX_CONDITION = 1e10  # of the keys' correlations; beyond, few digits are left of what solve_many finds


class RankOneError(MecheditError, ValueError):
    """An edit that cannot be solved for, or does not fit the model."""


@dataclass(frozen=True)
class RankOneEdit:
    """`W_out += outer(u, step)` in block `layer`. `divisor` is u @ key, by which the step was divided."""

    layer: int
    u: Float[Tensor, " d_mlp"] = field(repr=False)
    step: Float[Tensor, " d_model"] = field(repr=False)
    divisor: float = 1.0

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return float(self.u.double().norm() * self.step.double().norm())


def direction(key: Float[Tensor, " d_mlp"], C: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, " d_mlp"]:
    """u = C^-1 key, in float64: the rows of `W_out` that an edit for `key` changes, and by how much.

    Raises:
        RankOneError: NaN or infinity, or a C that is not positive definite.
    """
    return _whitened(key[None], C)[0]


def _whitened(keys: Float[Tensor, "n d_mlp"], C: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "n d_mlp"]:
    """K C^-1."""
    _check_finite(key=keys, C=C)
    factor, failed = torch.linalg.cholesky_ex(C.detach().cpu().double())
    if failed:
        raise RankOneError(
            f"C must be positive definite, but it is not (its first {int(failed)} rows already are not). Estimate it from more "
            "than d_mlp keys; ten times d_mlp is a good number. Or add a ridge."
        )
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
    _check_finite(W_out=W_out, b_out=b_out, value=value, at=at, u=u)
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
    whitened = _whitened(keys, C)
    _check_finite(W_out=W_out, b_out=b_out, value=values)
    W_out, b_out, keys, values = (tensor.detach().cpu().double() for tensor in (W_out, b_out, keys, values))
    gram = keys @ whitened.T
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    condition = float(torch.linalg.cond(gram / torch.outer(scale, scale)))
    if not condition < MAX_CONDITION:
        raise RankOneError(
            f"the {len(keys)} keys must not depend on each other, but the condition of their correlations is {condition:.2g}. "
            "Edit facts with the same key one at a time, or leave one out."
        )
    directions = torch.linalg.solve(gram, whitened)
    steps = values - (keys @ W_out + b_out)
    return tuple(RankOneEdit(layer, u, step) for u, step in zip(directions, steps, strict=True))


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RankOneError(
                f"{name} must be finite, but it holds NaN or infinity. Compute it again; in float16, load the model in float32."
            )


@torch.no_grad()
def write_(model: HookedModel, edit: RankOneEdit) -> None:
    """Add the edit to the model's `W_out`, in place, rounded once to the model's number format.

    Raises:
        RankOneError: the edit's shape is not that of the model's `W_out`.
        ModelError: the model has no such block, or the block no `W_out`.
    """
    W_out = models.W_out(model, edit.layer)
    if (len(edit.u), len(edit.step)) != tuple(W_out.shape):
        raise RankOneError(
            f"the edit is for a W_out of shape {[len(edit.u), len(edit.step)]}, but that of block {edit.layer} of "
            f"{model.cfg.model_name} is {list(W_out.shape)}. It was made for another model."
        )
    change = torch.outer(edit.u.cpu().double(), edit.step.cpu().double())
    wide = W_out.cpu() if W_out.is_mps else W_out  # which has no float64
    W_out.copy_(
        wide.double() + change.to(wide.device)
    )  # in place: W_out may be a view; setting W_out.data would change nothing


@contextmanager
def edited(model: HookedModel, *edits: RankOneEdit) -> Iterator[None]:
    """Run the body on the edited model, then put back the exact original weights."""
    weights = {edit.layer: models.W_out(model, edit.layer) for edit in edits}
    originals = {layer: weight.detach().clone() for layer, weight in weights.items()}
    try:
        for edit in edits:
            write_(model, edit)
        yield
    finally:
        with torch.no_grad():
            for layer, original in originals.items():
                weights[layer].copy_(original)
