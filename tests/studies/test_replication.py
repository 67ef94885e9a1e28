"""Means over source seeds and draws: equal to SciPy's where it applies, and intervals that cover the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from robust_tf.studies.replication import cluster_bootstrap, holm, replicate


def made_up_table(random, *, seeds=5, draws=5, of_seed=1.0, of_draw=1.0, of_run=1.0, mean=0.0):
    """Returns values, source seeds and draws of a crossed table with normal effects."""
    table = (
        mean
        + of_seed * random.normal(size=(seeds, 1))
        + of_draw * random.normal(size=(1, draws))
        + of_run * random.normal(size=(seeds, draws))
    )
    rows, columns = np.indices(table.shape)
    return table.ravel().tolist(), rows.ravel().tolist(), columns.ravel().tolist()


def test_with_one_draw_it_is_scipys_t_test():
    values = [0.8, 0.83, 0.79, 0.86]
    ours = replicate(values, range(4), [7] * 4)
    theirs = stats.ttest_1samp(values, 0.0)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert ours.interval == pytest.approx(theirs.confidence_interval(0.95))
    assert ours.mean == pytest.approx(np.mean(values))


def test_where_draws_make_no_difference_it_is_scipys_t_test_of_the_means_of_the_seeds():
    random = np.random.default_rng(3)
    values = random.normal(size=(5, 1)) + random.normal(size=(5, 4))
    values -= values.mean(axis=0)  # each draw has the same mean
    rows, columns = np.indices(values.shape)
    ours = replicate((values + 0.5).ravel(), rows.ravel(), columns.ravel())
    theirs = stats.ttest_1samp(values.mean(axis=1) + 0.5, 0.0)
    assert ours.interval == pytest.approx(theirs.confidence_interval(0.95))
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert ours.cluster == "source seed" and ours.degrees_of_freedom == 4


def test_it_is_the_paired_t_test_of_scipy_on_differences():
    random = np.random.default_rng(4)
    robust, standard = random.normal(0.85, 0.02, size=6), random.normal(0.8, 0.02, size=6)
    ours = replicate(robust - standard, range(6), [0] * 6)
    assert ours.p_value == pytest.approx(stats.ttest_rel(robust, standard).pvalue)


def test_with_a_single_source_the_draws_are_the_clusters():
    values = [0.8, 0.83, 0.79, 0.86]
    ours = replicate(values, [None] * 4, range(4))
    assert ours.cluster == "draw" and ours.num_clusters == 4
    assert ours.interval == pytest.approx(stats.ttest_1samp(values, 0.0).confidence_interval(0.95))


def test_the_draws_count_where_they_vary():
    values, seeds, draws = made_up_table(np.random.default_rng(0), of_seed=0.0, of_run=0.01)
    both, only_seeds = replicate(values, seeds, draws), stats.sem(np.reshape(values, (5, 5)).mean(axis=1))
    assert both.standard_error > 20 * only_seeds
    assert both.standard_error == pytest.approx(stats.sem(np.reshape(values, (5, 5)).mean(axis=0)), rel=0.05)


def test_the_standard_error_is_that_of_the_analysis_of_variance():
    values, seeds, draws = made_up_table(np.random.default_rng(0), seeds=4, draws=6)
    table = np.reshape(values, (4, 6))
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    of_seeds, of_draws = 6 * table.mean(axis=1).var(ddof=1), 4 * table.mean(axis=0).var(ddof=1)
    of_rest = (rest**2).sum() / 15
    assert of_draws > of_rest
    variance = (of_seeds + of_draws - of_rest) / 24
    freedom = variance**2 / ((of_seeds / 24) ** 2 / 3 + (of_draws / 24) ** 2 / 5 + (of_rest / 24) ** 2 / 15)
    ours = replicate(values, seeds, draws)
    assert ours.standard_error**2 == pytest.approx(variance)
    assert ours.degrees_of_freedom == pytest.approx(freedom)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    assert ours.interval == pytest.approx((table.mean() - half, table.mean() + half))


def test_an_interval_excludes_zero_exactly_when_the_p_value_is_below_5_percent():
    random = np.random.default_rng(1)
    outcomes = set()
    for _ in range(100):
        found = replicate(*made_up_table(random, mean=1.2))
        excluded = not found.interval.low <= 0 <= found.interval.high
        assert excluded == (found.p_value < 0.05)
        outcomes.add(excluded)
    assert outcomes == {True, False}


def test_the_order_of_the_runs_does_not_matter_and_gaps_are_allowed():
    values, seeds, draws = made_up_table(np.random.default_rng(2))
    runs = list(zip(values, seeds, draws, strict=True))[:-3]
    ours = replicate(*zip(*runs, strict=True))
    assert replicate(*zip(*runs[::-1], strict=True)).interval == pytest.approx(ours.interval)
    assert ours.num_runs == 22 and math.isfinite(ours.standard_error)


def test_a_single_run_says_nothing_about_others():
    found = replicate([0.8], [0], [0])
    assert found.mean == 0.8 and found.interval is None and found.p_value is None
    assert found.clusters_to_decide() is None


def test_equal_values_are_only_as_certain_as_their_rounding():
    equal = replicate([0.002] * 3, range(3), [0] * 3, resolution=0.01)
    assert equal.interval.low < 0 < equal.interval.high and equal.p_value > 0.05
    assert replicate([0.0] * 3, range(3), [0] * 3).p_value == 1.0


def test_the_suggested_number_of_seeds_decides_in_80_percent_of_the_studies():
    values = [0.9, -0.4, 1.6, -0.2, 0.6]
    pilot = replicate(values, range(5), [0] * 5)
    count = pilot.clusters_to_decide()
    assert pilot.p_value > 0.05 and count > 5
    random = np.random.default_rng(0)
    samples = random.normal(np.mean(values), np.std(values, ddof=1), size=(count, 4000))
    decided = (stats.ttest_1samp(samples, 0.0).pvalue < 0.05).mean()
    assert 0.79 < decided < 0.86
    assert pilot.clusters_to_decide(0.01) > count


def test_no_number_of_seeds_decides_where_nothing_differs_or_the_draws_vary_too_much():
    assert replicate([1.0, -1.0, 0.0], range(3), [0] * 3).clusters_to_decide() is None
    values, seeds, draws = made_up_table(np.random.default_rng(0), of_seed=0.01, of_draw=3.0, of_run=0.01, draws=3)
    assert replicate(values, seeds, draws).clusters_to_decide() is None


def test_holm_multiplies_the_smallest_by_the_number_of_comparisons_and_keeps_the_order():
    p_values = [0.2, 0.001, 0.035, 0.03, 0.9]
    adjusted = holm(p_values)
    assert adjusted[1] == pytest.approx(0.005) and adjusted[3] == adjusted[2] == pytest.approx(0.12)
    in_order = [after for _, after in sorted(zip(p_values, adjusted, strict=True))]
    assert in_order == sorted(in_order)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True)) and max(adjusted) <= 1
    assert holm([]) == []


def test_the_bootstrap_is_seeded_and_stays_between_the_means_of_the_clusters():
    values, seeds, draws = made_up_table(np.random.default_rng(5))
    interval = cluster_bootstrap(values, seeds, draws)
    means = np.reshape(values, (5, 5)).mean(axis=1)
    assert interval == cluster_bootstrap(values, seeds, draws)
    assert means.min() <= interval.low < np.mean(values) < interval.high <= means.max()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("effects", [(1, 0, 1), (1, 1, 1), (1, 0, 0.2), (0, 1, 1), (0.3, 1, 0.3)])
def test_the_interval_covers_the_true_mean_in_95_percent_of_the_studies(seeds, effects):
    random = np.random.default_rng(0)
    covered = bootstrap_covered = 0
    of_seed, of_draw, of_run = effects
    for number in range(2000):
        table = made_up_table(random, seeds=seeds, of_seed=of_seed, of_draw=of_draw, of_run=of_run)
        low, high = replicate(*table).interval
        covered += low <= 0 <= high
        if number < 200:
            low, high = cluster_bootstrap(*table)
            bootstrap_covered += low <= 0 <= high
    assert 0.94 < covered / 2000 < 0.985
    # This is why the verdicts do not rest on the percentile bootstrap.
    assert bootstrap_covered / 200 < 0.92
