"""From a trace to a place: the layer and token where restoring helps most."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.tracing import Trace

__all__ = ["Site", "early", "late"]


@dataclass(frozen=True)
class Site:
    """A layer and a token: `role` says which token that is, `p` is P(answer) with the site restored."""

    kind: str
    layer: int
    position: int
    role: str
    token: str
    p: float

    def __str__(self) -> str:
        return f"{self.kind} at layer {self.layer}, {self.role} {self.token!r}: P = {self.p:.3f}"


def early(trace: Trace) -> Site:
    """The layer whose window of MLP outputs (or whose state, in a trace without them) helps most at the subject's last token.

    This is where facts are looked up, and where ROME writes (Meng et al. 2022, sections 2.2 and 3.1).
    """
    return _best(trace, "mlp" if "mlp" in trace.effects else "resid", trace.subject_range[1] - 1, "last subject token")


def late(trace: Trace) -> Site:
    """The layer whose window of attention outputs (or whose state) helps most at the prompt's last token."""
    return _best(trace, "attn" if "attn" in trace.effects else "resid", len(trace.tokens) - 1, "last token")


def _best(trace: Trace, kind: str, position: int, role: str) -> Site:
    if kind not in trace.effects:
        raise ValueError(
            f"a site needs a trace of kind {kind}; this one has {', '.join(trace.effects)}. Trace again with kinds that include it."
        )
    column = trace.effects[kind][:, position]
    layer = int(column.argmax())
    return Site(kind, layer, position, role, trace.tokens[position], float(column[layer]))
