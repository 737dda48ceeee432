"""Store one fact in one MLP by a closed-form, rank-one change of its `W_out`.

An MLP is read as a memory: its post-activation is a `key`; `W_out` turns it into the `value` the block adds to the
residual stream. Of all changes after which `key` returns `value`, this one moves ordinary keys least (`C` is their second
moment; Meng et al. 2022, eq. 2):

    W_out += outer(u, value - (key @ W_out + b_out)) / (u @ key)          with u = C^-1 key

`W_out` is [d_mlp, d_model], the transpose of the paper's W. `solve` is arithmetic alone, in float64; only `write_` and
`edited` touch a model, and only its `W_out`. Nothing here sees text or runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import models
from mechedit.errors import MecheditError
from mechedit.models import HookedModel

__all__ = ["RankOneEdit", "RankOneError", "direction", "edited", "solve", "write_"]


class RankOneError(MecheditError, ValueError):
    """An edit that cannot be solved for, or does not fit the model."""


@dataclass(frozen=True)
class RankOneEdit:
    """`W_out += outer(u, step)` in block `layer`. `divisor` is u @ key, by which the step was divided."""

    layer: int
    u: Float[Tensor, " d_mlp"]
    step: Float[Tensor, " d_model"]
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
    _check_finite(key=key, C=C)
    factor, failed = torch.linalg.cholesky_ex(C.detach().cpu().double())
    if failed:
        raise RankOneError(
            f"C must be positive definite, but it is not (its first {int(failed)} rows already are not). Estimate it from more "
            "than d_mlp keys; ten times d_mlp is a good number."
        )
    return torch.cholesky_solve(key.detach().cpu().double()[:, None], factor)[:, 0]


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
        RankOneError: NaN or infinity anywhere, a C that is not positive definite, or a divisor that is not positive.
    """
    u = direction(key, C)
    at = key if at is None else at
    _check_finite(W_out=W_out, b_out=b_out, value=value, at=at)
    W_out, b_out, value, at = (tensor.detach().cpu().double() for tensor in (W_out, b_out, value, at))
    divisor = float(u @ at)
    if divisor <= 0:
        raise RankOneError(
            f"the divisor u @ key must be positive, but it is {divisor:.3g}: "
            + (
                "the key is zero."
                if not key.any()
                else "the two keys of the published policy disagree. Use the averaged key for both."
            )
        )
    return RankOneEdit(layer, u, (value - (at @ W_out + b_out)) / divisor, divisor)


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
    change = torch.outer(edit.u.double(), edit.step.double()).to(W_out.device)
    W_out.copy_(W_out.double() + change)  # in place: W_out may be a view, and setting W_out.data would change nothing


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
