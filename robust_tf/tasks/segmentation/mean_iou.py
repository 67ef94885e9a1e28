"""Mean intersection over union (mIoU) and pixel accuracy, in training and for measured predictions."""

from typing import Any

import keras
import numpy as np

from robust_tf.errors import UserError
from robust_tf.statistics import Interval
from robust_tf.tasks.segmentation.losses import labeled_pixels


class _PixelMetric(keras.metrics.Metric):
    """Base of the metrics here, which count pixels in int64: float32 would no longer count beyond 16.8 million."""

    def _count(self, name: str, shape: tuple[int, ...] = ()) -> Any:
        return self.add_variable(shape, "zeros", dtype="int64", name=name)

    @staticmethod
    def _counted(masks: Any, sample_weight: Any) -> tuple[Any, Any]:
        """Returns which pixels count, and the true classes. Images of weight 0 do not count, all others equally."""
        counted, classes = labeled_pixels(masks)
        if sample_weight is not None:
            used = keras.ops.not_equal(keras.ops.reshape(sample_weight, (-1, 1, 1)), 0)
            counted = keras.ops.logical_and(counted, used)
        return counted, classes


@keras.saving.register_keras_serializable(package="robust_tf")
class PixelAccuracy(_PixelMetric):
    """Share of labeled pixels that are classified correctly, over all images together.

    Args:
        name: Name of the metric.
        **kwargs: Further arguments of `keras.metrics.Metric`.

    Example:
        >>> import numpy
        >>> metric = PixelAccuracy()
        >>> metric.update_state(numpy.array([[[0, 1], [1, -1]]]), numpy.eye(2, dtype="float32")[[[[0, 1], [0, 0]]]])
        >>> round(float(metric.result()), 3)
        0.667
    """

    def __init__(self, name: str = "pixel_accuracy", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self._hits, self._total = self._count("hits"), self._count("total")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch.

        Args:
            y_true: Classes (batch, height, width), with -1 for ignored pixels.
            y_pred: Logits (batch, height, width, num_classes).
            sample_weight: Weights of the images, (batch,), or None. Images of weight 0 are not counted, and all others
                count equally.
        """
        counted, classes = self._counted(y_true, sample_weight)
        right = keras.ops.equal(keras.ops.cast(keras.ops.argmax(y_pred, axis=-1), "int32"), classes)
        right = keras.ops.logical_and(right, counted)
        self._hits.assign_add(keras.ops.sum(keras.ops.cast(right, "int64")))
        self._total.assign_add(keras.ops.sum(keras.ops.cast(counted, "int64")))

    def result(self) -> Any:
        """Returns the accuracy so far, a scalar; 0 before the first labeled pixel."""
        hits, total = keras.ops.cast(self._hits, "float64"), keras.ops.cast(self._total, "float64")
        return keras.ops.cast(hits / keras.ops.maximum(total, 1.0), self.dtype)


@keras.saving.register_keras_serializable(package="robust_tf")
class MeanIoU(_PixelMetric):
    """Intersection over union of each class, over all images together, averaged over the classes.

    The intersection over union of a class is the number of pixels that have the class in both mask and prediction,
    divided by the number of pixels that have it in either. Classes that occur in neither are left out of the mean.

    Args:
        num_classes: Number of classes.
        name: Name of the metric.
        **kwargs: Further arguments of `keras.metrics.Metric`.

    Source: Everingham et al. 2015, "The PASCAL visual object classes challenge: a retrospective", section 4.3.

    Example:
        >>> import numpy
        >>> metric = MeanIoU(num_classes=3)  # class 2 occurs nowhere
        >>> metric.update_state(numpy.array([[[0, 1], [1, -1]]]), numpy.eye(3, dtype="float32")[[[[0, 1], [0, 0]]]])
        >>> float(metric.result())
        0.5
    """

    def __init__(self, num_classes: int, name: str = "mean_iou", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.num_classes = num_classes
        self._confusion = self._count("confusion", (num_classes, num_classes))

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch.

        Args:
            y_true: Classes (batch, height, width), with -1 for ignored pixels.
            y_pred: Logits (batch, height, width, num_classes).
            sample_weight: Weights of the images, (batch,), or None. Images of weight 0 are not counted, and all others
                count equally.
        """
        counted, classes = self._counted(y_true, sample_weight)
        predicted = keras.ops.cast(keras.ops.argmax(y_pred, axis=-1), "int32")
        # Each pair of a true and a predicted class is a segment, and the ignored pixels are one more. A product of
        # one-hot masks would take memory for every class of every pixel.
        pairs = self.num_classes**2
        segments = keras.ops.where(counted, classes * self.num_classes + predicted, pairs)
        segments = keras.ops.reshape(segments, (-1,))
        counts = keras.ops.segment_sum(keras.ops.ones_like(segments), segments, num_segments=pairs + 1)
        confusion = keras.ops.reshape(counts[:pairs], (self.num_classes, self.num_classes))
        self._confusion.assign_add(keras.ops.cast(confusion, "int64"))

    def result(self) -> Any:
        """Returns the mean so far, a scalar; 0 before the first labeled pixel."""
        confusion = keras.ops.cast(self._confusion, "float64")
        both = keras.ops.diagonal(confusion)
        either = keras.ops.sum(confusion, axis=0) + keras.ops.sum(confusion, axis=1) - both
        occurs = keras.ops.cast(either > 0, "float64")
        ious = both / keras.ops.maximum(either, 1.0)
        mean = keras.ops.sum(ious) / keras.ops.maximum(keras.ops.sum(occurs), 1.0)
        return keras.ops.cast(mean, self.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "num_classes": self.num_classes}


def confusion_of(masks: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the confusion matrix of the pixels of each image.

    Args:
        masks: True classes (num_images, height, width) int, with -1 for ignored pixels.
        predictions: Predicted classes (num_images, height, width) int.
        num_classes: Number of classes.

    Returns:
        Numbers of labeled pixels (num_images, num_classes, num_classes) int64. Rows are true classes, columns are
        predictions.

    Raises:
        UserError: The shapes differ, or there is a number that is no class.

    Example:
        >>> import numpy
        >>> confusion_of(numpy.array([[[0, 1, 1, -1]]]), numpy.array([[[0, 1, 0, 0]]]), 2).tolist()
        [[[1, 0], [1, 1]]]
    """
    masks, predictions = np.asarray(masks), np.asarray(predictions)
    if masks.ndim != 3 or masks.shape != predictions.shape:
        raise UserError(
            "Masks and predictions must have the same shape, (num_images, height, width). Received: masks of shape "
            f"{masks.shape}, predictions of shape {predictions.shape}."
        )
    for name, values, low in (("Masks", masks, -1), ("Predictions", predictions, 0)):
        if values.dtype.kind not in "iu":
            raise UserError(f"{name} must hold integers. Received: type {values.dtype}.")
        if values.size and not (values.min() >= low and values.max() < num_classes):
            allowed = f"0..{num_classes - 1}" + (" or -1 for ignored pixels" if low else "")
            raise UserError(f"{name} must be in {allowed}. Received: values from {values.min()} to {values.max()}.")
    confusion = np.zeros((len(masks), num_classes, num_classes), np.int64)
    for image, (mask, prediction) in enumerate(zip(masks, predictions, strict=True)):
        counted = mask >= 0
        pairs = mask[counted].astype(np.int64) * num_classes + prediction[counted]
        confusion[image] = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return confusion


def miou(confusion: np.ndarray) -> float:
    """Returns the mean intersection over union. Classes that occur in neither masks nor predictions are left out.

    Args:
        confusion: Numbers of pixels (num_classes, num_classes), or those of each image, (num_images, num_classes,
            num_classes), which are added up first. Rows are true classes, columns are predictions.

    Returns:
        The mean over the classes that occur, in [0, 1].

    Raises:
        UserError: There is no labeled pixel.

    Example:
        >>> import numpy
        >>> miou(numpy.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        0.775
    """
    ious = iou_of_each_class(confusion)
    return float(ious[~np.isnan(ious)].mean())


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Returns the share of labeled pixels that are classified correctly.

    Args:
        confusion: Numbers of pixels, as in `miou`.

    Raises:
        UserError: There is no labeled pixel.

    Example:
        >>> import numpy
        >>> pixel_accuracy(numpy.array([[3, 1], [0, 4]]))
        0.875
    """
    confusion = _summed(confusion)
    return float(confusion.trace() / confusion.sum())


def iou_of_each_class(confusion: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, (num_classes,) float64, NaN for classes that do not occur.

    Args:
        confusion: Numbers of pixels, as in `miou`.

    Raises:
        UserError: There is no labeled pixel.

    Example:
        >>> import numpy
        >>> iou_of_each_class(numpy.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).tolist()
        [0.75, 0.8, nan]
    """
    confusion = _summed(confusion)
    both = confusion.diagonal()
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def bootstrap_interval(
    confusion: np.ndarray, other: np.ndarray | None = None, *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Returns the 95 % confidence interval of an mIoU, or of the difference between two models on the same images.

    The images are drawn again, with replacement, and the interval holds the middle 95 % of the mIoUs (percentile
    bootstrap). For a difference, both models are measured on the same draws. Draws without any labeled pixel are left
    out. A class that occurs in few images is missing from some draws and then left out of their mean.

    Args:
        confusion: Confusion matrix of each image, (num_images, num_classes, num_classes), see `confusion_of`.
        other: Confusion matrices of another model on the same images. The interval is then the one of the first mIoU
            minus the second.
        samples: Number of draws, at least 1.
        seed: Seed for the draws.

    Returns:
        The lower and the upper end, in [0, 1], or in [-1, 1] for a difference.

    Raises:
        UserError: There is no image or no labeled pixel, or the two arrays differ in their shape.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3.

    Example:
        >>> import numpy
        >>> good = numpy.tile([[[8, 1], [1, 8]]], (20, 1, 1))
        >>> bad = numpy.tile([[[6, 3], [3, 6]]], (20, 1, 1))
        >>> [round(end, 3) for end in bootstrap_interval(good, bad)]  # all images are the same
        [0.3, 0.3]
    """
    if samples < 1:
        raise UserError(f"`samples` must be at least 1. Received: samples={samples}.")
    models = [np.asarray(confusion)] if other is None else [np.asarray(confusion), np.asarray(other)]
    if models[0].ndim != 3 or any(model.shape != models[0].shape for model in models):
        raise UserError(
            "The bootstrap needs a confusion matrix for each image, (num_images, num_classes, num_classes), and of two "
            f"models the same images. Received: {' and '.join(str(model.shape) for model in models)}."
        )
    for model in models:
        _summed(model)
    count = len(models[0])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples).astype(np.float64)
    first, *second = [_mious(model, draws) for model in models]
    values = first - second[0] if second else first
    low, high = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
    return Interval(float(low), float(high))


def _mious(confusion: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Returns the mIoU of each draw, (samples,), NaN for a draw without labeled pixels.

    Args:
        confusion: Confusion matrix of each image, (num_images, num_classes, num_classes).
        draws: How often each image is in each draw, (samples, num_images) float64.
    """
    # Sums of whole numbers below 2**53 are exact in float64.
    both = draws @ confusion.diagonal(axis1=1, axis2=2)
    either = draws @ (confusion.sum(axis=1) + confusion.sum(axis=2)) - both
    occurs = either > 0
    counts = occurs.sum(axis=1)
    total = (both / np.maximum(either, 1)).sum(axis=1)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _summed(confusion: np.ndarray) -> np.ndarray:
    confusion = np.asarray(confusion)
    if confusion.ndim not in (2, 3) or confusion.shape[-1] != confusion.shape[-2]:
        raise UserError(
            "A confusion matrix is (num_classes, num_classes), or (num_images, num_classes, num_classes). Received: "
            f"shape {confusion.shape}."
        )
    total: np.ndarray = confusion.sum(axis=0) if confusion.ndim == 3 else confusion
    if total.sum() == 0:
        raise UserError(
            f"There must be at least one labeled pixel. Received: a confusion matrix of shape {confusion.shape} "
            "without any. Check the masks: all their pixels are ignored."
        )
    return total
