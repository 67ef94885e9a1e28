"""The plots in the report of a job, in Okabe and Ito's colors, which color-blind readers can tell apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robust_tf.evaluation.figures import pyplot
from robust_tf.reporting.job_files import FinishedJob
from robust_tf.statistics import wilson_interval
from robust_tf.training.tensorboard import axis_name, confusion_figure

_BLUE, _RED, _GREEN = "#0072B2", "#D55E00", "#009E73"
_WIDTH = 5.2  # inches: 10-point letters are still legible when a phone shows the plot at half size
_MOST_CLASSES = 25  # more do not fit into the plot of the class accuracies


def job_figures(job: FinishedJob) -> dict[str, tuple[Figure, str]]:
    """Draws all plots of a report.

    Args:
        job: The finished job.

    Returns:
        The plots by the names of their files, each with a text for readers who cannot see it. The caller must close
        them.
    """
    names = job.results.class_names
    confusion = job.outcomes.confusion(len(names))
    figures = {}
    if job.history:
        figures["curves"] = (curves_figure(job), _curves_text(job))
    figures["classes"] = (
        classes_figure(job),
        "Accuracy of each class with its 95 % interval. The table below has the numbers.",
    )
    largest = _largest_confusions(confusion, names)
    figures["confusion"] = (
        confusion_figure(confusion, names),
        f"Confusion matrix of the {len(names)} classes on clean test images. {largest}",
    )
    return figures


def curves_figure(job: FinishedJob) -> Figure:
    """Draws loss, accuracy and learning rate over the epochs, with a line at the epoch that was kept."""
    panels = [("loss", _losses(job)), ("accuracy, %", _accuracies(job))]
    rates = _column(job, "learning_rate")
    if rates:
        panels.append(("learning rate", {"": (rates, _BLUE, "-")}))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(_WIDTH, 2.3 * len(panels)), layout="constrained", sharex=True
    )
    for axis, (label, lines) in zip(axes, panels, strict=True):
        _draw_lines(axis, label, lines)
        if job.results.best_epoch > 0:
            axis.axvline(job.results.best_epoch, color="grey", linestyle=":", linewidth=1)
        if any(lines):
            axis.legend(fontsize="small")
    positive = [rate for rate in rates if rate > 0]  # a schedule may begin or end at 0
    if positive and max(positive) > 20 * min(positive):
        axes[-1].set_yscale("log")
    axes[-1].set_xlabel("epoch (dotted line: the one that was kept)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def classes_figure(job: FinishedJob) -> Figure:
    """Draws the accuracy of each class with its 95 % interval, or only the worst classes if there are many."""
    accuracies = class_accuracies(job)
    accuracies = sorted(accuracies, key=lambda each: each.right / each.total)[:_MOST_CLASSES]
    rows = np.arange(len(accuracies))
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 1.2 + 0.3 * len(rows)), layout="constrained")
    shown = [("clean", [each.right for each in accuracies], _BLUE, "o", 0.12)]
    if job.attacked:
        shown.append(("under attack", [each.robust for each in accuracies], _RED, "s", -0.12))
    totals = [each.total for each in accuracies]
    for label, hits, color, marker, offset in shown:
        share = np.array(hits) / totals
        beside = np.abs(np.array([wilson_interval(*pair) for pair in zip(hits, totals, strict=True)]).T - share)
        offset = offset if job.attacked else 0.0
        axes.errorbar(100 * share, rows + offset, xerr=100 * beside, fmt=marker, color=color, capsize=2, label=label)
    axes.set_yticks(rows, [axis_name(each.name) for each in accuracies])
    axes.set_xlim(-2, 102)
    axes.set_xlabel("accuracy, % (line: 95 % interval)")
    if len(accuracies) < len(class_accuracies(job)):
        axes.set_title(f"the {len(accuracies)} worst classes", fontsize="medium")
    axes.grid(alpha=0.3, axis="x")
    if job.attacked:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


class ClassAccuracy(NamedTuple):
    """Counts of the test images of one class.

    Attributes:
        name: Name of the class.
        right: Number of images that are classified correctly.
        robust: Number of images that are classified correctly under the attack as well.
        total: Number of images.
    """

    name: str
    right: int
    robust: int
    total: int


def class_accuracies(job: FinishedJob) -> list[ClassAccuracy]:
    """Returns the counts of each class that occurs, in the order of the labels."""
    outcomes = job.outcomes
    robust = outcomes.right if outcomes.robust is None else outcomes.robust
    found = []
    for label, name in enumerate(job.results.class_names):
        chosen = outcomes.labels == label
        if chosen.any():
            counts = (int(hits.sum()) for hits in (outcomes.right[chosen], robust[chosen], chosen))
            found.append(ClassAccuracy(name, *counts))
    return found


def _losses(job: FinishedJob) -> dict[str, tuple[list[float], str, str]]:
    kind = "under attack" if job.config.adversarial.training_attack.active else "clean"
    return _present(
        {
            f"training, {kind}": (_column(job, "loss"), _BLUE, "--"),
            f"validation, {kind}": (_column(job, "val_loss"), _RED, "-"),
        }
    )


def _accuracies(job: FinishedJob) -> dict[str, tuple[list[float], str, str]]:
    if job.config.adversarial.training_attack.active:
        names = {
            "training, under attack": ("accuracy", _BLUE, "--"),
            "validation, clean": ("val_clean_accuracy", _GREEN, "-"),
            "validation, under attack": ("val_accuracy", _RED, "-."),
        }
    else:
        names = {"training, clean": ("accuracy", _BLUE, "--"), "validation, clean": ("val_accuracy", _GREEN, "-")}
    return _present(
        {
            label: ([100 * value for value in _column(job, name)], color, style)
            for label, (name, color, style) in names.items()
        }
    )


def _present(lines: dict[str, tuple[list[float], str, str]]) -> dict[str, tuple[list[float], str, str]]:
    return {label: line for label, line in lines.items() if line[0]}


def _column(job: FinishedJob, name: str) -> list[float]:
    """Returns a metric for all epochs, or nothing if an epoch lacks it because an older version ran it."""
    return [logs[name] for logs in job.history] if all(name in logs for logs in job.history) else []


def _draw_lines(axis: Axes, label: str, lines: dict[str, tuple[list[float], str, str]]) -> None:
    for name, (values, color, style) in lines.items():
        marker = "o" if len(values) <= 20 else ""
        axis.plot(range(1, len(values) + 1), values, style, color=color, marker=marker, markersize=4, label=name)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _curves_text(job: FinishedJob) -> str:
    first, last = job.history[0], job.history[-1]
    kept = f" Epoch {job.results.best_epoch} was kept." if job.results.best_epoch > 0 else ""
    return (
        f"Training curves over {len(job.history)} epochs: the validation loss went from {first['val_loss']:.3g} to "
        f"{last['val_loss']:.3g}, the validation accuracy from {first['val_accuracy']:.1%} to "
        f"{last['val_accuracy']:.1%}.{kept}"
    )


def _largest_confusions(confusion: np.ndarray, names: Sequence[str], most: int = 3) -> str:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    pairs = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None, kind="stable")[:most]]
    texts = [
        f"{names[row]} classified as {names[column]} ({wrong[row, column]})"
        for row, column in pairs
        if wrong[row, column]
    ]
    return f"Most frequent mistakes: {', '.join(texts)}." if texts else "There are no mistakes."
