"""The calibration error of known predictions."""

import numpy as np
import pytest

from robust_tf.evaluation.calibration import calibration


def logits_of(confidences: list[float]) -> np.ndarray:
    """Logits of two classes whose softmax gives class 0 these probabilities."""
    return np.array([[np.log(value / (1 - value)), 0.0] for value in confidences])


def test_bins_and_error_of_known_predictions():
    # Three images at 0.9, two of them right, and one at 0.6, wrong: |2/3 - 0.9| * 3/4 + |0 - 0.6| * 1/4.
    bins = calibration(logits_of([0.9, 0.9, 0.9, 0.6]), np.array([0, 0, 1, 1]), bins=10)
    assert bins.counts.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 3, 0]  # a bin includes its upper edge
    assert bins.accuracy[8] == pytest.approx(2 / 3) and bins.confidence[8] == pytest.approx(0.9)
    assert bins.expected_calibration_error == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6)


def test_sure_and_right_predictions_are_calibrated_with_any_logits():
    bins = calibration(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 1]))
    assert bins.expected_calibration_error == 0.0
    assert bins.counts.tolist() == [0] * 14 + [2]
    assert calibration(np.array([[1e4, -1e4]]), np.array([1])).expected_calibration_error == 1.0
