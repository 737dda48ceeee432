from __future__ import annotations

from dataclasses import replace

import pytest

from mechedit import sites
from mechedit.settings import TraceSettings
from mechedit.tracing import trace

SMALL = TraceSettings(draws=3, window=2)


def test_sites_are_where_restoring_helps_most(model, fact):
    found = trace(model, fact, SMALL)
    early, late = sites.early(found), sites.late(found)
    assert early.p == float(found.effects["mlp"][:, found.subject_range[1] - 1].max())
    assert (early.kind, early.role) == ("mlp", "subject_last")
    assert late.p == float(found.effects["attn"][:, -1].max())
    assert str(late.layer) in str(late)
    only = trace(model, fact, replace(SMALL, kinds=("resid",)))
    assert sites.early(only).kind == sites.late(only).kind == "resid"


def test_sites_need_a_kind_that_was_traced(model, fact):
    with pytest.raises(sites.SiteError, match="needs a trace of kind resid; this one has mlp"):
        sites.late(trace(model, fact, replace(SMALL, kinds=("mlp",))))
