"""Many facts at one layer, by one solve whose terms are named.

A change D of `W_out` [d_mlp, d_model] should add the residuals R to what the keys K return, and move little of the rest:

    minimise  |K D - R|^2 / slack + tr(D^T M D),    M = a C + b P + c I,    P = the sum of k k^T over the keys of earlier edits

    D = A^T (K A^T + slack I)^-1 R,                 A = K M^-1

Without slack the residuals are met exactly. Inside the null space of C, D has no part along the directions in which ordinary
keys are large: all of the above is then done in coordinates of that space. The published editors are rows of one table, `METHODS`:

    method      a       b  c   slack  null space   source
    memit       lambda  0  0   1                   Meng et al. 2023
    memit-seq   lambda  1  0   1                   the same, with the keys of earlier edits
    encore      lambda  1  c   1                   Gupta et al. 2025
    emmet       1       0  0   0                   Gupta et al. 2024 (as published 0.1, for more facts than one)
    alphaedit   0       1  10  1      0.02         Fang et al. 2025
    rome        1       0  0   0                   Meng et al. 2022: emmet with one fact

With the values of all edits given, `memit-seq` is recursive least squares: after any number of batches W is what one solve of all facts
at once gives. Everything is float64 on the CPU; a solve of n facts costs n d_mlp^2 beside the factor of M, d_mlp^3 / 3.

When few facts are added to many, the factor is not made anew (`Metric.plus`): L'L'^T = LL^T + b K^T K by reflections of blocks of columns,
about 4 n d_mlp^2 however many edits there were. Reflections lose no digits to speak of, and what is lost is measured: each solve looks how
well M times its solution is the keys, corrects it by that once, and makes the factor anew where it is off by more than `DRIFT`. In a
sequence `Metric.at` goes from one edit's M to the next one's: the eigenvectors of C are found once.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import log
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit import rank_one
from mechedit.changes import Change, Dense, LowRank
from mechedit.errors import MecheditError
from mechedit.weights import Weight

__all__ = ["METHODS", "ClosedFormError", "Metric", "Terms", "bounded", "least_spectrum", "sparsest", "updated"]

FEW = 16  # times as many numbers as keys a key has, where an update costs less than a new factor (measured at d_mlp 768 and 2048)
BLOCK = 32  # columns of a factor that are updated at once, at least
DRIFT = 1e-9  # how far M times a solution may be from the keys, beside them, before an updated factor is made anew


class ClosedFormError(MecheditError, ValueError):
    """Terms that cannot be, or facts that they give no change for."""


@dataclass(frozen=True)
class Terms:
    """What a change is weighed by. `a` weighs C, `b` the keys of earlier edits, `c` the identity; `slack` is 0 where residuals must be met;
    `loose` is more slack, in means of k M^-1 k over the keys that are written, so that it means the same whatever weighs a change; `null` is the
    eigenvalue of C below which directions belong to its null space, where the change is to stay.

    Raises:
        ClosedFormError: a negative number, or nothing that a change would be weighed by.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    slack: float = 1.0
    null: float | None = None
    loose: float = 0.0

    def __post_init__(self) -> None:
        for name in ("a", "b", "c", "slack", "loose"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ClosedFormError(f"{name} must be 0 or more; found {getattr(self, name)}.")
        if self.a == self.c == 0:
            raise ClosedFormError("a or c must be above 0, as nothing else weighs every direction; both are 0.")
        if self.null is not None and not self.null > 0:
            raise ClosedFormError(f"null must be above 0, an eigenvalue of C; found {self.null}.")


METHODS: Mapping[str, Terms] = MappingProxyType(
    {
        "rome": Terms(slack=0.0),
        "emmet": Terms(slack=0.0),
        "memit": Terms(a=15000.0),
        "memit-seq": Terms(a=15000.0, b=1.0),
        "encore": Terms(a=15000.0, b=1.0, c=10.0),
        "alphaedit": Terms(a=0.0, b=1.0, c=10.0, null=0.02),
    }
)
"""Published editors as terms, with the constants that were published for models of GPT-J's size."""


@dataclass(frozen=True, eq=False)
class Metric:
    """M of a layer, whose cubic work is done once: C, and `earlier`, the sum of k k^T over the keys of earlier edits.

    Raises:
        ClosedFormError: `earlier` is not of C's shape, or no direction is in the null space.
        RankOneError: NaN or infinity, or a C that is not symmetric; when the factor is made, an M that is not positive definite.
    """

    terms: Terms
    C: Float[Tensor, "d_mlp d_mlp"] = field(repr=False)
    earlier: Float[Tensor, "d_mlp d_mlp"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rank_one.check_symmetric(self.C)
        self._check_earlier()

    def _check_earlier(self) -> None:
        if self.earlier is not None and self.earlier.shape != self.C.shape:
            raise ClosedFormError(
                f"earlier must be a sum of k k^T of C's shape, {list(self.C.shape)}; it is {list(self.earlier.shape)}."
            )

    @cached_property
    def basis(self) -> Float[Tensor, "d_mlp rank"] | None:
        """Orthonormal directions of C's null space; none where changes may go anywhere."""
        if self.terms.null is None:
            return None
        values, vectors = torch.linalg.eigh(self.C.detach().cpu().double())
        if not bool((values < self.terms.null).any()):
            raise ClosedFormError(
                f"C must have directions whose eigenvalue is below null, {self.terms.null:g}; its smallest is {float(values[0]):.3g}. "
                "Raise null, or leave it out."
            )
        return vectors[:, values < self.terms.null]

    @cached_property
    def factor(self) -> Float[Tensor, "rank rank"]:
        """The Cholesky factor of M, in the null space's coordinates where there is one."""
        M = self._weighed()
        if self.basis is not None:
            M = self.basis.T @ M @ self.basis
            M = (M + M.T) / 2
        return rank_one.factor(M + self.terms.c * torch.eye(len(M), dtype=M.dtype))

    def _weighed(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """M without the identity."""
        M = self.terms.a * self.C.detach().cpu().double()
        if self.terms.b and self.earlier is not None:
            M = M + self.terms.b * self.earlier.detach().cpu().double()
        return M

    def at(
        self,
        terms: Terms,
        earlier: Float[Tensor, "d_mlp d_mlp"] | None,
        factor: Float[Tensor, "rank rank"] | None = None,
    ) -> Metric:
        """M of the same C by other terms or with other earlier keys. Of the same null space the basis is this one's, and of the same M the
        factor too, unless it was updated: then it is to be given (`factor`), so that it does not depend on what was computed before.

        Raises:
            ClosedFormError: `earlier` is not of C's shape.
        """
        found = copy(self)
        own = vars(found)
        own.update(terms=terms, earlier=earlier)
        found._check_earlier()
        if terms.null != self.terms.null:
            own.pop("basis", None)
        if self.is_updated or not self._is(terms, earlier):
            own.pop("factor", None)
        own["is_updated"] = factor is not None
        if factor is not None:
            own["factor"] = factor
        return found

    def _is(self, terms: Terms, earlier: Float[Tensor, "d_mlp d_mlp"] | None) -> bool:
        """Whether M by these terms and keys is this one."""
        mine, other = ((each.a, each.b, each.c, each.null) for each in (self.terms, terms))
        if mine != other or not terms.b or earlier is self.earlier:
            return mine == other
        return earlier is not None and self.earlier is not None and torch.equal(earlier, self.earlier)

    def plus(self, keys: Float[Tensor, "n d_mlp"], earlier: Float[Tensor, "d_mlp d_mlp"] | None = None) -> Metric:
        """After an edit that wrote these keys: they are among the earlier ones, whose sum with them may be given. Of few keys the factor is
        this one's, updated.

        Raises:
            RankOneError: NaN or infinity.
        """
        rank_one.check_finite(keys=keys)
        keys = keys.detach().cpu().double()
        if earlier is None:
            earlier = keys.T @ keys if self.earlier is None else self.earlier.detach().cpu().double() + keys.T @ keys
        own = keys if self.basis is None else keys @ self.basis
        is_few = self.terms.b and FEW * len(own) <= own.shape[1]
        return self.at(self.terms, earlier, updated(self.factor, self.terms.b**0.5 * own) if is_few else None)

    @cached_property
    def is_updated(self) -> bool:
        """Whether the factor was brought here from that of fewer keys."""
        return False

    def inverse(self, own: Float[Tensor, "n rank"]) -> Float[Tensor, "n rank"]:
        """The rows times M^-1, in the null space's coordinates where there is one.

        Raises:
            RankOneError: NaN or infinity, or an M that is not positive definite.
        """
        along = rank_one.whitened(own, self.factor)
        if not self.is_updated:
            return along
        off = own - self._times(along)
        if not float(off.norm()) <= DRIFT * float(own.norm()):
            vars(self).pop("factor")
            vars(self)["is_updated"] = False
            return rank_one.whitened(own, self.factor)
        return along + rank_one.whitened(off, self.factor)

    def reach(self, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_mlp"]:
        """K M^-1, in the null space where there is one: by how much what a target of each key asks for changes `W_out`, row by row."""
        own = keys.detach().cpu().double()
        if self.basis is None:
            return self.inverse(own)
        return self.inverse(own @ self.basis) @ self.basis.T

    def _times(self, along: Float[Tensor, "n rank"]) -> Float[Tensor, "n rank"]:
        """The rows times M, without M."""
        whole = along if self.basis is None else along @ self.basis.T
        again = self.terms.a * (whole @ self.C.detach().cpu().double()) if self.terms.a else torch.zeros_like(whole)
        if self.terms.b and self.earlier is not None:
            again = again + self.terms.b * (whole @ self.earlier.detach().cpu().double())
        return (again if self.basis is None else again @ self.basis) + self.terms.c * along

    @property
    def rank(self) -> int:
        """How many directions a change may have: those of the null space, else all."""
        return len(self.C) if self.basis is None else self.basis.shape[1]

    def survives(self, keys: Float[Tensor, "n d_mlp"]) -> Float[Tensor, " n"]:
        """The share of each key's square that lies where a change may be; 1 without a null space."""
        keys = keys.detach().cpu().double()
        if self.basis is None:
            return torch.ones(len(keys), dtype=keys.dtype)
        return (keys @ self.basis).square().sum(1) / keys.square().sum(1)

    def solve(self, layer: int, keys: Float[Tensor, "n d_mlp"], residuals: Float[Tensor, "n d_model"]) -> LowRank:
        """The change D of the layer's `W_out`, as factors of rank n.

        Raises:
            RankOneError: NaN or infinity, an M that is not positive definite; without slack, keys that are zero or depend on each other.
            ClosedFormError: keys that are not of C's width, or not one for each residual.
        """
        if keys.shape != (len(residuals), len(self.C)):
            raise ClosedFormError(
                f"keys must be one of {len(self.C)} numbers, as wide as C, for each of the {len(residuals)} residuals; they are {list(keys.shape)}."
            )
        rank_one.check_finite(keys=keys, residuals=residuals)
        keys, residuals = keys.detach().cpu().double(), residuals.detach().cpu().double()
        own = keys if self.basis is None else keys @ self.basis
        along = self.inverse(own)
        gram = own @ along.T
        slack = self.terms.slack + self.terms.loose * float(gram.diagonal().mean())
        if not slack:
            rank_one.check_independent(gram)
        system = gram + slack * torch.eye(len(gram), dtype=gram.dtype)
        along = along if self.basis is None else along @ self.basis.T
        right = torch.linalg.solve((system + system.T) / 2, residuals)
        # laid out as a file has them, one row too, so that sums over them come out alike to the last bit
        along, right = (each.clone(memory_format=torch.contiguous_format) for each in (along, right))
        return LowRank(Weight(layer, "mlp.W_out"), along, right)


def updated(factor: Float[Tensor, "d d"], keys: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """The lower Cholesky factor of L L^T + K^T K, in float64.

    [L K^T] times any rotation Q has the same square. Of each block of columns Q is the one that makes K^T's part of its rows zero.
    """
    L, V = factor.clone(), keys.double().T.clone()
    d, n = V.shape
    width = max(n, BLOCK)
    for begin in range(0, d, width):
        end = min(begin + width, d)
        own = slice(begin, end)
        Q, R = torch.linalg.qr(torch.cat([L[own, own], V[own]], 1).T, mode="complete")
        signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)  # so that the factor's diagonal is above zero
        L[own, own] = R[: end - begin].T * signs
        below = torch.cat([L[end:, own], V[end:]], 1) @ Q
        L[end:, own], V[end:] = below[:, : end - begin] * signs, below[:, end - begin :]
    return L


def bounded(change: Change, norm: float) -> Change:
    """The change, no longer than `norm` (Frobenius).

    Raises:
        ClosedFormError: a norm that is not above 0.
    """
    if not norm > 0:
        raise ClosedFormError(f"norm must be above 0; found {norm}.")
    length = change.norm
    share = min(1.0, norm / length) if length else 1.0
    factors = change.factors()
    if factors is None:
        return Dense(change.weight, share * change.dense())
    return LowRank(change.weight, factors[0], share * factors[1])


def sparsest(
    delta: Float[Tensor, "d_mlp d_model"], W_out: Float[Tensor, "d_mlp d_model"], share: float
) -> Float[Tensor, "d_mlp d_model"]:
    """RECT (Gu et al. 2024): the change's entries that are, beside the weight's own, among the largest `share`; the others are zero.

    Raises:
        ClosedFormError: a share that is not above 0 and 1 at most.
    """
    if not 0 < share <= 1:
        raise ClosedFormError(f"share must be above 0, and 1 at most; found {share}.")
    beside = (delta.double() / W_out.double()).abs().nan_to_num(nan=0.0)
    kept = beside.flatten().topk(max(1, round(share * delta.numel()))).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[kept] = True
    return torch.where(mask.view_as(delta), delta, 0)


def least_spectrum(
    delta: Float[Tensor, "d_mlp d_model"], W_out: Float[Tensor, "d_mlp d_model"], base: float = 1.2
) -> Float[Tensor, "d_mlp d_model"]:
    """PRUNE (Ma et al. 2025): singular values s of a total change above the largest of the unedited weight, m, become
    log(s) - log(m) + m, logarithms to `base`.

    Raises:
        ClosedFormError: a base that is not above 1.
    """
    if not base > 1:
        raise ClosedFormError(f"base must be above 1; found {base}.")
    U, s, V = torch.linalg.svd(delta.double(), full_matrices=False)
    m = torch.linalg.matrix_norm(W_out.double(), 2)
    lower = torch.where(s > m, (s.log() - m.log()) / log(base) + m, s)
    return ((U * lower) @ V).to(delta)
