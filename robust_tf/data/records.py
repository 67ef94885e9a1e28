"""What a data set is to the pipeline, wherever it is stored: numbered records in a training and a test part."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
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


# So many files or faults of one kind are named, the others counted.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Files that lie among the images and are not part of the data set: what they are, and their paths."""

    what: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"Left out: {len(self.paths)} {self.what}: {few(self.paths)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledImages:
    """A data set that is there to be read.

    Attributes:
        class_names: names of the labels 0, 1, ...
        train: what may be learned from, the data set's own validation part (if any) included.
        test: what the result is measured on.
        validation: (train.num_examples,) bool, true for the data set's own validation part; None if it has none.
        num_bytes: size of all encoded images, about.
        fingerprint: changes when the content does.
        trusted: a known data set, whose labels need no check.
        left_out: files that are not part of it.
        bad_images: names of images among those, which cannot be read.
        highest_float: pixels are float32 in [0, highest_float]; None for encoded images, whose pixels are integers.
        notes: sentences that whoever uses it has to know.
    """

    class_names: tuple[str, ...]
    train: Part
    test: Part
    validation: np.ndarray | None
    num_bytes: int
    fingerprint: str
    trusted: bool
    left_out: tuple[LeftOut, ...] = ()
    bad_images: tuple[str, ...] = ()
    highest_float: float | None = None
    notes: tuple[str, ...] = ()


def few(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(printable, names[:_NAMED])) + more


def printable(name: str) -> str:
    """A name as one line that can be printed everywhere: control characters and bytes that are no text are escaped."""
    return "".join(char.encode("unicode_escape").decode() if _breaks_a_line(char) else char for char in name)


def _breaks_a_line(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def check_class_names(names: Iterable[str], *, where: str) -> None:
    """Every class name must be one line of text: an exported model lists them in a file, one a line.

    Raises:
        UserError: one is not; shows it escaped.
    """
    for name in names:
        if not name.strip() or any(map(_breaks_a_line, name)):
            raise UserError(
                "A class name is one line of text that is not blank, without tabs and other control characters. "
                f"Received: '{printable(name)}' in {printable(where)}. Rename the class."
            )


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
        rest = [str(label) for label in classes if label not in missing]
        way_out = f", or leave the class out with --classes={','.join(rest)}" if len(rest) > 1 else ""
        raise UserError(
            f"Every class needs images in {where}. Received: none of {', '.join(class_names[c] for c in missing)}. "
            f"Add some{way_out}."
        )
