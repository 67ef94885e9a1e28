"""Weights of hundreds of megabytes: one copy of each in memory, where TensorFlow and Keras make up to three."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def untouched_zeros(shape: Sequence[int]) -> np.ndarray:
    """Float32 zeros that take no memory until something is written to them, for `tensor_over`."""
    count = int(np.prod(shape))
    # TensorFlow takes memory over that begins at a multiple of 64 bytes.
    memory = np.zeros(4 * count + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][: 4 * count].view(np.float32).reshape(shape)


def tensor_over(array: np.ndarray) -> tf.Tensor:
    """A tensor in the memory of an `untouched_zeros` array, which must not be written to any more."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class UntouchedZeros(keras.initializers.Initializer):
    """Zeros for weights that are replaced at once.

    Args:
        instead_of: the initializer that these weights have otherwise.
    """

    def __init__(self, instead_of: keras.initializers.Initializer) -> None:
        self.instead_of = instead_of

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        """A tensor of the shape; in another type than float32, zeros as any."""
        if dtype not in (None, "float32", tf.float32):
            return tf.zeros(shape, dtype)
        return tensor_over(untouched_zeros(shape))


@contextlib.contextmanager
def saved_without_copies(model: keras.Model) -> Iterator[None]:
    """What Keras saves inside goes to the file from where it is; Keras copies each weight twice for that."""
    kinds = (keras.layers.Dense, keras.layers.Conv2D)  # only their weights are large
    layers = [
        layer
        for layer in model.layers
        if isinstance(layer, kinds)
        and layer.quantization_mode is None
        and all(weight.dtype == "float32" for weight in layer.weights)  # bfloat16 has no place in a buffer
    ]
    for layer in layers:
        layer.save_own_variables = functools.partial(_save_weights, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.save_own_variables


def _save_weights(layer: keras.layers.Layer, store: Any) -> None:
    """As Keras's own: the weights by their numbers."""
    for number, weight in enumerate(layer.weights):
        store[str(number)] = _InPlace(np.asarray(memoryview(tf.convert_to_tensor(weight.value))))


class _InPlace:
    """An array that NumPy is not to copy when Keras asks it to."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)
