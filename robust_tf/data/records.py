"""The common form of all data sets in the pipeline: numbered records in a training part and a test part."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError


class Part(Protocol):
    """The training part or the test part of a data set. Its examples are numbered from 0 in a fixed order."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""

    def records(self) -> tf.data.Dataset:
        """Returns a dataset of (index, encoded image, label), int64, string and int64 scalars, by ascending index."""

    def labels(self) -> np.ndarray:
        """Returns all labels, (num_examples,) int64. Reads no images if the storage allows it."""

    def name(self, index: int) -> str:
        """Returns the path or the TFDS id of an example, for messages about it."""


# Number of files or faults of one kind that a message names. The others are only counted.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Files that were found among the images but are not part of the data set.

    Attributes:
        what: Kind of the files, as a plural for messages.
        paths: Their paths.
    """

    what: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"Left out: {self.what} ({len(self.paths)}): {few(self.paths)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledImages:
    """A data set that is ready to be read.

    Attributes:
        class_names: Names of the labels 0, 1, ...
        train: Training part. It includes the validation part that the data set itself defines, if there is one.
        test: Test part.
        validation: (train.num_examples,) bool, true for the validation part that the data set itself defines. None if
            it defines none.
        num_bytes: Approximate size of all encoded images.
        fingerprint: Text that changes when the content of the data set changes.
        trusted: Whether the data set is a row of `DATASETS`, whose labels need no check.
        left_out: Files that were found but are not part of the data set.
        bad_images: Names of images that were left out because they cannot be read.
        highest_float: Upper end of the range [0, highest_float] if the pixels are stored as float32. None for encoded
            images, whose pixels are integers.
        notes: Sentences about the data set that its users should read.
        label_kind: "classes" if a label is the number of a class, "boxes" or "masks" if it is a string that holds the
            boxes or the encoded mask of the image.
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
    label_kind: Literal["classes", "boxes", "masks"] = "classes"


def few(names: Sequence[str]) -> str:
    """Returns the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(printable, names[:_NAMED])) + more


def printable(name: str) -> str:
    """Returns a name as one printable line, with control characters and undecodable bytes escaped."""
    return "".join(char.encode("unicode_escape").decode() if _breaks_a_line(char) else char for char in name)


def _breaks_a_line(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def check_class_names(names: Iterable[str], *, where: str) -> None:
    """Checks that every class name is one line of text, because an exported model lists them in a file, one per line.

    Args:
        names: Names of the classes.
        where: Data set or folder, for the message.

    Raises:
        UserError: If a name is blank or has several lines. The message shows it with escapes.
    """
    for name in names:
        if not name.strip() or any(map(_breaks_a_line, name)):
            raise UserError(
                "A class name must be one line of text that is not blank, without tabs or other control characters. "
                f"Received: '{printable(name)}' in {printable(where)}. Rename the class."
            )


def check_labels(labels: np.ndarray, part: Part, class_names: Sequence[str], *, name: str) -> None:
    """Checks that every label of a part belongs to a class.

    Args:
        labels: Labels of the part, (part.num_examples,) int.
        part: Part of the data set.
        class_names: Names of all classes.
        name: Name of the data set, for the message.

    Raises:
        UserError: If a label is out of range. The message names the first such example.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if wrong.size:
        more = f", and {wrong.size - 1} more" if wrong.size > 1 else ""
        raise UserError(
            f"Labels of {name} must be 0 to {len(class_names) - 1}, one number for each class. Received: label "
            f"{labels[wrong[0]]} of {part.name(int(wrong[0]))}{more}."
        )


def check_classes_present(
    labels: np.ndarray, classes: Sequence[int], class_names: Sequence[str], *, where: str
) -> None:
    """Checks that every class in use has an example. Without one it cannot be learned, or its accuracy is 0 / 0.

    Args:
        labels: Labels of the examples in use.
        classes: Labels of the classes in use.
        class_names: Names of all classes.
        where: Part and data set, for the message.

    Raises:
        UserError: If a class has no example.
    """
    missing = sorted(set(classes) - set(labels.tolist()))
    if missing:
        rest = [str(label) for label in classes if label not in missing]
        way_out = ""
        if len(rest) > 1:
            way_out = f", or leave the class out with classes=({', '.join(rest)}) or --classes={','.join(rest)}"
        raise UserError(
            f"Every class needs images in {where}. Received: none for {', '.join(class_names[c] for c in missing)}. "
            f"Add some images{way_out}."
        )
