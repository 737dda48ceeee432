"""From traces to a place: the layer and token role where restoring helps most.

The rule, for one trace and for an average alike: the early site is the layer whose window of MLP outputs (or whose state, in a
trace without them) restores most at the subject's last token; the late site the layer whose window of attention outputs (or
whose state) restores most at the prompt's last token. The early site is where facts are looked up, and where ROME writes
(Meng et al. 2022, sections 2.2 and 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import nan

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import MecheditError
from mechedit.tracing import Trace, measures
from mechedit.tracing.averages import Average
from mechedit.tracing.cells import restored_blocks
from mechedit.tracing.roles import ROLES, TITLES

__all__ = ["Site", "SiteError", "early", "late"]


LEAST = 0.05  # of what the corruption takes away
SEEN = 0.0005  # what three decimals show


class SiteError(MecheditError, ValueError):
    """A trace that cannot show the site asked for."""


@dataclass(frozen=True)
class Site:
    """A layer and a token role. `p` is the measure with the site restored, averaged over facts where there are several.

    In one trace, `position` and `token` say which token it is, and `elsewhere` is where another one restores more, if any does:
    there the rule's token does not decide. In an average, `near` are all layers that these facts do not tell from the best one,
    itself among them: the interval of the paired difference reaches zero. It is empty where facts are too few for one. Of
    `facts` facts, `exceptions` are decided at another token. `clean` and `corrupted` are the measure where nothing is corrupted, and
    where nothing is restored. `window` are the layers that are restored together, around this one; of a state, that one alone.
    """

    kind: str
    layer: int
    role: str
    p: float
    position: int | None = None
    token: str | None = None
    near: tuple[int, ...] = ()
    measure: str = "P"
    elsewhere: Site | None = None
    facts: int = 1
    exceptions: int = 0
    clean: float = nan
    corrupted: float = nan
    window: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether less than a twentieth comes back there of what the corruption takes away, or it takes nothing away."""
        taken = self.clean - self.corrupted
        return taken < SEEN or self.p - self.corrupted < LEAST * taken

    def __str__(self) -> str:
        token = f" {self.token!r}" if self.token is not None else ""
        around = f" (window {self.window[0]} to {self.window[-1]})" if len(self.window) > 1 else ""
        said = f"{self.kind} at layer {self.layer}{around}, {TITLES[self.role]}{token}: {self.measure} = {self.p:.3f}"
        if self.is_empty:
            back = (
                "there is nothing to come back" if self.clean - self.corrupted < SEEN else "next to nothing comes back"
            )
            said += f", where {self.corrupted:.3f} is the corrupted run's and {self.clean:.3f} the clean one's: {back}"
        if len(self.near) > 1:
            said += f" (layers {', '.join(map(str, self.near))} are as good)"
        if self.facts > 1 and not self.near:
            said += f" ({self.facts} facts are too few to tell layers apart)"
        if self.exceptions:
            said += f"; another token decides for {self.exceptions} of {self.facts} facts"
        if self.elsewhere is not None:
            said += f"; but another token decides: {self.elsewhere}"
        return said


def early(trace: Trace | Average) -> Site:
    """Where restoring helps most at the subject's last token; where another token decides, it says so.

    That token is looked for among all but the prompt's last, which carries the answer whatever the fact is.

    Raises:
        SiteError: the trace has neither MLP outputs nor states, or no such token.
    """
    site = _best(trace, "mlp", "subject_last")
    if isinstance(trace, Average):
        return replace(site, exceptions=len(trace.exceptions) if trace.decided_by == site.kind else 0)
    here = [index for index, role in enumerate(trace.roles) if role != "last"]
    grid = trace.effects[site.kind][:, here].nan_to_num(-torch.inf)
    layer, column = divmod(int(grid.argmax()), len(here))
    if float(grid[layer, column]) <= site.p:
        return site
    place = here[column]
    there = replace(site, layer=layer, role=trace.roles[place], p=float(grid[layer, column]), position=place, token=trace.tokens[place], window=_window(trace, site.kind, layer))  # fmt: skip
    return replace(site, elsewhere=there)


def late(trace: Trace | Average) -> Site:
    """Where restoring helps most at the prompt's last token.

    Raises:
        SiteError: the trace has neither attention outputs nor states, or no such token.
    """
    return _best(trace, "attn", "last")


def _best(trace: Trace | Average, kind: str, role: str) -> Site:
    grids = _grids(trace)
    kind = kind if kind in grids else "resid"
    if kind not in grids:
        raise SiteError(
            f"a site needs a trace of kind {kind}; this one has {', '.join(grids)}. Trace again with kinds that include it."
        )
    measure = "P" if measures.of(trace.settings).share else trace.settings.measure
    if isinstance(trace, Trace):
        # a subject that ends the prompt is both
        position = trace.subject_range[1] - 1 if role == "subject_last" else len(trace.tokens) - 1
        layer, p = _highest(grids[kind][:, position], role)
        return Site(kind, layer, role, p, position, trace.tokens[position], measure=measure, clean=trace.p_clean, corrupted=trace.p_corrupted, window=_window(trace, kind, layer))  # fmt: skip
    column = ROLES.index(role)
    layer, p = _highest(grids[kind][:, column], role)
    near = (trace.behind[kind][:, column] >= 0).nonzero()[:, 0].tolist()
    return Site(kind, layer, role, p, near=tuple(near), measure=measure, facts=trace.n_role[column], clean=trace.clean.mean, corrupted=trace.corrupted.mean, window=_window(trace, kind, layer))  # fmt: skip


def _grids(trace: Trace | Average) -> dict[str, Tensor]:
    return trace.effects if isinstance(trace, Trace) else trace.restored


def _window(trace: Trace | Average, kind: str, layer: int) -> tuple[int, ...]:
    """The layers that the site's cell restores."""
    return tuple(restored_blocks(kind, layer, len(_grids(trace)[kind]), trace.settings))


def _highest(column: Float[Tensor, " layer"], role: str) -> tuple[int, float]:
    if column.isnan().all():
        raise SiteError(f"no position with the role {role} was traced. Trace again with roles that include it.")
    layer = int(column.nan_to_num(-torch.inf).argmax())
    return layer, float(column[layer])
