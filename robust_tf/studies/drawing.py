"""Draws the panels of lines, the bars and the points of a study with Matplotlib.

Categories have Okabe and Ito's colors, ordered values those of viridis, and every line its own marker, so that
color-blind readers and black-and-white prints can tell them apart.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from robust_tf.evaluation.figures import pyplot
from robust_tf.studies.analysis import Group, Place
from robust_tf.studies.axes import describe, epsilon_text, norm_text
from robust_tf.studies.published import PublishedTransfer, published_source_accuracy, published_transfer
from robust_tf.studies.replication import Replication

PUBLISHED_LABEL = "published, best epsilon"  # by Salman et al. 2020
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_STAR: dict[str, Any] = {"linestyle": "", "marker": "*", "markersize": 13, "markerfacecolor": "none"}
_DASHES = ("-", "--", "-.", ":")
_WIDTH = 5.6  # inches: 11-point letters are still legible when a phone shows the figure at half size


class Line(NamedTuple):
    """A line of a panel.

    Attributes:
        label: Name in the legend.
        x: Positions of its points among the ticks.
        estimates: Their values.
        published: Positions and accuracies of published values, to be drawn as stars.
    """

    label: str
    x: list[float]
    estimates: list[Replication]
    published: list[tuple[float, float]]


class Panel(NamedTuple):
    """A plot with lines.

    Attributes:
        title: Title; empty if the figure has a single panel.
        lines: Its lines.
        ticks: Names of the positions 0, 1, ... on the horizontal axis.
        x_label: Name of the horizontal axis.
    """

    title: str
    lines: list[Line]
    ticks: list[str]
    x_label: str


def draw_panels(panels: Sequence[Panel], legend: str, y_label: str) -> Figure:
    """Draws panels in two columns, with the same vertical axis and one legend.

    Args:
        panels: The panels.
        legend: Title of the legend; empty for none.
        y_label: Name of the vertical axis.
    """
    names = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    published = [PUBLISHED_LABEL] if any(line.published for panel in panels for line in panel.lines) else []
    order = {name: number for number, name in enumerate(names)}
    figure, grid = _grid(len(panels), height=2.9, below=0.2 + _legend_height([*names, *published]))
    colors = _colors(len(names), ordered=all(map(_is_number, names)))
    for axis, panel in zip(grid, panels, strict=True):
        _draw_panel(axis, panel, order, colors, narrow=len(panels) > 1)
    means = [100 * estimate.mean for panel in panels for line in panel.lines for estimate in line.estimates]
    means += [100 * accuracy for panel in panels for line in panel.lines for _, accuracy in line.published]
    # A very wide band, as from two draws, may leave the plot, so that the lines do not become flat.
    room = max(6.0, 0.5 * (max(means) - min(means)))
    grid[0].set_ylim(max(-2.0, min(means) - room), min(102.0, max(means) + room))
    for axis in grid[::2]:
        axis.set_ylabel(f"{y_label}, %\n(band: 95 % interval)")
    handles: dict[str, Any] = {}
    for axis in grid:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # A published value has the color of its line. In the legend it stands for all of them.
    handles |= {label: Line2D([], [], color="gray", **_STAR) for label in published}
    _legend(figure, handles, legend)
    return figure


def _draw_panel(axis: Axes, panel: Panel, order: dict[str, int], colors: Sequence[Any], *, narrow: bool) -> None:
    for line in panel.lines:
        number = order[line.label]
        color, marker = colors[number], _MARKERS[number % len(_MARKERS)]
        if line.x:
            middle = 100 * np.array([estimate.mean for estimate in line.estimates])
            dashes = _DASHES[number % len(_DASHES)]
            axis.plot(line.x, middle, dashes, color=color, marker=marker, markersize=5, label=line.label)
            ends = [100 * np.array(_ends(estimate)) for estimate in line.estimates]
            low, high = np.array(ends).T
            axis.fill_between(line.x, low, high, color=color, alpha=0.15 if len(order) < 5 else 0.07, linewidth=0)
            if len(line.x) == 1:
                axis.errorbar(line.x, middle, np.abs([low - middle, high - middle]), color=color, capsize=3)
        for x, y in line.published:
            axis.plot(
                x, 100 * y, "*", markersize=13, markerfacecolor="none", markeredgecolor=color, label=PUBLISHED_LABEL
            )
    axis.set_xticks(range(len(panel.ticks)), panel.ticks)
    if sum(map(len, panel.ticks)) > (15 if narrow else 34):
        axis.tick_params(axis="x", rotation=60)
    axis.set_xlim(-0.4, len(panel.ticks) - 0.6)
    axis.set_xlabel(panel.x_label, fontsize="small")
    _finish(axis, panel.title)


# Bars and points ------------------------------------------------------------------------------------------------


def draw_bars(pairs: Sequence[tuple[Group, Place, Place]], axes: Sequence[str]) -> Figure:
    """Draws a pair of bars for each group: the standard and the robust source, with the paired difference.

    Args:
        pairs: Groups, each with the place of the standard source and the place of a robust source.
        axes: Axes of the study that the names of the groups tell.
    """
    figure, axis = pyplot.subplots(figsize=(_WIDTH, 1.6 + 0.75 * len(pairs)), layout="constrained")
    rows = np.arange(len(pairs), dtype=float)
    for places, color, hatch, offset, label in (
        ([standard for _, standard, _ in pairs], "#56B4E9", "", -0.19, "standard source"),
        ([robust for _, _, robust in pairs], "#D55E00", "//", 0.19, "robust source (epsilon by validation)"),
    ):
        estimates = [place.measures["accuracy"].estimate for place in places]
        means = 100 * np.array([estimate.mean for estimate in estimates])
        beside = np.abs(100 * np.array([_ends(estimate) for estimate in estimates]).T - means)
        axis.barh(rows + offset, means, 0.36, color=color, hatch=hatch, edgecolor="white", label=label)
        axis.errorbar(means, rows + offset, xerr=beside, fmt="none", ecolor="black", capsize=2, linewidth=1)
    published = [
        (row, cell.accuracy) for row, (group, *_) in zip(rows, pairs, strict=True) if (cell := published_of(group))
    ]
    if published:
        at, values = zip(*published, strict=True)
        axis.plot(100 * np.array(values), at, color="black", label=PUBLISHED_LABEL, **_STAR)
    names = []
    for row, (group, _, robust) in zip(rows, pairs, strict=True):
        epsilon = f"{norm_text(group.key.source_norm)} epsilon {epsilon_text(robust.epsilon, group.key.source_norm)}"
        names.append(textwrap.fill(", ".join(filter(None, (describe(group, axes), epsilon))), 30))
        difference = robust.measures["accuracy"].difference
        if difference:
            decided = difference.verdict in ("better", "worse")
            axis.text(
                104, row, f"{100 * difference.estimate.mean:+.1f}", va="center", weight="bold" if decided else None
            )
    axis.set_yticks(rows, names, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlim(0, 121)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("accuracy, % (line: 95 % interval)\nright: difference in points, bold if decided", fontsize="small")
    axis.grid(alpha=0.3, axis="x")
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    _legend(figure, dict(zip(labels, handles, strict=True)), "")
    return figure


def draw_sources(panels: Sequence[tuple[str, Sequence[tuple[Group, Place]]]]) -> Figure:
    """Draws the accuracy after the transfer against the accuracy of the source.

    Args:
        panels: Titles of the panels, each with the places to draw, whose source accuracy is known, and their groups.
    """
    points = [point for _, inside in panels for point in inside]
    sources = sorted({_threat(*point) for point in points}, key=lambda threat: (threat[0], threat[1]))
    colors = dict(zip(sources, _colors(len(sources), ordered=True), strict=True))
    names = list(dict.fromkeys(group.key.source_architecture for group, _ in points))
    markers = {name: _MARKERS[number % len(_MARKERS)] for number, name in enumerate(names)}
    handles = {
        (f"{norm_text(norm)} {epsilon_text(epsilon, norm)}" if epsilon else "epsilon 0"): Line2D(
            [], [], color=color, linestyle=_line_style(norm)
        )
        for (norm, epsilon), color in colors.items()
    }
    handles |= {name: Line2D([], [], color="gray", linestyle="", marker=markers[name]) for name in names}
    if any(published_of(group) for group, _ in points):
        handles[PUBLISHED_LABEL] = Line2D([], [], color="gray", **_STAR)
    figure, grid = _grid(len(panels), height=3.0, below=0.2 + _legend_height(list(handles)))
    for axis, (title, inside) in zip(grid, panels, strict=True):
        for threat in sources:
            found = [point for point in inside if _threat(*point) == threat]
            _draw_threat(axis, found, colors[threat], markers, hollow=threat[0] == "linf")
        groups = {group.key: group for group, _ in inside}
        for group in groups.values():
            cell = published_of(group)
            of_source = published_source_accuracy(cell.architecture, "l2", cell.epsilon) if cell else None
            if cell and of_source is not None:
                color = colors.get(("l2" if cell.epsilon else "", cell.epsilon), "gray")
                axis.plot(100 * of_source, 100 * cell.accuracy, color=color, **_STAR)
        _finish(axis, title)
        axis.set_xlabel("accuracy of the source, %", fontsize="small")
        axis.xaxis.set_major_locator(MaxNLocator(4))  # more labels would touch in two columns
    for axis in grid[::2]:
        axis.set_ylabel("accuracy after transfer, %\n(line: 95 % interval)", fontsize="small")
    _legend(figure, handles, "epsilon of the source, and its architecture")
    return figure


def _draw_threat(
    axis: Axes, points: Sequence[tuple[Group, Place]], color: Any, markers: Mapping[str, str], *, hollow: bool
) -> None:
    """Draws the sources of one epsilon, joined by a line in the order of their accuracy."""
    ordered = sorted(points, key=lambda point: point[1].source_accuracy or 0.0)
    x = [100 * (place.source_accuracy or 0.0) for _, place in ordered]
    estimates = [place.measures["accuracy"].estimate for _, place in ordered]
    style = _line_style("linf" if hollow else "")
    axis.plot(x, [100 * estimate.mean for estimate in estimates], style, color=color, linewidth=1)
    for at, estimate, (group, _) in zip(x, estimates, ordered, strict=True):
        beside = np.abs(100 * np.array(_ends(estimate)).reshape(2, 1) - 100 * estimate.mean)
        marker = markers[group.key.source_architecture]
        axis.errorbar(
            at, 100 * estimate.mean, beside, color=color, marker=marker, markersize=6, capsize=2, elinewidth=1
        )


def _line_style(norm: str) -> Literal["-", "--"]:
    """Returns dashes for linf, whose epsilons share the scale of colors with those of l2."""
    return "--" if norm == "linf" else "-"


def _threat(group: Group, place: Place) -> tuple[str, float]:
    """Returns norm and epsilon of a source; no norm for a standard one."""
    return (group.key.source_norm if place.epsilon else "", place.epsilon or 0.0)


def _grid(count: int, *, height: float, below: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with some plots in two columns, and room below them for the legend, in inches."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(_WIDTH, below + (height if columns == 2 else height + 0.3) * rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis in grid.flat[count:]:
        axis.set_visible(False)
    return figure, list(grid.flat[:count])


def _finish(axis: Axes, title: str) -> None:
    if title:
        axis.set_title(textwrap.fill(title, 30), fontsize="small")
    axis.tick_params(labelleft=True)
    axis.grid(alpha=0.3)


def published_of(group: Group) -> PublishedTransfer | None:
    """Returns the published accuracy of a transfer like the one of a group, or None.

    Published are transfers from ImageNet with all labels, at the usual size of the images.
    """
    key, flags = group.key, dict(group.key.varied)
    if key.examples_per_class or key.classes or flags.get("downscale") or key.source_norm != "l2":
        return None
    if not key.source_dataset.startswith("imagenet"):
        return None
    return published_transfer(key.dataset, key.transfer_mode, key.source_architecture)


def _ends(estimate: Replication) -> tuple[float, float]:
    """Returns the interval of a mean, cut to [0, 1]; for a single run, the mean itself."""
    low, high = estimate.interval or (estimate.mean, estimate.mean)
    return max(0.0, low), min(1.0, high)


def _is_number(name: str) -> bool:
    """Returns whether the name of a line is one of an ordered scale: a number, such as 20 or 4/255, or all or none."""
    return bool(re.fullmatch(r"[\d./]+|all|unset", name))


def _colors(count: int, *, ordered: bool) -> list[Any]:
    if ordered or count > len(_COLORS):
        # The bright end of viridis is hard to see on white.
        return list(matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, count)))
    return list(_COLORS[:count])


def _legend_columns(labels: Iterable[str]) -> int:
    """Returns how many entries of a legend fit beside each other; a letter takes about 0.08 inches."""
    return max(1, min(5, int(_WIDTH / (0.08 * (max(map(len, labels)) + 5)))))


def _legend_height(labels: Sequence[str]) -> float:
    """Returns the height of a legend with its title, in inches."""
    return 0.5 + 0.2 * -(-len(labels) // _legend_columns(labels)) if len(labels) > 1 else 0.0


def _legend(figure: Figure, entries: Mapping[str, Any], title: str) -> None:
    """Draws a legend below the plots, in as many columns as fit; none for a single line."""
    if len(entries) > 1:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(_legend_columns(entries), len(entries)),
            fontsize="small",
            title=title or None,
            title_fontsize="small",
        )
