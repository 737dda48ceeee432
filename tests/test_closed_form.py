"""Each published editor's own formula, in its own orientation (keys and residuals are columns), beside the one solve."""

from __future__ import annotations

from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch

from mechedit import closed_form, models, moments, rank_one
from mechedit.changes import LowRank
from mechedit.closed_form import METHODS, ClosedFormError, Metric, Terms
from mechedit.rank_one import RankOneError
from mechedit.weights import Weight

pytestmark = pytest.mark.anywhere
D_MLP, D_MODEL = 24, 9


class Layer:
    """A weight, ordinary keys, and facts to store, in float64."""

    def __init__(self, n=5, seed=0, ordinary=400):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.logspace(-2, 1, D_MLP, dtype=torch.float64)
        mixing = torch.linalg.qr(draw(D_MLP, D_MLP)).Q
        self.ordinary = draw(ordinary, D_MLP) * lengths @ mixing
        self.C = self.ordinary.T @ self.ordinary / ordinary
        self.W, self.keys, self.values = draw(D_MLP, D_MODEL), draw(n, D_MLP), draw(n, D_MODEL)
        self.before = draw(7, D_MLP)
        self.earlier = self.before.T @ self.before

    @property
    def residuals(self):
        return self.values - self.keys @ self.W


@pytest.fixture
def layer():
    return Layer()


