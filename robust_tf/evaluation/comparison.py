"""The comparison of two classifiers on the same images: paired differences between all their accuracies."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_tf.evaluation.pictures import Measured
from robust_tf.evaluation.report import row_title
from robust_tf.json_records import from_json, to_json
from robust_tf.statistics import PairedDifference, in_words, paired_difference


def compare_classifiers(measured: Sequence[Measured]) -> dict[str, Any] | None:
    """Returns the paired differences, first classifier minus second, as evaluation.json holds them.

    Args:
        measured: One or two classifiers.

    Returns:
        A dict in which "clean_accuracy" is the difference between the clean accuracies, and "attacks" is a list with a
        difference for each attack at each epsilon. None if there is no second classifier, or if it was measured on
        other images.
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
        "clean_accuracy": to_json(paired_difference(*right)),
        "attacks": [
            {
                "attack": ours.attack,
                "norm": ours.norm,
                "epsilon": ours.epsilon,
                **to_json(paired_difference(ours.robust, theirs.robust)),
            }
            for ours, theirs in zip(first.robustness, second.robustness, strict=True)
            if ours.epsilon > 0
        ],
    }


def comparison_lines(comparison: dict[str, Any] | None, names: Sequence[str]) -> list[str]:
    """Returns a line for each paired difference, or one line that says why there are none.

    Args:
        comparison: Result of `compare_classifiers`.
        names: Names of the classifiers. With a single classifier there are no lines.
    """
    if len(names) < 2:
        return []
    if comparison is None:
        return ["No paired differences: the two classifiers were not measured on the same images."]
    rows = {"clean accuracy": comparison["clean_accuracy"]}
    rows |= {row_title(row): row for row in comparison["attacks"]}
    return [
        f"{name}, {' minus '.join(names)}: {in_words(from_json(PairedDifference, row))}" for name, row in rows.items()
    ]
