"""Builds the entries of evaluation.json for deployed artifacts, and the table beside their classifier."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from robust_tf.evaluation.artifacts import AttackedTarget, MeasuredTarget
from robust_tf.evaluation.report import accuracy_entry, share, with_interval
from robust_tf.evaluation.subject import Images
from robust_tf.json_records import from_json, to_json
from robust_tf.statistics import PairedDifference, in_words, paired_difference


def artifact_entries(
    measured: Sequence[MeasuredTarget], images: Images, class_names: Sequence[str], *, norm: str, queries: int
) -> list[dict[str, Any]]:
    """Returns an entry for each target, with 95 % intervals and the paired differences from the classifier.

    Args:
        measured: Results of the classifier, then of its artifacts.
        images: Test images.
        class_names: Names of all classes.
        norm: Norm of the perturbations.
        queries: Number of queries that Square made about each image.
    """
    classifier = measured[0]

    def entry_of(each: MeasuredTarget) -> dict[str, Any]:
        right = each.predictions == images.labels
        agrees = each.predictions == classifier.predictions
        return {
            "artifact": each.target.name,
            "location": each.target.location,
            "files": each.target.card.get("files"),
            "latency_ms_per_image": each.target.card.get("latency_ms_per_image"),
            "clean": {
                **accuracy_entry(right, images.labels, class_names),
                "minus_classifier": _difference(right, classifier.predictions == images.labels),
            },
            "agreement": {**share(agrees), "disagreeing": images.ids[~agrees].tolist()},
            "attacks": [
                attack_entry(ours, theirs) for ours, theirs in zip(each.attacked, classifier.attacked, strict=True)
            ],
        }

    def attack_entry(ours: AttackedTarget, theirs: AttackedTarget) -> dict[str, Any]:
        return {
            "norm": norm,
            "epsilon": ours.epsilon,
            "transferred": {name: share(resists) for name, resists in ours.transferred.items()},
            "square_queries": queries,
            "worst_case": {
                **share(ours.robust),
                "minus_classifier": _difference(ours.robust, theirs.robust),
                "fell": images.ids[~ours.robust].tolist(),
            },
        }

    return [entry_of(each) for each in measured]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> Any:
    return to_json(paired_difference(ours, theirs))


def artifact_table(entries: Sequence[dict[str, Any]]) -> Table:
    """Returns a table with one column for the classifier and for each artifact.

    Args:
        entries: Entries in evaluation.json, see `artifact_entries`.
    """
    count = entries[0]["clean"]["num_images"]
    title = f"Exports of the classifier, {count} test images. The gradient attacks run on the classifier."
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for name in column_names(entries):
        table.add_column(name, overflow="fold")
    table.add_row("clean accuracy", *(with_interval(entry["clean"]) for entry in entries))
    table.add_row("same label as the classifier", *(with_interval(entry["agreement"]) for entry in entries))
    for rows in zip(*(entry["attacks"] for entry in entries), strict=True):
        model = f"{rows[0]['norm']} {rows[0]['epsilon']:.4g}"
        for name in rows[0]["transferred"]:
            cells = (with_interval(row["transferred"][name]) for row in rows)
            table.add_row(f"{name}, {model}", *cells)
        worst = f"worst case, also by {rows[0]['square_queries']} queries of square, {model}"
        table.add_row(worst, *(with_interval(row["worst_case"]) for row in rows))
    return table


def artifact_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a line for each paired difference between an artifact and the classifier.

    Args:
        entries: Entries in evaluation.json, see `artifact_entries`.
    """
    lines = []
    for name, entry in list(zip(column_names(entries), entries, strict=True))[1:]:
        rows = {"clean accuracy": entry["clean"]}
        rows |= {f"worst case, {row['norm']} {row['epsilon']:.4g}": row["worst_case"] for row in entry["attacks"]}
        lines += [
            f"{title}, {name} minus classifier: {in_words(from_json(PairedDifference, row['minus_classifier']))}"
            for title, row in rows.items()
        ]
    return lines


def column_names(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of the formats, with a number behind each name that occurs more than once."""
    names = [entry["artifact"] for entry in entries]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: position + 1].count(name)})"
        for position, name in enumerate(names)
    ]
