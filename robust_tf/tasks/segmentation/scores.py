"""Predicted masks of one network on many images, and the mean IoU over all of them."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from robust_tf.results import Measures
from robust_tf.tasks.base import Prediction
from robust_tf.tasks.segmentation.mean_iou import (
    bootstrap_interval,
    confusion_of,
    iou_of_each_class,
    miou,
    pixel_accuracy,
)


class SegmentationScores:
    """Collects the confusion matrices of images, see `Scores`. The metric is the mean IoU.

    It is measured at the size of the network's images.

    Args:
        class_names: Names of the classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = tuple(class_names)
        self._confusions: list[np.ndarray] = []

    def add(self, truth: Prediction, prediction: Prediction) -> None:
        """Adds one image, with its true and its predicted "mask", (height, width) int, where -1 is ignored."""
        count = len(self._class_names)
        self._confusions.append(confusion_of(truth["mask"][None], prediction["mask"][None], count)[0])

    def state(self) -> dict[str, np.ndarray]:
        """Returns the confusion matrices."""
        return {"confusion": self.confusion()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over the confusion matrices that `state` returned."""
        self._confusions = list(arrays["confusion"])

    def value(self) -> float:
        """Returns the mean IoU, 0 if no pixel is labeled."""
        confusion = self.confusion()
        return miou(confusion) if confusion.any() else 0.0

    def measures(self) -> Measures:
        """Returns the mean IoU with its interval, the pixel accuracy, and the IoU of each class."""
        confusion = self.confusion()
        if not confusion.any():
            return Measures()
        ious = zip(self._class_names, iou_of_each_class(confusion).tolist(), strict=True)
        return Measures(
            value=miou(confusion),
            interval=bootstrap_interval(confusion),
            others={"pixel_accuracy": pixel_accuracy(confusion)},
            per_class={name: value for name, value in ious if value == value},  # NaN for a class that does not occur
        )

    def difference(self, other: Self) -> Measures:
        """Returns the difference from the mean IoU of another network on the same images, with its interval."""
        ours, theirs = self.confusion(), other.confusion()
        return Measures(value=miou(ours) - miou(theirs), interval=bootstrap_interval(ours, theirs))

    def confusion(self) -> np.ndarray:
        """Returns the confusion matrix of each image, (num_images, num_classes, num_classes) int64."""
        return np.stack(self._confusions)
