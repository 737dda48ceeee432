from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import sites
from mechedit.settings import TraceSettings
from mechedit.tracing import trace
from mechedit.tracing.averages import average

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


def test_a_site_says_where_another_token_decides(model, fact):
    """As "Bron" does for LeBron James: his name's last token restores far less."""
    found = trace(model, fact, SMALL)
    begin, end = found.subject_range
    grid = torch.full_like(found.effects["mlp"], 0.1)
    grid[5 % len(grid), end - 1], grid[2, begin], grid[0, -1] = 0.27, 0.74, 0.9
    odd = replace(found, effects=found.effects | {"mlp": grid})
    early = sites.early(odd)
    assert (early.layer, early.position, early.p) == (5 % len(grid), end - 1, pytest.approx(0.27))
    assert (early.elsewhere.layer, early.elsewhere.position, early.elsewhere.p) == (2, begin, pytest.approx(0.74))
    assert str(early).endswith(
        f"P = 0.270; but another token decides: mlp at layer 2 (window 1 to 2), first subject token {found.tokens[begin]!r}: P = 0.740"
    )
    grid[5 % len(grid), end - 1] = 0.8
    assert sites.early(odd).elsewhere is None
    assert "another token" not in str(sites.early(odd))
    logs = replace(odd, settings=replace(SMALL, measure="log_p"))
    assert "log_p = 0.800" in str(sites.early(logs))


def test_a_site_where_nothing_comes_back_says_so(model, fact):
    found = replace(trace(model, fact, SMALL), p_clean=0.9, p_corrupted=0.1)
    grid = torch.full_like(found.effects["mlp"], 0.139)
    for p, empty in ((0.139, True), (0.141, False)):
        grid[:, found.subject_range[1] - 1] = p
        early = sites.early(replace(found, effects=found.effects | {"mlp": grid}))
        assert early.is_empty == empty
        assert (
            "where 0.100 is the corrupted run's and 0.900 the clean one's: next to nothing comes back" in str(early)
        ) == empty
    unknown = replace(found, p_clean=0.001, p_corrupted=0.2)
    assert sites.early(replace(unknown, effects=found.effects | {"mlp": 0 * grid + 0.15})).is_empty
    for clean, p in ((0.0, 0.0), (0.0004, 0.0003), (0.001, 0.5)):
        nothing = replace(found, p_clean=clean, p_corrupted=0.0 if clean < 0.001 else 0.2)
        early = sites.early(replace(nothing, effects=found.effects | {"mlp": 0 * grid + p}))
        assert early.is_empty
        assert str(early).endswith(f"run's and {clean:.3f} the clean one's: there is nothing to come back")


def test_a_site_names_the_layers_of_its_window_cut_at_the_edges(model, fact):
    """Four layers; windows of three reach one below and one above, and the published ones of two one below."""
    found = trace(model, fact, SMALL)
    mean = average([found, found])
    for width, at, said in ((3, 0, " (window 0 to 1)"), (3, 3, " (window 2 to 3)"), (2, 2, " (window 1 to 2)"), (2, 0, ""), (1, 2, "")):  # fmt: skip
        settings = replace(SMALL, window=width)
        grid = torch.full_like(found.effects["mlp"], 0.1)
        grid[at] = 0.8
        roles = torch.full_like(mean.restored["mlp"], 0.1)
        roles[at] = 0.8
        one = replace(found, settings=settings, effects=found.effects | {"mlp": grid, "resid": grid})
        many = replace(mean, settings=settings, restored=mean.restored | {"mlp": roles})
        for site in (sites.early(one), sites.early(many)):
            assert str(site).startswith(f"mlp at layer {at}{said}, last subject token")
        states = replace(one, effects={"resid": grid})
        assert str(sites.early(states)).startswith(f"resid at layer {at}, last")
