"""The calibration of a classifier: how well its confidence agrees with its accuracy."""

from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """Confidence and accuracy in bins of equal width.

    Attributes:
        edges: Edges of the bins from 0 to 1, (bins + 1,) float64. A bin does not include its lower edge.
        counts: Number of images in each bin, (bins,) int64.
        confidence: Mean confidence in each bin, (bins,) float64. 0 for an empty bin.
        accuracy: Share of correct predictions in each bin, (bins,) float64. 0 for an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean absolute difference between confidence and accuracy, weighted by the images in each bin, in [0, 1]."""
        return float((self.counts * np.abs(self.confidence - self.accuracy)).sum() / self.counts.sum())


def calibration(logits: np.ndarray, labels: np.ndarray, *, bins: int = 15) -> Calibration:
    """Sorts the predictions into bins by their confidence, which is the largest softmax probability.

    Args:
        logits: Logits of the images, (count, num_classes) float.
        labels: Labels of the images, (count,) int.
        bins: Number of bins in [0, 1]. The source uses 15.

    Source: Guo et al. 2017, arXiv 1706.04599, equations 3 and 5.

    Example:
        >>> import numpy as np
        >>> from robust_tf.evaluation.calibration import calibration
        >>> sure_and_right = calibration(np.array([[30.0, 0.0], [0.0, 30.0]]), np.array([0, 1]))
        >>> round(sure_and_right.expected_calibration_error, 3)
        0.0
        >>> sure_but_wrong = calibration(np.array([[30.0, 0.0], [0.0, 30.0]]), np.array([1, 0]))
        >>> round(sure_but_wrong.expected_calibration_error, 3)
        1.0
    """
    logits = np.asarray(logits, np.float64)
    # The largest probability is exp(max) / sum(exp). Both are divided by exp(max), which avoids overflow.
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
