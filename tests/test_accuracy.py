from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import trace
from mechedit.tracing.accuracy import is_exact, sample_error
from mechedit.tracing.attribution import attribution_patching
from tests.conftest import FACT, SHAPES, assert_same_state, state

SMALL = TraceSettings(window=2)


def test_what_is_exact():
    assert is_exact(SMALL)
    assert is_exact(replace(SMALL, draws=30))
    assert is_exact(replace(SMALL, draws=1, corruption="tokens"))
    assert not is_exact(replace(SMALL, draws=3))
    assert not is_exact(replace(SMALL, precision="bfloat16"))


def test_the_error_of_fewer_draws_is_that_against_ten(model, fact):
    few, ten = trace(model, fact, replace(SMALL, draws=2)), trace(model, fact, SMALL)
    begin = few.subject_range[0]
    errors = torch.stack([(few.effects[kind] - ten.effects[kind])[:, begin:] for kind in SMALL.kinds])
    found = sample_error(model, fact, replace(SMALL, draws=2), cells=10_000)
    assert found.cells == errors.numel()
    assert found.largest == pytest.approx(float(errors.abs().max()), abs=1e-6)
    assert found.mean == pytest.approx(float(errors.abs().mean()), abs=1e-6)
    assert found.bias == pytest.approx(float(errors.mean()), abs=1e-6)
    part = sample_error(model, fact, replace(SMALL, draws=2), cells=5)
    assert part.cells == 5
    assert 0 < part.largest <= found.largest + 1e-7
    assert "on 5 cells: largest error" in str(part)
    behind = replace(fact, template=f"Today {fact.template}")
    assert sample_error(model, behind, replace(SMALL, draws=2, roles=("before",))).cells > 0, (
        "though nothing is there that noise reaches"
    )
    with pytest.raises(SettingsError, match="cells must be at least 1"):
        sample_error(model, fact, SMALL, cells=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_near_and_puts_every_weight_back(shape, load):
    model = load(shape)
    before = state(model)
    half, exact = (trace(model, FACT, replace(SMALL, draws=3, precision=each)) for each in ("bfloat16", "model"))
    assert_same_state(model, before)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for kind in SMALL.kinds:
        assert half.effects[kind].dtype == torch.float32
        assert not torch.equal(half.draws[kind], exact.draws[kind])
        torch.testing.assert_close(half.effects[kind], exact.effects[kind], atol=0.02, rtol=0.3)


def test_an_interrupted_cast_puts_every_weight_back(model, fact):
    def interrupt(what, done, of):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, fact, replace(SMALL, precision="bfloat16"), progress=interrupt)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.cfg.dtype == torch.float32


def test_the_error_of_attribution_patching_is_against_the_same_cells(model, fact):
    found = sample_error(model, fact, SMALL, cells=10_000, attribution=True)
    exact = trace(model, fact, SMALL)
    estimate = attribution_patching(model, fact, SMALL)
    begin = exact.subject_range[0]
    errors = torch.stack(
        [(estimate[kind].mean(-1) + exact.p_corrupted - exact.effects[kind])[:, begin:] for kind in SMALL.kinds]
    )
    assert found.largest == pytest.approx(float(errors.abs().max()), abs=1e-6)
