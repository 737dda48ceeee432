from __future__ import annotations

import jaxtyping
import pytest
import torch

from mechedit.changes import ChangeError, Dense, LowRank, Rows, by_weight, norm, total
from mechedit.rank_one import RankOneEdit
from mechedit.weights import Weight

pytestmark = pytest.mark.anywhere

WEIGHT = Weight(1, "mlp.W_out")
STREAM = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=STREAM)


def each_kind():
    """A change of each kind, [6, 4], beside the matrix that it is, written down plainly."""
    u, step, left, right, values, delta = random(6), random(4), random(3, 6), random(3, 4), random(2, 4), random(6, 4)
    rows = torch.zeros(6, 4, dtype=torch.float64)
    rows[5], rows[1] = values[0].double(), values[1].double()
    return [
        (RankOneEdit(1, u, step), torch.outer(u.double(), step.double())),
        (LowRank(WEIGHT, left, right), sum(torch.outer(left[i].double(), right[i].double()) for i in range(3))),
        (Rows(WEIGHT, torch.tensor([5, 1]), values, 6), rows),
        (Dense(WEIGHT, delta), delta.double()),
    ]


def test_each_kind_is_the_matrix_that_it_says():
    for change, matrix in each_kind():
        torch.testing.assert_close(change.dense(), matrix, atol=1e-12, rtol=1e-12)
        assert change.dense().dtype == torch.float64
        assert change.shape == (6, 4)
        assert change.norm == pytest.approx(float(matrix.norm()))
        torch.testing.assert_close(change.negated().dense(), -matrix, atol=1e-12, rtol=1e-12)
        if (factors := change.factors()) is not None:
            torch.testing.assert_close(factors[0].T @ factors[1], matrix, atol=1e-12, rtol=1e-12)


def test_inner_products_and_sums_are_those_of_the_matrices_in_every_combination():
    for first, a in each_kind():
        for second, b in each_kind():
            assert first.inner(second) == pytest.approx(float((a * b).sum()))
            torch.testing.assert_close(total([first, second]), a + b, atol=1e-12, rtol=1e-12)
    kinds = each_kind()
    whole = sum(matrix for _, matrix in kinds)
    torch.testing.assert_close(total([change for change, _ in kinds]), whole, atol=1e-12, rtol=1e-12)


def test_changes_of_different_weights_have_nothing_in_common():
    first, other = Dense(WEIGHT, random(6, 4)), Dense(Weight(2, "mlp.W_out"), random(6, 4))
    assert first.inner(other) == 0.0
    assert norm([first, other]) == pytest.approx((first.norm**2 + other.norm**2) ** 0.5)
    assert list(by_weight([other, first])) == [WEIGHT, other.weight]


def test_the_norm_of_changes_that_cancel_is_nothing():
    change = LowRank(WEIGHT, random(2, 6), random(2, 4))
    assert norm([change, change.negated()]) == pytest.approx(0, abs=1e-6)
    assert norm([change, change]) == pytest.approx(2 * change.norm)
    assert norm([]) == 0.0


