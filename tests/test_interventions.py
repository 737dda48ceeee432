from __future__ import annotations

import pytest
import torch

from mechedit.interventions import InterventionError, add_noise, intervened, mlp_outputs, read, restore
from tests.conftest import assert_same_state, state

TOKENS = torch.tensor([[0, 40, 50, 60], [0, 40, 50, 60]])


def run(model, *changes):
    kept = {}
    names = ("hook_embed", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    readers = [read(name, lambda activation, name=name: kept.__setitem__(name, activation.clone())) for name in names]
    with torch.no_grad(), intervened(model, *changes, *readers):
        model(TOKENS)
    return kept


def test_noise_is_added_to_the_span_and_nowhere_else(model):
    noise = torch.randn(2, 2, 32)
    change = run(model, add_noise(noise, 1))["hook_embed"] - run(model)["hook_embed"]
    torch.testing.assert_close(change[:, 1:3], noise, atol=1e-6, rtol=1e-5)
    assert not change[:, 0].any()
    assert not change[:, 3].any()


def test_a_restored_activation_is_what_was_given_at_that_position_alone(model):
    name, value = "blocks.1.hook_resid_post", torch.randn(32)
    clean, changed = run(model), run(model, restore(name, value, 2))
    torch.testing.assert_close(changed[name][:, 2], value.expand(2, -1))
    assert torch.equal(changed[name][:, :2], clean[name][:, :2])
    last = "blocks.3.hook_resid_post"
    torch.testing.assert_close(changed[last][:, :2], clean[last][:, :2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(changed[last][:, 3], clean[last][:, 3], atol=1e-3)


def test_a_row_each_can_be_restored(model):
    name, value = "blocks.1.hook_resid_post", torch.randn(2, 32)
    torch.testing.assert_close(run(model, restore(name, value, 0))[name][:, 0], value)


def test_a_misspelt_hook_is_an_error_before_anything_is_hooked(model):
    before = state(model)
    with (
        pytest.raises(InterventionError, match=r"blocks\.9\.hook_mlp_out.* no hook points"),
        intervened(model, add_noise(torch.zeros(2, 1, 32), 0), restore("blocks.9.hook_mlp_out", torch.zeros(32), 0)),
    ):
        raise AssertionError("the body must not run")
    assert_same_state(model, before)


def test_an_intervention_that_was_never_reached_is_an_error(model):
    with (
        pytest.raises(InterventionError, match=r"no forward pass reached \['blocks.3.hook_mlp_out'\]"),
        intervened(model, restore("blocks.3.hook_mlp_out", torch.zeros(32), 0)),
    ):
        model(TOKENS, stop_at_layer=2)
    with pytest.raises(InterventionError, match="MLP of block 3"), mlp_outputs(model, 3, lambda output: None):
        model(TOKENS, stop_at_layer=2)


def test_an_intervention_that_does_not_fit_is_an_error(model):
    before = state(model)
    with (
        pytest.raises(InterventionError, match="3 rows, the forward pass 2"),
        intervened(model, add_noise(torch.zeros(3, 1, 32), 0)),
    ):
        model(TOKENS)
    with (
        pytest.raises(InterventionError, match="position 7 lies beyond the 4"),
        intervened(model, restore("blocks.0.hook_resid_post", torch.zeros(32), 7)),
    ):
        model(TOKENS)
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_error_in_the_body(error, model):
    before = state(model)
    with (
        pytest.raises(error),
        intervened(model, add_noise(torch.zeros(2, 1, 32), 0)),
        mlp_outputs(model, 1, lambda output: None),
    ):
        raise error
    assert_same_state(model, before)


def test_hooks_of_the_user_stay_and_still_fire(model):
    seen = []
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: seen.append(1))
    try:
        run(model, add_noise(torch.zeros(2, 1, 32), 0))
        model(TOKENS)
        assert len(seen) == 2
    finally:
        model.reset_hooks()


def test_mlp_outputs_changes_what_W_out_writes_before_any_norm(load):
    model = load("gemma3")
    with torch.no_grad():
        plain = model(TOKENS)
        with mlp_outputs(model, 1, lambda output: output * 5):
            scaled = model(TOKENS)
    torch.testing.assert_close(plain, scaled, atol=1e-3, rtol=1e-3)  # the norm after Gemma's MLP takes any scale away
