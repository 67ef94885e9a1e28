"""The form of a data set with masks."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from robust_tf.data.records import LabeledImages, Part


class MaskPart(Part, Protocol):
    """The training part or the test part of a data set with masks."""

    def masks(self) -> Iterator[np.ndarray]:
        """Yields each mask, (height, width) int32 with 255 for ignored pixels, in the order of the examples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabeledMasks(LabeledImages):
    """A data set with masks that is ready to be read. The labels of its records are encoded masks."""

    train: MaskPart
    test: MaskPart
