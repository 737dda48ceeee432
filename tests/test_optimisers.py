"""How a value goes down its loss, on losses whose minimum is known or found by other means."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import minimize

from mechedit.optimisers import ByRow, Lbfgs, descent, root
from mechedit.settings import RomeSettings

pytestmark = pytest.mark.anywhere

WIDE = RomeSettings(clamp=1e6)


def curvature(n: int, seed: int = 0) -> torch.Tensor:
    """Of very different sizes in different directions, as G is."""
    turn, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return turn @ torch.diag(torch.logspace(-3, 1, n, dtype=torch.float64)) @ turn.T


class Learning:
    """-log p of one of several answers, and what a curvature holds against d; of each fact its own answers."""

    def __init__(self, facts: int, n: int, G: torch.Tensor, parts: int = 1) -> None:
        seeded = torch.Generator().manual_seed(7)
        self.W, self.b = (
            torch.randn(facts, *shape, generator=seeded, dtype=torch.float64) for shape in ((20, parts * n), (20,))
        )
        self.G = torch.block_diag(*[torch.zeros_like(G)] * (parts - 1), G)
        self.asked: list[torch.Tensor] = []

    def __call__(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = delta.double().flatten(1).clone().requires_grad_()
        self.asked.append(d.detach())
        p = (torch.einsum("fan,fn->fa", self.W, d) + 4 * self.b).log_softmax(1)
        loss = -p[:, 0] + ((d @ self.G) * d).sum(1) / 2
        (slope,) = torch.autograd.grad(loss.sum(), d)
        return loss.detach(), slope.view_as(delta)


def followed(found: Lbfgs, loss: Learning, steps: int) -> list[torch.Tensor]:
    """The losses of a search of so many steps, those that were taken back as they were before."""
    losses, latest = [], torch.full((len(found.delta),), torch.inf, dtype=torch.float64)
    for _ in range(steps):
        value, slope = loss(found.delta)
        latest = torch.where(found.judge(value, slope), value, latest)
        losses.append(latest)
        found.go(torch.zeros(len(value), dtype=torch.bool))
    return losses


def test_in_rows_coordinates_a_kronecker_product_is_round():
    A, L, z = (
        torch.randn(n, m, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n, m in ((4, 4), (3, 3), (4, 3))
    )
    rows, G = A @ A.T + torch.eye(4), L @ L.T + torch.eye(3)
    by = ByRow(torch.linalg.cholesky(rows), torch.linalg.cholesky(G))
    d = by.of(z[None])[0].requires_grad_()
    cost = torch.trace(G @ d.T @ rows @ d) / 2
    torch.testing.assert_close(cost, z.square().sum() / 2)
    (slope,) = torch.autograd.grad(cost, d)
    torch.testing.assert_close(by.slope_of(slope[None])[0], z)


def test_a_curvature_that_is_nothing_has_a_root_too():
    torch.testing.assert_close(root(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))


def test_it_finds_the_minimum_that_another_optimiser_finds():
    G = curvature(12)
    loss = Learning(5, 12, G)
    found = descent(torch.ones(5, 1, 12, dtype=torch.float64), WIDE, G)
    losses = followed(found, loss, 40)

    for fact in range(5):

        def one(x, fact=fact):
            value, slope = loss(torch.tensor(x).expand(5, 1, 12))
            return float(value[fact]), slope[fact, 0].numpy()

        other = minimize(one, [0.0] * 12, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 1000})
        assert float(losses[-1][fact]) == pytest.approx(other.fun, abs=1e-7)
        torch.testing.assert_close(found.best[fact, 0], torch.tensor(other.x), rtol=0, atol=1e-3)
    assert all((after <= before).all() for before, after in itertools.pairwise(losses))


def test_with_the_known_curvature_few_steps_do_what_many_of_adam_do():
    G = curvature(64)
    loss = Learning(4, 64, G)
    initial = torch.full((4, 1, 64), 0.5, dtype=torch.float64)
    known = followed(descent(initial, WIDE, G), loss, 8)[-1]
    unknown = followed(descent(initial, WIDE, torch.eye(64)), loss, 8)[-1]
    adam = descent(initial, RomeSettings(clamp=1e6, learning_rate=0.1), None)
    by_adam = torch.stack(followed(adam, loss, 20)).amin(0)
    assert (known < unknown).all()
    assert (known < by_adam).all()


def test_its_way_is_that_of_the_whole_inverse_by_the_bfgs_formula():
    G = torch.eye(6, dtype=torch.float64)
    loss = Learning(1, 6, G)
    found = descent(torch.ones(1, 1, 6, dtype=torch.float64), WIDE, 100 * G)
    scale, at, slope = 110**-0.5, None, None  # z is d in these units
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(6):
        tried = found.delta.flatten() / scale
        value, own = loss(found.delta)
        own = own.flatten() * scale
        if found.judge(value, own.view(1, 1, 6) / scale):
            if at is not None:
                pairs.append((tried - at, own - slope))
            at, slope = tried, own
            assert len(pairs) < 10
            if pairs:
                step, bend = pairs[-1]
                H = torch.eye(6, dtype=torch.float64) * (step @ bend) / (bend @ bend)
                for step, bend in pairs:
                    side = torch.eye(6, dtype=torch.float64) - torch.outer(step, bend) / (step @ bend)
                    H = side @ H @ side.T + torch.outer(step, step) / (step @ bend)
                torch.testing.assert_close(found.way.flatten(), -H @ slope, rtol=1e-8, atol=0)
        found.go(torch.zeros(1, dtype=torch.bool))
    assert len(pairs) > 2


def test_the_first_step_costs_half_a_nat_of_what_is_known():
    """It is one length of z: what the curvature holds against it, and the little that is the same in all directions."""
    G = curvature(32)
    loss = Learning(3, 32, G)
    found = descent(torch.ones(3, 1, 32, dtype=torch.float64), WIDE, G)
    found.judge(*loss(found.delta))
    found.go(torch.zeros(3, dtype=torch.bool))
    round_ = G + 0.1 * G.diagonal().mean() * torch.eye(32)
    costs = ((found.delta[:, 0] @ round_) * found.delta[:, 0]).sum(1) / 2
    torch.testing.assert_close(costs, torch.full((3,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("known", [False, True])
def test_each_fact_goes_as_it_would_alone_and_one_that_is_done_stays(known):
    G = curvature(8)
    initial = torch.ones(3, 2, 8, dtype=torch.float64)
    settings = RomeSettings(clamp=0.5, learning_rate=0.1)
    loss = Learning(3, 8, G, parts=2)
    together = descent(initial, settings, G if known else None)
    for step in range(10):
        together.judge(*loss(together.delta))
        together.go(torch.tensor([False, step >= 4, False]))
    for fact, steps in ((0, 10), (1, 4), (2, 10)):
        alone = descent(initial[[fact]], settings, G if known else None)
        for step in range(steps + 1):
            value, slope = loss(alone.delta.expand(3, 2, 8))
            alone.judge(value[[fact]], slope[[fact]])
            alone.go(torch.tensor([step >= steps]))
            if steps == 10 and step == 9:
                break
        torch.testing.assert_close(together.delta[fact], alone.delta[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("known", [False, True])
def test_no_part_is_longer_than_its_clamp(known):
    initial = torch.stack([torch.ones(1, 8), 3 * torch.ones(1, 8)], 1).reshape(1, 2, 8)
    settings = RomeSettings(clamp=0.01, learning_rate=0.5)
    loss = Learning(1, 8, curvature(8) * 1e-4, parts=2)
    found = descent(initial, settings, (curvature(8) * 1e-4).float() if known else None)
    for _ in range(6):
        found.judge(*(each.float() for each in loss(found.delta)))
        found.go(torch.tensor([False]))
        assert (found.delta.norm(dim=2) <= settings.clamp * initial.norm(dim=2) * (1 + 1e-5)).all()
    assert found.delta.dtype == torch.float32
    assert (found.best.norm(dim=2) > 0.99 * settings.clamp * initial.norm(dim=2))[:, -1].all()


def test_a_step_that_makes_it_worse_is_taken_back_and_shortened():
    """Of a loss that rises steeply, or is no number, a little way off."""
    found = descent(torch.ones(2, 1, 1, dtype=torch.float64), WIDE, torch.eye(1) / 1.1)
    zero = torch.zeros(2, dtype=torch.bool)
    assert found.judge(torch.zeros(2), -torch.ones(2, 1, 1)).all()
    found.go(zero)
    torch.testing.assert_close(found.delta.flatten(), torch.ones(2, dtype=torch.float64))
    assert not found.judge(torch.tensor([1.5, torch.nan]), torch.ones(2, 1, 1)).any()
    assert found.best.eq(0).all()
    found.go(zero)
    # the parabola through 0 with slope -1 there and 1.5 at 1 is least at 0.2
    torch.testing.assert_close(found.delta.flatten(), torch.tensor([0.2, 0.1], dtype=torch.float64))
