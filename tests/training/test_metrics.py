"""Mean-per-class accuracy is compared with scikit-learn; class weights act on losses only."""

import keras
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from robust_tf.training.metrics import Accuracy, CrossEntropy, MeanPerClassAccuracy, balanced_class_weights


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 200, p=[0.6, 0.2, 0.1, 0.1, 0.0])  # uneven classes, of which the last one never occurs
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
    assert abs(expected - np.mean(labels == logits.argmax(axis=1))) > 0.01  # here the two figures differ


def test_sample_weight_leaves_examples_out(predictions):
    labels, logits = predictions
    weight = (np.arange(200) % 2).astype(np.float32)
    weighted, half = MeanPerClassAccuracy(5), MeanPerClassAccuracy(5)
    weighted.update_state(labels, logits, sample_weight=weight)
    half.update_state(labels[1::2], logits[1::2])
    np.testing.assert_allclose(weighted.result(), half.result(), rtol=1e-6)


def test_reset_and_serialization(predictions):
    metric = MeanPerClassAccuracy(5)
    metric.update_state(*predictions)
    metric.reset_state()
    assert float(metric.result()) == 0.0
    assert keras.metrics.deserialize(keras.metrics.serialize(metric)).num_classes == 5


def test_balanced_weights_have_mean_one_and_equal_sums_per_class():
    labels = np.array([0] * 6 + [1] * 3 + [3] * 1)
    weights = balanced_class_weights(labels, 4)
    np.testing.assert_allclose(weights, [10 / (3 * 6), 10 / (3 * 3), 0, 10 / 3])  # class 2 does not occur
    assert weights[labels].mean() == pytest.approx(1.0)


def test_class_weights_act_on_the_loss_of_labels_and_of_shares(predictions):
    labels, logits = predictions
    weights = balanced_class_weights(labels, 5)
    each = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True).numpy()
    loss = keras.losses.deserialize(keras.losses.serialize(CrossEntropy(weights)))
    assert float(loss(labels, logits)) == pytest.approx((weights[labels] * each).mean(), rel=1e-5)
    assert float(loss(labels[:, None], logits)) == pytest.approx((weights[labels] * each).mean(), rel=1e-5)
    assert float(CrossEntropy()(labels, logits)) == pytest.approx(each.mean(), rel=1e-5)
    shares = 0.75 * np.eye(5)[labels] + 0.25 * np.eye(5)[labels[::-1]]
    mixed = keras.losses.categorical_crossentropy(shares, logits, from_logits=True).numpy()
    expected = ((0.75 * weights[labels] + 0.25 * weights[labels[::-1]]) * mixed).mean()
    assert float(loss(shares, logits)) == pytest.approx(expected, rel=1e-5)


def test_class_weights_do_not_change_the_metrics(predictions):
    labels, logits = predictions
    model = keras.Sequential([keras.Input((5,)), keras.layers.Activation("linear")])
    figures = {}
    for loss in (CrossEntropy(), CrossEntropy(balanced_class_weights(labels, 5))):
        model.compile(loss=loss, weighted_metrics=[Accuracy(), MeanPerClassAccuracy(5)])
        figures[loss.class_weights] = model.evaluate(logits, labels, verbose=0, return_dict=True)
    plain, weighted = figures.values()
    assert plain["accuracy"] == weighted["accuracy"]
    assert plain["mean_per_class_accuracy"] == weighted["mean_per_class_accuracy"]
    assert abs(plain["loss"] - weighted["loss"]) > 0.01
