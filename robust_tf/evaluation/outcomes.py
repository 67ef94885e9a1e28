"""What became of each test image: kept beside results.json, so that two jobs can be compared image by image."""

import csv
import dataclasses
import pathlib
from typing import Any

import numpy as np

from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.statistics import PairedDifference, paired_difference, paired_mean_per_class

FILE_NAME = "predictions.csv"
_COLUMNS = ("id", "label", "prediction", "prediction_under_attack")


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The predictions for the test images, in the order of their ids.

    Attributes:
        ids: (count,) int64, positions in the test part as it is stored.
        labels: (count,) int64.
        predictions: (count,) int64, for the clean images.
        predictions_adv: (count,) int64, for the adversarial images; None when no attack was run.
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    predictions_adv: np.ndarray | None

    @property
    def right(self) -> np.ndarray:
        """(count,) bool, right without an attack."""
        return self.predictions == self.labels

    @property
    def robust(self) -> np.ndarray | None:
        """(count,) bool, right both without and with the attack."""
        return None if self.predictions_adv is None else self.right & (self.predictions_adv == self.labels)

    def confusion(self, num_classes: int) -> np.ndarray:
        """(num_classes, num_classes) int64 of the clean images: rows are true classes, columns predictions."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    def write(self, workdir: pathlib.Path) -> None:
        """Writes predictions.csv."""
        columns = [self.ids, self.labels, self.predictions]
        if self.predictions_adv is not None:
            columns.append(self.predictions_adv)
        with replaced_atomically(workdir / FILE_NAME) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS[: len(columns)])
            writer.writerows(np.stack(columns, axis=1).tolist())


def read_outcomes(workdir: pathlib.Path) -> Outcomes | None:
    """The predictions of a finished job; None for a job that has none, as those of older versions.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / FILE_NAME
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if tuple(header) not in (_COLUMNS, _COLUMNS[:3]) or not rows:
            raise ValueError(f"its columns are {', '.join(header)}, in {len(rows)} rows")
        table = np.array(rows, np.int64)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not what a job writes. Received: {error}. Delete it.") from error
    return Outcomes(table[:, 0], table[:, 1], table[:, 2], table[:, 3] if table.shape[1] == 4 else None)


def comparison(ours: Outcomes | None, theirs: Outcomes | None, *, metric: str) -> dict[str, Any] | None:
    """The paired differences of two jobs, ours minus theirs, as JSON; None where they have no common images.

    Args:
        ours, theirs: of the same test part.
        metric: with "mean_per_class_accuracy" that figure is compared as well.

    Returns:
        By the name of the figure its difference, 95 % interval and p-value; robust_accuracy is None without an attack.
    """
    if ours is None or theirs is None:
        return None
    if not np.array_equal(ours.ids, theirs.ids) or not np.array_equal(ours.labels, theirs.labels):
        return None
    compared = {"clean_accuracy": as_json(paired_difference(ours.right, theirs.right))}
    if metric == "mean_per_class_accuracy":
        compared[metric] = as_json(paired_mean_per_class(ours.right, theirs.right, ours.labels))
    both_attacked = ours.robust is not None and theirs.robust is not None
    robust = as_json(paired_difference(ours.robust, theirs.robust)) if both_attacked else None  # type: ignore[arg-type]
    return {**compared, "robust_accuracy": robust}


def as_json(compared: PairedDifference) -> dict[str, Any]:
    """A difference as results.json and evaluation.json hold it."""
    return {**compared._asdict(), "interval": list(compared.interval)}


def from_json(compared: dict[str, Any]) -> PairedDifference:
    """The other way round."""
    low, high = compared["interval"]
    return PairedDifference(compared["difference"], (low, high), compared["p_value"])
