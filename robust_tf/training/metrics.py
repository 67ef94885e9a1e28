"""Figures of classification that Keras lacks."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def true_classes(labels: Any) -> Any:
    """(batch,) int32 from labels (batch,) or (batch, 1), or from the shares (batch, num_classes) of mixed images."""
    if _are_shares(labels):
        return keras.ops.cast(keras.ops.argmax(labels, axis=-1), "int32")
    return keras.ops.reshape(keras.ops.cast(labels, "int32"), (-1,))


def _are_shares(labels: Any) -> bool:
    return len(labels.shape) == 2 and labels.shape[-1] != 1


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights with which every class has the same sum over these images, and an image 1 on average.

    Args:
        labels: (num_images,) int, at least one.
        num_classes: number of classes; those that don't occur have weight 0.

    Returns:
        (num_classes,) float64: num_images / (classes that occur * images of the class).
    """
    counts = np.bincount(labels, minlength=num_classes)
    occurring = np.count_nonzero(counts)
    return np.where(counts > 0, len(labels) / (occurring * np.maximum(counts, 1)), 0.0)


@keras.saving.register_keras_serializable(package="robust_tf")
class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy with labels, or with the shares of classes that mixed images have.

    Args:
        class_weights: factors on the loss of an image by its class, (num_classes,). A mixed image gets their mean over
            its shares. None leaves every loss as it is.
    """

    def __init__(
        self, class_weights: Sequence[float] | None = None, name: str = "cross_entropy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))

    from_logits = True  # as Keras's own losses say it

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """(batch,) from labels (batch,) or (batch, 1), or shares (batch, num_classes), and logits."""
        if _are_shares(y_true):
            losses = keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)
        else:
            losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        return losses if self.class_weights is None else losses * self.weights_of(y_true, losses.dtype)

    def weights_of(self, y_true: Any, dtype: str = "float32") -> Any:
        """(batch,) factors on the losses of these labels or shares."""
        if self.class_weights is None:
            return keras.ops.ones((keras.ops.shape(y_true)[0],), dtype)
        weights = keras.ops.convert_to_tensor(self.class_weights, dtype)
        if _are_shares(y_true):
            return keras.ops.sum(keras.ops.cast(y_true, dtype) * weights, axis=-1)
        return keras.ops.take(weights, true_classes(y_true), axis=0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "class_weights": self.class_weights}


@keras.saving.register_keras_serializable(package="robust_tf")
class Accuracy(keras.metrics.Mean):
    """Share of the images whose prediction is the label, or the largest share of a mixed one."""

    def __init__(self, name: str = "accuracy", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Counts labels (batch,) or shares (batch, num_classes) against logits (batch, num_classes)."""
        hits = keras.ops.equal(true_classes(y_true), keras.ops.cast(keras.ops.argmax(y_pred, axis=-1), "int32"))
        return super().update_state(keras.ops.cast(hits, self.dtype), sample_weight)


@keras.saving.register_keras_serializable(package="robust_tf")
class MeanPerClassAccuracy(keras.metrics.Metric):
    """Accuracy of each class, averaged over the classes that occurred: what the paper reports for uneven data sets.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, num_classes: int, name: str = "mean_per_class_accuracy", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_classes = num_classes
        self._hits = self.add_variable((num_classes,), "zeros", name="hits")
        self._total = self.add_variable((num_classes,), "zeros", name="total")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts labels (batch,) against logits or probabilities (batch, num_classes)."""
        labels = keras.ops.one_hot(true_classes(y_true), self.num_classes)
        labels = keras.ops.cast(labels, self.dtype)
        if sample_weight is not None:
            labels = labels * keras.ops.reshape(keras.ops.cast(sample_weight, self.dtype), (-1, 1))
        predicted = keras.ops.one_hot(keras.ops.argmax(y_pred, axis=-1), self.num_classes)
        hits = labels * keras.ops.cast(predicted, self.dtype)
        self._hits.assign_add(keras.ops.sum(hits, axis=0))
        self._total.assign_add(keras.ops.sum(labels, axis=0))

    def result(self) -> Any:
        seen = keras.ops.cast(self._total > 0, self.dtype)
        per_class = self._hits / keras.ops.maximum(self._total, keras.backend.epsilon())
        return keras.ops.sum(per_class * seen) / keras.ops.maximum(keras.ops.sum(seen), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_classes": self.num_classes}
