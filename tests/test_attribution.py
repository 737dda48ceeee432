from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechedit import models
from mechedit.facts import Fact
from mechedit.settings import SettingsError, TraceSettings
from mechedit.tracing import prepare, restore, single, trace, window
from mechedit.tracing.attribution import agreement, attribution_patching, exact_cells, integrated_gradients
from mechedit.tracing.cells import RESID_POST
from tests.conftest import FACT, assert_same_state, state

SMALL = TraceSettings(draws=2, window=2)


@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3"])
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


@pytest.mark.parametrize("measure", ["p", "p_answer"])
@pytest.mark.parametrize("shape", ["gpt2", "gptj", "gemma3"])
def test_a_windows_estimate_is_the_derivative_of_restoring_all_of_it_a_little(load, fact, shape, measure):
    """Against whole forward passes in float64, with every member of the window moved by hand by the same small share."""
    model = load(shape)
    settings = replace(SMALL, window=3, measure=measure, prepend_bos=True)
    fact = replace(fact, target_true="Seattle piano")
    with torch.no_grad():  # as a user may be
        estimate = attribution_patching(model, fact, settings)
        alone = attribution_patching(model, fact, replace(settings, window=1))
    prepared = prepare(model, fact, settings)
    tokens = torch.tensor([list(prepared.ids)])
    corrupting = [("hook_embed", lambda activation, hook: prepared.corrupted.to(activation))]
    share = 1e-2  # a bridge computes norms in float32 whatever it is cast to
    with torch.no_grad(), models.cast(model, torch.float64):
        _, clean = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=corrupting):
            _, corrupted = model.run_with_cache(tokens.expand(2, -1))

        def run(kind, layers, position, by):
            def move(activation, hook):
                activation, theirs = activation.clone(), corrupted[hook.name][:, position]
                activation[:, position] = theirs + by * (clean[hook.name][0, position] - theirs)
                return activation

            hooks = [*corrupting, *((f"blocks.{layer}.hook_{kind}_out", move) for layer in layers)]
            log_p = model.run_with_hooks(tokens.expand(2, -1), fwd_hooks=hooks).log_softmax(-1)
            return sum(log_p[:, read.position, read.targets[0]] for read in prepared.reads).exp()

        for kind, layer, position in (
            ("mlp", 2, prepared.prompt.last_subject),
            ("attn", 1, len(prepared.prompt.ids) - 1),
        ):
            layers = window(layer, 3, 4)
            assert len(layers) == 3
            slope = (run(kind, layers, position, share) - run(kind, layers, position, -share)) / (2 * share)
            found = estimate[kind][layer, position]
            size = float(slope.abs().max())
            torch.testing.assert_close(found, slope.float(), atol=2e-3 * size, rtol=0)
            summed = alone[kind][list(layers), position].sum(0)
            assert (summed - found).abs().max() > 0.02 * size, "paths through later members do count"


def test_integrated_gradients_of_a_whole_answer_have_its_tokens_share(model, fact):
    fact = replace(fact, target_true="Seattle piano")
    settings = replace(SMALL, measure="p_answer")
    shares = integrated_gradients(model, fact, settings, steps=200)
    prepared = prepare(model, fact, settings)
    assert shares.shape[1] == len(prepared.ids) > len(prepared.prompt.ids)
    _, clean, corrupted = restore(model, fact, [single(RESID_POST, [0], 0)], settings)
    total = (clean - corrupted).expand(4, -1)
    torch.testing.assert_close(shares.sum(1), total, atol=1e-7, rtol=0.02)
    without = shares[:, : len(prepared.prompt.ids)].sum(1)
    assert not torch.allclose(without, total, atol=1e-7, rtol=0.05)


def test_roles_and_precision_and_another_subject_are_obeyed(load):
    model, fact = load("gpt2"), Fact("Seattle", "The city of {} is in", "Paris")
    whole = attribution_patching(model, fact, SMALL)
    chosen = replace(SMALL, roles=("subject_last", "last"))
    part, shares = attribution_patching(model, fact, chosen), integrated_gradients(model, fact, chosen)
    at = [index for index, name in enumerate(trace(model, fact, chosen).roles) if name in chosen.roles]
    for kind in SMALL.kinds:
        torch.testing.assert_close(part[kind][:, at], whole[kind][:, at])
        assert int(part[kind].isnan().any(-1).any(0).sum()) == part[kind].shape[1] - len(at)
    torch.testing.assert_close(shares[:, at], integrated_gradients(model, fact, SMALL)[:, at])
    assert int(shares.isnan().any(-1).any(0).sum()) == shares.shape[1] - len(at)
    half = attribution_patching(model, fact, replace(SMALL, precision="bfloat16"))["mlp"]
    assert not torch.equal(half, whole["mlp"])
    torch.testing.assert_close(half, whole["mlp"], atol=0.1 * float(whole["mlp"].abs().max()), rtol=0.3)
    swapped = replace(SMALL, corruption="tokens")
    assert attribution_patching(model, fact, swapped, other="London")["mlp"].shape[-1] == 1
    assert integrated_gradients(model, fact, swapped, other="London").shape[-1] == 1
    with pytest.raises(SettingsError, match="at least 1 step; found 0"):
        integrated_gradients(model, fact, SMALL, steps=0)


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
