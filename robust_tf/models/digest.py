"""A digest that tells whether two classifiers have the same weights."""

import hashlib

import keras
import numpy as np


def weights_sha256(classifier: keras.Model) -> str:
    """Returns the SHA-256 of the values and shapes of all weights. It does not depend on the file that holds them.

    Args:
        classifier: Built Keras model.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> weights_sha256(model) == weights_sha256(keras.models.clone_model(model))
        True
    """
    digest = hashlib.sha256()
    for weight in classifier.get_weights():
        digest.update(f"{weight.dtype}{weight.shape}".encode())
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()
