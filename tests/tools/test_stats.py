import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pact_fast.evaluation import stats


def test_wilson_equals_scipys_and_closes_at_the_ends():
    for successes, n in [(0, 10), (3, 10), (10, 10), (61, 100)]:
        ours = stats.wilson(successes, n)
        theirs = scipy_stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert stats.wilson(0, 10).low == 0.0
    assert stats.wilson(10, 10).high == 1.0


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="n > 0"):
        stats.wilson(successes, n)


def test_mean_interval_equals_scipys_t_interval():
    values = [0.2, 0.5, 0.9, 0.4, 0.1]
    ours = stats.mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(values), scipy_stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high))


def test_mean_of_one_value_claims_no_interval():
    one = stats.mean_interval([0.4])
    assert one.mean == 0.4
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_t_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = sum(
        i.low <= 1.0 <= i.high for i in (stats.mean_interval(rng.normal(1.0, 2.0, 6)) for _ in range(2000))
    )
    assert 0.935 < hits / 2000 < 0.965


def test_shares_of_several_attempts_stay_inside_zero_and_one():
    interval = stats.share_interval([1.0, 1.0, 1.0, 0.75])
    assert interval.high == 1.0
    assert interval.low < interval.mean == 0.9375
    assert stats.share_interval([1, 0, 1]) == stats.wilson(2, 3)


def test_pairing_by_seed_removes_what_the_seeds_share():
    seeds = {0: 0.10, 1: 0.50, 2: 0.90}
    better = {seed: value + 0.05 + 0.001 * seed for seed, value in seeds.items()}
    paired = stats.paired_difference(better, seeds)
    assert paired.low > 0 or paired.high < 0
    assert paired.mean == pytest.approx(0.051)
    with pytest.raises(ValueError, match="seeds differ"):
        stats.paired_difference(better, {0: 0.1, 1: 0.5})


def test_bootstrap_over_tasks_widens_with_task_noise_and_is_repeatable():
    rng = np.random.default_rng(1)
    base = {seed: rng.integers(0, 2, 50).astype(float) for seed in range(4)}
    same = {seed: row.copy() for seed, row in base.items()}
    assert stats.bootstrap_difference(base, same).low == 0.0
    steady = {seed: row + 0.1 for seed, row in base.items()}
    noisy = {seed: row + 0.1 + rng.normal(0, 1, 50) for seed, row in base.items()}
    tight, wide = stats.bootstrap_difference(steady, base), stats.bootstrap_difference(noisy, base)
    assert tight.high - tight.low < 1e-9 < wide.high - wide.low
    assert stats.bootstrap_difference(noisy, base) == wide
    with pytest.raises(ValueError, match="same tasks"):
        stats.bootstrap_difference({0: [1.0]}, {0: [1.0, 0.0]})


def test_evaluation_block_holds_means_limits_and_tasks():
    block = stats.evaluation_block([1, 0, 1, 1], [1.0, -0.5, 0.5, 1.0], [2, 3, 1, 2])
    assert block["solved"] == 0.75
    assert block["tasks"] == 4
    assert block["calls"] == 2.0
    assert block["reward_low"] < block["reward"] < block["reward_high"]
    assert block["per_task_solved"] == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="differ in length"):
        stats.evaluation_block([1], [1.0, 2.0], [1])


def test_an_interval_of_calls_is_not_negative():
    """Few tasks, one with many calls: the t limit alone lies below 0."""
    counts = [0, 0, 0, 12]
    assert stats.mean_interval(counts).low < 0
    assert stats.score_mean("calls", counts).low == 0.0
    assert stats.score_mean("calls", counts).high == stats.mean_interval(counts).high
    assert stats.evaluation_block([0, 0, 0, 1], [0.0] * 4, counts)["calls_low"] == 0.0
    assert stats.seed_mean("calls", [0.0, 9.0]).low == 0.0
    assert stats.seed_mean("solved", [0.9, 1.0]).high == 1.0
    assert stats.score_mean("reward", [-1, 1]).low < -1  # a reward may be negative
    assert math.isnan(stats.score_mean("calls", [3]).low)


def test_non_finite_scores_are_an_error_not_a_nan_interval():
    with pytest.raises(ValueError, match="1 non-finite"):
        stats.mean_interval([1.0, float("nan")])
