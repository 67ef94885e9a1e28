"""Detections of one network on many images, and the average precision over all of them."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from robust_tf.errors import UserError
from robust_tf.results import Measures
from robust_tf.tasks.base import Prediction
from robust_tf.tasks.detection.average_precision import (
    Matches,
    average_precision,
    bootstrap_difference,
    bootstrap_interval,
    match_detections,
)


class AveragePrecision:
    """Collects true boxes and detections, see `Scores`. The metric is COCO's AP in pixels of the original images.

    Args:
        class_names: Names of the classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = tuple(class_names)
        self._truths: list[Prediction] = []
        self._detections: list[Prediction] = []

    def add(self, truth: Prediction, prediction: Prediction) -> None:
        """Adds one image.

        Args:
            truth: Its "boxes" (n, 4) in pixels of the original image, "classes" (n,) with -1 for padding, "crowd" (n,),
                and "scale", the number of pixels of the square for each pixel of the original image.
            prediction: Its detections, with "boxes" (n, 4) in pixels of the square.
        """
        found = prediction["classes"] >= 0  # the rest is padding
        self._truths.append({name: truth[name] for name in ("boxes", "classes", "crowd")})
        self._detections.append(
            {
                "boxes": prediction["boxes"][found] / np.float32(truth["scale"]),
                "scores": prediction["scores"][found],
                "classes": prediction["classes"][found],
            }
        )

    def state(self) -> dict[str, np.ndarray]:
        """Returns the boxes and detections of all images, one array for each kind, and the number in each image."""
        arrays = {}
        for kind, images in (("truth", self._truths), ("detection", self._detections)):
            arrays[f"{kind}/count"] = np.array([len(each["classes"]) for each in images], np.int64)
            for name in images[0] if images else ():
                arrays[f"{kind}/{name}"] = np.concatenate([each[name] for each in images])
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over the boxes and detections that `state` returned."""
        for kind, images in (("truth", self._truths), ("detection", self._detections)):
            ends = np.cumsum(arrays[f"{kind}/count"])[:-1]
            names = [name.partition("/")[2] for name in arrays if name.startswith(f"{kind}/") and "count" not in name]
            columns = [np.split(arrays[f"{kind}/{name}"], ends) for name in names]
            images[:] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def value(self) -> float:
        """Returns the average precision, 0 if there are no objects."""
        return average_precision(self._truths, self._detections, self._class_names)["ap"] or 0.0

    def measures(self) -> Measures:
        """Returns the average precision with its interval, at IoU 0.5 and 0.75, by size and by class."""
        matches = self.matches()
        figures = dict(matches.figures)
        per_class, value = figures.pop("per_class"), figures.pop("ap")
        try:
            interval = bootstrap_interval(matches)
        except UserError:  # no objects
            interval = None
        return Measures(value=value, interval=interval, others=_known(figures), per_class=_known(per_class))

    def difference(self, other: Self) -> Measures:
        """Returns the difference from another detector's average precision on the same images, with its interval."""
        compared = bootstrap_difference(self.matches(), other.matches())
        return Measures(value=compared.difference, interval=compared.interval)

    def matches(self) -> Matches:
        """Returns which detections are correct."""
        return match_detections(self._truths, self._detections, self._class_names)


def _known(figures: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
