"""BatchNorm in training: PyTorch's rule for the moving variance, and statistics over several replicas."""

import contextlib
from collections.abc import Collection, Iterator

import keras
import tensorflow as tf


@contextlib.contextmanager
def unbiased_statistics(
    model: keras.Model,
    batch_size: tf.Tensor,
    *,
    passes: int = 1,
    replicas: int = 1,
    besides: Collection[keras.layers.Layer] = (),
) -> Iterator[None]:
    """Returns a context in which forward passes update the moving variance with the unbiased variance of the batch.

    PyTorch uses the unbiased variance, Keras the biased one. Layers whose input size is unknown when the model is built
    always behave as in Keras.

    Args:
        model: Model with the BatchNormalization layers, including those in nested models.
        batch_size: Number of images on this replica, a scalar int32.
        passes: Number of forward passes in training mode within the context.
        replicas: Number of replicas that share the statistics of a synchronized layer.
        besides: Layers that follow PyTorch's rule by themselves.
    """
    done = set(map(id, besides))
    layers = [layer for layer in flat_layers(model) if _is_updated(layer) and id(layer) not in done]
    before = [tf.identity(layer.moving_variance) for layer in layers]
    yield
    for layer, variance in zip(layers, before, strict=True):
        _make_unbiased(layer, variance, batch_size * (replicas if layer.synchronized else 1), passes)


def prepare_batchnorm(model: keras.Model, *, synchronized: bool) -> None:
    """Sets whether BatchNorm layers train with the statistics of the whole batch or of each replica's share.

    Args:
        model: Model with the BatchNormalization layers, including those in nested models.
        synchronized: True for the statistics of the whole batch.
    """
    for layer in flat_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = synchronized


def has_synchronized_batchnorm(model: keras.Model) -> bool:
    """Returns whether some BatchNorm layer computes its statistics from the images of all replicas in training mode.

    Args:
        model: Model with the BatchNormalization layers, including those in nested models.
    """
    norms = (layer for layer in flat_layers(model) if isinstance(layer, keras.layers.BatchNormalization))
    return any(layer.synchronized and layer.trainable for layer in norms)


def _is_updated(layer: keras.layers.Layer) -> bool:
    is_batchnorm = isinstance(layer, keras.layers.BatchNormalization)
    return is_batchnorm and layer.trainable and _positions(layer) is not None


def flat_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers of a model, including those of nested models."""
    layers: list[keras.layers.Layer] = []
    for layer in model.layers:
        layers += flat_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return layers


def _positions(layer: keras.layers.Layer) -> int | None:
    """Returns how many values each image adds to a channel's statistics, or None if that is not known."""
    try:
        shape = layer.input.shape
    except (AttributeError, ValueError):  # the layer is not part of a functional graph, or used more than once
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
    """Replaces the biased batch variances in the moving variance with unbiased ones, n / (n - 1) times as large."""
    count = tf.cast(batch_size * _positions(layer), tf.float32)
    kept = layer.momentum**passes * variance_before
    followed = layer.moving_variance - kept
    layer.moving_variance.assign(kept + followed * count / tf.maximum(count - 1.0, 1.0))
