"""The final evaluation of a job, with a classifier whose predictions are known."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.job.testing import evaluate_classifier
from robust_tf.statistics import wilson_interval


def brightness_classifier() -> keras.Model:
    """Predicts class 1 where the single pixel is brighter than 0.5."""
    images = keras.Input((1, 1, 3))
    logits = keras.layers.Dense(2, name="logits")(keras.layers.Flatten()(images))
    classifier = keras.Model(images, logits)
    kernel = np.array([[-1.0, 1.0]] * 3, np.float32)
    classifier.get_layer("logits").set_weights([kernel, np.array([1.5, -1.5], np.float32)])
    return classifier


def test_each_image_is_counted_under_its_id():
    values = np.array([0.1, 0.45, 0.55, 0.9, 0.2, 0.8, 0.95], np.float32)
    labels = np.array([0, 0, 1, 1, 1, 0, 1], np.int32)
    images = np.broadcast_to(values[:, None, None, None], (7, 1, 1, 3))
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(3)
    attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=4)
    ids = np.array([70, 10, 60, 20, 50, 30, 40])
    evaluation = evaluate_classifier(brightness_classifier(), dataset, attack=attack, ids=ids)
    outcomes = evaluation.outcomes
    assert outcomes.ids.tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert outcomes.labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert outcomes.predictions.tolist() == [0, 1, 1, 1, 0, 1, 0]
    assert outcomes.robust.tolist() == [
        False,
        True,
        False,
        True,
        False,
        False,
        True,
    ]  # the attack can turn 0.45 and 0.55
    assert (evaluation.clean_accuracy, evaluation.robust_accuracy) == (5 / 7, 3 / 7)
    assert evaluation.robust_interval == wilson_interval(3, 7)
    assert evaluation.confusion.tolist() == [[2, 1], [1, 3]]
    kinds = {round(float(each.image[0, 0, 0]), 2): each.kind for each in evaluation.examples}
    assert kinds == {
        0.1: "resists",
        0.45: "falls",
        0.55: "falls",
        0.9: "resists",
        0.2: "wrong",
        0.8: "wrong",
        0.95: "resists",
    }
    turned = next(each for each in evaluation.examples if np.isclose(each.image[0, 0, 0], 0.45))
    np.testing.assert_allclose(turned.image_adv, turned.image + 0.1, atol=1e-6)


def test_without_an_attack_there_are_no_robust_figures():
    dataset = tf.data.Dataset.from_tensor_slices((np.zeros((2, 1, 1, 3), np.float32), np.array([0, 1], np.int32)))
    attack = AttackConfig(norm="linf", epsilon=0.0, step_size=0.0, steps=0)
    evaluation = evaluate_classifier(brightness_classifier(), dataset.batch(2), attack=attack, ids=np.arange(2))
    assert evaluation.robust_accuracy is None and evaluation.robust_interval is None
    assert evaluation.outcomes.predictions_adv is None
    assert evaluation.mean_per_class_accuracy == pytest.approx(0.5)
