"""The choice of test images for the report of a job: as many classes and kinds of mistakes as possible."""

from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["resists", "falls", "wrong"]
PER_KIND = 6


class Example(NamedTuple):
    """One test image with its predictions.

    Attributes:
        kind: "wrong" if the clean image is misclassified, "falls" if only the adversarial image is misclassified, and
            "resists" if neither is.
        label: True class.
        prediction: Predicted class of the clean image.
        prediction_adv: Predicted class of the adversarial image.
        image: Clean image (height, width, channels) float32 in [0, 1].
        image_adv: Adversarial image of the same shape; the clean image if no attack was run.
    """

    kind: Kind
    label: int
    prediction: int
    prediction_adv: int
    image: np.ndarray
    image_adv: np.ndarray


class ExampleChoice:
    """Keeps a few images of each kind from all batches, spread first over the classes and then over the mistakes.

    Args:
        per_kind: Largest number of images of each kind.
    """

    def __init__(self, per_kind: int = PER_KIND) -> None:
        self._per_kind = per_kind
        self._kept: dict[Kind, list[Example]] = {"resists": [], "falls": [], "wrong": []}

    @property
    def examples(self) -> tuple[Example, ...]:
        """The images that were kept: first those that resist, then those that fall, then the wrong ones."""
        return tuple(each for kept in self._kept.values() for each in sorted(kept, key=lambda each: each[1:4]))

    def look_at(self, rows: np.ndarray, images: Any, images_adv: Any) -> None:
        """Looks at a batch, and keeps the images that make the choice more varied.

        Args:
            rows: Table (batch, 4) int with the label, the prediction, the prediction under attack, and 1 for a test
                image or 0 for an image that only fills up the batch.
            images: Tensor (batch, height, width, channels) of clean images. Only images that are kept are copied.
            images_adv: Tensor of the same shape with the adversarial images.
        """
        for position, (label, prediction, prediction_adv, counts) in enumerate(rows.tolist()):
            if not counts:
                continue
            kind: Kind = "wrong" if prediction != label else "falls" if prediction_adv != label else "resists"
            if (place := self._place(kind, label, (prediction, prediction_adv))) is not None:
                pixels = (np.array(images[position]), np.array(images_adv[position]))
                self._kept[kind][place : place + 1] = [Example(kind, label, prediction, prediction_adv, *pixels)]

    def _place(self, kind: Kind, label: int, mistake: tuple[int, int]) -> int | None:
        """Returns the place for a new image, or None if the image does not make the choice more varied.

        The place is empty, or it holds an image whose class or mistake occurs too often.
        """
        kept = self._kept[kind]
        if len(kept) < self._per_kind:
            return len(kept)
        of_class = Counter(each.label for each in kept)
        most, count = of_class.most_common(1)[0]
        if count > of_class[label] + 1:
            return max(place for place, each in enumerate(kept) if each.label == most)
        mistakes = [each[2:4] for each in kept if each.label == label]
        if mistake in mistakes:
            return None
        repeated = (place for place, each in enumerate(kept) if each.label == label and mistakes.count(each[2:4]) > 1)
        return next(repeated, None)
