"""Max pooling from operations that have deterministic kernels in XLA."""

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf


def max_pool(x: tf.Tensor, *, size: Sequence[int], strides: Sequence[int], padding: str) -> tf.Tensor:
    """Returns `tf.nn.max_pool2d(x, size, strides, padding)`, computed from slices.

    XLA has no deterministic gradient for max pooling on a GPU, and TensorFlow refuses to compile one, also on a CPU.
    The gradient is the same here, up to the rounding of sums: among equal values it goes to the first of the window.

    Args:
        x: Input (batch, height, width, channels).
        size: Height and width of the window.
        strides: Steps of the window along the height and the width.
        padding: "valid" or "same".

    Returns:
        Output (batch, new height, new width, channels) of the same dtype.

    Example:
        >>> import tensorflow as tf
        >>> images = tf.reshape(tf.range(16.0), (1, 4, 4, 1))
        >>> max_pool(images, size=(2, 2), strides=(2, 2), padding="valid")[0, :, :, 0].numpy().tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    shape = tf.shape(x)
    lengths = [x.shape[axis] if x.shape[axis] is not None else shape[axis] for axis in (1, 2)]
    if padding == "same":
        paddings = []
        for length, window, stride in zip(lengths, size, strides, strict=True):
            missing = (-(-length // stride) - 1) * stride + window - length
            missing = tf.maximum(missing, 0)
            paddings.append([missing // 2, missing - missing // 2])
        x = tf.pad(x, [[0, 0], *paddings, [0, 0]], constant_values=x.dtype.min)
        lengths = [length + sum(pads) for length, pads in zip(lengths, paddings, strict=True)]
    # Where the last window begins, plus one.
    height, width = (
        (length - window) // stride * stride + 1 for length, window, stride in zip(lengths, size, strides, strict=True)
    )
    slices = [
        x[:, top : top + height : strides[0], left : left + width : strides[1]]
        for top in range(size[0])
        for left in range(size[1])
    ]
    # The gradient of `maximum` goes to its first argument if both are equal.
    return functools.reduce(tf.maximum, slices)


def use_deterministic_pooling(model: keras.Model) -> None:
    """Lets the MaxPooling2D layers of a model compute with `max_pool` from now on.

    Their configuration stays the same, and so does the saved file.

    Args:
        model: Model with the layers, including those in nested models.
    """
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            use_deterministic_pooling(layer)
        elif type(layer) is keras.layers.MaxPooling2D and layer.data_format == "channels_last":
            layer.call = functools.partial(max_pool, size=layer.pool_size, strides=layer.strides, padding=layer.padding)
