"""A folded network gives the same answers as the trained one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models import build_classifier
from robust_tf.models.folding import fold_batch_norm


def with_statistics(classifier: keras.Model) -> keras.Model:
    """Sets scales, shifts, means and variances that differ from those of a new classifier."""
    rng = np.random.default_rng(0)
    for layer in classifier.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return classifier


def batch_norms(model: keras.Model) -> int:
    return sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)


def relative_difference(one, other) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max() / np.abs(np.asarray(other)).max())


@pytest.mark.parametrize(
    ("architecture", "left"),
    [("resnet20", 0), ("mobilenet_v2", 0), pytest.param("densenet161", 82, marks=pytest.mark.slow)],
)
def test_outputs_and_gradients_equal_those_of_the_classifier(architecture, left):
    size = 32
    classifier = with_statistics(build_classifier(architecture, 5, image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3))
    before = [weight.copy() for weight in classifier.get_weights()]
    folded = fold_batch_norm(classifier)
    assert batch_norms(folded) == left < batch_norms(classifier)
    images = tf.constant(np.random.default_rng(1).uniform(0, 1, (2, size, size, 3)), tf.float32)
    gradients = []
    for model in (folded, classifier):
        with tf.GradientTape() as tape:
            tape.watch(images)
            logits = model(images, training=False)
        gradients.append(tape.gradient(logits, images))
    assert relative_difference(folded(images), classifier(images)) < 1e-5
    assert relative_difference(*gradients) < 1e-4
    assert not folded.trainable_weights
    for ours, theirs in zip(classifier.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bias_missing_scale_and_depth_multiplier():
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, name="biased", bias_initializer="ones")(inputs)
    x = keras.layers.BatchNormalization(scale=False, name="no_scale")(x)
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization(center=False)(x)
    classifier = with_statistics(keras.Model(inputs, keras.layers.Flatten()(x)))
    folded = fold_batch_norm(classifier)
    assert batch_norms(folded) == 0
    images = np.random.default_rng(0).random((2, 6, 6, 3)).astype(np.float32)
    assert relative_difference(folded(images), classifier(images)) < 1e-5


def test_layers_that_cannot_be_folded_are_kept():
    inputs = keras.Input((6, 6, 3))
    twice = keras.layers.Conv2D(3, 3, padding="same", name="twice")
    x = keras.layers.BatchNormalization(name="after_shared")(twice(twice(inputs)))
    x = keras.layers.Conv2D(3, 3, activation="relu", name="activated")(x)
    x = keras.layers.BatchNormalization(name="after_activation")(x)
    forked = keras.layers.Conv2D(3, 3, name="forked")(x)
    x = keras.layers.Add()([keras.layers.BatchNormalization(name="after_fork")(forked), forked])
    half = keras.layers.Conv2D(3, 1, dtype="mixed_bfloat16", name="half")(x)
    x = keras.layers.BatchNormalization(name="after_half")(half)
    x = keras.layers.Conv2D(3, 1, name="plain")(x)
    x = keras.layers.BatchNormalization(name="folded")(x)
    classifier = with_statistics(keras.Model(inputs, x))
    folded = fold_batch_norm(classifier)
    kept = {layer.name for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)}
    assert kept == {"after_shared", "after_activation", "after_fork", "after_half"}
    images = np.random.default_rng(0).random((2, 6, 6, 3)).astype(np.float32)
    assert relative_difference(folded(images), classifier(images)) < 1e-5


def test_without_anything_to_fold_the_classifier_itself_is_returned():
    plain = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()])
    assert fold_batch_norm(plain) is plain
    inputs = keras.Input((4, 4, 3))
    functional = keras.Model(inputs, keras.layers.Flatten()(inputs))
    assert fold_batch_norm(functional) is functional


def test_a_batchnorm_that_is_also_called_elsewhere_is_kept():
    inputs = keras.Input((6, 6, 3))
    norm = keras.layers.BatchNormalization()
    x = keras.layers.Concatenate()([norm(keras.layers.Conv2D(3, 3, padding="same")(inputs)), norm(inputs)])
    classifier = with_statistics(keras.Model(inputs, keras.layers.Flatten()(x)))
    images = np.random.default_rng(1).uniform(0, 1, (2, 6, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(fold_batch_norm(classifier)(images), classifier(images), atol=1e-5)


def test_other_axes_and_adapted_kernels_are_left_alone():
    inputs = keras.Input((6, 6, 3))
    adapted = keras.layers.Conv2D(4, 3)
    x = keras.layers.BatchNormalization(axis=1)(keras.layers.Conv2D(4, 3)(inputs))
    classifier = with_statistics(keras.Model(inputs, keras.layers.BatchNormalization()(adapted(x))))
    adapted.enable_lora(2)
    adapted.lora_kernel_b.assign(keras.random.normal(adapted.lora_kernel_b.shape, seed=1))
    assert fold_batch_norm(classifier) is classifier
