"""Accuracies with their uncertainty: shares, means over classes, and differences between two classifiers.

Only NumPy is needed here. The metrics that are computed while a network runs are in `robust_tf.training.metrics`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # 97.5 % quantile of the normal distribution
_SIGN_FLIPS = 20_000


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float

    @property
    def in_words(self) -> str:
        """The interval of a share in percent, such as "71.1% to 86.7%"."""
        return f"{self.low:.1%} to {self.high:.1%}"


def wilson_interval(hits: int, total: int) -> Interval:
    """Returns the 95 % confidence interval of a share, such as an accuracy.

    Args:
        hits: Number of successes, such as correct predictions.
        total: Number of trials, such as all predictions; at least 1.

    Returns:
        The lower and the upper end, in [0, 1].

    Example:
        >>> wilson_interval(80, 100).in_words
        '71.1% to 86.7%'

    Source: Wilson 1927, JASA 22(158), 209-212.
    """
    share = hits / total
    center = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / (1 + _Z**2 / total)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def mean_per_class(confusion: np.ndarray) -> float:
    """Returns the mean of the accuracies of the classes that occurred.

    Args:
        confusion: Counts of images (classes, classes); rows are true classes, columns are predictions.

    Example:
        >>> mean_per_class(np.array([[90, 10], [5, 5]]))
        0.7
    """
    totals = confusion.sum(axis=1)
    return float((confusion.diagonal()[totals > 0] / totals[totals > 0]).mean())


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Difference between the accuracies of two classifiers on the same images.

    Attributes:
        difference: First accuracy minus the second, in [-1, 1].
        interval: The 95 % confidence interval of the difference.
        p_value: Probability of a difference at least this large if both classifiers were equally good.
    """

    difference: float
    interval: Interval
    p_value: float


