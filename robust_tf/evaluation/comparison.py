"""Two classifiers on the same images: the paired differences of everything that was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_tf.evaluation.outcomes import as_json, from_json
from robust_tf.evaluation.pictures import Measured
from robust_tf.evaluation.report import row_title
from robust_tf.statistics import in_words, paired_difference


def compared(measured: Sequence[Measured]) -> dict[str, Any] | None:
    """The first classifier minus the second, as evaluation.json has it; None where there is no second on its images.

    Returns:
        "clean_accuracy" and "attacks", a list with an entry for each attack at each epsilon: difference, 95 % interval,
        p-value.
    """
    if len(measured) < 2:
        return None
    first, second = measured
    tasks = [(each.subject.dataset, each.subject.classes, each.subject.task.class_names) for each in measured]
    same = [np.array_equal(getattr(first.images, name), getattr(second.images, name)) for name in ("ids", "labels")]
    if tasks[0] != tasks[1] or not all(same):
        return None
    labels = first.images.labels
    right = [each.logits.argmax(axis=1) == labels for each in measured]
    return {
        "clean_accuracy": as_json(paired_difference(*right)),
        "attacks": [
            {
                "attack": ours.attack,
                "norm": ours.norm,
                "epsilon": ours.epsilon,
                **as_json(paired_difference(ours.robust, theirs.robust)),
            }
            for ours, theirs in zip(first.robustness, second.robustness, strict=True)
            if ours.epsilon > 0
        ],
    }


def comparison_lines(comparison: dict[str, Any] | None, names: Sequence[str]) -> list[str]:
    """A line for each paired difference, or one that says why there is none; nothing for a single classifier."""
    if len(names) < 2:
        return []
    if comparison is None:
        return ["No paired differences: the two classifiers were not measured on the same images."]
    rows = {"clean accuracy": comparison["clean_accuracy"]}
    rows |= {row_title(row): row for row in comparison["attacks"]}
    return [f"{name}, {' minus '.join(names)}: {in_words(from_json(row))}" for name, row in rows.items()]
