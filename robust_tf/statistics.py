"""Figures of classification with their uncertainty: shares, means over classes, differences of two classifiers.

NumPy alone; what is counted while a network runs is in `robust_tf.training.metrics`.
"""

import math
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # 97.5 % quantile of the normal distribution
_SIGN_FLIPS = 20_000


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, e.g. an accuracy. Source: Wilson 1927, JASA 22(158), 209-212.

    Args:
        hits: how often it happened.
        total: out of how many, at least 1.

    Returns:
        The lower and upper end, in [0, 1].
    """
    share = hits / total
    centre = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)) / (1 + _Z**2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_per_class(confusion: np.ndarray) -> float:
    """Mean accuracy over the classes (rows: true class) that occurred."""
    totals = confusion.sum(axis=1)
    return float((confusion.diagonal()[totals > 0] / totals[totals > 0]).mean())


class PairedDifference(NamedTuple):
    """How much more often one classifier is right than another one on the same images.

    Attributes:
        difference: of the shares, in [-1, 1]; above 0 where the first classifier is better.
        interval: its 95 % confidence interval.
        p_value: of the hypothesis that the two are right equally often.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_difference(first: np.ndarray, second: np.ndarray) -> PairedDifference:
    """The difference of two accuracies that were measured on the same images.

    Only the images count on which the classifiers differ: the p-value is that of McNemar's exact test, the interval is
    Bonett and Price's adjusted Wald interval. Both are valid for few images, and for classifiers that differ on none.

    Args:
        first, second: (count,) bool, whether each classifier is right about each image.

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
    """The difference of two mean-per-class accuracies that were measured on the same images.

    The interval adds up the variances of the classes; the pseudo-observations of Bonett and Price are shared among
    them, so that with one class it is the interval of `paired_difference`. The p-value comes from a permutation
    test that swaps the two classifiers on each image, with 20,000 seeded draws.

    Args:
        first, second: (count,) bool, whether each classifier is right about each image.
        labels: (count,) int, the true classes.
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


def decides(compared: PairedDifference) -> bool:
    """Whether the images tell which classifier is better: both the interval and the p-value have to say so."""
    low, high = compared.interval
    return not low <= 0 <= high and compared.p_value < 0.05


def in_words(compared: PairedDifference) -> str:
    """ "+5.8 points (95 % +1.2 to +10.4, p = 0.013)", and a warning where that decides nothing."""
    low, high = (f"{100 * end:+.1f}" for end in compared.interval)
    p_value = "p < 0.001" if compared.p_value < 0.001 else f"p = {compared.p_value:.2g}"
    text = f"{100 * compared.difference:+.1f} points (95 % {low} to {high}, {p_value})"
    return text if decides(compared) else f"{text}: this run does not decide"


def _clipped(centre: float, half: float) -> tuple[float, float]:
    return max(-1.0, centre - half), min(1.0, centre + half)


def _sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split as uneven as that among fair tosses."""
    tosses, fewer = wins + losses, min(wins, losses)
    log_half = tosses * math.log(0.5)
    tail = sum(
        math.exp(log_half + math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)
