"""Draws curves, plots and sheets of images with Matplotlib, without a display."""

import io
import itertools
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

from robust_tf.evaluation.calibration import Calibration
from robust_tf.files import replaced_atomically
from robust_tf.statistics import wilson_interval

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Numbers of characters that fit along the side of a picture on a sheet, and on an inch of a legend or a title.
_ROW_NAME_LENGTH = 22
_LETTERS_PER_INCH = 11


class Curve(NamedTuple):
    """One line of the robustness curve.

    Attributes:
        name: Name in the legend.
        epsilons: Radii in ascending order.
        accuracy: Accuracy at each epsilon, in [0, 1].
        intervals: Lower and upper end of the 95 % interval at each epsilon.
    """

    name: str
    epsilons: Sequence[float]
    accuracy: Sequence[float]
    intervals: Sequence[tuple[float, float]]


def save_curve(path: pathlib.Path, curves: Sequence[Curve], *, norm: str, title: str) -> None:
    """Draws the robust accuracy over epsilon, with the 95 % intervals as bands.

    Args:
        path: PNG file to write.
        curves: Lines of the plot.
        norm: Norm of the perturbations, for the label of the axis.
        title: Title of the plot.
    """
    names = [_wrapped(curve.name, 6 * _LETTERS_PER_INCH) for curve in curves]
    height = 4 + _height_of_further_lines(names)
    figure, axes = pyplot.subplots(figsize=(6, height), layout="constrained")
    # With different dashes, curves that lie on each other stay visible.
    for curve, name, dashes in zip(curves, names, itertools.cycle(("-", "--", "-.", ":"))):
        (line,) = axes.plot(curve.epsilons, 100 * np.array(curve.accuracy), marker="o", linestyle=dashes, label=name)
        low, high = 100 * np.array(curve.intervals).T
        axes.fill_between(curve.epsilons, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(f"epsilon ({norm}, pixels in [0, 1])")
    axes.set_ylabel("accuracy, % (band: 95 % interval)")
    axes.set_ylim(-2, 102)
    axes.set_title(_wrapped(title, 5 * _LETTERS_PER_INCH), fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    save(path, figure)


def save_reliability(path: pathlib.Path, calibrations: dict[str, Calibration]) -> None:
    """Draws the accuracy of each classifier over its confidence, with 95 % intervals and the number of images below.

    Args:
        path: PNG file to write.
        calibrations: Calibration of each classifier, by its name in the legend.
    """
    texts = [f"{name}: ECE {100 * bins.expected_calibration_error:.1f} %" for name, bins in calibrations.items()]
    texts = [_wrapped(text, 5 * _LETTERS_PER_INCH) for text in texts]
    height = 6.4 + _height_of_further_lines(texts)
    figure, (axes, counts) = pyplot.subplots(
        2, 1, figsize=(5, height), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfectly calibrated")
    width = 1.0 / (len(calibrations) + 0.25)
    for position, (label, bins) in enumerate(zip(texts, calibrations.values(), strict=True)):
        filled = bins.counts > 0
        accuracy, counted = bins.accuracy[filled], bins.counts[filled]
        hits = np.round(accuracy * counted).astype(int)
        ends = np.array([wilson_interval(int(hit), int(count)) for hit, count in zip(hits, counted, strict=True)])
        beside = np.abs(ends.T - accuracy)
        axes.errorbar(bins.confidence[filled], accuracy, beside, fmt="o", capsize=2, label=label)
        bin_width = np.diff(bins.edges) * width
        counts.bar(bins.edges[:-1] + position * bin_width, bins.counts, bin_width, align="edge")
    axes.set_ylabel("accuracy")
    counts.set_ylabel("images")
    counts.set_xlabel("confidence")
    axes.set_xlim(0, 1)
    figure.legend(loc="outside lower center", fontsize="small")
    save(path, figure)


def save_sheet(
    path: pathlib.Path,
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[Sequence[str]],
    *,
    row_names: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws a grid of pictures with a caption above each.

    Args:
        path: PNG file to write.
        rows: Rows of the same length with pictures of shape (height, width, 3), float in [0, 1].
        captions: Captions, in the same grid.
        row_names: Names of the rows, which are written along the left side.
        title: Title of the sheet.
    """
    side = 1.3  # side of a picture, in inches
    figure, axes = pyplot.subplots(
        len(rows),
        len(rows[0]),
        figsize=(side * len(rows[0]), (side + 0.3) * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for line, pictures, texts in zip(axes, rows, captions, strict=True):
        for axis, picture, text in zip(line, pictures, texts, strict=True):
            axis.imshow(np.clip(picture, 0.0, 1.0), interpolation="nearest")
            axis.set_title(text, fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], row_names, strict=False):
        axis.set_ylabel(_wrapped(name, _ROW_NAME_LENGTH), fontsize=7)
    figure.suptitle(_wrapped(title, int(side * len(rows[0]) * _LETTERS_PER_INCH)), fontsize="medium")
    save(path, figure)


def _wrapped(name: str, length: int) -> str:
    """Breaks a name into lines of at most `length` characters, also after underscores."""
    lines = (textwrap.fill(line.replace("_", "_ "), length) for line in name.splitlines())
    return "\n".join(lines).replace("_ ", "_")


def _height_of_further_lines(texts: Sequence[str]) -> float:
    """Returns the height in inches that a legend needs for its lines beyond the first."""
    return 0.17 * (sum(text.count("\n") + 1 for text in texts) - 1)


def magnified(perturbation: np.ndarray) -> np.ndarray:
    """Returns a perturbation as a picture around gray, scaled so that its largest value becomes 0 or 1."""
    return 0.5 + 0.5 * perturbation / (np.abs(perturbation).max() or 1.0)


def svg_of(figure: Figure, name: str) -> str:
    """Returns a figure as an SVG element for an HTML page, without prolog and metadata.

    Args:
        figure: Figure to convert.
        name: Prefix for all ids, which makes them unique in the page.
    """
    buffer = io.StringIO()
    with pyplot.rc_context({"svg.hashsalt": name}):  # gives equal figures the same SVG text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)


def save(path: pathlib.Path, figure: Figure) -> None:
    """Writes a figure as PNG and closes it. It contains no date or version, so equal figures give equal files."""
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
