"""The predictions for each test image, stored next to results.json so that two jobs can be compared image by image."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.results import AccuracyDifference, Comparison
from robust_tf.statistics import mean_over_draws, paired_difference, paired_mean_per_class

FILE_NAME = "predictions.csv"
_COLUMNS = ("id", "label", "prediction", "prediction_under_attack")


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The predictions for the test images, in the order of their ids.

    Attributes:
        ids: Positions in the test part as it is stored, (count,) int64.
        labels: True classes, (count,) int64.
        predictions: Predicted classes of the clean images, (count,) int64.
        predictions_adv: Predicted classes of the adversarial images, (count,) int64; None if no attack was run.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    predictions_adv: np.ndarray | None

    @property
    def right(self) -> np.ndarray:
        """Whether the clean image is classified correctly, (count,) bool."""
        right: np.ndarray = self.predictions == self.labels
        return right

    @property
    def robust(self) -> np.ndarray | None:
        """Whether clean and adversarial image are both classified correctly, (count,) bool; None without an attack."""
        return None if self.predictions_adv is None else self.right & (self.predictions_adv == self.labels)

    def confusion(self, num_classes: int) -> np.ndarray:
        """Returns the confusion matrix of the clean images.

        Args:
            num_classes: Number of classes of the classifier.

        Returns:
            Counts (num_classes, num_classes) int64; rows are true classes, columns are predictions.
        """
        counts = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    def write(self, workdir: pathlib.Path) -> None:
        """Writes predictions.csv into a workdir."""
        columns = [self.ids, self.labels, self.predictions]
        if self.predictions_adv is not None:
            columns.append(self.predictions_adv)
        with replaced_atomically(workdir / FILE_NAME) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS[: len(columns)])
            writer.writerows(np.stack(columns, axis=1).tolist())


def read_outcomes(workdir: pathlib.Path) -> Outcomes | None:
    """Returns the predictions of a finished job, or None if it was run by an older version, which did not write them.

    Raises:
        UserError: The file is damaged.
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        if tuple(header) not in (_COLUMNS, _COLUMNS[:3]) or not rows:
            raise ValueError(f"the columns {', '.join(header) or 'none'}, and {len(rows)} rows")
        table = np.array(rows, np.int64)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not what a training job writes. Received: {error}. Delete the file.") from error
    return Outcomes(table[:, 0], table[:, 1], table[:, 2], table[:, 3] if table.shape[1] == 4 else None)


def compare_outcomes(ours: Outcomes | None, theirs: Outcomes | None, *, metric: str | None) -> Comparison | None:
    """Returns the paired differences between two jobs, the first minus the second.

    Args:
        ours: Predictions of the first job.
        theirs: Predictions of the second job.
        metric: Usual metric of the data set. "mean_per_class_accuracy" is compared as well.

    Returns:
        The differences, or None if predictions are missing or the two jobs did not test the same images.
    """
    if ours is None or theirs is None:
        return None
    if not np.array_equal(ours.ids, theirs.ids) or not np.array_equal(ours.labels, theirs.labels):
        return None
    per_class = robust = None
    if metric == "mean_per_class_accuracy":
        per_class = AccuracyDifference.of(paired_mean_per_class(ours.right, theirs.right, ours.labels))
    if ours.robust is not None and theirs.robust is not None:
        robust = AccuracyDifference.of(paired_difference(ours.robust, theirs.robust))
    return Comparison(
        clean_accuracy=AccuracyDifference.of(paired_difference(ours.right, theirs.right)),
        mean_per_class_accuracy=per_class,
        robust_accuracy=robust,
    )


def compare_draws(
    ours: Sequence[Outcomes | None], theirs: Sequence[Outcomes | None], *, metric: str | None
) -> Comparison | None:
    """Returns the mean paired differences between two sources over several draws, the first source minus the second.

    Args:
        ours: Predictions of the jobs from the first source, one for each draw of the labeled images.
        theirs: Predictions of the jobs from the second source, in the same order.
        metric: Usual metric of the data set. "mean_per_class_accuracy" is compared as well.

    Returns:
        The differences, or None if predictions are missing or not all jobs tested the same images.
    """
    pairs = [(our, their) for our, their in zip(ours, theirs, strict=True) if our is not None and their is not None]
    if not pairs or len(pairs) < len(ours):
        return None
    ids, labels = pairs[0][0].ids, pairs[0][0].labels
    if not all(
        np.array_equal(each.ids, ids) and np.array_equal(each.labels, labels) for pair in pairs for each in pair
    ):
        return None

    def difference(sides: list[list[np.ndarray]], weights: Any = 1.0) -> AccuracyDifference:
        first, second = (np.stack(side).astype(float) for side in sides)
        return AccuracyDifference.of(mean_over_draws((first - second) * weights), draws=len(pairs))

    right = [[each.right for each in side] for side in zip(*pairs, strict=True)]
    robust = [[each.robust for each in side if each.robust is not None] for side in zip(*pairs, strict=True)]
    per_class = None
    if metric == "mean_per_class_accuracy":
        _, classes = np.unique(labels, return_inverse=True)
        totals = np.bincount(classes)
        per_class = difference(right, len(labels) / len(totals) / totals[classes])
    return Comparison(
        clean_accuracy=difference(right),
        mean_per_class_accuracy=per_class,
        robust_accuracy=difference(robust) if all(len(side) == len(pairs) for side in robust) else None,
    )
