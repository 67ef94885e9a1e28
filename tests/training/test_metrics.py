"""Mean-per-class accuracy against scikit-learn."""

import keras
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from robust_tf.training.metrics import MeanPerClassAccuracy


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 200, p=[0.6, 0.2, 0.1, 0.1, 0.0])  # uneven, and the last class never occurs
    logits = rng.standard_normal((200, 5)).astype(np.float32)
    logits[np.arange(200), labels] += 1.5
    return labels, logits


def test_equals_balanced_accuracy_over_batches(predictions):
    labels, logits = predictions
    metric = MeanPerClassAccuracy(5)
    for start in range(0, 200, 64):
        metric.update_state(labels[start : start + 64], logits[start : start + 64])
    expected = balanced_accuracy_score(labels, logits.argmax(axis=1))
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)
    assert abs(expected - np.mean(labels == logits.argmax(axis=1))) > 0.01  # the two figures do differ here


def test_sample_weight_leaves_examples_out(predictions):
    labels, logits = predictions
    weight = (np.arange(200) % 2).astype(np.float32)
    weighted, half = MeanPerClassAccuracy(5), MeanPerClassAccuracy(5)
    weighted.update_state(labels, logits, sample_weight=weight)
    half.update_state(labels[1::2], logits[1::2])
    np.testing.assert_allclose(weighted.result(), half.result(), rtol=1e-6)


def test_reset_and_serialisation(predictions):
    metric = MeanPerClassAccuracy(5)
    metric.update_state(*predictions)
    metric.reset_state()
    assert float(metric.result()) == 0.0
    assert keras.metrics.deserialize(keras.metrics.serialize(metric)).num_classes == 5
