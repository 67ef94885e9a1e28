"""Figures of classification that Keras lacks."""

from typing import Any

import keras


def true_classes(labels: Any) -> Any:
    """(batch,) int32 from labels (batch,) or (batch, 1), or from the shares (batch, num_classes) of mixed images."""
    if len(labels.shape) == 2 and labels.shape[-1] != 1:
        return keras.ops.cast(keras.ops.argmax(labels, axis=-1), "int32")
    return keras.ops.reshape(keras.ops.cast(labels, "int32"), (-1,))


@keras.saving.register_keras_serializable(package="robust_tf")
class CrossEntropy(keras.losses.Loss):
    """Softmax cross-entropy with labels, or with the shares of classes that mixed images have."""

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
