"""Intervals against closed forms, published values and simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mechedit import statistics
from mechedit.benchmarks.metrics import METRICS
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
    assert found["numbers"] == len(METRICS) + 4, "and four beside those that mechedit has"


def test_numbers_of_records_are_drawn_again_and_their_own_mean_is_the_truth(tmp_path, monkeypatch):
    """Of records that are all 1 but for one no small sample knows the mean."""
    from experiments import coverage

    monkeypatch.setattr(coverage, "FIGURES", tmp_path)
    values = {"drift": np.linspace(0, 1, 50), "drift_log_p": np.r_[np.linspace(1, 1.01, 49), 100.0], "essence_kl": np.linspace(1, 2, 50)}  # fmt: skip
    rows = [{name: float(each[index]) for name, each in values.items()} for index in range(50)]
    monkeypatch.setattr(coverage.Evaluation, "load", lambda folder: type("Kept", (), {"rows": {"after": rows}}))
    coverage.main(coverage.Coverage(records=tmp_path / "kept", of_records=(20,), samples=300))
    found = {each["number"]: each for each in json.loads((tmp_path / "coverage_records.json").read_text())["kinds"]}
    assert {name: each["truth"] for name, each in found.items()} == pytest.approx({name: each.mean() for name, each in values.items()})  # fmt: skip
    assert found["drift"]["coverage"] > 0.92
    assert found["drift_log_p"]["coverage"] == pytest.approx(1 - (49 / 50) ** 20, abs=0.1), (
        "it is held where the one is drawn"
    )


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
    few = np.array([[0.0], [1.0]]), np.array([[1.0], [0.0]])
    assert statistics.smallest_seen(few[1] - few[0]) > 1
    (found,) = statistics.compared(*few, [(0.0, 1.0)])
    assert math.isnan(found.could_see), "no difference of two shares is so large"


# --- every constant and argument has a test ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.25, 0.75, True), (-0.75, -0.25, True), (0.0, 0.75, False), (-0.75, 0.0, False), (-0.25, 0.75, False), (0.5, 3.0, True), (-3.0, -0.5, True)],
)  # fmt: skip
def test_zero_is_excluded_by_bounds_on_one_side_of_it(low, high, excludes):
    assert Mean((low + high) / 2, low, high, 9).excludes_zero is excludes


@pytest.mark.parametrize("n", [12, 13])
def test_signs_are_tried_out_up_to_12_facts_and_drawn_from_13_on(n):
    """Of n differences that are all 1 only two of all signs go as far; of drawn signs, the one that was found counts too."""
    exact = 2 / 2**n
    found = [
        statistics.paired(np.zeros(n), np.ones(n)).p,
        statistics.compared_statistic(np.zeros((n, 1)), np.ones((n, 1)), lambda mean: mean).p,
    ]
    if n == 12:
        assert found == [exact, exact]
    else:
        assert [10_000 * p for p in found] == pytest.approx([round(10_000 * p) for p in found], abs=1e-9)
        assert all(1 / 10_000 <= p <= 0.0015 and p != exact for p in found)


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize("part", [1, 700, 1 << 21])
def test_where_nothing_differs_every_sign_goes_as_far(n, part, monkeypatch):
    monkeypatch.setattr(statistics, "PART", part if n == 5 else max(part, 700))
    same = np.random.default_rng(0).random((n, 2))
    assert statistics.paired(same[:, 0], same[:, 0]).p == 1.0
    assert statistics.compared_statistic(same, same, lambda a, b: a * b).p == 1.0


@pytest.mark.parametrize(("part", "sizes"), [(40, [4, 4, 4, 4, 4]), (60, [6, 6, 6, 2]), (3, [1] * 20), (1 << 21, [20])])
def test_random_numbers_are_drawn_in_parts_that_fit(part, sizes, monkeypatch):
    monkeypatch.setattr(statistics, "PART", part)
    drawn = list(statistics._weights(10, 0, 20))
    assert [each.shape for each, _ in drawn] == [(size, 10) for size in sizes]
    assert [each.shape for _, each in drawn] == [(size, 1) for size in sizes]
    monkeypatch.setattr(statistics, "DRAWS", 21)
    signs = list(statistics._signs(10, 0))
    assert [each.shape for each in signs] == [(size, 10) for size in sizes]
    assert set(np.unique(np.concatenate(signs))) == {0.0, 1.0}


def test_drawn_signs_are_fair_coins():
    (signs,) = statistics._signs(20, 0)
    assert signs.shape == (9999, 20)
    assert np.abs(signs.mean(0) - 0.5).max() < 0.025, "five standard errors"
    assert np.abs(signs.mean(1).std() - (0.25 / 20) ** 0.5) < 0.005


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_columns_are_weighed_some_at_a_time_to_the_same_bounds(columns, monkeypatch):
    values = np.random.default_rng(0).binomial(10, 0.6, (20, 5)) / 10
    whole = statistics.interval(values)
    monkeypatch.setattr(statistics, "COLUMNS", columns)
    np.testing.assert_allclose(statistics.interval(values), whole, rtol=1e-9)


def seeded(seed):
    """Every number that is drawn, by this seed."""
    values = np.random.default_rng(0).binomial(10, 0.6, (20, 2)) / 10
    other = np.random.default_rng(1).binomial(10, 0.5, (20, 2)) / 10
    pair = statistics.paired(values[:, 0], other[:, 0], seed)
    of_means = statistics.compared_statistic(values, other, lambda a, b: a * b, seed)
    (of_columns,) = statistics.compared(values[:, :1], other[:, :1], [None], seed)
    assert of_columns == pair
    return [
        float(statistics.interval(values, seed)[0][0]),
        statistics.summary(values[:, 0], seed).low,
        statistics.summaries(values, [None, None], seed)[1].low,
        statistics.statistic(values, lambda a, b: a * b, seed).low,
        pair.difference.low,
        pair.p,
        of_means.difference.low,
        of_means.p,
    ]


def test_a_seed_says_what_is_drawn():
    first, again, other = seeded(0), seeded(0), seeded(1)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert first == pytest.approx(other, abs=0.02)


@pytest.mark.parametrize("of", ["interval", "summaries", "statistic"])
def test_the_number_of_draws_is_the_callers(of, monkeypatch):
    asked, real = [], statistics._weights
    monkeypatch.setattr(statistics, "_weights", lambda n, seed, draws: asked.append(draws) or real(n, seed, draws))
    values = np.random.default_rng(0).binomial(10, 0.6, (20, 1)) / 10
    {
        "interval": lambda: statistics.interval(values, draws=37),
        "summaries": lambda: statistics.summaries(values, [None], draws=37),
        "statistic": lambda: statistics.statistic(values, lambda mean: mean, draws=37),
    }[of]()
    assert asked == [37]
    statistics.summary(values[:, 0])
    assert asked == [37, 10_000]


def test_a_support_that_is_given_is_not_guessed():
    values = np.random.default_rng(0).beta(2.0, 3.0, 30)
    unbounded = statistics.summary(values, support=UNBOUNDED)
    low, high = statistics.interval(values[:, None], support=UNBOUNDED)
    assert (low[0], high[0]) == (unbounded.low, unbounded.high)
    assert unbounded.low != statistics.summary(values).low
    shares = statistics.interval(values[:, None], support=(0.0, 2.0))
    assert shares[1][0] > statistics.interval(values[:, None])[1][0]
    assert statistics.summary(np.append(values, 1.2), support=(0.0, 2.0)).low > 0


def test_columns_of_one_array_are_guessed_together_and_of_several_numbers_each_alone():
    values = np.random.default_rng(0).beta(2.0, 3.0, (30, 2))
    values[:, 1] += 1
    whole = statistics.summary(values[:, 0], support=UNBOUNDED)
    assert statistics.interval(values)[0][0] == pytest.approx(whole.low, rel=1e-9)
    alone = statistics.summary(values[:, 0], support=(0.0, 1.0))
    assert statistics.summaries(values, [None, None])[0].low == pytest.approx(alone.low, rel=1e-9)
    assert alone.low != pytest.approx(whole.low, rel=1e-3)


@pytest.mark.parametrize("beyond", [-0.01, 1.01, 1.5])
def test_numbers_beyond_0_to_1_are_no_shares(beyond):
    assert math.isnan(statistics.summary(np.array([0.5, 0.25, 0.75, beyond])).low), "unbounded, of few facts"
    assert not math.isnan(statistics.summary(np.array([0.0, 0.5, 1.0])).low)


def test_bounds_of_a_number_that_cannot_be_negative_are_cut_there():
    values = np.array([0.0] * 19 + [10.0])
    assert statistics.summary(values, support=UNBOUNDED).low < 0
    cut, whole = statistics.summary(values, support=(0.0, math.inf)), statistics.summary(values, support=UNBOUNDED)
    assert (cut.low, cut.high) == (0.0, whole.high)


def test_successes_on_another_scale_have_clopper_and_pearsons_interval_on_it():
    plain, turned = statistics.summary(of(54, 60)), statistics.summary(2 * of(54, 60) - 1, support=(-1.0, 1.0))
    assert (turned.low, turned.high) == pytest.approx((2 * plain.low - 1, 2 * plain.high - 1))
    some = np.array([0.0, 0.0, 1.0, 1.0, 0.5])
    mixed = statistics.summary(some)
    assert mixed.low > statistics.summary(of(2, 5)).low, "a half counts as a half"


def test_two_facts_have_an_interval_and_one_has_none():
    assert not math.isnan(statistics.summary(np.array([0.25, 0.75])).low)
    two = statistics.statistic(np.array([[0.25, 1.0], [0.75, 0.5]]), lambda a, b: a * b)
    assert two.mean == pytest.approx(0.5 * 0.75)
    assert (two.low < two.mean < two.high, two.n) == (True, 2)
    one = statistics.statistic(np.array([[0.25, 1.0], [0.75, math.nan]]), lambda a, b: a * b)
    assert (one.mean, one.n) == (0.5, 1), "as many as the column with the fewest"
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_halls_interval_is_the_inverse_of_his_transformation():
    """Hall (1992): T + s T^2 / 3 + s^2 T^3 / 27 + s / 6 is as good as normal, s the skewness over the root of n."""
    from scipy import optimize, stats

    values = np.random.default_rng(1).lognormal(size=40)
    n, q = 40, float(stats.t.ppf(1 - 0.025 * (1 - 5 / 40), 39))
    s = float(stats.skew(values)) / n**0.5
    upper, lower = (
        optimize.brentq(lambda t, to=to: t + s * t**2 / 3 + s**2 * t**3 / 27 + s / 6 - to, -50, 50) for to in (q, -q)
    )
    error = values.std(ddof=1) / n**0.5
    found = statistics.summary(values)
    assert found.low == pytest.approx(values.mean() - error * max(upper, q))
    assert found.high == pytest.approx(values.mean() - error * min(lower, -q))


def test_numbers_that_are_alike_but_for_rounding_have_no_interval():
    values = np.full(30, 1e6)
    values[0] += 1e-8
    assert math.isnan(statistics.summary(values).low)
    values[0] += 1e-3
    assert not math.isnan(statistics.summary(values).low)
    assert math.isnan(statistics.summary(np.append(np.arange(30.0), math.inf), support=UNBOUNDED).low)


@pytest.mark.parametrize("n", [4, 6])
def test_conditions_are_exchanged_fact_by_fact_in_every_way(n):
    """All exchanges by a loop, of a function that is not linear; facts that lack a number are left out."""
    random = np.random.default_rng(n)
    first, second = random.random((n + 2, 2)), random.random((n + 2, 2)) + 0.1
    first[1, 0] = second[3, 1] = math.nan

    def of_means(a, b):
        return a * b / (a + b)

    found = statistics.compared_statistic(first, second, of_means, support=(0.0, 2.0))
    there = [index for index in range(n + 2) if index not in (1, 3)]
    a, b = first[there], second[there]
    gains = []
    for way in range(2**n):
        swap = np.array([[way >> index & 1] for index in range(n)], bool)
        one, two = np.where(swap, b, a).mean(0), np.where(swap, a, b).mean(0)
        gains.append(of_means(*two) - of_means(*one))
    assert found.difference.mean == pytest.approx(gains[0])
    assert found.difference.n == n
    assert found.p == np.mean(np.abs(gains) >= abs(gains[0]) - 1e-12)
    assert 2 / 2**n <= found.p < 1


@pytest.mark.parametrize("width", [1.0, 2.0])
def test_the_difference_of_a_statistic_could_be_as_large_as_its_support(width):
    same = width * of(30, 60)[:, None]
    found = statistics.compared_statistic(same, same, lambda mean: mean, support=(0.0, width)).difference
    assert (found.low, found.high) == pytest.approx((-found.high, width * (1 - 0.025 ** (1 / 61))), abs=0.02 * width)
    alone = statistics.statistic(width * of(60, 60)[:, None], lambda mean: mean, support=(0.0, width))
    assert alone.low == pytest.approx(width * 0.025 ** (1 / 60), abs=0.005 * width)


def test_a_statistic_of_no_fact_is_none():
    lacking = np.full((3, 1), math.nan)
    found = statistics.compared_statistic(lacking, lacking, lambda mean: mean)
    assert found.difference.n == 0
    assert math.isnan(found.difference.mean + found.difference.low + found.difference.high)
    assert math.isnan(found.p)


def test_a_difference_could_be_as_large_as_the_support_of_both():
    same = 10 * of(30, 60)
    found = statistics.paired(same, same, support=(0.0, 10.0)).difference
    assert (found.low, found.high) == pytest.approx((-10 * (1 - 0.025 ** (1 / 60)), 10 * (1 - 0.025 ** (1 / 60))), abs=0.05)  # fmt: skip
    unbounded = statistics.paired(np.zeros(30), np.arange(30.0) / 30, support=(0.0, math.inf)).difference
    assert unbounded == statistics.summary(np.arange(30.0) / 30, support=UNBOUNDED)


def test_columns_are_compared_each_alone():
    random = np.random.default_rng(0)
    first, second = random.random((10, 3)), random.random((10, 3))
    first[4:, 1] = math.nan
    found = statistics.compared(first, second, [None] * 3)
    for column in range(3):
        alone = statistics.paired(first[:, column], second[:, column])
        assert found[column].p == alone.p
        assert found[column].difference.n == alone.difference.n == (4 if column == 1 else 10)
        assert found[column].difference.mean == pytest.approx(alone.difference.mean)


def test_what_is_nan_is_not_counted_among_the_comparisons():
    found = statistics.holm([0.02, math.nan, 0.04])
    assert found[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(found[1])
    assert all(map(math.isnan, statistics.holm([math.nan])))


@pytest.mark.parametrize("n", [2, 9])
def test_the_smallest_difference_by_hand(n):
    from scipy import stats

    values = np.arange(n) ** 2.0
    expected = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * stats.sem(values)
    assert statistics.smallest_seen(np.append(values, math.nan)) == pytest.approx(expected)
    surer = (stats.t.ppf(0.995, n - 1) + stats.t.ppf(0.9, n - 1)) * stats.sem(values)
    assert statistics.smallest_seen(values, power=0.9, alpha=0.01) == pytest.approx(surer)
    assert math.isnan(statistics.smallest_seen(values[:1]))
    assert math.isnan(statistics.smallest_seen(np.full(n, 0.5)))
