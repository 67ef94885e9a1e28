"""Which test images a job's report shows: as many classes and kinds of mistakes as possible, not the first images."""

from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["resists", "falls", "wrong"]
PER_KIND = 6


class Example(NamedTuple):
    """One test image and what became of it.

    Attributes:
        kind: "resists" the attack (or is right, where none was run), "falls" under it, or "wrong" without one.
        label, prediction, prediction_adv: classes.
        image, image_adv: (height, width, channels) float32 in [0, 1]; equal where there is no attack.
    """

    kind: Kind
    label: int
    prediction: int
    prediction_adv: int
    image: np.ndarray
    image_adv: np.ndarray


class ExampleChoice:
    """Looks at batch after batch and keeps a few images of each kind, spread over classes and then over mistakes."""

    def __init__(self, per_kind: int = PER_KIND) -> None:
        self._per_kind = per_kind
        self._kept: dict[Kind, list[Example]] = {"resists": [], "falls": [], "wrong": []}

    @property
    def examples(self) -> tuple[Example, ...]:
        """The images that resist, those that fall, and the wrong ones, each in the order of their classes."""
        return tuple(each for kept in self._kept.values() for each in sorted(kept, key=lambda each: each[1:4]))

    def look_at(self, rows: np.ndarray, images: Any, images_adv: Any) -> None:
        """Takes what is of use from a batch.

        Args:
            rows: (batch, 4) int: labels, predictions, predictions under attack, and 0 where an image does not count.
            images, images_adv: (batch, height, width, channels) tensors; only the chosen images are copied.
        """
        for position, (label, prediction, prediction_adv, counts) in enumerate(rows.tolist()):
            if not counts:
                continue
            kind: Kind = "wrong" if prediction != label else "falls" if prediction_adv != label else "resists"
            if (place := self._place(kind, label, (prediction, prediction_adv))) is not None:
                pixels = (np.array(images[position]), np.array(images_adv[position]))
                self._kept[kind][place : place + 1] = [Example(kind, label, prediction, prediction_adv, *pixels)]

    def _place(self, kind: Kind, label: int, mistake: tuple[int, int]) -> int | None:
        """Returns the place for a new image: an empty one, or one whose class or mistake is shown too often."""
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
