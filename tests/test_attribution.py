from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import models
from mechedit.facts import Fact
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import prepare, restore, single, trace
from mechedit.tracing.attribution import agreement, attribution_patching, exact_cells, integrated_gradients
from mechedit.tracing.cells import RESID_POST
from tests.conftest import FACT, SHAPES, assert_same_state, state

SMALL = TraceSettings(draws=2, window=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_integrated_gradients_add_up_to_the_total_effect_in_every_layer(shape, load):
    model = load(shape)
    before = state(model)
    shares = integrated_gradients(model, FACT, SMALL, steps=200)
    _, clean, corrupted = restore(model, FACT, [single(RESID_POST, [0], 0)], SMALL)
    total = clean - corrupted
    torch.testing.assert_close(shares.sum(1), total.expand(4, -1), atol=2e-4, rtol=0.05)
    assert shares.abs().max() > 1e-4
    assert_same_state(model, before)


def test_the_last_states_share_is_the_last_positions_alone(model, fact):
    shares = integrated_gradients(model, fact, SMALL)
    assert torch.equal(shares[-1, :-1], torch.zeros_like(shares[-1, :-1]))


@pytest.mark.parametrize("measure", ["p", "log_p", "logit_difference"])
def test_attribution_patching_is_the_derivative_of_restoring_a_little(load, fact, measure):
    """Moving one state a small way towards its clean value changes the measure by that share of the estimate."""
    model = load("gpt2")
    settings = replace(SMALL, measure=measure)
    estimate = attribution_patching(model, fact, settings)
    prepared = prepare(model, fact, settings)
    tokens = torch.tensor([list(prepared.ids)])
    _, clean = model.run_with_cache(tokens)
    share = 1e-2

    def run(layer, position, by):
        name = f"blocks.{layer}.hook_resid_post"

        def move(activation, hook):
            activation = activation.clone()
            activation[:, position] += by * (clean[name][0, position].to(activation) - activation[:, position])
            return activation

        hooks = [("hook_embed", lambda activation, hook: prepared.corrupted.to(activation)), (name, move)]
        with torch.no_grad(), models.cast(model, torch.float64):
            log_p = model.run_with_hooks(tokens.expand(2, -1), fwd_hooks=hooks)[:, -1].log_softmax(-1)
        first, *second = prepared.reads[0].targets
        if measure == "logit_difference":
            return log_p[:, first] - log_p[:, second[0]]
        return log_p[:, first] if measure == "log_p" else log_p[:, first].exp()

    for layer, position in ((0, prepared.prompt.last_subject), (1, len(prepared.ids) - 1)):
        slope = (run(layer, position, share) - run(layer, position, -share)) / (2 * share)
        torch.testing.assert_close(estimate["resid"][layer, position], slope.float(), atol=2e-4, rtol=0.05)


def test_a_windows_estimate_is_the_sum_of_its_layers(model, fact):
    single, double = (attribution_patching(model, fact, replace(SMALL, window=width)) for width in (1, 2))
    for kind in ("mlp", "attn"):
        torch.testing.assert_close(double[kind][1:], single[kind][1:] + single[kind][:-1])
        torch.testing.assert_close(double[kind][0], single[kind][0])


def test_agreement_is_a_rank_correlation_over_cells_that_both_have():
    exact = torch.tensor([[torch.nan, 1.0, 2.0, 3.0]])
    assert agreement(torch.tensor([[9.0, 0.1, 0.2, 50.0]]), exact) == pytest.approx(1.0)
    assert agreement(torch.tensor([[9.0, 3.0, 2.0, 1.0]]), exact) == pytest.approx(-1.0)


def test_cells_before_the_subject_do_not_count(model):
    found = trace(model, Fact("Paris", "The city of {} is in", "Seattle"), SMALL)
    grid = exact_cells(found, "mlp")
    begin = found.subject_range[0]
    assert grid[:, :begin].isnan().all()
    torch.testing.assert_close(grid[:, begin:], found.effects["mlp"][:, begin:] - found.p_corrupted)


def test_attribution_knows_no_components_of_ones_own(model, fact):
    with pytest.raises(SettingsError, match="attribution knows the kinds"):
        attribution_patching(model, fact, replace(SMALL, kinds=("queries",)))
