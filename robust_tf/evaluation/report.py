"""Builds the entries of evaluation.json and the table that is printed at the end of an evaluation."""

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

import robust_tf
from robust_tf.attacks.table import title_of
from robust_tf.evaluation.calibration import Calibration
from robust_tf.evaluation.robustness import Robustness
from robust_tf.evaluation.subject import Images, Subject, short_names
from robust_tf.statistics import wilson_interval

_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the results depend on, by name."""
    return {
        "robust_tf": robust_tf.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def accuracy_entry(correct: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns an accuracy with its 95 % interval (Wilson), for all images and for each class that occurs.

    Args:
        correct: Whether each image is classified correctly, (count,) bool.
        labels: Labels of the images, (count,) int.
        class_names: Names of all classes.
    """
    per_class = {
        name: share(correct[labels == label]) for label, name in enumerate(class_names) if (labels == label).any()
    }
    return {**share(correct), "per_class": per_class}


def share(correct: np.ndarray) -> dict[str, Any]:
    """Returns the share of images for which something holds, with its 95 % interval (Wilson).

    Args:
        correct: Whether it holds for each image, (count,) bool.
    """
    hits, total = int(correct.sum()), len(correct)
    return {"accuracy": hits / total, "interval": list(wilson_interval(hits, total)), "num_images": total}


def robustness_entry(result: Robustness, images: Images, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the entry for one attack at one epsilon, with the ids of the images on which an attack succeeded.

    The ids are grouped by the epsilon at which an attack succeeded and by the name of this attack.

    Args:
        result: Result of the attack.
        images: Test images.
        class_names: Names of all classes.
    """
    fell: dict[str, dict[str, list[int]]] = {}
    for number, by, at in zip(images.ids.tolist(), result.felled_by, result.felled_at, strict=True):
        if by:
            fell.setdefault(f"{at:.9g}", {}).setdefault(by, []).append(number)
    return {
        "attack": result.attack,
        "title": title_of(result.attack),
        "norm": result.norm,
        "epsilon": result.epsilon,
        **accuracy_entry(result.robust, images.labels, class_names),
        "fell": fell,
        "warnings": result.warnings,
    }


def calibration_entry(bins: Calibration) -> dict[str, Any]:
    """Returns the expected calibration error and its bins."""
    return {
        "expected_calibration_error": bins.expected_calibration_error,
        "bins": [
            {"above": low, "to": high, "num_images": count, "confidence": confidence, "accuracy": accuracy}
            for low, high, count, confidence, accuracy in zip(
                bins.edges[:-1].tolist(),
                bins.edges[1:].tolist(),
                bins.counts.tolist(),
                bins.confidence.tolist(),
                bins.accuracy.tolist(),
                strict=True,
            )
        ],
    }


def subject_entry(
    subject: Subject, images: Images, logits: np.ndarray, bins: Calibration, robustness: Sequence[Robustness]
) -> dict[str, Any]:
    """Returns all results of one classifier except the corruption error.

    Args:
        subject: Classifier and its task.
        images: Test images.
        logits: Logits of the images, (count, num_classes).
        bins: Calibration on the images.
        robustness: Result of each attack at each epsilon.
    """
    names = subject.task.class_names
    correct = logits.argmax(axis=1) == images.labels
    return {
        "classifier": subject.name,
        "architecture": subject.classifier.name,
        "weights_sha256": subject.weights_sha256,
        "dataset": subject.dataset,
        "classes": list(subject.classes) or None,
        "class_names": list(names),
        "image_size": subject.task.image_size,
        "num_test_images": subject.task.num_test,
        "image_ids": images.ids.tolist(),
        "clean": {**accuracy_entry(correct, images.labels, names), "wrong": images.ids[~correct].tolist()},
        "calibration": calibration_entry(bins),
        "attacks": [robustness_entry(result, images, names) for result in robustness],
        "corruptions": None,
    }


def closing_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Returns a table with one column for each classifier and one row for each result.

    Args:
        entries: Entries of one or two classifiers in evaluation.json.
    """
    table = Table(title=_images(entries), title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in short_names([entry["classifier"] for entry in entries]):
        table.add_column(name, overflow="fold")
    if len({entry["dataset"] for entry in entries}) > 1:
        table.add_row("data set", *(entry["dataset"] for entry in entries))
    table.add_row("clean accuracy", *(with_interval(entry["clean"]) for entry in entries))
    for rows in zip(*(entry["attacks"] for entry in entries), strict=True):
        if not rows[0]["epsilon"]:
            continue  # equal to the clean accuracy, which has its own row
        name = row_title(rows[0])
        flags = (" (!)" if row["warnings"] else "" for row in rows)
        table.add_row(name, *(with_interval(row) + flag for row, flag in zip(rows, flags, strict=True)))
    calibration_errors = (f"{entry['calibration']['expected_calibration_error']:.1%}" for entry in entries)
    table.add_row("calibration error (ECE)", *calibration_errors)
    if entries[0]["corruptions"]:
        errors = [entry["corruptions"] for entry in entries]
        table.add_row("mean corruption error", *(f"{error['mean_corruption_error']:.1%}" for error in errors))
        if errors[0]["relative_mean_corruption_error"] is not None:
            relative = (f"{error['relative_mean_corruption_error']:.1%}" for error in errors)
            table.add_row("mCE relative to the second", *relative)
    return table


def row_title(row: dict[str, Any]) -> str:
    """Returns the row title, in tables, of an attack at one epsilon.

    For PGD the title says "any wrong iterate", because a training job evaluates PGD differently: only the iterate with
    the highest loss counts there.

    Args:
        row: Entry of the attack in evaluation.json.
    """
    return f"{title_of(row['attack'])}, {row['norm']} {row['epsilon']:.4g}"


def _images(entries: Sequence[dict[str, Any]]) -> str:
    sizes = {(len(entry["image_ids"]), entry["num_test_images"], entry["dataset"]) for entry in entries}
    return "; ".join(f"{count} of {total} test images of {name}" for count, total, name in sorted(sizes))


def with_interval(entry: dict[str, Any]) -> str:
    """Returns an accuracy in percent with its interval, from an entry in evaluation.json."""
    low, high = entry["interval"]
    return f"{entry['accuracy']:.1%} ({low:.1%} to {high:.1%})"
