"""Weight gradients of bfloat16 convolutions as products of matrices, beside TensorFlow's and those in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.models import Execution
from robust_tf.models.weight_gradient import convolved, has_fast_weight_gradient

RNG = np.random.default_rng(0)


def convolution(channels: int = 128, **options) -> keras.layers.Conv2D:
    layer = keras.layers.Conv2D(8, **{"kernel_size": 3, "dtype": "mixed_bfloat16", **options})
    layer.build((None, None, None, channels))
    return layer


def gradients_of(run, layer: keras.layers.Conv2D, x: tf.Tensor) -> tuple[list[np.ndarray], list[str]]:
    """Returns outputs and gradients of the input and the weights in float32, and the operations of the graph."""
    weights = [weight.value for weight in layer.trainable_weights]

    @tf.function
    def traced(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = run(x)
        shares = tf.cos(tf.reshape(tf.range(tf.size(y), dtype=tf.int32), tf.shape(y)) % 97 / 7)
        return [y, *tape.gradient(y, [x, *weights], output_gradients=tf.cast(shares, y.dtype))]

    kinds = [operation.type for operation in traced.get_concrete_function(x).graph.get_operations()]
    return [tf.cast(value, tf.float32).numpy() for value in traced(x)], kinds


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": (2, 3)},
        {"kernel_size": 1},
        {"kernel_size": 1, "strides": 2},
        {"strides": 2},
        {"strides": (2, 1)},
        {"kernel_size": 4, "strides": 3, "activation": "relu"},
        {"use_bias": False},
    ],
)
def test_outputs_and_gradients_are_those_of_keras_up_to_bfloat16(options, padding):
    layer = convolution(**options, padding=padding)
    assert has_fast_weight_gradient(layer)
    x = tf.constant(RNG.normal(size=(3, 7, 6, 128)), tf.float32)
    ours, kinds = gradients_of(lambda x: convolved(layer, x), layer, x)
    theirs, kinds_of_keras = gradients_of(layer, layer, x)
    assert "Conv2DBackpropFilter" not in kinds and "Conv2DBackpropFilter" in kinds_of_keras
    exact = keras.layers.Conv2D.from_config({**layer.get_config(), "dtype": "float32"})
    exact.build(x.shape)
    exact.set_weights([tf.cast(tf.cast(weight, tf.bfloat16), tf.float32).numpy() for weight in layer.get_weights()])
    expected, _ = gradients_of(exact, exact, tf.cast(tf.cast(x, tf.bfloat16), tf.float32))
    for index, (value, of_keras, reference) in enumerate(zip(ours, theirs, expected, strict=True)):
        largest = np.abs(reference).max()
        if index < 2:  # the outputs and the gradient of the input
            np.testing.assert_array_equal(value, of_keras)
        elif index == 2:  # the gradient of the kernel is as far from the one in float32 as Keras's
            assert np.abs(value - reference).max() < 0.006 * largest
            assert np.abs(value - reference).mean() < 1.1 * np.abs(of_keras - reference).mean()
        else:  # TensorFlow itself sums the gradient of the bias in bfloat16
            np.testing.assert_allclose(value, of_keras, rtol=0, atol=0.01 * largest)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"channels": 64},
        {"channels": 256, "groups": 2},
        {"dilation_rate": 2},
        {"activity_regularizer": "l2"},
    ],
)
def test_other_convolutions_are_left_to_keras(options):
    assert not has_fast_weight_gradient(convolution(**options))


def test_images_of_many_pixels_or_unknown_size_are_left_to_keras():
    layer = convolution(use_bias=False)
    for size, signature in ((14, None), (6, [tf.TensorSpec([None, None, None, 128])])):
        x = tf.constant(RNG.normal(size=(1, size, size, 128)), tf.float32)
        run = tf.function(lambda x: convolved(layer, x), input_signature=signature)
        _, kinds = gradients_of(run, layer, x)
        graph = run.get_concrete_function(x).graph
        assert "IdentityN" not in [operation.type for operation in graph.get_operations()]
        np.testing.assert_array_equal(tf.cast(run(x), tf.float32), tf.cast(layer(x), tf.float32))
        assert kinds


@pytest.mark.parametrize("trainable", [True, False])
def test_the_training_mode_of_an_execution_uses_them(trainable):
    inputs = keras.Input((4, 4, 128))
    conv = keras.layers.Conv2D(16, 3, padding="same", dtype="mixed_bfloat16")
    model = keras.Model(inputs, conv(inputs))
    conv.trainable = trainable
    execution, x = Execution(model), tf.constant(RNG.normal(size=(2, 4, 4, 128)), tf.float32)
    weights = [weight.value for weight in model.trainable_weights]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = execution(x, training=True)
        return tape.gradient(y, [x, *weights])

    kinds = [operation.type for operation in step.get_concrete_function(x).graph.get_operations()]
    assert "Conv2DBackpropFilter" not in kinds
    assert all(gradient is not None for gradient in step(x))
