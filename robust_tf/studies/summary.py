"""The table `summary.csv` of a study: one line for each group and epsilon."""

import csv
import pathlib
from collections.abc import Iterable

from robust_tf.files import replaced_atomically
from robust_tf.studies.analysis import MEASURES, Group, Measured, Place

SUMMARY = "summary.csv"
_KEY = (
    "dataset classes transfer_mode examples_per_class source_architecture source_norm source_dataset source_classes"
).split()
_OF_A_MEASURE = (
    "{0} {0}_low {0}_high {0}_difference {0}_difference_low {0}_difference_high {0}_p_value {0}_holm_p_value "
    "{0}_verdict {0}_clusters_to_decide {0}_wins {0}_bootstrap_low {0}_bootstrap_high"
).split()


def write_summary(path: pathlib.Path, groups: Iterable[Group]) -> None:
    """Writes the table of the means and the differences from the standard source.

    Accuracies and differences are fractions. Each has the ends of its 95 % interval beside it, `_low` and `_high`.
    `_bootstrap_low` and `_bootstrap_high` are the percentile interval of the bootstrap clustered by source seed, for
    the difference. What does not apply is left empty.

    Args:
        path: File to write.
        groups: Result of `robust_tf.studies.analysis.analyze`.

    Raises:
        UserError: The file cannot be written.

    Example:
        >>> write_summary(pathlib.Path("summary.csv"), [])
        >>> pathlib.Path("summary.csv").read_text().split(",")[:3]
        ['dataset', 'classes', 'transfer_mode']
    """
    groups = list(groups)
    varied = sorted({name for group in groups for name, _ in group.key.varied})
    measured = [name.format(measure) for measure in MEASURES for name in _OF_A_MEASURE]
    head = [*_KEY, *varied, "source_epsilon", "source", "robust_norm", "robust_epsilon", "metric"]
    head += ["clusters", "source_seeds", "draws", "runs", "num_test_images", "validation_value", "source_accuracy"]
    with replaced_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, *measured])
        writer.writerows(_line(group, place, varied) for group in groups for place in group.places)


def _line(group: Group, place: Place, varied: list[str]) -> list[object]:
    key, flags = group.key, dict(group.key.varied)
    runs = place.measures["accuracy"].estimate
    line = [getattr(key, name) for name in _KEY] + [flags.get(name) for name in varied]
    line += [place.epsilon, place.source, key.robust_norm, key.robust_epsilon, group.metric]
    line += [f"{runs.cluster}s", runs.num_seeds, runs.num_draws, runs.num_runs, place.num_test_images or None]
    line += [place.validation_value, place.source_accuracy]
    for measure in MEASURES:
        line += _values(place.measures.get(measure))
    return [_text(value) for value in line]


def _values(measured: Measured | None) -> list[object]:
    if measured is None:
        return [None] * len(_OF_A_MEASURE)
    estimate, difference = measured.estimate, measured.difference
    values: list[object] = [estimate.mean, *(estimate.interval or (None, None))]
    if difference is None:
        return values + [None] * (len(_OF_A_MEASURE) - len(values))
    values += [difference.estimate.mean, *(difference.estimate.interval or (None, None))]
    values += [difference.p_value, difference.holm_p_value, difference.verdict, difference.clusters_to_decide]
    return [*values, difference.wins, *difference.bootstrap]


def _text(value: object) -> str:
    if value is None:
        return ""
    # More digits would only show how a processor rounds.
    return f"{value:.6g}" if isinstance(value, float) else str(value)
