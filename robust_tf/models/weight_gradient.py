"""Convolutions in bfloat16 whose weight gradients are computed as products of matrices.

On CPUs TensorFlow's own kernel for this gradient takes up to four times as long where a layer has many channels and few
pixels (see tests/bench/README.md).
"""

import math
from typing import Any

import keras
import tensorflow as tf

# The products were faster with at least this number of input channels, and no more pixels of the output than channels.
_MANY_CHANNELS = 128


def has_fast_weight_gradient(layer: keras.Operation) -> bool:
    """Whether `convolved` can compute what a layer does, and is faster for images of some sizes."""
    if type(layer) is not keras.layers.Conv2D or layer.compute_dtype != "bfloat16" or not layer.built:
        return False
    if tf.config.list_logical_devices("GPU"):
        return False
    own_kernel = layer.quantization_mode is None and not getattr(layer, "lora_enabled", False)
    plain = layer.data_format == "channels_last" and layer.groups == 1 and layer.dilation_rate == (1, 1)
    # Keras adds a loss to the outputs of a layer with an activity regularizer.
    return own_kernel and plain and layer.activity_regularizer is None and layer.kernel.shape[2] >= _MANY_CHANNELS


def convolved(layer: keras.layers.Conv2D, x: tf.Tensor) -> tf.Tensor:
    """Returns what a layer returns. If it is faster, the gradient of its kernel is computed from products of matrices.

    Args:
        layer: Layer for which `has_fast_weight_gradient` is true.
        x: Input (batch, height, width, channels).
    """
    x = tf.cast(x, layer.compute_dtype)
    kernel = tf.cast(keras.ops.convert_to_tensor(layer.kernel), layer.compute_dtype)
    pads = [_pads(*sizes, layer.padding) for sizes in zip(x.shape[1:3], layer.kernel_size, layer.strides, strict=True)]
    padded = [None if size is None else size + sum(pad) for size, pad in zip(x.shape[1:3], pads, strict=True)]
    if None in padded:
        return layer(x)
    pixels = math.prod(
        (size - window) // stride + 1
        for size, window, stride in zip(padded, layer.kernel_size, layer.strides, strict=True)
    )
    if pixels > kernel.shape[2]:
        return layer(x)
    strides, padding = [1, *layer.strides, 1], layer.padding.upper()

    @tf.custom_gradient
    def convolution(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradients(of_outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            of_x = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(x), filter=kernel, out_backprop=of_outputs, strides=strides, padding=padding
            )
            around = tf.pad(x, [[0, 0], *pads, [0, 0]]) if padding == "SAME" else x
            return of_x, _of_kernel(around, of_outputs, kernel.shape, layer.strides)

        return tf.nn.conv2d(x, kernel, strides, padding), gradients

    y = convolution(x, kernel)
    if layer.use_bias:
        y = tf.nn.bias_add(y, tf.cast(keras.ops.convert_to_tensor(layer.bias), layer.compute_dtype))
    return y if layer.activation is None else layer.activation(y)


def _pads(size: int | None, window: int, stride: int, padding: str) -> list[int]:
    """Returns how many pixels a padding adds before and after an axis."""
    if size is None or padding == "valid":
        return [0, 0]
    missing = max((-(-size // stride) - 1) * stride + window - size, 0)
    return [missing // 2, missing - missing // 2]


def _of_kernel(x: tf.Tensor, of_outputs: tf.Tensor, shape: tf.TensorShape, strides: tuple[int, int]) -> tf.Tensor:
    """Returns the gradient of a kernel (height, width, channels, filters).

    Args:
        x: Padded input (batch, height, width, channels).
        of_outputs: Gradient of the outputs (batch, new height, new width, filters).
        shape: Shape of the kernel.
        strides: Strides of the convolution.
    """
    window, (channels, filters) = shape[:2], shape[2:]
    height, width = of_outputs.shape[1:3]
    of_outputs = tf.reshape(of_outputs, [-1, filters])
    if strides == (1, 1):
        # The input that each element of the kernel has seen.
        size = [-1, height, width, channels]
        seen = [tf.slice(x, [0, i, j, 0], size) for i in range(window[0]) for j in range(window[1])]
        products = [tf.matmul(tf.reshape(part, [-1, channels]), of_outputs, transpose_a=True) for part in seen]
        return tf.reshape(tf.stack(products), shape)
    # Slices with strides are slow.
    patches = tf.image.extract_patches(x, [1, *window, 1], [1, *strides, 1], [1, 1, 1, 1], "VALID")
    patches = tf.reshape(patches, [-1, math.prod(window) * channels])
    return tf.reshape(tf.matmul(patches, of_outputs, transpose_a=True), shape)
