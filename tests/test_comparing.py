"""Comparisons of evaluations, against differences taken by hand and SciPy's own permutation test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mechedit.runs.comparing import compare
from mechedit.runs.results import Evaluation
from mechedit.runs.store import RunError

pytestmark = pytest.mark.anywhere


def evaluation(values, *, after=True, benchmark="counterfact", begin=0, relations=2):
    """One of records whose ES, PS and NS are the columns of `values`."""
    facts = tuple(
        {"id": str(index), "subject": f"S{begin + index}", "prompt": f"S{begin + index} is in", "target_true": "A", "target_new": "B", "relation": f"P{index % relations}", "reason": ""}
        for index in range(len(values))
    )  # fmt: skip
    rows = [dict(zip(("ES", "PS", "NS"), map(float, row), strict=True)) for row in values]
    what = {"editor": "rome", "settings": {"mode": "independent"}, "model": {"name": "M"}, "benchmark": benchmark}
    return Evaluation(facts, {"before": rows, "after": rows} if after else {"before": rows}, what)


@pytest.fixture
def two():
    random = np.random.default_rng(0)
    first = random.random((12, 3))
    return first, np.clip(first + random.normal(0.1, 0.1, (12, 3)), 0, 1)


def test_differences_are_paired_by_record_whatever_their_order(two):
    first, second = two
    order = np.random.default_rng(1).permutation(12)
    shuffled = evaluation(second)
    shuffled = Evaluation(tuple(shuffled.facts[i] for i in order), {"after": [shuffled.rows["after"][i] for i in order]}, shuffled.what)  # fmt: skip
    found = compare([evaluation(first), shuffled], ["one", "two"])
    assert (found.common, found.records, found.stages, found.names) == (
        12,
        (12, 12),
        ("after", "after"),
        ("one", "two"),
    )
    by_name = {each.name: each for each in found.overall}
    assert list(by_name) == ["ES", "PS", "NS", "S"]
    for column, name in enumerate(("ES", "PS", "NS")):
        each, exact = by_name[name], stats.permutation_test((second[:, column] - first[:, column],), np.sum, permutation_type="samples", n_resamples=np.inf)  # fmt: skip
        assert each.difference.mean == pytest.approx((second[:, column] - first[:, column]).mean())
        assert (each.first, each.second) == pytest.approx((first[:, column].mean(), second[:, column].mean()))
        assert each.p == pytest.approx(exact.pvalue)
        assert each.difference.low < each.difference.mean < each.difference.high
    S = [3 / (1 / each.mean(0)).sum() for each in (first, second)]
    assert by_name["S"].difference.mean == pytest.approx(S[1] - S[0])
    assert math.isnan(by_name["S"].p)


def test_p_values_are_corrected_by_holm_in_each_table(two):
    found = compare(list(map(evaluation, two)))
    for table, n in ((found.overall, 3), (found.by_relation, 6)):
        tested = sorted((each for each in table if not math.isnan(each.p)), key=lambda each: each.p)
        assert len(tested) == n
        highest = 0.0
        for index, each in enumerate(tested):
            highest = max(highest, min(1.0, (n - index) * each.p))
            assert each.p_corrected == pytest.approx(highest)


def test_relations_have_their_own_records(two):
    first, second = two
    found = compare(list(map(evaluation, two)))
    assert {each.relation for each in found.by_relation} == {"P0", "P1"}
    (ES,) = [each for each in found.by_relation if (each.relation, each.name) == ("P1", "ES")]
    assert ES.difference.mean == pytest.approx((second - first)[1::2, 0].mean())
    assert ES.difference.n == 6


def test_only_common_records_are_compared_and_how_many_they_are_is_said(two):
    first, second = two
    found = compare([evaluation(first), evaluation(second[4:], begin=4)])
    assert str(found) == "8 records, with the numbers of counterfact, are common to all (of 12, 8)"
    (ES,) = [each for each in found.overall if each.name == "ES"]
    assert ES.difference.mean == pytest.approx((second - first)[4:, 0].mean())


def test_a_pair_with_a_number_that_is_none_is_left_out(two):
    first, second = two
    second = second.copy()
    second[0, 0] = math.nan
    (ES,) = [each for each in compare([evaluation(first), evaluation(second)]).overall if each.name == "ES"]
    assert ES.difference.n == 11
    assert ES.first == pytest.approx(first[1:, 0].mean()), "of the same records as the other's"


def test_the_unedited_model_can_be_compared_with_an_edited_one(two):
    found = compare([evaluation(two[0], after=False), evaluation(two[1])])
    assert found.stages == ("before", "after")
    with pytest.raises(RunError, match="1 has no stage 'after'; it has before"):
        compare([evaluation(two[0], after=False), evaluation(two[1])], stage="after")


def test_results_that_have_nothing_to_do_with_each_other_are_refused(two):
    one = evaluation(two[0])
    with pytest.raises(RunError, match="two results or more; found 1"):
        compare([one])
    with pytest.raises(RunError, match="different benchmarks cannot be compared: 1 is of counterfact, 2 is of zsre"):
        compare([one, evaluation(two[1], benchmark="zsre")])
    with pytest.raises(RunError, match="of the 12 of 1 and 12 of 2, 0 are common"):
        compare([one, evaluation(two[1], begin=100)])


def test_three_results_are_compared_with_the_first(two):
    found = compare([evaluation(two[0]), evaluation(two[1]), evaluation(two[0])])
    assert {each.result for each in found.overall} == {1, 2}
    same = [each for each in found.overall if each.result == 2]
    assert all(each.difference.mean == pytest.approx(0.0) for each in same)
    assert all(each.p == 1.0 for each in same if each.name != "S")
