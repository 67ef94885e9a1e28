"""Compares the attack probe with PGD written out by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.attacks.threat_models import NORMS
from robust_tf.serving.publish.probe import AttackProbe, run_probe


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    return logits[rows, labels] - others.max(axis=1)


@pytest.mark.parametrize(("norm", "largest"), [("l2", 2.0), ("linf", 0.1)])
def test_probe_returns_the_point_of_smallest_margin_of_each_image(norm, largest):
    images_in = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(6, 3, activation="relu")(images_in)
    classifier = keras.Model(images_in, keras.layers.Dense(5)(keras.layers.Flatten()(x)))
    images = np.random.default_rng(0).random((8, 6, 6, 3)).astype(np.float32)
    labels = classifier(images).numpy().argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % 5
    epsilon = np.linspace(0, largest, 8).astype(np.float32)
    steps = 6

    radius = epsilon[:, None, None, None]
    points, worst, at = images, np.full(8, np.inf), images
    for number in range(steps + 1):
        with tf.GradientTape() as tape:
            tensor = tf.constant(points)
            tape.watch(tensor)
            logits = classifier(tensor)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        lower = margin(logits.numpy(), labels) < worst
        worst = np.where(lower, margin(logits.numpy(), labels), worst)
        at = np.where(lower[:, None, None, None], points, at)
        if number < steps:
            moved = points + NORMS[norm].step(tape.gradient(loss, tensor), 2.5 * radius / steps)
            points = NORMS[norm].project(moved, images, radius).numpy()

    arguments = (tf.constant(images), tf.constant(labels, tf.int64), tf.constant(epsilon))
    result = run_probe(classifier, *arguments, probe=AttackProbe(norm=norm, steps=steps))
    np.testing.assert_allclose(result.images_adv, at, atol=1e-6)
    np.testing.assert_allclose(result.margin, worst, atol=1e-5)
    np.testing.assert_allclose(result.logits, classifier(at), atol=1e-5)
    np.testing.assert_array_equal(result.images_adv[0], images[0])
