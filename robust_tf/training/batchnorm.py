"""BatchNorm in training: the moving variance as in PyTorch, and the statistics of several replicas."""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


@contextlib.contextmanager
def unbiased_statistics(
    model: keras.Model, batch_size: tf.Tensor, *, passes: int = 1, replicas: int = 1
) -> Iterator[None]:
    """Lets what passes in training mode within it add to the moving variances be the unbiased variance, as in PyTorch.

    Keras adds the biased one. Layers whose input size is not known when the model is built keep that.

    Args:
        model: whose BatchNormalization layers are meant, those in models inside it included.
        batch_size: scalar int32, images of this replica.
        passes: so many, one after the other.
        replicas: whose statistics are one where the layer is synchronized.
    """
    layers = [layer for layer in flat_layers(model) if _is_updated(layer)]
    before = [tf.identity(layer.moving_variance) for layer in layers]
    yield
    for layer, variance in zip(layers, before, strict=True):
        _make_unbiased(layer, variance, batch_size * (replicas if layer.synchronized else 1), passes)


def prepare_batchnorm(model: keras.Model, *, synchronized: bool) -> None:
    """Whether BatchNorm layers in training take the statistics of the whole batch or of the replica's share."""
    for layer in flat_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = synchronized


def _is_updated(layer: keras.layers.Layer) -> bool:
    is_batchnorm = isinstance(layer, keras.layers.BatchNormalization)
    return is_batchnorm and layer.trainable and _positions(layer) is not None


def flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model, those of models inside it included."""
    layers: list[keras.layers.Layer] = []
    for layer in model.layers:
        layers += flat_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return layers


def _positions(layer: keras.layers.Layer) -> int | None:
    """How many values each image adds to a channel's statistics, or None where that isn't known beforehand."""
    try:
        shape = layer.input.shape
    except (AttributeError, ValueError):  # not in a functional graph, or used more than once
        return None
    channel_axis = layer.axis % len(shape)
    count = 1
    for axis, size in enumerate(shape):
        if axis not in (0, channel_axis):
            if size is None:
                return None
            count *= size
    return count


def _make_unbiased(
    layer: keras.layers.BatchNormalization, variance_before: tf.Tensor, batch_size: tf.Tensor, passes: int
) -> None:
    """Replaces the biased batch variances in the moving variance by the unbiased ones, n / (n - 1) times as large."""
    count = tf.cast(batch_size * _positions(layer), tf.float32)
    kept = layer.momentum**passes * variance_before
    followed = layer.moving_variance - kept
    layer.moving_variance.assign(kept + followed * count / tf.maximum(count - 1.0, 1.0))
