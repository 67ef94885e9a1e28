"""Losses, metrics and class weights for classification that Keras lacks."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np


def true_classes(labels: Any) -> Any:
    """Returns the true class of each image, (batch,) int32.

    Args:
        labels: Labels (batch,) or (batch, 1), or, for mixed images, the share of each class, (batch, num_classes).
    """
    if _are_shares(labels):
        return keras.ops.cast(keras.ops.argmax(labels, axis=-1), "int32")
    return keras.ops.reshape(keras.ops.cast(labels, "int32"), (-1,))


def _counts(sample_weight: Any, dtype: str) -> Any:
    """Returns 1 for images that count and 0 for images of weight 0, (batch,), or None without weights."""
    # Not the weights themselves: sums of a weight such as 1.1 are rounded, and sums of 1 are exact.
    return None if sample_weight is None else keras.ops.cast(keras.ops.not_equal(sample_weight, 0), dtype)


def _are_shares(labels: Any) -> bool:
    return len(labels.shape) == 2 and labels.shape[-1] != 1


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns weights that give every class the same total weight. The average weight of an image is 1.

    Args:
        labels: Labels of the images, (num_images,) int, at least one.
        num_classes: Number of classes. Classes that do not occur get weight 0.

    Returns:
        Weights (num_classes,), float64: num_images / (number of classes that occur * number of images of the class).

    Example:
        >>> import numpy
        >>> balanced_class_weights(numpy.array([0, 0, 0, 1]), num_classes=2).round(2).tolist()
        [0.67, 2.0]
    """
    counts = np.bincount(labels, minlength=num_classes)
    occurring = np.count_nonzero(counts)
    return np.where(counts > 0, len(labels) / (occurring * np.maximum(counts, 1)), 0.0)


@keras.saving.register_keras_serializable(package="robust_tf")
class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy of logits, with integer labels or with the class shares of mixed images.

    Args:
        class_weights: Factor for the loss of the images of each class, (num_classes,). A mixed image gets the mean of
            the factors, weighted by its class shares. None means no factors.
        name: Name of the loss.
        **kwargs: Further arguments of `keras.losses.Loss`.
    """

    def __init__(
        self, class_weights: Sequence[float] | None = None, name: str = "cross_entropy", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))

    from_logits = True  # named as in Keras's own losses

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, (batch,).

        Args:
            y_true: Labels (batch,) or (batch, 1), or shares (batch, num_classes).
            y_pred: Logits (batch, num_classes).
        """
        if _are_shares(y_true):
            losses = keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)
        else:
            losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        return losses if self.class_weights is None else losses * self.weights_of(y_true, losses.dtype)

    def weights_of(self, y_true: Any, dtype: str = "float32") -> Any:
        """Returns the factor on the loss of each image, (batch,).

        Args:
            y_true: Labels (batch,) or (batch, 1), or shares (batch, num_classes).
            dtype: Data type of the factors.
        """
        if self.class_weights is None:
            return keras.ops.ones((keras.ops.shape(y_true)[0],), dtype)
        weights = keras.ops.convert_to_tensor(self.class_weights, dtype)
        if _are_shares(y_true):
            return keras.ops.sum(keras.ops.cast(y_true, dtype) * weights, axis=-1)
        return keras.ops.take(weights, true_classes(y_true), axis=0)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "class_weights": self.class_weights}


@keras.saving.register_keras_serializable(package="robust_tf")
class Accuracy(keras.metrics.Mean):
    """Share of images that are classified correctly. The true class of a mixed image is the one with the largest share.

    Args:
        name: Name of the metric.
        **kwargs: Further arguments of `keras.metrics.Mean`.
    """

    def __init__(self, name: str = "accuracy", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Adds a batch.

        Args:
            y_true: Labels (batch,) or (batch, 1), or shares (batch, num_classes).
            y_pred: Logits or probabilities (batch, num_classes).
            sample_weight: Weights of the images, (batch,), or None. Images of weight 0 are not counted, and all others
                count equally.
        """
        hits = keras.ops.equal(true_classes(y_true), keras.ops.cast(keras.ops.argmax(y_pred, axis=-1), "int32"))
        return super().update_state(keras.ops.cast(hits, self.dtype), _counts(sample_weight, self.dtype))


@keras.saving.register_keras_serializable(package="robust_tf")
class MeanPerClassAccuracy(keras.metrics.Metric):
    """Accuracy of each class, averaged over the classes that occur.

    The paper on robust transfer (Salman et al. 2020, arXiv 2007.08489) reports it for data sets with uneven classes.

    Args:
        num_classes: Number of classes.
        name: Name of the metric.
        **kwargs: Further arguments of `keras.metrics.Metric`.

    Example:
        >>> import numpy
        >>> metric = MeanPerClassAccuracy(num_classes=2)
        >>> labels, logits = numpy.array([0, 0, 0, 1]), numpy.array([[1.0, 0.0]] * 4)
        >>> metric.update_state(labels, logits)  # 3 of 3 images of class 0 are correct, 0 of 1 of class 1
        >>> float(metric.result())
        0.5
    """

    def __init__(self, num_classes: int, name: str = "mean_per_class_accuracy", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_classes = num_classes
        self._hits = self.add_variable((num_classes,), "zeros", name="hits")
        self._total = self.add_variable((num_classes,), "zeros", name="total")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch.

        Args:
            y_true: Labels (batch,) or (batch, 1), or shares (batch, num_classes).
            y_pred: Logits or probabilities (batch, num_classes).
            sample_weight: Weights of the images, (batch,), or None. Images of weight 0 are not counted, and all others
                count equally.
        """
        labels = keras.ops.one_hot(true_classes(y_true), self.num_classes)
        labels = keras.ops.cast(labels, self.dtype)
        counts = _counts(sample_weight, self.dtype)
        if counts is not None:
            labels = labels * keras.ops.reshape(counts, (-1, 1))
        predicted = keras.ops.one_hot(keras.ops.argmax(y_pred, axis=-1), self.num_classes)
        hits = labels * keras.ops.cast(predicted, self.dtype)
        self._hits.assign_add(keras.ops.sum(hits, axis=0))
        self._total.assign_add(keras.ops.sum(labels, axis=0))

    def result(self) -> Any:
        """Returns the mean accuracy so far, a scalar."""
        seen = keras.ops.cast(self._total > 0, self.dtype)
        per_class = self._hits / keras.ops.maximum(self._total, keras.backend.epsilon())
        return keras.ops.sum(per_class * seen) / keras.ops.maximum(keras.ops.sum(seen), 1.0)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "num_classes": self.num_classes}