def paired_difference(first: np.ndarray, second: np.ndarray) -> PairedDifference:
    """Returns the difference between two accuracies that were measured on the same images.

    Only images on which exactly one of the classifiers is right matter. The p-value comes from McNemar's exact test,
    and the interval is Bonett and Price's adjusted Wald interval. Both are valid even for few images, and for
    classifiers that agree on every image.

    Args:
        first: Whether the first classifier is right about each image, (count,) bool.
        second: The same for the second classifier.

    Example:
        >>> first = np.repeat([True, False], [90, 10])
        >>> second = np.repeat([True, False], [70, 30])
        >>> in_words(paired_difference(first, second))
        '+20.0 points (95 % +11.4 to +27.8, p < 0.001)'

    Sources: McNemar 1947, Psychometrika 12(2), 153-157; Bonett and Price 2012, Journal of Educational and Behavioral
    Statistics 37(4), 479-488, which Fagerland et al. 2014, Statistics in Medicine 33(16), 2850-2875, recommend.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total = len(first) + 2
    better, worse = (only_first + 1) / total, (only_second + 1) / total
    half = _Z * math.sqrt((better + worse - (better - worse) ** 2) / total)
    return PairedDifference(
        (only_first - only_second) / len(first),
        _clipped(better - worse, half),
        _sign_test(only_first, only_second),
    )


def paired_mean_per_class(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> PairedDifference:
    """Returns the difference between two mean-per-class accuracies that were measured on the same images.

    For the interval, the variances of the classes are added up. The pseudo-observations of Bonett and Price are divided
    among the classes, so with one class the interval equals the one of `paired_difference`. The p-value comes from a
    permutation test with 20,000 seeded draws, each of which swaps the two classifiers on some of the images.

    Args:
        first: Whether the first classifier is right about each image, (count,) bool.
        second: The same for the second classifier.
        labels: True classes, (count,) int.

    Example:
        >>> labels = np.repeat([0, 1], [90, 10])
        >>> compared = paired_mean_per_class(labels == labels, labels == 0, labels)
        >>> compared.difference
        0.5
    """
    _, classes = np.unique(labels, return_inverse=True)
    totals = np.bincount(classes)
    count = len(totals)
    only_first = np.bincount(classes, weights=first & ~second)
    only_second = np.bincount(classes, weights=second & ~first)
    adjusted = totals + 2 / count
    better, worse = (only_first + 1 / count) / adjusted, (only_second + 1 / count) / adjusted
    variance = float(((better + worse - (better - worse) ** 2) / adjusted).sum()) / count**2
    difference = float(((only_first - only_second) / totals).mean())

    differing = (only_first + only_second).astype(int)
    wins = np.random.default_rng(0).binomial(differing, 0.5, size=(_SIGN_FLIPS, count))
    swapped = ((2 * wins - differing) / totals).mean(axis=1)
    as_far = int((np.abs(swapped) >= abs(difference) - 1e-12).sum())
    return PairedDifference(
        difference,
        _clipped(float((better - worse).mean()), _Z * math.sqrt(variance)),
        (as_far + 1) / (_SIGN_FLIPS + 1),
    )


def mean_over_draws(differences: np.ndarray) -> PairedDifference:
    """Returns the mean difference between two classifiers that were fitted again for several draws of their labels.

    The interval covers other draws and other test images of the same kind. Its variance is the sum of two variances:
    one between the draws and one between the images. Variation that depends on both is counted twice, so the interval
    may be too wide, but not too narrow. The degrees of freedom follow Welch and Satterthwaite.

    Args:
        differences: Difference for each draw and test image, (draws, images) float, at least 2 of each: 1 if only the
            first classifier is right, -1 if only the second is, else 0.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> in_words(mean_over_draws(rng.choice([-1.0, 0.0, 1.0], size=(5, 400), p=[0.1, 0.6, 0.3])))
        '+19.8 points (95 % +14.4 to +25.2, p < 0.001)'

    Sources: Owen 2007, Annals of Applied Statistics 1(2), 386-411, on crossed random effects; Satterthwaite 1946,
    Biometrics Bulletin 2(6), 110-114.
    """
    by_draw, by_image = differences.mean(axis=1), differences.mean(axis=0)
    parts = [(float(means.var(ddof=1)) / len(means), len(means) - 1) for means in (by_draw, by_image)]
    variance, difference = sum(part for part, _ in parts), float(differences.mean())
    if variance == 0:  # the two classifiers differ by the same amount everywhere, usually not at all
        return PairedDifference(difference, Interval(difference, difference), 1.0 if difference == 0 else 0.0)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    error = math.sqrt(variance)
    return PairedDifference(
        difference, _clipped(difference, _t_quantile(freedom) * error), _t_tails(abs(difference) / error, freedom)
    )


def _t_tails(value: float, freedom: float) -> float:
    """Returns the probability that a t-distributed number is at least this far from 0.

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1).
    """
    start = math.atan(value / math.sqrt(freedom))

    def integral(low: float) -> float:
        angles = np.linspace(low, math.pi / 2, 20_001)
        return float(np.trapezoid(np.cos(angles).clip(0.0) ** (freedom - 1), angles))

    return min(1.0, integral(start) / integral(0.0))


def _t_quantile(freedom: float) -> float:
    """Returns the 97.5 % quantile of the t-distribution, by bisection."""
    low, high = 1.9, 13.0  # infinitely many degrees of freedom, and 1
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tails(middle, freedom) > 0.05 else (low, middle)
    return high


def decides(compared: PairedDifference) -> bool:
    """Returns whether the images show which classifier is better, by both the interval and the p-value."""
    low, high = compared.interval
    return not low <= 0 <= high and compared.p_value < 0.05


def in_words(compared: PairedDifference) -> str:
    """Returns a text such as "+5.8 points (95 % +1.2 to +10.4, p = 0.013)", with a note if `decides` is false."""
    low, high = (f"{100 * end:+.1f}" for end in compared.interval)
    p_value = "p < 0.001" if compared.p_value < 0.001 else f"p = {compared.p_value:.2g}"
    text = f"{100 * compared.difference:+.1f} points (95 % {low} to {high}, {p_value})"
    return text if decides(compared) else f"{text}: this run does not show which is better"


def _clipped(center: float, half: float) -> Interval:
    return Interval(max(-1.0, center - half), min(1.0, center + half))


def _sign_test(wins: int, losses: int) -> float:
    """Returns the two-sided probability that fair coin tosses split at least as unevenly as these wins and losses."""
    tosses, fewer = wins + losses, min(wins, losses)
    log_half = tosses * math.log(0.5)
    tail = sum(
        math.exp(log_half + math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)
