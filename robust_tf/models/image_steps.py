"""The first steps of a network, in which an image has few channels: clipping, normalization, blocks of pixels.

TensorFlow's operations on a CPU are slow where a broadcast or a copy runs over a few values at a time. These functions
compute the same values with long runs (see tests/bench/README.md).
"""

import functools
from typing import Any

import keras
import tensorflow as tf

_FEW_CHANNELS = 4


def is_clip(operation: Any) -> bool:
    """Whether an operation of a Functional model is `keras.ops.clip`."""
    return type(operation) is _clip_class()


@functools.cache
def _clip_class() -> type:
    return type(keras.ops.clip(keras.Input((1,)), 0.0, 1.0)._keras_history.operation)


def clipped(operation: Any, x: tf.Tensor) -> tf.Tensor:
    """Returns what `keras.ops.clip` returns. The gradient is that of TensorFlow, too: 1 inside and at the limits.

    Args:
        operation: The operation, with its limits.
        x: Tensor of any shape.
    """
    if not x.dtype.is_floating:
        return operation(x)

    @tf.custom_gradient
    def clip(x: tf.Tensor) -> tuple[tf.Tensor, Any]:
        y = operation(x)
        # TensorFlow chooses between the gradient and a 0 that it broadcasts, for each of the two limits.
        return y, lambda gradient: tf.math.multiply_no_nan(gradient, tf.cast(tf.equal(x, y), gradient.dtype))

    return clip(x)


def is_normalization(layer: keras.Operation) -> bool:
    """Whether `normalized` can compute what a layer does: normalize the channels of images."""
    return type(layer) is keras.layers.Normalization and not layer.invert and layer.built


def normalized(layer: keras.layers.Normalization, x: tf.Tensor) -> tf.Tensor:
    """Returns what a Normalization layer returns, bit by bit. Images of known size are normalized row by row.

    Args:
        layer: Layer for which `is_normalization` is true.
        x: Images (batch, height, width, channels).
    """
    mean, variance = (tf.cast(layer.convert_weight(part), layer.compute_dtype) for part in (layer.mean, layer.variance))
    shape = x.shape
    per_channel = shape.rank == 4 and None not in shape[1:] and mean.shape == (1, 1, 1, shape[3])
    if not (per_channel and shape[3] <= _FEW_CHANNELS):
        return layer(x)
    row = shape[2] * shape[3]
    std = tf.maximum(tf.sqrt(variance), keras.config.epsilon())
    mean, std = (tf.tile(tf.reshape(part, [1, shape[3]]), [1, shape[2]]) for part in (mean, std))
    rows = (tf.reshape(tf.cast(x, layer.compute_dtype), [-1, row]) - mean) / std
    return tf.reshape(rows, [-1, *shape[1:]])


def blocks_of_pixels(images: tf.Tensor) -> tf.Tensor:
    """Returns `tf.nn.space_to_depth(images, 2)`.

    Args:
        images: Images (batch, height, width, channels) of known, even height and width.

    Returns:
        Blocks (batch, height / 2, width / 2, 4 * channels).
    """
    height, width, channels = images.shape[1:]
    pairs = tf.reshape(images, [-1, 2, width // 2, 2 * channels])
    blocks = tf.transpose(pairs, [0, 2, 1, 3])
    return tf.reshape(blocks, [-1, height // 2, width // 2, 4 * channels])
