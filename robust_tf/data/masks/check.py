"""Counts the pixels of each class, for `python -m robust_tf.data --check --task_type=segmentation`."""

import numpy as np

from robust_tf.data.boxes.check import LISTED_CLASSES, more_classes
from robust_tf.data.masks.mask_files import IGNORED_IN_FILE, check_values
from robust_tf.data.masks.records import LabeledMasks, MaskPart
from robust_tf.data.records import few


def mask_facts(images: LabeledMasks) -> tuple[list[str], list[str]]:
    """Reads all masks of a data set and describes them.

    Args:
        images: Data set that `open_masks` has opened.

    Returns:
        Lines with the shares of pixels, and lines about faults.

    Raises:
        UserError: If a mask cannot be read, or has a value without a class. The message names it.
    """
    parts: dict[str, MaskPart] = {"training": images.train, "test": images.test}
    counts = {where: _counted(part, len(images.class_names)) for where, part in parts.items()}
    shares = [count[:-1] / max(count[:-1].sum(), 1) for count in counts.values()]
    listed = [
        f"{name} {shares[0][number]:.2%} / {shares[1][number]:.2%}"
        for number, name in enumerate(images.class_names[:LISTED_CLASSES])
    ]
    ignored = " / ".join(f"{count[-1] / max(count.sum(), 1):.2%}" for count in counts.values())
    facts = [
        f"pixels of each class, training / test: {', '.join(listed)}{more_classes(images)}",
        f"ignored pixels, training / test: {ignored}",
    ]
    faults = []
    missing = [images.class_names[number] for number in np.flatnonzero(counts["training"][:-1] == 0)]
    if missing:
        faults.append(
            f"Every class needs pixels in the training part. Received: none for {few(missing)}. Add some images, or "
            "remove the class."
        )
    if not counts["test"][:-1].any():
        faults.append("The test part needs pixels that are not ignored. Received: none. Add some images.")
    return facts, faults


def _counted(part: MaskPart, num_classes: int) -> np.ndarray:
    """Returns the number of pixels of each class and, as the last one, of ignored pixels, (num_classes + 1,) int64."""
    counts = np.zeros(num_classes + 1, np.int64)
    for index, mask in enumerate(part.masks()):
        if (mask[mask != IGNORED_IN_FILE].max(initial=0)) >= num_classes:
            check_values(mask, num_classes, part.name(index))
        counts += np.bincount(np.where(mask == IGNORED_IN_FILE, num_classes, mask).ravel(), minlength=num_classes + 1)
    return counts
