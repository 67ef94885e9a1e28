"""Builds and saves large weights with one copy in memory, where TensorFlow and Keras would make up to three."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def untouched_zeros(shape: Sequence[int]) -> np.ndarray:
    """Returns float32 zeros for `tensor_over`. They take no memory until something is written to them.

    Args:
        shape: Shape of the array.
    """
    count = int(np.prod(shape))
    # TensorFlow uses memory without copying it only if it is aligned to 64 bytes.
    memory = np.zeros(4 * count + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][: 4 * count].view(np.float32).reshape(shape)


def tensor_over(array: np.ndarray) -> tf.Tensor:
    """Returns a tensor that shares the memory of an array from `untouched_zeros`.

    Args:
        array: Array from `untouched_zeros`. Do not write to it afterwards.
    """
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


class UntouchedZeros(keras.initializers.Initializer):
    """Initializer of zeros that take no memory, for weights that are about to be replaced.

    Args:
        instead_of: Initializer that these weights would normally have.
    """

    def __init__(self, instead_of: keras.initializers.Initializer) -> None:
        self.instead_of = instead_of

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        """Returns zeros of the given shape. Only float32 zeros save memory.

        Args:
            shape: Shape of the weight.
            dtype: Data type, by default float32.
        """
        if dtype not in (None, "float32", tf.float32):
            return tf.zeros(shape, dtype)
        return tensor_over(untouched_zeros(shape))


@contextlib.contextmanager
def saved_without_copies(model: keras.Model) -> Iterator[None]:
    """Returns a context in which Keras saves weights without copying them. Normally Keras copies each weight twice.

    Args:
        model: Model that is saved within the context.
    """
    kinds = (keras.layers.Dense, keras.layers.Conv2D)  # only these have large weights
    layers = [
        layer
        for layer in model.layers
        if isinstance(layer, kinds)
        and layer.quantization_mode is None
        and all(weight.dtype == "float32" for weight in layer.weights)  # Python buffers do not support bfloat16
    ]
    for layer in layers:
        layer.save_own_variables = functools.partial(_save_weights, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.save_own_variables


def _save_weights(layer: keras.layers.Layer, store: Any) -> None:
    """Stores the weights under their numbers, as `keras.layers.Layer.save_own_variables` does."""
    for number, weight in enumerate(layer.weights):
        store[str(number)] = _InPlace(np.asarray(memoryview(tf.convert_to_tensor(weight.value))))


class _InPlace:
    """Wraps an array so that NumPy does not copy it, although Keras asks for a copy."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array if dtype is None else self._array.astype(dtype)
