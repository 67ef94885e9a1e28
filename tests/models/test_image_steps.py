"""Clipping, normalization and blocks of pixels: the values and gradients are Keras's and TensorFlow's, bit by bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models import image_steps

RNG = np.random.default_rng(0)
MEAN, VARIANCE = [0.485, 0.456, 0.406], [0.05, 0.0, 0.06]  # with a variance of 0, Keras divides by its own epsilon


def value_and_gradient(function, x: tf.Tensor) -> list[np.ndarray]:
    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        shares = tf.cos(tf.reshape(tf.range(tf.size(y), dtype=tf.float32), tf.shape(y)))
        return y, tape.gradient(y, x, output_gradients=tf.cast(shares, y.dtype))

    return [tf.cast(value, tf.float32).numpy() for value in run(x)]


def clip_operation(low: float, high: float):
    inputs = keras.Input((3,))
    return keras.ops.clip(inputs, low, high)._keras_history.operation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clipping_has_the_gradient_of_tensorflow_inside_outside_and_at_the_limits(dtype):
    operation = clip_operation(0, 1)
    x = tf.constant([-2.0, -0.0, 0.0, 1e-30, 0.5, 1.0, 1.5, np.inf, -np.inf, np.nan], dtype)
    ours = value_and_gradient(lambda x: image_steps.clipped(operation, x), x)
    theirs = value_and_gradient(operation, x)
    for value, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert np.count_nonzero(ours[1]) == 5  # from -0.0 to 1.0


def test_an_infinite_gradient_does_not_pass_a_limit():
    """As with TensorFlow's own gradient, and other than with a product of the gradient and a mask."""
    with tf.GradientTape() as tape:
        x = tf.constant([0.5, 2.0])
        tape.watch(x)
        y = image_steps.clipped(clip_operation(0, 1), x)
    assert tape.gradient(y, x, output_gradients=tf.constant([np.inf, np.inf])).numpy().tolist() == [np.inf, 0.0]


def test_only_the_operation_of_keras_is_a_clip():
    assert image_steps.is_clip(clip_operation(0, 1))
    assert not image_steps.is_clip(keras.ops.abs(keras.Input((3,)))._keras_history.operation)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 5, 7, 3), "float32"), ((3, 4, 4, 3), "bfloat16")])
def test_normalization_is_that_of_keras(shape, dtype):
    layer = keras.layers.Normalization(axis=-1, mean=MEAN, variance=VARIANCE, dtype=dtype)
    layer.build(shape)
    assert image_steps.is_normalization(layer)
    x = tf.constant(RNG.random(shape), tf.float32)
    graph = tf.function(lambda x: image_steps.normalized(layer, x)).get_concrete_function(x).graph
    assert "Tile" in [operation.type for operation in graph.get_operations()]  # in rows
    for ours, expected in zip(
        value_and_gradient(lambda x: image_steps.normalized(layer, x), x), value_and_gradient(layer, x), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("form", ["unknown size", "matrix", "many channels", "one value for all", "adapted"])
def test_other_normalizations_are_those_of_keras_too(form):
    shape = {"matrix": (6, 3), "many channels": (2, 4, 4, 8)}.get(form, (2, 4, 5, 3))
    x = tf.constant(RNG.random(shape), tf.float32)
    if form == "adapted":
        layer = keras.layers.Normalization()
        layer.adapt(x.numpy())
    elif form == "one value for all":
        layer = keras.layers.Normalization(axis=None, mean=0.5, variance=0.25)
    else:
        layer = keras.layers.Normalization(mean=np.linspace(0.1, 0.9, shape[-1]), variance=[0.5] * shape[-1])
    if form != "adapted":
        layer.build(shape)
    signature = [tf.TensorSpec([None] * 4 if form == "unknown size" else shape)]
    run = tf.function(lambda x: image_steps.normalized(layer, x), input_signature=signature)
    np.testing.assert_array_equal(run(x), layer(x))


def test_what_is_no_plain_normalization_is_left_to_keras():
    inverse = keras.layers.Normalization(mean=MEAN, variance=VARIANCE, invert=True)
    inverse.build((1, 2, 2, 3))
    assert not image_steps.is_normalization(inverse)
    assert not image_steps.is_normalization(keras.layers.Normalization(mean=MEAN, variance=VARIANCE))  # not built
    assert not image_steps.is_normalization(keras.layers.Rescaling(2.0))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 2, 2, 1), (0, 4, 4, 3)])
def test_blocks_are_those_of_space_to_depth(shape):
    x = tf.constant(RNG.random(shape), tf.float32)
    for ours, expected in zip(
        value_and_gradient(image_steps.blocks_of_pixels, x),
        value_and_gradient(lambda x: tf.nn.space_to_depth(x, 2), x) if shape[0] else [np.zeros((0, 2, 2, 12)), x],
        strict=True,
    ):
        np.testing.assert_array_equal(ours, expected)
