"""Intervals against closed forms, published values and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mechedit import statistics
from mechedit.statistics import UNBOUNDED, Mean, Paired

pytestmark = pytest.mark.anywhere


def of(successes, n):
    return np.array([1.0] * successes + [0.0] * (n - successes))


@pytest.mark.parametrize(("successes", "n"), [(60, 60), (0, 60), (54, 60), (9, 10), (1, 2)])
def test_successes_have_clopper_and_pearsons_interval(successes, n):
    from scipy.stats import binomtest

    found, theirs = statistics.summary(of(successes, n)), binomtest(successes, n).proportion_ci(method="exact")
    assert (found.mean, found.n) == (successes / n, n)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    if successes == n == 60:
        assert found.low == pytest.approx(0.025 ** (1 / 60)), "94.0 %: none of 60 fails with p = 0.025"


def test_weights_of_successes_alone_give_clopper_and_pearsons_interval_too():
    lower, upper = statistics._weighed(of(54, 60)[:, None], [(0.0, 1.0)], 0, 10_000)
    exact = statistics.summary(of(54, 60))
    assert (np.quantile(lower, 0.025), np.quantile(upper, 0.975)) == pytest.approx((exact.low, exact.high), abs=0.003)


def test_many_shares_have_the_interval_of_plain_resampling():
    random = np.random.default_rng(3)
    values = random.binomial(10, 0.7, 800) / 10
    found = statistics.summary(values)
    means = [values[random.integers(800, size=800)].mean() for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.003)


def test_one_fact_has_no_interval_and_none_has_no_mean():
    one = statistics.summary(np.array([1.0]))
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert str(one) == "1.000 [no interval: n = 1]"
    assert not one.excludes_zero
    assert one.to_json() == {"mean": 1.0, "low": None, "high": None, "n": 1}
    none = statistics.summary(np.array([math.nan]))
    assert none.n == 0
    assert math.isnan(none.mean)
    assert str(Mean(0.5, 0.25, 0.75, 9)) == "0.500 [0.250, 0.750]"


def test_unbounded_numbers_have_an_interval_from_20_facts_on_unless_all_are_alike():
    values = np.random.default_rng(0).gamma(0.5, size=20) + 1
    assert statistics.summary(values).low < values.mean() < statistics.summary(values).high
    assert math.isnan(statistics.summary(values[:19]).low)
    assert math.isnan(statistics.summary(np.full(30, 1.1)).low)
    assert math.isnan(statistics.summary(of(19, 19), support=UNBOUNDED).low)


def test_without_skewness_the_interval_is_students():
    from scipy import stats

    values = np.concatenate([np.arange(-12.0, 0.0), np.arange(1.0, 13.0)])
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(1 - 0.05 * (1 - 5 / 24))
    found = statistics.summary(values)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


def test_an_interval_of_skewed_numbers_reaches_further_to_their_tail():
    values = np.random.default_rng(1).lognormal(size=40)
    found = statistics.summary(values)
    assert found.high - found.mean > 1.2 * (found.mean - found.low)
    turned = statistics.summary(-values)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_columns_with_missing_facts_have_the_intervals_of_the_facts_that_are_there():
    values = np.random.default_rng(0).binomial(10, 0.6, size=(40, 2)) / 10
    values[::2, 1] = np.nan
    low, high = statistics.interval(values)
    alone_low, alone_high = statistics.interval(values[1::2, 1:])
    assert (low[1], high[1]) == pytest.approx((alone_low[0], alone_high[0]), abs=0.01)
    assert low[1] < low[0]
    cube = statistics.interval(np.random.default_rng(0).normal(size=(30, 3, 2)))
    assert cube[0].shape == cube[1].shape == (3, 2)
    assert np.isnan(statistics.interval(np.full((5, 1), np.nan))[0]).all()


def test_a_statistic_of_equal_columns_has_the_interval_of_one():
    values = np.stack([of(60, 60)] * 3, 1)
    found = statistics.statistic(values, lambda a, b, c: 3 / (1 / a + 1 / b + 1 / c))
    assert (found.mean, found.high, found.n) == (1.0, 1.0, 60)
    assert found.low == pytest.approx(0.025 ** (1 / 60), abs=0.003)
    less = statistics.statistic(np.stack([of(30, 60), of(30, 60)], 1), lambda a, b: a - b, falling=[1])
    assert (less.mean, less.low) == (0.0, pytest.approx(-less.high, abs=0.01))
    assert less.high == pytest.approx(1 - 0.025 ** (1 / 61), abs=0.01), "the one more observation could differ by 1"


def test_a_paired_comparison_sees_what_two_means_hide():
    numbers = np.random.default_rng(5)
    first = numbers.normal(0.0, 1.0, 40)
    better = statistics.paired(first, first + 0.1 + numbers.normal(0.0, 0.05, 40))
    assert better.difference.mean == pytest.approx(0.1, abs=0.03)
    assert better.difference.excludes_zero
    assert better.p < 0.001
    assert statistics.paired(first, numbers.permutation(first)).p > 0.05


def test_signs_of_few_pairs_are_tried_out():
    found = statistics.paired(np.zeros(8), of(8, 8))
    assert found.p == 2 / 2**8
    some = statistics.paired(of(1, 10), of(10, 10)[::-1])  # nine of ten facts better, none worse
    assert some.p == pytest.approx(2 / 2**9)
    from scipy.stats import binomtest

    first, second = np.zeros(200), np.concatenate([of(14, 100), np.zeros(100)])
    first[150:155] = 1.0  # 14 better, 5 worse
    assert statistics.paired(first, second).p == pytest.approx(binomtest(14, 19).pvalue, abs=0.01)


def test_a_pair_with_a_nan_is_left_out_and_counted_out():
    first = np.array([0.0, 0.0, math.nan, 0.0, 1.0])
    second = np.array([0.0, 1.0, 1.0, math.nan, 1.0])
    found, alone = statistics.paired(first, second), statistics.paired(first[[0, 1, 4]], second[[0, 1, 4]])
    assert found.difference.n == 3
    assert found.p == alone.p == 1.0
    assert found.difference.mean == pytest.approx(1 / 3)
    none = statistics.paired(np.array([math.nan]), np.array([1.0]))
    assert isinstance(none, Paired)
    assert math.isnan(none.p)
    assert statistics.paired(of(5, 9), of(5, 9)).p == 1.0


def test_differences_of_successes_that_are_all_nothing_have_an_interval():
    found = statistics.paired(of(60, 60), of(60, 60)).difference
    assert found.low == pytest.approx(-(1 - 0.025 ** (1 / 60)), abs=0.005)
    assert not found.excludes_zero


def test_holms_correction_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, math.nan, 0.6])[::2] == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("n", "p"), [(10, 0.9), (60, 0.98), (150, 0.99)])
def test_intervals_of_shares_cover_the_truth_as_often_as_they_say(n, p):
    random = np.random.default_rng(0)
    spread = random.beta(p * 2, (1 - p) * 2, size=(n, 400))
    values = random.binomial(10, spread) / 10
    low, high = statistics.interval(values, draws=1000)
    assert ((low <= p) & (p <= high)).mean() >= 0.93
    one = random.binomial(1, p, size=(n, 400)).astype(float)
    low, high = statistics.interval(one, draws=1000)
    assert ((low <= p) & (p <= high)).mean() >= 0.93


def test_the_experiments_on_intervals_run(tmp_path, monkeypatch):
    from experiments import benchmark_statistics, coverage

    for module in (benchmark_statistics, coverage):
        monkeypatch.setattr(module, "FIGURES", tmp_path)
    coverage.main(coverage.Coverage(n=(20,), largest=30, samples=100, samples_of_s=4, p=(0.9,), draws=500))
    record = json.loads((tmp_path / "coverage.json").read_text())
    kinds = {each["number"]: each for each in record["kinds"]}
    assert {
        "successes, p = 0.9",
        "normal",
        "S of (0.9, 0.8, 0.75)",
        "difference of successes, 0.1 to 0.98",
    } <= kinds.keys()
    assert record["lowest"] == min(each["coverage"] for each in record["kinds"])
    assert min(each["coverage"] for each in record["kinds"] if each["of"] == 100) >= 0.85, "93 % less the noise of 100"
    benchmark_statistics.main(benchmark_statistics.BenchmarkStatistics(records=50))
    found = json.loads((tmp_path / "benchmark_statistics.json").read_text())["found"]
    assert found["numbers"] == 31


@pytest.mark.parametrize("n", [20, 60])
def test_intervals_of_skewed_numbers_cover_the_truth_as_often_as_they_say(n):
    random = np.random.default_rng(0)
    for values, truth in ((random.lognormal(0, 1, (n, 1500)), math.exp(0.5)), (random.normal(1, 1, (n, 1500)), 1.0)):
        low, high = statistics.interval(values, support=UNBOUNDED)
        assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.985


def test_the_smallest_difference_that_could_be_seen_is_seen_four_times_of_five():
    from scipy import stats

    random = np.random.default_rng(0)
    n, spread = 40, 0.3
    effect = np.mean([statistics.smallest_seen(random.normal(0, spread, n)) for _ in range(400)])
    p = stats.ttest_1samp(random.normal(effect, spread, (4000, n)), 0.0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.03)
    assert math.isnan(statistics.smallest_seen(np.ones(5)))
    first, second = random.random((2, 30))
    found = statistics.paired(first, second)
    assert found.could_see == statistics.smallest_seen(second - first)
