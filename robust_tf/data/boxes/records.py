"""Images with boxes: their form while a folder is read, and the part of a data set that gives them as records."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import tensorflow as tf

from robust_tf.data.folder_records import FilePart
from robust_tf.data.folder_scan import ImageFile
from robust_tf.data.records import LabeledImages, Part

# Numbers of a row of a label: top, left, bottom, right, class, crowd.
BOX_NUMBERS = 6
_ROW_BYTES = 4 * BOX_NUMBERS


def encode_label(rows: np.ndarray) -> bytes:
    """Returns the label of an image as bytes.

    Args:
        rows: (boxes, 6), each row [top, left, bottom, right, class, crowd].
    """
    return np.ascontiguousarray(rows, "<f4").tobytes()


def decode_boxes(label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the boxes of a label.

    Args:
        label: Label of a record, a scalar string.

    Returns:
        The boxes, (boxes, 4) float32 [top, left, bottom, right] in pixels of the original image, their classes,
        (boxes,) int32, and whether each one is a crowd, (boxes,) bool.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from robust_tf.data.boxes import decode_boxes
        >>> label = np.array([[10, 20, 30, 60, 2, 0]], "<f4").tobytes()
        >>> boxes, classes, crowd = decode_boxes(tf.constant(label))
        >>> boxes.numpy().tolist(), classes.numpy().tolist(), crowd.numpy().tolist()
        ([[10.0, 20.0, 30.0, 60.0]], [2], [False])
    """
    rows = tf.reshape(tf.io.decode_raw(label, tf.float32), (-1, BOX_NUMBERS))
    return rows[:, :4], tf.cast(rows[:, 4], tf.int32), rows[:, 5] > 0.5


class BoxPart(Part, Protocol):
    """The training part or the test part of a data set with boxes."""

    def boxes(self) -> Iterator[np.ndarray]:
        """Yields the boxes of each image, (boxes, 6) float32, in the order of the examples."""

    def most_boxes(self) -> int:
        """Returns the largest number of boxes in an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledBoxes(LabeledImages):
    """A data set with boxes that is ready to be read. The labels of its records are strings, see `decode_boxes`."""

    train: BoxPart
    test: BoxPart


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """An image file and its boxes as an annotation file states them.

    Attributes:
        file: Image file.
        where: Image and annotation file, for messages.
        size: Height and width that the annotation file states, in pixels. None if it states none.
        edges: (boxes, 4) float64 [top, left, bottom, right] in pixels.
        classes: Category of each box: an id or a name.
        crowd: Whether each box counts neither as a hit nor as a miss.
        box_names: Name of each box, for messages.
    """

    file: ImageFile
    where: str
    size: tuple[float, float] | None
    edges: np.ndarray
    classes: tuple[int | str, ...]
    crowd: tuple[bool, ...]
    box_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BoxFolderPart(FilePart):
    """Image files and their boxes.

    Attributes:
        box_labels: Label of each image, see `encode_label`.
    """

    box_labels: tuple[bytes, ...]

    def label(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the boxes of an example as a string."""
        return tf.gather(self._label_table, index)

    @functools.cached_property
    def _label_table(self) -> tf.Tensor:
        with tf.init_scope():
            return tf.constant(self.box_labels, tf.string)

    def boxes(self) -> Iterator[np.ndarray]:
        """Yields the boxes of each image, (boxes, 6) float32, in the order of the examples."""
        for label in self.box_labels:
            yield np.frombuffer(label, "<f4").reshape(-1, BOX_NUMBERS)

    def most_boxes(self) -> int:
        """Returns the largest number of boxes in an image."""
        return max((len(label) // _ROW_BYTES for label in self.box_labels), default=0)