def close(found, expected):
    """Relative to the largest number, 1e-8."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.dense() if isinstance(found, LowRank) else found, expected, rtol=0, atol=1e-8 * scale)  # fmt: skip


def plain(name, layer, terms):
    """The change as its paper writes it, with W [d_model, d_mlp]: given back transposed."""
    K, R, C, I = layer.keys.T, layer.residuals.T, layer.C, torch.eye(D_MLP, dtype=torch.float64)  # noqa: E741
    seen = layer.before.T @ layer.before
    match name:
        case "rome":
            k, r = K[:, :1], R[:, :1]
            u = torch.linalg.inv(C) @ k
            change = r @ u.T / (u.T @ k)
        case "emmet":
            inverse = torch.linalg.inv(C)
            change = R @ torch.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse
        case "memit":
            change = R @ torch.linalg.solve(terms.a * C + K @ K.T, K).T
        case "memit-seq":
            change = R @ torch.linalg.solve(terms.a * C + K @ K.T + seen, K).T
        case "encore":
            change = R @ K.T @ torch.linalg.inv(K @ K.T + terms.a * C + seen + terms.c * I)
        case "alphaedit":
            U, s, _ = torch.linalg.svd(C)
            P = U[:, s < terms.null] @ U[:, s < terms.null].T
            change = torch.linalg.solve(P @ (K @ K.T + seen) + terms.c * I, P @ K @ R.T).T
    return change.T


@pytest.mark.parametrize("name", METHODS)
def test_every_published_editor_is_the_solver_with_its_terms(name, layer):
    terms = replace(METHODS[name], a=METHODS[name].a and 3.0, c=METHODS[name].c and 0.5)  # on the scale of these keys
    n = 1 if name == "rome" else len(layer.keys)
    found = Metric(terms, layer.C, layer.earlier).solve(4, layer.keys[:n], layer.residuals[:n])
    assert (found.weight, len(found.left)) == (Weight(4, "mlp.W_out"), n)
    close(found, plain(name, layer, terms))


def test_at_a_models_width_and_with_its_own_c_every_editor_is_its_formula():
    model = models.load("organism")
    C = moments.estimate(model, 0).C.numpy().astype(np.float64)
    draws = np.random.default_rng(0)
    likely = np.linalg.cholesky(C)
    K, before, R = (
        likely @ draws.normal(size=(768, 20)),
        likely @ draws.normal(size=(768, 40)),
        draws.normal(size=(192, 20)),
    )
    values, vectors = np.linalg.eigh(C)
    null = float(values[400:402].mean())
    P = vectors[:, :401] @ vectors[:, :401].T
    seen, gram, one = before @ before.T, K @ K.T, np.eye(768)
    along = np.linalg.solve(C, K)
    plain = {
        "emmet": along @ np.linalg.solve(K.T @ along, R.T),
        "memit": np.linalg.solve(15000.0 * C + gram, K) @ R.T,
        "memit-seq": np.linalg.solve(15000.0 * C + seen + gram, K) @ R.T,
        "encore": np.linalg.solve(15000.0 * C + seen + gram + 10.0 * one, K) @ R.T,
        "alphaedit": np.linalg.solve(P @ (gram + seen) + 10.0 * one, P @ K @ R.T),
    }
    for name, expected in plain.items():
        terms = replace(METHODS[name], null=METHODS[name].null and null)
        found = Metric(terms, torch.tensor(C), torch.tensor(seen)).solve(0, torch.tensor(K.T), torch.tensor(R.T))
        close(found, torch.tensor(expected))


def test_the_constants_are_those_published():
    assert METHODS["memit"] == Terms(15000.0, 0.0, 0.0, 1.0)
    assert METHODS["memit-seq"] == Terms(15000.0, 1.0, 0.0, 1.0)
    assert METHODS["encore"] == Terms(15000.0, 1.0, 10.0, 1.0)
    assert METHODS["alphaedit"] == Terms(0.0, 1.0, 10.0, 1.0, 0.02)
    assert METHODS["rome"] == METHODS["emmet"] == Terms(1.0, 0.0, 0.0, 0.0)


def test_the_change_is_where_nothing_smaller_costs_less(layer):
    terms = Terms(a=2.0, b=0.7, c=0.3, slack=1.5)
    change = Metric(terms, layer.C, layer.earlier).solve(0, layer.keys, layer.residuals).dense().requires_grad_()
    M = 2.0 * layer.C + 0.7 * layer.earlier + 0.3 * torch.eye(D_MLP, dtype=torch.float64)
    cost = (layer.keys @ change - layer.residuals).square().sum() / 1.5 + (change.T @ M @ change).trace()
    (slope,) = torch.autograd.grad(cost, [change])
    (of_facts,) = torch.autograd.grad((layer.keys @ change - layer.residuals).square().sum() / 1.5, [change])
    assert float(slope.abs().max()) < 1e-9 * float(of_facts.abs().max()), "the terms pull as much as the facts do"


def test_without_slack_residuals_are_met_exactly_and_slack_to_nothing_leads_there(layer):
    exact = Metric(Terms(slack=0.0), layer.C).solve(0, layer.keys, layer.residuals)
    close(layer.keys @ exact.dense(), layer.residuals)
    together = rank_one.solve_many(0, layer.W, torch.zeros(D_MODEL), layer.keys, layer.values, layer.C)
    close(exact, sum(each.dense() for each in together))
    near = Metric(Terms(a=1e-10), layer.C).solve(0, layer.keys, layer.residuals)
    torch.testing.assert_close(near.dense(), exact.dense(), rtol=0, atol=1e-5)
    far = Metric(Terms(a=1.0), layer.C).solve(0, layer.keys, layer.residuals)
    assert float((far.dense() - exact.dense()).abs().max()) > 1e-3


def test_with_no_null_space_and_no_ridge_alphaedit_is_memit_with_earlier_keys(layer):
    everywhere = Terms(a=0.0, b=1.0, c=1e-12, null=float(layer.C.trace()))
    earlier = layer.ordinary.T @ layer.ordinary
    found = Metric(everywhere, layer.C, earlier).solve(0, layer.keys, layer.residuals)
    expected = Metric(Terms(a=float(len(layer.ordinary))), layer.C).solve(0, layer.keys, layer.residuals)
    close(found, expected.dense())


def test_a_change_in_the_null_space_moves_ordinary_keys_less_and_says_what_of_a_key_survives(layer):
    inside = Metric(Terms(a=0.0, c=0.1, null=0.02), layer.C)
    outside = Metric(Terms(a=0.0, c=0.1), layer.C)
    values = np.linalg.eigvalsh(layer.C.numpy())
    assert inside.basis.shape == (D_MLP, int((values < 0.02).sum()))
    torch.testing.assert_close(inside.basis.T @ inside.basis, torch.eye(inside.basis.shape[1], dtype=torch.float64))
    moved = [(layer.ordinary @ each.solve(0, layer.keys, layer.residuals).dense()).norm() for each in (inside, outside)]
    assert moved[0] < 0.1 * moved[1]
    P = inside.basis @ inside.basis.T
    expected = [float((P @ key).norm() / key.norm()) ** 2 for key in layer.keys]
    assert inside.survives(layer.keys).tolist() == pytest.approx(expected)
    assert outside.survives(layer.keys).tolist() == [1.0] * 5


def test_batch_after_batch_ends_where_one_solve_of_all_facts_does():
    layer = Layer(n=30, seed=1)
    terms = Terms(a=40.0, b=1.0)
    W, earlier = layer.W.clone(), torch.zeros_like(layer.C)
    for keys, values in zip(layer.keys.split(4), layer.values.split(4), strict=True):
        W += Metric(terms, layer.C, earlier).solve(0, keys, values - keys @ W).dense()
        earlier += keys.T @ keys
    once = layer.W + Metric(terms, layer.C).solve(0, layer.keys, layer.residuals).dense()
    close(W, once)
    forgetting = layer.W.clone()
    for keys, values in zip(layer.keys.split(4), layer.values.split(4), strict=True):
        forgetting += Metric(replace(terms, b=0.0), layer.C).solve(0, keys, values - keys @ forgetting).dense()
    assert float((forgetting - once).abs().max()) > 1e-3, "the control: without earlier keys it does not"


@pytest.mark.parametrize("n", [1, 5, 40])
def test_an_updated_factor_is_that_of_the_sum(n):
    generator = torch.Generator().manual_seed(n)
    own, keys = (torch.randn(rows, 75, generator=generator, dtype=torch.float64) for rows in (200, n))
    found = closed_form.updated(torch.linalg.cholesky(own.T @ own), keys)
    expected = np.linalg.cholesky((own.T @ own + keys.T @ keys).numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12 * float(np.abs(expected).max()))


@pytest.mark.parametrize("terms", [Terms(a=40.0, b=1.5), Terms(a=0.5, b=2.0, c=0.3, slack=0.0), Terms(a=0.0, b=1.0, c=0.1, null=5.0)])  # fmt: skip
def test_a_metric_that_takes_in_key_after_key_solves_as_one_made_anew(terms, monkeypatch):
    layer = Layer(n=60, seed=2)
    metric = Metric(terms, layer.C, layer.earlier)
    metric.solve(0, layer.keys[:1], layer.residuals[:1])
    updates = []
    monkeypatch.setattr(closed_form, "updated", lambda *given, plain=closed_form.updated: updates.append(1) or plain(*given))  # fmt: skip
    for index in range(50):
        metric = metric.plus(layer.keys[index : index + 1])
    assert len(updates) == 50
    anew = Metric(terms, layer.C, layer.earlier + layer.keys[:50].T @ layer.keys[:50])
    torch.testing.assert_close(metric.earlier, anew.earlier)
    close(
        metric.solve(0, layer.keys[50:53], layer.residuals[50:53]),
        anew.solve(0, layer.keys[50:53], layer.residuals[50:53]).dense(),
    )
    assert metric.is_updated


def test_many_keys_or_a_factor_that_is_off_are_a_reason_to_make_it_anew(layer, monkeypatch):
    terms = Terms(b=1.0)
    metric = Metric(terms, layer.C)
    metric.solve(0, layer.keys, layer.residuals)
    assert not metric.plus(layer.keys).is_updated, "five keys of 24 numbers are many"
    assert Metric(terms, layer.C).plus(layer.keys[:1]).is_updated, "where there is none yet, it is made first"
    near = metric.plus(layer.keys[:1])
    anew = Metric(terms, layer.C, layer.keys[:1].T @ layer.keys[:1]).solve(0, layer.keys, layer.residuals).dense()
    near.factor[3] *= 1 + 1e-13
    close(near.solve(0, layer.keys, layer.residuals), anew)
    assert near.is_updated, "so little is corrected"
    off = metric.plus(layer.keys[:1])
    off.factor[3] *= 1.01
    close(off.solve(0, layer.keys, layer.residuals), anew)
    assert not off.is_updated
    with pytest.raises(RankOneError, match="keys must be finite"):
        metric.plus(layer.keys / 0)


@pytest.fixture
def counted(monkeypatch):
    """How often each costly step was taken."""
    counts = {"eigh": 0, "cholesky_ex": 0}

    def counting(name, plain):
        def call(*given, **named):
            counts[name] += 1
            return plain(*given, **named)

        return call

    for name in counts:
        monkeypatch.setattr(torch.linalg, name, counting(name, getattr(torch.linalg, name)))
    return counts


def test_a_metric_of_other_terms_has_what_follows_from_c_and_a_factor_of_the_same_m(layer, counted):
    terms = Terms(a=0.0, b=1.0, c=0.1, null=5.0)
    first = Metric(terms, layer.C, layer.earlier)
    first.solve(0, layer.keys, layer.residuals)
    looser = first.at(replace(terms, loose=0.5), layer.earlier.clone())
    close(looser.solve(0, layer.keys, layer.residuals), Metric(looser.terms, layer.C, layer.earlier).solve(0, layer.keys, layer.residuals).dense())  # fmt: skip
    assert counted == {"eigh": 2, "cholesky_ex": 2}, "one of each is of the metric that was made anew"
    for other in (
        first.at(replace(terms, c=0.2), layer.earlier),
        first.at(terms, None),
        first.at(terms, 2 * layer.earlier),
    ):
        anew = Metric(other.terms, layer.C, other.earlier)
        close(other.solve(0, layer.keys, layer.residuals), anew.solve(0, layer.keys, layer.residuals).dense())
    assert counted == {"eigh": 5, "cholesky_ex": 8}, "another M has another factor, and the same basis"
    everywhere = first.at(Terms(a=2.0), layer.earlier)
    close(everywhere.solve(0, layer.keys, layer.residuals), Metric(Terms(a=2.0), layer.C).solve(0, layer.keys, layer.residuals).dense())  # fmt: skip
    assert (first.rank, everywhere.rank) == (int((torch.linalg.eigvalsh(layer.C) < 5.0).sum()), D_MLP)


def test_an_updated_factor_goes_on_only_where_it_is_given(layer, counted):
    near = Metric(Terms(b=1.0), layer.C).plus(layer.keys[:1])
    assert near.is_updated
    assert not near.at(near.terms, near.earlier).is_updated
    given = near.at(near.terms, near.earlier, near.factor)
    assert given.is_updated
    one, other = (each.solve(0, layer.keys, layer.residuals) for each in (near, given))
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)
    assert counted["cholesky_ex"] == 1


@pytest.mark.parametrize("null", [None, 0.5])
def test_what_a_target_reaches_is_its_key_by_the_inverse_of_m_in_the_null_space(layer, null):
    terms = Terms(a=3.0, b=2.0, c=0.5, null=null)
    M = 3.0 * layer.C + 2.0 * layer.earlier + 0.5 * torch.eye(D_MLP, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(layer.C)
    B = vectors if null is None else vectors[:, values < null]
    assert null is None or 0 < B.shape[1] < D_MLP
    expected = layer.keys @ B @ torch.linalg.inv(B.T @ M @ B) @ B.T
    close(Metric(terms, layer.C, layer.earlier).reach(layer.keys), expected)


def test_keys_may_be_single_precision_and_the_solve_is_not(layer):
    found = Metric(Terms(), layer.C.float()).solve(0, layer.keys.float(), layer.residuals.float())
    assert found.left.dtype == found.right.dtype == torch.float64
    C, keys, residuals = (each.float().double() for each in (layer.C, layer.keys, layer.residuals))
    K = keys.T
    close(found, (residuals.T @ torch.linalg.solve(C + K @ K.T, K).T).T)


def test_a_bound_shortens_a_change_and_lengthens_none(layer):
    change = Metric(Terms(), layer.C).solve(0, layer.keys, layer.residuals)
    length = float(change.dense().norm())
    close(closed_form.bounded(change, length / 4), change.dense() / 4)
    close(closed_form.bounded(change, length * 4), change.dense())
    nothing = LowRank(change.weight, torch.zeros_like(change.left), change.right)
    assert not closed_form.bounded(nothing, 1.0).dense().any()


def test_the_sparsest_change_keeps_the_entries_that_are_largest_beside_the_weight(layer):
    delta = Metric(Terms(), layer.C).solve(0, layer.keys, layer.residuals).dense()
    found = closed_form.sparsest(delta, layer.W, 0.4)
    ranked = sorted(((abs(float(delta[i, j] / layer.W[i, j])), i, j) for i in range(D_MLP) for j in range(D_MODEL)), reverse=True)  # fmt: skip
    kept = {(i, j) for _, i, j in ranked[: round(0.4 * D_MLP * D_MODEL)]}
    for i in range(D_MLP):
        for j in range(D_MODEL):
            assert float(found[i, j]) == (float(delta[i, j]) if (i, j) in kept else 0.0)
    weight = layer.W.clone()
    weight[0, 0] = 0.0
    assert float(closed_form.sparsest(delta, weight, 0.01)[0, 0]) == float(delta[0, 0]), "beside nothing all is large"


def test_singular_values_above_the_weights_largest_grow_as_logarithms(layer):
    delta = 3 * torch.diag(torch.arange(1.0, D_MODEL + 1, dtype=torch.float64))
    delta = torch.cat([delta, torch.zeros(D_MLP - D_MODEL, D_MODEL, dtype=torch.float64)])
    m = float(np.linalg.norm(layer.W.numpy(), 2))
    expected = [s if s <= m else np.log(s / m) / np.log(1.2) + m for s in 3 * np.arange(1.0, D_MODEL + 1)]
    assert 3 < m < 27, "some are above, and some not"
    found = closed_form.least_spectrum(delta, layer.W)
    assert sorted(np.linalg.svd(found.numpy(), compute_uv=False)) == pytest.approx(sorted(expected))
    close(closed_form.least_spectrum(0.9 * delta / 27 * m, layer.W), 0.9 * delta / 27 * m)


def test_what_cannot_be_is_refused_with_what_must_hold(layer, monkeypatch):
    for wrong in ({"a": -1.0}, {"b": float("nan")}, {"slack": float("inf")}, {"c": -0.1}):
        with pytest.raises(ClosedFormError, match=f"{next(iter(wrong))} must be 0 or more; found"):
            Terms(**wrong)
    with pytest.raises(ClosedFormError, match="a or c must be above 0"):
        Terms(a=0.0, b=1.0)
    with pytest.raises(ClosedFormError, match="null must be above 0"):
        Terms(null=0.0)
    with pytest.raises(ClosedFormError, match=r"eigenvalue is below null, 1e-09; its smallest is"):
        Metric(Terms(null=1e-9), layer.C).solve(0, layer.keys, layer.residuals)
    with monkeypatch.context() as users, pytest.raises(ClosedFormError, match="of C's shape"):
        users.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
        Metric(Terms(b=1.0), layer.C, torch.eye(3))
    with pytest.raises(RankOneError, match="symmetric"):
        Metric(Terms(), layer.C + torch.triu(layer.C, 1))
    with pytest.raises(RankOneError, match="positive definite"):
        Metric(Terms(), layer.C - torch.eye(D_MLP)).solve(0, layer.keys, layer.residuals)
    twice = torch.cat([layer.keys, layer.keys[:1]])
    with pytest.raises(RankOneError, match="6 keys must not depend on each other"):
        Metric(Terms(slack=0.0), layer.C).solve(0, twice, torch.cat([layer.residuals, layer.residuals[:1]]))
    with pytest.raises(RankOneError, match="residuals must be finite"):
        Metric(Terms(), layer.C).solve(0, layer.keys, layer.residuals / 0)
    for wrong in (0.0, 1.5):
        with pytest.raises(ClosedFormError, match="share must be above 0"):
            closed_form.sparsest(layer.W, layer.W, wrong)
    with pytest.raises(ClosedFormError, match="base must be above 1"):
        closed_form.least_spectrum(layer.W, layer.W, 1.0)
    with pytest.raises(ClosedFormError, match="norm must be above 0"):
        closed_form.bounded(Metric(Terms(), layer.C).solve(0, layer.keys, layer.residuals), 0.0)


def test_keys_that_are_zero_or_not_as_wide_as_C_are_refused_in_a_line(layer):
    none = torch.zeros(1, D_MLP, dtype=torch.float64)
    keys, residuals = torch.cat([layer.keys, none]), torch.cat([layer.residuals, layer.residuals[:1]])
    for terms in (Terms(slack=0.0), Terms(slack=0.0, null=1.0)):
        with pytest.raises(RankOneError, match="keys must not be zero where a change may be, but key 5 of 6 is"):
            Metric(terms, layer.C).solve(0, keys, residuals)
    with pytest.raises(RankOneError, match="key 0 of 1 is"):
        Metric(Terms(slack=0.0, loose=0.2), layer.C).solve(0, none, layer.residuals[:1])
    with pytest.raises(RankOneError, match="key 5 of 6 is"):
        rank_one.solve_many(0, layer.W, torch.zeros(D_MODEL), keys, residuals, layer.C)
    close(Metric(Terms(slack=1.0), layer.C).solve(0, keys, residuals), Metric(Terms(slack=1.0), layer.C).solve(0, layer.keys, layer.residuals).dense())  # fmt: skip
    with pytest.raises(
        ClosedFormError,
        match=r"keys must be one of 24 numbers, as wide as C, for each of the 5 residuals; they are \[5, 23\]",
    ):
        Metric(Terms(), layer.C).solve(0, layer.keys[:, 1:], layer.residuals)
