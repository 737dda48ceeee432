"""The theorems of the closed form, each with its control."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from mechedit import models, rank_one
from mechedit.models import ModelError
from mechedit.rank_one import RankOneEdit, RankOneError
from tests.conftest import assert_same_state, state

LAYER = 2


@pytest.fixture
def problem(model):
    generator = torch.Generator().manual_seed(0)
    d_mlp, d_model = models.W_out(model, LAYER).shape
    keys = torch.randn(8 * d_mlp, d_mlp, generator=generator, dtype=torch.float64)
    C = (keys * torch.linspace(0.2, 2.0, d_mlp)).T @ (keys * torch.linspace(0.2, 2.0, d_mlp)) / len(keys)
    return torch.randn(d_mlp, generator=generator), torch.randn(d_model, generator=generator), C


def solve(model, problem, **options):
    key, value, C = problem
    return rank_one.solve(LAYER, models.W_out(model, LAYER), models.b_out(model, LAYER), key, value, C, **options)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_key_returns_the_value_after_the_write(shape, load):
    model = load(shape)
    before = state(model)
    weight, bias = models.W_out(model, LAYER), models.b_out(model, LAYER)
    key, value = torch.randn(weight.shape[0]), torch.randn(weight.shape[1])
    edit = rank_one.solve(LAYER, weight, bias, key, value, torch.eye(weight.shape[0], dtype=torch.float64))
    assert not torch.allclose(key @ weight + bias, value, atol=1e-2)
    with rank_one.edited(model, edit):
        torch.testing.assert_close(key @ models.W_out(model, LAYER) + bias, value, atol=1e-4, rtol=1e-4)
    assert_same_state(model, before)


def test_keys_orthogonal_under_C_keep_their_values(model, problem):
    key, _, _ = problem
    edit = solve(model, problem)
    other = torch.randn(len(key), dtype=torch.float64)
    other = (other - key.double() * (other @ edit.u) / (key.double() @ edit.u)).float()  # now other @ C^-1 @ key = 0
    before, key_before = other @ models.W_out(model, LAYER), key @ models.W_out(model, LAYER)
    with rank_one.edited(model, edit):
        torch.testing.assert_close(other @ models.W_out(model, LAYER), before, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(key @ models.W_out(model, LAYER), key_before, atol=1e-2)


def test_no_other_update_that_meets_the_constraint_moves_ordinary_keys_less(model, problem):
    """Against generic constrained least squares: min |L^T D|^2 with key @ D = r and C = L L^T, column by column, by its KKT system."""
    key, value, C = problem
    d_mlp = len(key)
    residual = (
        value.double()
        - (key.double() @ models.W_out(model, LAYER).detach().double() + models.b_out(model, LAYER).double())
    ).numpy()
    system = torch.zeros(d_mlp + 1, d_mlp + 1, dtype=torch.float64)
    system[:d_mlp, :d_mlp] = 2 * C
    system[d_mlp, :d_mlp] = system[:d_mlp, d_mlp] = key.double()
    right = torch.zeros(d_mlp + 1, len(value), dtype=torch.float64)
    right[d_mlp] = torch.from_numpy(residual)
    best = torch.from_numpy(scipy.linalg.solve(system.numpy(), right.numpy()))[:d_mlp]
    edit = solve(model, problem)
    ours = torch.outer(edit.u, edit.step)
    torch.testing.assert_close(ours, best, atol=1e-9, rtol=1e-7)
    cost = lambda change: float(torch.einsum("kd,kl,ld->", change, C, change))  # noqa: E731
    for _ in range(5):
        other = torch.randn(d_mlp, len(value), dtype=torch.float64)
        other -= torch.outer(key.double(), key.double() @ other) / (key.double() @ key.double())  # keeps the constraint
        assert cost(ours + 0.01 * other) > cost(ours)


def test_a_zero_edit_changes_nothing(model, problem):
    key, _, C = problem
    value = key.double() @ models.W_out(model, LAYER).detach().double() + models.b_out(model, LAYER).double()
    assert solve(model, (key, value, C)).norm < 1e-10
    before = state(model)
    with rank_one.edited(model, RankOneEdit(LAYER, torch.zeros(128), torch.zeros(32))):
        assert_same_state(model, before)


def test_the_divisor_is_the_keys_length_under_C_inverse(model, problem):
    key, _, C = problem
    expected = float(key.double() @ torch.linalg.inv(C) @ key.double())
    assert solve(model, problem).divisor == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(C @ rank_one.direction(key, C), key.double(), atol=1e-9, rtol=1e-9)


def test_with_at_that_key_returns_the_value_and_the_direction_is_the_first_keys(model, problem):
    key, value, _ = problem
    at = key + 0.1 * torch.randn(len(key))
    edit = solve(model, problem, at=at)
    torch.testing.assert_close(edit.u, solve(model, problem).u)
    with rank_one.edited(model, edit):
        torch.testing.assert_close(
            at @ models.W_out(model, LAYER) + models.b_out(model, LAYER), value, atol=1e-4, rtol=1e-4
        )


def test_the_norm_is_the_frobenius_norm_of_the_change(model, problem):
    edit = solve(model, problem)
    assert edit.norm == pytest.approx(float(torch.outer(edit.u, edit.step).norm()), rel=1e-9)


def test_edits_of_one_layer_add_up_and_all_is_put_back(model, problem):
    before = state(model)
    original = models.W_out(model, LAYER).detach().clone()
    first, second = solve(model, problem), RankOneEdit(LAYER, torch.randn(128), torch.randn(32))
    with rank_one.edited(model, first, second):
        expected = original + torch.outer(first.u, first.step).float() + torch.outer(second.u, second.step)
        torch.testing.assert_close(models.W_out(model, LAYER).detach(), expected, atol=1e-4, rtol=1e-4)
    assert_same_state(model, before)


def test_edits_of_one_layer_are_summed_before_they_are_rounded(model, problem):
    """Two that take each other back leave the weight as it was, however large they are."""
    edit = solve(model, problem)
    large = RankOneEdit(LAYER, edit.u, 1e6 * edit.step)
    before = models.W_out(model, LAYER).detach().clone()
    with rank_one.edited(model, large, large.negated(), edit):
        expected = (before.double() + torch.outer(edit.u, edit.step)).float()
        torch.testing.assert_close(models.W_out(model, LAYER).detach(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_original_weights_come_back_bit_for_bit_after_an_error(error, model, problem):
    before = state(model)
    with pytest.raises(error), rank_one.edited(model, solve(model, problem)):
        raise error
    assert_same_state(model, before)


def test_a_C_that_cannot_be_inverted_is_an_error(model, problem):
    key, value, _ = problem
    few = torch.randn(20, len(key), dtype=torch.float64)
    with pytest.raises(RankOneError, match="positive definite.*more than d_mlp keys"):
        solve(model, (key, value, few.T @ few - 1e-9 * torch.eye(len(key))))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_errors(which, bad, model, problem):
    spoilt = [tensor.clone() for tensor in problem]
    spoilt[which].view(-1)[3] = bad
    with pytest.raises(RankOneError, match=f"{('key', 'value', 'C')[which]} must be finite"):
        solve(model, tuple(spoilt))


def test_a_divisor_of_zero_is_an_error(model, problem):
    key, value, C = problem
    with pytest.raises(RankOneError, match="the key is zero"):
        solve(model, (torch.zeros_like(key), value, C))
    u, across = torch.eye(len(key), dtype=torch.float64)[:2]
    weight, bias = models.W_out(model, LAYER), models.b_out(model, LAYER)
    with pytest.raises(RankOneError, match="nothing in common"):
        rank_one.insert(LAYER, weight, bias, u, across, value)
    assert solve(model, problem, at=-key).divisor < 0, "guards judge it, so that it can be looked at"


def test_an_edit_of_another_shape_or_layer_is_refused_and_nothing_is_written(model):
    before = state(model)
    with pytest.raises(ModelError, match=r"shape \[5, 32\].* is \[128, 32\].*another model"):
        rank_one.write_(model, RankOneEdit(LAYER, torch.ones(5), torch.ones(32)))
    with (
        pytest.raises(ModelError, match="from 0 to 3"),
        rank_one.edited(model, RankOneEdit(9, torch.ones(128), torch.ones(32))),
    ):
        raise AssertionError("the body must not run")
    assert_same_state(model, before)


def test_a_factor_of_C_serves_any_number_of_keys(model, problem):
    key, value, C = problem
    L = rank_one.factor(C)
    torch.testing.assert_close(L @ L.T, C, atol=1e-12, rtol=1e-10)
    assert not L.triu(1).any()
    others = torch.stack([key, torch.randn(len(key)), torch.ones(len(key))])
    torch.testing.assert_close(
        rank_one.whitened(others, L), others.double() @ torch.linalg.inv(C), atol=1e-8, rtol=1e-7
    )
    weight, bias = models.W_out(model, LAYER), models.b_out(model, LAYER)
    inserted = rank_one.insert(LAYER, weight, bias, rank_one.whitened(key[None], L)[0], key, value)
    assert torch.equal(inserted.step, solve(model, problem).step)


# --- several keys at once ---------------------------------------------------------------------------------------------


def many(model, problem, keys, values):
    return rank_one.solve_many(LAYER, models.W_out(model, LAYER), models.b_out(model, LAYER), keys, values, problem[2])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_every_key_returns_its_value_after_a_batch_is_written(shape, load):
    model = load(shape)
    weight, bias = models.W_out(model, LAYER), models.b_out(model, LAYER)
    keys, values = torch.randn(5, weight.shape[0]), torch.randn(5, weight.shape[1])
    C = torch.diag(torch.linspace(0.5, 2.0, weight.shape[0], dtype=torch.float64))
    batch = rank_one.solve_many(LAYER, weight, bias, keys, values, C)
    with rank_one.edited(model, *batch):
        torch.testing.assert_close(keys @ models.W_out(model, LAYER) + bias, values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_keys_of_any_size_return_their_values_past_a_bias(size):
    """Arithmetic alone, of random numbers: new models have biases of zero, and keys of about the same size."""
    stream = torch.Generator().manual_seed(0)
    W, b, values = (torch.randn(*shape, generator=stream, dtype=torch.float64) for shape in ((24, 8), (8,), (3, 8)))
    keys, drawn = (torch.randn(n, 24, generator=stream, dtype=torch.float64) for n in (3, 200))
    keys, C = size * keys, drawn.T @ drawn / 200
    batch = rank_one.solve_many(0, W, b, keys, values, C)
    torch.testing.assert_close(keys @ (W + sum(torch.outer(each.u, each.step) for each in batch)) + b, values)
    single = rank_one.solve(0, W, b, keys[0], values[0], C)
    torch.testing.assert_close(keys[0] @ (W + torch.outer(single.u, single.step)) + b, values[0])


def test_a_batch_of_one_is_the_single_edit(model, problem):
    key, value, _ = problem
    (batch,) = many(model, problem, key[None], value[None])
    single = solve(model, problem)
    torch.testing.assert_close(torch.outer(batch.u, batch.step), torch.outer(single.u, single.step))
    assert float(batch.u @ key.double()) == pytest.approx(batch.divisor)


def test_a_batch_moves_ordinary_keys_least_and_less_than_edits_one_after_another(model, problem):
    """Against a constrained minimiser written with a general solver: min trace(D^T C D) with K D = R."""
    C = problem[2]
    keys, values = torch.randn(3, len(C), dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    weight, bias = models.W_out(model, LAYER).detach().double(), models.b_out(model, LAYER).double()
    batch = many(model, problem, keys, values)
    change = sum(torch.outer(edit.u, edit.step) for edit in batch)
    wanted = values - (keys @ weight + bias)
    kkt = torch.cat([torch.cat([2 * C, keys.T], 1), torch.cat([keys, torch.zeros(3, 3, dtype=torch.float64)], 1)])
    optimum = torch.linalg.solve(kkt, torch.cat([torch.zeros(len(C), 32, dtype=torch.float64), wanted]))[: len(C)]
    torch.testing.assert_close(change, optimum, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(keys @ torch.stack([edit.u for edit in batch]).T, torch.eye(3, dtype=torch.float64))


def test_keys_that_repeat_each_other_are_refused(model, problem):
    key, value, _ = problem
    with pytest.raises(RankOneError, match="2 keys must not depend on each other"):
        many(model, problem, torch.stack([key, 2 * key]), torch.stack([value, value]))
    with pytest.raises(RankOneError, match="value must be finite"):
        many(model, problem, key[None], torch.full((1, 32), float("nan")))


def test_a_ridge_is_a_share_of_the_mean_diagonal(problem):
    C = problem[2]
    assert rank_one.regularised(C, 0.0) is C
    torch.testing.assert_close(rank_one.regularised(C, 0.1) - C, 0.1 * C.diagonal().mean() * torch.eye(len(C)).double())


def test_a_zero_key_among_many_is_named(model, problem):
    key, value, C = problem
    keys = torch.stack([key, torch.zeros_like(key), key.flip(0)])
    W_out, b_out = (model.blocks[LAYER].mlp.get_parameter(name) for name in ("W_out", "b_out"))
    with pytest.raises(RankOneError, match="key 1 of 3 is"):
        rank_one.solve_many(LAYER, W_out, b_out, keys, torch.stack([value] * 3), C)
