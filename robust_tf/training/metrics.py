"""Figures of classification that Keras lacks."""

import math
from typing import Any

import keras
import numpy as np


def true_classes(labels: Any) -> Any:
    """(batch,) int32 from labels (batch,) or (batch, 1), or from the shares (batch, num_classes) of mixed images."""
    if len(labels.shape) == 2 and labels.shape[-1] != 1:
        return keras.ops.cast(keras.ops.argmax(labels, axis=-1), "int32")
    return keras.ops.reshape(keras.ops.cast(labels, "int32"), (-1,))


@keras.saving.register_keras_serializable(package="robust_tf")
class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy with labels, or with the shares of classes that mixed images have."""

    from_logits = True  # as Keras's own losses say it

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if len(y_true.shape) == 2 and y_true.shape[-1] != 1:
            return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


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


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share, e.g. an accuracy. Source: Wilson 1927, JASA 22(158), 209-212.

    Args:
        hits: how often it happened.
        total: out of how many, at least 1.

    Returns:
        The lower and upper end, in [0, 1].
    """
    z = 1.959964  # 97.5 % quantile of the normal distribution
    share = hits / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_per_class(confusion: np.ndarray) -> float:
    """Mean accuracy over the classes (rows: true class) that occurred."""
    totals = confusion.sum(axis=1)
    return float((confusion.diagonal()[totals > 0] / totals[totals > 0]).mean())