def test_a_thousand_changes_are_added_in_float64():
    small = [Dense(WEIGHT, torch.full((6, 4), 1e-8)) for _ in range(1000)]
    big = Dense(WEIGHT, torch.ones(6, 4))
    found = total([big, *small])
    assert float((found - (1 + 1000 * float(torch.tensor(1e-8)))).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(WEIGHT, random(2, 6), random(3, 4)), r"\[2, 6\] and \[3, 4\]"),
        (lambda: Rows(WEIGHT, torch.tensor([0, 6]), random(2, 4), 6), "from 0 to 5"),
        (lambda: Rows(WEIGHT, torch.tensor([1, 1]), random(2, 4), 6), "there twice"),
        (lambda: Rows(WEIGHT, torch.tensor([1]), random(2, 4), 6), r"\[1\] and \[2, 4\]"),
        (lambda: total([]), "found none"),
        (lambda: total([Dense(WEIGHT, random(6, 4)), Dense(Weight(2, "mlp.W_out"), random(6, 4))]), "of one weight"),
        (lambda: total([Dense(WEIGHT, random(6, 4)), Dense(WEIGHT, random(4, 6))]), "and shape"),
    ],
)
def test_parts_that_do_not_fit_are_told(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    with pytest.raises(ChangeError, match=message):
        make()


def test_what_is_no_number_has_no_norm():
    for value in (float("nan"), float("inf")):
        change = Dense(WEIGHT, torch.full((6, 4), value))
        assert not change.norm < 1e30
        assert not norm([change]) < 1e30
    huge = RankOneEdit(1, torch.full((6,), 1e200, dtype=torch.float64), torch.full((4,), 1e200, dtype=torch.float64))
    assert norm([huge]) == float("inf")


def test_what_a_sum_is_not_of_is_told_in_order():
    many = [Dense(Weight(layer, "mlp.W_out"), random(6, 4)) for layer in (7, 3, 5, 1, 6, 2)]
    named = ", ".join(rf"mlp.W_out of block {layer} \[6, 4\]" for layer in (1, 2, 3, 5, 6, 7))
    with pytest.raises(ChangeError, match=f"found {named}"):
        total(many)


def test_one_weights_changes_have_an_inner_product_only_in_one_shape():
    with pytest.raises(ChangeError, match=r"found \[6, 4\] and \[4, 6\]"):
        Dense(WEIGHT, random(6, 4)).inner(Dense(WEIGHT, random(4, 6)))


def test_the_norm_of_every_mixture_of_changes_is_that_of_their_sums():
    kinds = [*each_kind(), (Dense(Weight(0, "mlp.W_out"), one := random(3, 3)), one.double())]
    for first, a in kinds:
        for second, b in kinds:
            together = (a + b).norm() if first.weight == second.weight else (a.norm() ** 2 + b.norm() ** 2).sqrt()
            assert norm([first, second]) == pytest.approx(float(together))
    weights = list(by_weight([change for change, _ in kinds]))
    assert weights == [Weight(0, "mlp.W_out"), WEIGHT]


@pytest.mark.parametrize("index", [[], [0], [5], [5, 0, 3]])
def test_rows_are_of_a_height_and_may_be_none(index):
    values = random(len(index), 4)
    change = Rows(WEIGHT, torch.tensor(index, dtype=torch.int64), values, 6)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for at, row in zip(index, values, strict=True):
        expected[at] = row.double()
    assert torch.equal(change.dense(), expected)
    assert (change.numbers(), set(change.tensors())) == ({"height": 6}, {"index", "values"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(WEIGHT, random(6), random(2, 4)),
        lambda: LowRank(WEIGHT, random(2, 6), random(2)),
        lambda: Rows(WEIGHT, torch.tensor([[1]]), random(1, 4), 6),
        lambda: Rows(WEIGHT, torch.tensor([1]), random(1), 6),
        lambda: Rows(WEIGHT, torch.tensor([-1]), random(1, 4), 6),
        lambda: Rows(WEIGHT, torch.tensor([6]), random(1, 4), 6),
        lambda: Dense(WEIGHT, random(6)),
        lambda: Dense(WEIGHT, random(6, 4, 1)),
    ],
)
def test_parts_of_other_axes_or_beyond_the_height_are_told(make, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks, which users do not have
    with pytest.raises(ChangeError, match=r"found \["):
        make()


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.01, 0.5, 3.0])
def test_a_change_is_as_small_as_it_is(size):
    u, row = torch.zeros(6), torch.zeros(1, 4)
    u[2], row[0, 1] = 1.0, size
    delta = torch.zeros(6, 4)
    delta[2, 1] = size
    for change in (RankOneEdit(1, u, row[0]), LowRank(WEIGHT, u[None], row), Rows(WEIGHT, torch.tensor([2]), row, 6), Dense(WEIGHT, delta)):  # fmt: skip
        assert change.norm == norm([change]) == pytest.approx(size, rel=1e-6)
