"""Counts the boxes of a data set, for `python -m robust_tf.data --check --task_type=detection`."""

import dataclasses

import numpy as np

from robust_tf.data.boxes.records import BoxPart, LabeledBoxes
from robust_tf.data.records import LabeledImages, few

# Classes beyond this number are not listed one by one.
LISTED_CLASSES = 20


@dataclasses.dataclass
class _Counts:
    """Numbers of one part. `per_class` leaves out crowd boxes."""

    per_class: np.ndarray
    crowd: int = 0
    without_boxes: int = 0


def box_facts(images: LabeledBoxes) -> tuple[list[str], list[str]]:
    """Reads all boxes of a data set and describes them.

    Args:
        images: Data set that `open_boxes` has opened.

    Returns:
        Lines with the numbers of boxes, and lines about faults.
    """
    parts: dict[str, BoxPart] = {"training": images.train, "test": images.test}
    counts = {where: _counted(part, len(images.class_names)) for where, part in parts.items()}
    facts = []
    for where, count in counts.items():
        facts.append(
            f"{where} part: {int(count.per_class.sum()):,} boxes, {count.crowd:,} crowd boxes, "
            f"{count.without_boxes:,} images without boxes"
        )
    train, test = (count.per_class for count in counts.values())
    listed = [
        f"{name} {train[number]:,} / {test[number]:,}"
        for number, name in enumerate(images.class_names[:LISTED_CLASSES])
    ]
    facts.append(f"boxes of each class, training / test: {', '.join(listed)}{more_classes(images)}")
    faults = []
    missing = [images.class_names[number] for number in np.flatnonzero(train == 0)]
    if missing:
        faults.append(
            f"Every class needs boxes in the training part that are no crowd boxes. Received: none for {few(missing)}. "
            "Add some images, or remove the class."
        )
    if not test.sum():
        faults.append("The test part needs boxes that are no crowd boxes. Received: none. Add some images.")
    return facts, faults


def more_classes(images: LabeledImages) -> str:
    """Returns a text about the classes that are not listed, or an empty one."""
    more = len(images.class_names) - LISTED_CLASSES
    return f" and {more:,} more classes" if more > 0 else ""


def _counted(part: BoxPart, num_classes: int) -> _Counts:
    counts = _Counts(np.zeros(num_classes, np.int64))
    for rows in part.boxes():
        crowd = rows[:, 5] > 0.5
        counts.per_class += np.bincount(rows[~crowd, 4].astype(np.int64), minlength=num_classes)
        counts.crowd += int(crowd.sum())
        counts.without_boxes += not len(rows)
    return counts
