"""Intervals and tests agree with published values, with SciPy and with scikit-learn."""

import numpy as np
import pytest
from scipy.stats import binomtest, t, ttest_1samp
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from robust_tf.statistics import (
    PairedDifference,
    decides,
    in_words,
    mean_over_draws,
    mean_per_class,
    paired_difference,
    paired_mean_per_class,
    wilson_interval,
)


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether two classifiers are right about each image, from the four counts of a paired table."""
    first = np.repeat([True, True, False, False], (both, only_first, only_second, neither))
    second = np.repeat([True, False, True, False], (both, only_first, only_second, neither))
    return first, second


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # scikit-learn, about the last class
def test_mean_per_class_from_a_confusion_matrix():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 200, p=[0.6, 0.2, 0.1, 0.1, 0.0])  # uneven, and the last class never occurs
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(5, size=200))
    confusion = confusion_matrix(labels, predictions, labels=range(5))
    np.testing.assert_allclose(mean_per_class(confusion), balanced_accuracy_score(labels, predictions))


@pytest.mark.parametrize(
    ("hits", "total", "expected"),
    [  # R: prop.test(hits, total, correct = FALSE)
        (80, 100, (0.711169, 0.866634)),
        (0, 10, (0.0, 0.277533)),
        (10, 10, (0.722467, 1.0)),
    ],
)
def test_wilson_interval(hits, total, expected):
    np.testing.assert_allclose(wilson_interval(hits, total), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("counts", "difference", "interval"),
    [
        # R, statpsych: ci.prop.ps(.05, 12, 4, 26, 6), by the interval's own author.
        ((6, 26, 4, 12), 22 / 48, (0.2548067, 0.6251933)),
        # R, contingencytables: Wald_CI_BonettPrice_paired_2x2(cavo_2012).
        ((59, 6, 16, 80), -10 / 161, (-0.1195, -0.0032)),
    ],
)
def test_the_paired_interval_is_the_published_one(counts, difference, interval):
    compared = paired_difference(*outcomes(*counts))
    assert compared.difference == pytest.approx(difference)
    np.testing.assert_allclose(compared.interval, interval, atol=5e-5)


@pytest.mark.parametrize("counts", [(59, 6, 16, 80), (6, 26, 4, 12), (10, 0, 0, 3), (0, 7, 7, 0), (0, 0, 9, 0)])
def test_mcnemars_p_value_agrees_with_scipy(counts):
    _, wins, losses, _ = counts
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert paired_difference(*outcomes(*counts)).p_value == pytest.approx(expected)


def test_many_images_do_not_overflow():
    compared = paired_difference(*outcomes(40_000, 5_200, 4_800, 0))
    assert compared.p_value == pytest.approx(binomtest(5_200, 10_000).pvalue, rel=1e-6)


def test_classifiers_that_agree_on_every_image_do_not_differ():
    compared = paired_difference(*outcomes(9, 0, 0, 1))
    assert (compared.difference, compared.p_value) == (0.0, 1.0)
    assert compared.interval[0] < -0.2 and compared.interval[1] > 0.2  # ten images exclude no small difference
    per_class = paired_mean_per_class(*outcomes(9, 0, 0, 1), np.arange(10) % 2)
    assert per_class.difference == 0.0 and per_class.interval[0] < 0 < per_class.interval[1]


def test_swapping_the_classifiers_changes_the_sign():
    first, second = outcomes(30, 9, 4, 7)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert back.difference == -there.difference and back.p_value == there.p_value
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))


def test_with_one_class_the_mean_per_class_equals_the_accuracy():
    first, second = outcomes(59, 6, 16, 80)
    plain, per_class = paired_difference(first, second), paired_mean_per_class(first, second, np.zeros(161, int))
    assert per_class.difference == pytest.approx(plain.difference)
    assert per_class.interval == pytest.approx(plain.interval)
    assert per_class.p_value == pytest.approx(plain.p_value, abs=0.01)


def test_the_difference_per_class_equals_the_difference_of_the_two_means():
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 2, 5], 120, p=[0.7, 0.2, 0.1])
    one, other = (np.where(rng.random(120) < share, labels, 7) for share in (0.9, 0.5))
    compared = paired_mean_per_class(one == labels, other == labels, labels)
    expected = np.mean([np.mean(one[labels == k] == k) - np.mean(other[labels == k] == k) for k in (0, 2, 5)])
    assert compared.difference == pytest.approx(expected)
    assert compared.interval[0] < compared.difference < compared.interval[1]
    assert compared.p_value < 0.01


@pytest.mark.parametrize("per_class", [False, True])
def test_the_intervals_hold_the_true_difference_in_95_percent_of_the_runs(per_class, monkeypatch):
    """2,000 pairs of classifiers on 80 images of 4 uneven classes; the bounds are 95 % and three standard errors."""
    monkeypatch.setattr("robust_tf.statistics._SIGN_FLIPS", 1)  # saves time, since only the intervals are checked
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1, 2, 3], (40, 20, 12, 8))
    share = np.array([0.25, 0.2, 0.15, 0.1])  # of the images of a class about which only the first is right
    lost = np.array([0.05, 0.1, 0.1, 0.2])
    truth = (share - lost).mean() if per_class else (share - lost)[labels].mean()
    covered = []
    for draw in rng.random((2_000, 80)):
        first, second = draw < share[labels], draw > 1 - lost[labels]
        if per_class:
            low, high = paired_mean_per_class(first, second, labels).interval
        else:
            low, high = paired_difference(first, second).interval
        covered.append(low <= truth <= high)
    assert 0.935 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize(
    ("compared", "text"),
    [
        ((0.0577, (0.0123, 0.1041), 0.0132), "+5.8 points (95 % +1.2 to +10.4, p = 0.013)"),
        ((-0.2, (-0.3, -0.1), 1e-9), "-20.0 points (95 % -30.0 to -10.0, p < 0.001)"),
        (
            (0.02, (-0.01, 0.05), 0.21),
            "+2.0 points (95 % -1.0 to +5.0, p = 0.21): this run does not show which is better",
        ),
        # The interval excludes 0, but the exact test is more careful.
        (
            (-0.0621, (-0.1195, -0.0032), 0.0525),
            "(95 % -11.9 to -0.3, p = 0.052): this run does not show which is better",
        ),
    ],
)
def test_a_difference_in_words(compared, text):
    assert text in in_words(PairedDifference(*compared))
    assert decides(PairedDifference(*compared)) == ("does not show" not in text)


def test_the_mean_over_draws_equals_a_t_test_when_only_the_draws_differ():
    draws = np.array([0.1, 0.04, 0.07, 0.12, -0.01])
    compared = mean_over_draws(np.tile(draws[:, None], (1, 50)))  # the same difference on every image
    expected = ttest_1samp(draws, 0)
    assert compared.difference == pytest.approx(draws.mean())
    assert compared.p_value == pytest.approx(expected.pvalue, rel=1e-4)
    np.testing.assert_allclose(compared.interval, expected.confidence_interval(), atol=1e-6)


def test_the_mean_over_draws_adds_the_variances_of_draws_and_images():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=(6, 80), p=[0.1, 0.6, 0.3])
    parts = differences.mean(axis=1).var(ddof=1) / 6, differences.mean(axis=0).var(ddof=1) / 80
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 79)
    half = t.ppf(0.975, freedom) * sum(parts) ** 0.5
    compared = mean_over_draws(differences)
    np.testing.assert_allclose(compared.interval, (differences.mean() - half, differences.mean() + half), atol=1e-6)
    assert compared.p_value == pytest.approx(2 * t.sf(differences.mean() / sum(parts) ** 0.5, freedom), rel=1e-4)


def test_the_interval_of_a_mean_over_draws_covers_the_truth():
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(300):
        differences = 0.1 + 0.05 * rng.normal(size=(5, 1)) + rng.normal(size=(1, 60)) + rng.normal(size=(5, 60))
        low, high = mean_over_draws(differences / 4).interval
        misses += not low <= 0.025 <= high
    assert misses / 300 <= 0.07


@pytest.mark.parametrize(("value", "p_value"), [(0.0, 1.0), (0.2, 0.0)])
def test_the_mean_over_draws_of_one_value_everywhere(value, p_value):
    compared = mean_over_draws(np.full((3, 8), value))
    assert compared.p_value == p_value and compared.interval == (pytest.approx(value), pytest.approx(value))
