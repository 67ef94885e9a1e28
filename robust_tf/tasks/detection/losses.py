"""Losses of a detector. Each returns one value for every image, which does not depend on the other images."""

import math
from typing import Any

import keras
from keras import ops

from robust_tf.tasks.detection.boxes import CENTER_VARIANCE, LARGEST_RATIO, SIZE_VARIANCE
from robust_tf.tasks.detection.targets import IGNORED


@keras.saving.register_keras_serializable(package="robust_tf")
class FocalLoss(keras.losses.Loss):
    """Focal loss of the classes: cross-entropy that counts anchors less if they are classified well.

    It is the sum over the anchors of an image, divided by the number of positive anchors of that image, or by 1 if
    there are none.

    Args:
        alpha: Weight of the class of a positive anchor, in [0, 1]. All other classes have the weight 1 - alpha.
        gamma: Exponent of the factor (1 - p)^gamma, where p is the probability of the truth; at least 0. With 0 the
            loss is the weighted cross-entropy.
        name: Name of the loss.
        **kwargs: Further arguments of `keras.losses.Loss`.

    Source: Lin et al. 2017, arXiv 1708.02002, equation (5).

    Example:
        >>> import numpy
        >>> labels = numpy.array([[1, -1, -2]])  # an anchor of class 1, a background anchor, an ignored anchor
        >>> logits = numpy.array([[[-9.0, 9.0], [-9.0, -9.0], [9.0, 9.0]]])
        >>> float(FocalLoss()(labels, logits)) < 1e-6
        True
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, name: str = "focal_loss", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.alpha, self.gamma = alpha, gamma

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, (batch,) float32.

        Args:
            y_true: Classes (batch, A) or (batch, A, 1): -1 for background, -2 for ignored anchors.
            y_pred: Logits (batch, A, num_classes).
        """
        num_classes = y_pred.shape[-1]
        logits = ops.cast(y_pred, "float32")
        labels = ops.reshape(ops.cast(y_true, "int32"), (-1, y_pred.shape[1], 1))
        is_class = ops.equal(labels, ops.arange(num_classes, dtype="int32"))
        # The logit of the truth. All terms are functions of it that do not overflow:
        # log(p) = -softplus(-truth) and log(1 - p) = -softplus(truth).
        truth = ops.where(is_class, logits, -logits)
        weights = ops.where(is_class, self.alpha, 1.0 - self.alpha) * ops.cast(labels > IGNORED, "float32")
        losses = weights * ops.exp(-self.gamma * ops.softplus(truth)) * ops.softplus(-truth)
        return ops.sum(losses, axis=(1, 2)) / _at_least_one(ops.cast(labels >= 0, "float32"), axis=(1, 2))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "alpha": self.alpha, "gamma": self.gamma}


@keras.saving.register_keras_serializable(package="robust_tf")
class BoxLoss(keras.losses.Loss):
    """Generalized IoU loss of the boxes, 1 - GIoU, averaged over the positive anchors of an image.

    An image without positive anchors has the loss 0. The loss of an anchor lies in [0, 2], so it is of the same size as
    the focal loss, and no single anchor can dominate an attack. RetinaNet's smooth L1 loss of the offsets has no bound
    and needs a weight, and it does not measure the overlap, by which detections are judged.

    The IoU does not change if the axes are scaled. So it is computed in units of the anchor, and the loss needs no
    anchors.

    Args:
        name: Name of the loss.
        **kwargs: Further arguments of `keras.losses.Loss`.

    Source: Rezatofighi et al. 2019, arXiv 1902.09630, algorithm 2.

    Example:
        >>> import numpy
        >>> labels = numpy.array([[[0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
        >>> offsets = numpy.array([[[0.0, 0.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]]])  # the second anchor does not count
        >>> float(BoxLoss()(labels, offsets))
        0.0
    """

    label_width = 5  # the last axis of the labels, which is not as long as the last axis of the outputs

    def __init__(self, name: str = "box_loss", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each image, (batch,) float32.

        Args:
            y_true: Offsets of the assigned boxes, then 1.0 for positive anchors and 0.0 for others, (batch, A, 5).
            y_pred: Offsets (batch, A, 4).
        """
        y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
        positive = y_true[..., 4]
        losses = 1.0 - _generalized_iou(_corners(y_true[..., :4]), _corners(y_pred))
        return ops.sum(losses * positive, axis=1) / _at_least_one(positive, axis=1)


def _at_least_one(positive: Any, *, axis: Any) -> Any:
    return ops.maximum(ops.sum(positive, axis=axis), 1.0)


def _corners(offsets: Any) -> tuple[Any, Any]:
    """Returns the low and the high corners of boxes, (..., 2), in units of their anchors."""
    # The limits keep all areas finite and above 0, whatever the network returns.
    center = ops.clip(offsets[..., :2] * CENTER_VARIANCE, -LARGEST_RATIO, LARGEST_RATIO)
    limit = math.log(LARGEST_RATIO)
    half = ops.exp(ops.clip(offsets[..., 2:] * SIZE_VARIANCE, -limit, limit)) / 2
    return center - half, center + half


def _generalized_iou(first: tuple[Any, Any], second: tuple[Any, Any]) -> Any:
    (low, high), (other_low, other_high) = first, second
    shared = _area(ops.relu(ops.minimum(high, other_high) - ops.maximum(low, other_low)))
    union = _area(high - low) + _area(other_high - other_low) - shared
    hull = _area(ops.maximum(high, other_high) - ops.minimum(low, other_low))
    return shared / union - (hull - union) / hull


def _area(edges: Any) -> Any:
    return edges[..., 0] * edges[..., 1]
