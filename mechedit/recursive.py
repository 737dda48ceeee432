"""Many edits of one layer as one least-squares problem, whatever the order in which they came.

Keys k with targets t, written one after another by the solve of `mechedit.closed_form` that counts the keys of earlier edits
(b), leave the change that one solve for all of them gives:

    D = (a C + c I + b P)^-1 b Q,    P = sum of k k^T,    Q = sum of k r^T,    r = t - (k W0 + b_out)

With slack 1/b the target is v*, which is then met as far as `a` lets. With less slack v* is met more nearly, and the target that has this as
its least-squares solution lies beyond it, by the solve's right factor f = (K M^-1 K^T + slack I)^-1 R: t is what the key returns after the write,
and f/b. A fact that was lost is met again in the same way, its target being raised by f/b (`Sums.raised`). So P and Q are all that an edit needs to know of those before it, and an edit is taken out by taking its k k^T and k r^T out of them.
Everything is float64 on the CPU. A solve costs one factor of d_mlp by d_mlp and d_model right sides, however many edits there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import rank_one
from mechedit.closed_form import ClosedFormError, Metric, Terms

__all__ = ["Sums", "check_recursive", "least_squares"]


@dataclass(frozen=True, eq=False)
class Sums:
    """P and Q of the edits so far."""

    P: Float[Tensor, "d_mlp d_mlp"] = field(repr=False)
    Q: Float[Tensor, "d_mlp d_model"] = field(repr=False)

    @classmethod
    def none(cls, d_mlp: int, d_model: int) -> Sums:
        """Of no edits."""
        return cls(torch.zeros(d_mlp, d_mlp, dtype=torch.float64), torch.zeros(d_mlp, d_model, dtype=torch.float64))

    def plus(self, keys: Float[Tensor, "n d_mlp"], residuals: Float[Tensor, "n d_model"]) -> Sums:
        """With these edits, whose residuals are to what the keys return without any edit."""
        keys, residuals = keys.detach().cpu().double(), residuals.detach().cpu().double()
        return Sums(self.P + keys.T @ keys, self.Q + keys.T @ residuals)

    def minus(self, keys: Float[Tensor, "n d_mlp"], residuals: Float[Tensor, "n d_model"]) -> Sums:
        """Without these edits, which are among them."""
        keys, residuals = keys.detach().cpu().double(), residuals.detach().cpu().double()
        return Sums(self.P - keys.T @ keys, self.Q - keys.T @ residuals)

    def raised(self, keys: Float[Tensor, "n d_mlp"], more: Float[Tensor, "n d_model"]) -> Sums:
        """With the targets of these edits, which are among them, changed by so much."""
        return Sums(self.P, self.Q + keys.detach().cpu().double().T @ more.detach().cpu().double())


def check_recursive(terms: Terms) -> None:
    """Raise unless edits with these terms, one after another, are one least-squares problem.

    Raises:
        ClosedFormError: earlier keys weigh nothing.
    """
    if not terms.b:
        raise ClosedFormError("edits are one least-squares problem where earlier keys weigh something; found b = 0.")


def least_squares(metric: Metric, sums: Sums) -> Float[Tensor, "d_mlp d_model"]:
    """D, for a metric of any earlier keys, in whose place P is; inside the null space of C where its terms have one. Of a metric whose
    earlier keys are P its factor is used.

    Raises:
        ClosedFormError: terms with which edits are no such problem.
        RankOneError: NaN or infinity, or a matrix that is not positive definite.
    """
    check_recursive(metric.terms)
    rank_one.check_finite(P=sums.P, Q=sums.Q)
    if metric.earlier is not sums.P:
        metric = metric.at(metric.terms, sums.P)
    basis, Q = metric.basis, metric.terms.b * sums.Q
    D = metric.inverse((Q if basis is None else basis.T @ Q).T).T
    return D.contiguous() if basis is None else basis @ D
