"""What a data set is to the pipeline, wherever it is stored: numbered records in a training and a test part."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError


class Part(Protocol):
    """The examples of one part, numbered from 0 in an order that never changes."""

    @property
    def num_examples(self) -> int:
        """How many there are."""

    def records(self) -> tf.data.Dataset:
        """(index, encoded image, label), scalars of int64, string and int64, in order of the index."""

    def labels(self) -> np.ndarray:
        """(num_examples,) int64, without reading the images where that is possible."""

    def name(self, index: int) -> str:
        """The file or the TFDS id of an example, for messages about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A data set that is there to be read.

    Attributes:
        class_names: names of the labels 0, 1, ...
        train: what may be learned from, the data set's own validation part (if any) included.
        test: what the result is measured on.
        validation: (train.num_examples,) bool, true for the data set's own validation part; None if it has none.
        num_bytes: size of all encoded images, about.
        fingerprint: changes when the content does.
        trusted: a known data set, whose labels need no check.
    """

    class_names: tuple[str, ...]
    train: Part
    test: Part
    validation: np.ndarray | None
    num_bytes: int
    fingerprint: str
    trusted: bool


def check_labels(labels: np.ndarray, part: Part, class_names: Sequence[str], *, name: str) -> None:
    """Every label of a part must be that of a class.

    Raises:
        UserError: one is not; names the first such example.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if wrong.size:
        raise UserError(
            f"Labels of {name} must be 0 to {len(class_names) - 1}, one for each class. Received: label "
            f"{labels[wrong[0]]} of {part.name(int(wrong[0]))}, and {wrong.size - 1} more like it."
        )


def check_classes_present(
    labels: np.ndarray, classes: Sequence[int], class_names: Sequence[str], *, where: str
) -> None:
    """Every class in use must have an example: it could not be learned, or its accuracy is 0 / 0.

    Args:
        labels: of the examples in use.
        classes: the labels in use.
        class_names: of all labels.
        where: the part and the data set, for the message.

    Raises:
        UserError: a class has none.
    """
    missing = sorted(set(classes) - set(labels.tolist()))
    if missing:
        rest = ",".join(str(label) for label in classes if label not in missing)
        raise UserError(
            f"Every class needs images in {where}. Received: none of {', '.join(class_names[c] for c in missing)}. "
            f"Add some, or leave the class out with --classes={rest}."
        )
