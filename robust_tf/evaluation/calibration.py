"""Whether a classifier is right as often as it says."""

from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """Confidence against accuracy in bins of equal width.

    Attributes:
        edges: (bins + 1,) float64, from 0 to 1; a bin holds the confidences above its lower edge.
        counts: (bins,) int64, images in each bin.
        confidence: (bins,) float64, mean confidence in each bin, 0 where it is empty.
        accuracy: (bins,) float64, share of right predictions in each bin, 0 where it is empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between confidence and accuracy, weighted by the images in the bins, in [0, 1]."""
        return float((self.counts * np.abs(self.confidence - self.accuracy)).sum() / self.counts.sum())


def calibration(logits: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> Calibration:
    """Bins the predictions by their confidence, the largest softmax probability.

    Args:
        logits: (count, num_classes) float.
        labels: (count,) int.
        bins: of equal width over [0, 1]; 15 as in the source.

    Source: Guo et al. 2017, arXiv 1706.04599, equations 3 and 5.
    """
    logits = np.asarray(logits, np.float64)
    # The largest probability: exp(max) / sum(exp), both divided by exp(max).
    confidence = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    correct = logits.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    divisor = np.maximum(counts, 1)
    return Calibration(
        edges,
        counts,
        np.bincount(bin_of, weights=confidence, minlength=bins) / divisor,
        np.bincount(bin_of, weights=correct, minlength=bins) / divisor,
    )
