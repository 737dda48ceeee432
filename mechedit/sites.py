"""From traces to a place: the layer and token role where restoring helps most.

The rule, for one trace and for an average alike: the early site is the layer whose window of MLP outputs (or whose state, in a
trace without them) restores most at the subject's last token; the late site the layer whose window of attention outputs (or
whose state) restores most at the prompt's last token. The early site is where facts are looked up, and where ROME writes
(Meng et al. 2022, sections 2.2 and 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import MecheditError
from mechedit.tracing import Trace
from mechedit.tracing.averages import Average
from mechedit.tracing.roles import ROLES, TITLES

__all__ = ["Site", "SiteError", "early", "late"]


class SiteError(MecheditError, ValueError):
    """A trace that cannot show the site asked for."""


@dataclass(frozen=True)
class Site:
    """A layer and a token role. `p` is the measure with the site restored, averaged over facts where there are several.

    In one trace, `position` and `token` say which token it is. In an average, `near` are all layers whose interval reaches
    the best layer's mean, the best one among them: the sample does not tell them apart.
    """

    kind: str
    layer: int
    role: str
    p: float
    position: int | None = None
    token: str | None = None
    near: tuple[int, ...] = ()

    def __str__(self) -> str:
        token = f" {self.token!r}" if self.token is not None else ""
        near = f" (layers {', '.join(map(str, self.near))} are as good)" if len(self.near) > 1 else ""
        return f"{self.kind} at layer {self.layer}, {TITLES[self.role]}{token}: P = {self.p:.3f}{near}"


def early(trace: Trace | Average) -> Site:
    """Where restoring helps most at the subject's last token.

    Raises:
        SiteError: the trace has neither MLP outputs nor states, or no such token.
    """
    return _best(trace, "mlp", "subject_last")


def late(trace: Trace | Average) -> Site:
    """Where restoring helps most at the prompt's last token.

    Raises:
        SiteError: the trace has neither attention outputs nor states, or no such token.
    """
    return _best(trace, "attn", "last")


def _best(trace: Trace | Average, kind: str, role: str) -> Site:
    grids = trace.effects if isinstance(trace, Trace) else trace.restored
    kind = kind if kind in grids else "resid"
    if kind not in grids:
        raise SiteError(
            f"a site needs a trace of kind {kind}; this one has {', '.join(grids)}. Trace again with kinds that include it."
        )
    if isinstance(trace, Trace):
        # a subject that ends the prompt is both
        position = trace.subject_range[1] - 1 if role == "subject_last" else len(trace.tokens) - 1
        layer, p = _highest(grids[kind][:, position], role)
        return Site(kind, layer, role, p, position, trace.tokens[position])
    column = ROLES.index(role)
    layer, p = _highest(grids[kind][:, column], role)
    reach = trace.high[kind][:, column] >= trace.indirect[kind][layer, column]
    reach[layer] = True  # which has no interval where facts are few
    return Site(kind, layer, role, p, near=tuple(reach.nonzero()[:, 0].tolist()))


def _highest(column: Float[Tensor, " layer"], role: str) -> tuple[int, float]:
    if column.isnan().all():
        raise SiteError(f"no position with the role {role} was traced. Trace again with roles that include it.")
    layer = int(column.nan_to_num(-torch.inf).argmax())
    return layer, float(column[layer])
