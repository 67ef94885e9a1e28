"""The figures of a study. Each is drawn only if the study has what it shows."""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from robust_tf.evaluation.figures import pyplot, save, svg_of
from robust_tf.files import replaced_atomically
from robust_tf.studies.analysis import Group, Measure, Place
from robust_tf.studies.axes import (
    ARCHITECTURE,
    ATTACK,
    DATASET,
    LABELS,
    MODE,
    NORM,
    axes_of,
    describe,
    epsilon_text,
    legend_text,
    norm_text,
    value_of,
    values_on,
    width_of,
)
from robust_tf.studies.drawing import Line, Panel, draw_bars, draw_panels, draw_sources, published_of

FIGURES = "figures"
_FONT = 11  # points: in a figure of this width still legible at half size
_PANELS, _ROWS = 6, 10  # most panels and most bars of a file
_TITLES: dict[Measure, str] = {"accuracy": "accuracy", "robust_accuracy": "robust accuracy"}


class StudyFigure(NamedTuple):
    """A figure of a study.

    Attributes:
        name: Name of its files, without suffix.
        title: Heading.
        text: What it shows, for readers who cannot see it.
        draw: Function that draws it. The caller has to close the figure.
    """

    name: str
    title: str
    text: str
    draw: Callable[[], Figure]


def study_figures(groups: Sequence[Group]) -> list[StudyFigure]:
    """Returns all figures for which a study has the cells, not yet drawn.

    Args:
        groups: Result of `robust_tf.studies.analysis.analyze`.
    """
    makers = (_bars, _norms, _widths, _flags, _epsilon, _labels, _sources)
    found = [figure for make in makers for figure in make(groups)]
    # The plain figure over epsilon may be the same as one that shows a single further axis, which has a better title.
    different = {repr(figure.draw): figure for figure in reversed(found)}
    return [figure for figure in found if different[repr(figure.draw)] is figure]


def write_figures(workdir: pathlib.Path, figures: Sequence[StudyFigure]) -> dict[str, str]:
    """Draws figures into figures/ of a study, each as SVG and PNG.

    Args:
        workdir: Folder of the study.
        figures: Result of `study_figures`.

    Returns:
        The SVG element of each figure by its name.

    Raises:
        UserError: A file cannot be written.
    """
    elements = {}
    for each in figures:
        with pyplot.rc_context({"font.size": _FONT}):
            figure = each.draw()
            elements[each.name] = svg_of(figure, each.name)
            figure.set_layout_engine("none")  # the layout is computed once, not for each of the two files
            save(workdir / FIGURES / f"{each.name}.png", figure)
        with replaced_atomically(workdir / FIGURES / f"{each.name}.svg") as temporary:
            temporary.write_text(elements[each.name], encoding="utf-8")
    return elements


# Which figures there are ----------------------------------------------------------------------------------------


def _epsilon(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields accuracy against epsilon for each data set and mode, and the same for the robust accuracy."""
    with_curves = [group for group in groups if _num_epsilons(group) > 1]
    measures: tuple[Measure, ...] = ("accuracy", "robust_accuracy")
    for measure, (about, found) in itertools.product(measures, _split(with_curves, [DATASET, MODE])):
        # Never the norm: the epsilons of two norms cannot share an axis.
        axes = [axis for axis in axes_of(found) if axis != NORM]
        line = next((axis for axis in (LABELS, ARCHITECTURE, *axes) if axis in axes), ARCHITECTURE)
        yield from _curves(found, f"{_TITLES[measure]} against epsilon", about, line=line, measure=measure)


def _labels(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields accuracy against the number of labels per class, with a line for each epsilon."""
    for about, found in _split(groups, [DATASET, MODE]):
        rest = [axis for axis in axes_of(found) if axis != LABELS]
        panels = [
            _label_panel(describe(inside[0], rest), inside)
            for _, inside in _split(found, rest)
            if len(values_on(inside, LABELS)) > 1
        ]
        yield from _pages("accuracy against labels per class", about, panels, legend="epsilon of the source")


def _widths(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields accuracy against epsilon with a line for each width of the network (figure 6 of the paper)."""
    known = [group for group in groups if width_of(group) and _num_epsilons(group) > 1]
    for about, found in _split(known, [DATASET, MODE]):
        families = sorted({width[0] for group in found if (width := width_of(group))})
        for family in families:
            inside = [group for group in found if (width := width_of(group)) and width[0] == family]
            if len({width_of(group) for group in inside}) > 1:
                yield from _curves(inside, f"accuracy against epsilon, by width of {family}", about, line=ARCHITECTURE)


def _norms(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields Linf beside L2, in panels with the same accuracies on their axes."""
    with_curves = [group for group in groups if _num_epsilons(group) > 1]
    for about, found in _split(with_curves, [DATASET, MODE]):
        rest = [axis for axis in axes_of(found) if axis not in (NORM, LABELS)]
        for inside_about, inside in _split(found, rest):
            if len(values_on(inside, NORM)) > 1:
                line = LABELS if LABELS in axes_of(inside) else ARCHITECTURE
                where = f"{about}, {inside_about}" if inside_about else about
                yield from _curves(inside, "accuracy against epsilon, Linf beside L2", where, line=line, panel=[NORM])


def _flags(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields accuracy against epsilon with a line for each value of another axis.

    These are downscaled inputs (figure 7 of the paper), stylized or textured inputs as another pretraining data set
    (figure 8), and any other flag that varies.
    """
    for axis in axes_of(groups):
        if axis in (DATASET, MODE, ARCHITECTURE, NORM, LABELS, ATTACK, "source_width"):
            continue
        for about, found in _split([group for group in groups if _num_epsilons(group) > 1], [DATASET, MODE]):
            if len(values_on(found, axis)) > 1:
                yield from _curves(found, f"accuracy against epsilon, by {axis.replace('_', ' ')}", about, line=axis)


def _bars(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields the robust source that validation prefers beside the standard one, a pair of bars for each group."""
    for about, found in _split(groups, [MODE]):
        pairs = [
            (group, group.standard, robust)
            for group in found
            if (robust := group.chosen_by_validation) and group.standard
        ]
        axes = [axis for axis in axes_of(found) if axis not in (MODE, NORM)]
        title = "robust beside standard sources"
        for number, start in enumerate(range(0, len(pairs), _ROWS)):
            shown = pairs[start : start + _ROWS]
            yield StudyFigure(
                _file_name(title, about, number),
                _heading(title, about),
                "Bars of the accuracy from the standard source and from the robust source whose epsilon validation "
                "prefers, for each group, with 95 % intervals and the paired difference.",
                functools.partial(draw_bars, shown, axes),
            )


def _sources(groups: Sequence[Group]) -> Iterator[StudyFigure]:
    """Yields transfer accuracy against the accuracy of the source (figure 5 and table 2 of the paper)."""
    for about, found in _split(groups, [DATASET, MODE]):
        rest = [axis for axis in axes_of(found) if axis not in (ARCHITECTURE, NORM)]
        panels = []
        for _, inside in _split(found, rest):
            points = [(group, place) for group in inside for place in group.places if place.source_accuracy is not None]
            if len({(group.key.source_architecture, place.epsilon) for group, place in points}) > 2:
                panels.append((describe(inside[0], rest), points))
        title = "source accuracy against transfer accuracy"
        for number, start in enumerate(range(0, len(panels), _PANELS)):
            yield StudyFigure(
                _file_name(title, about, number),
                _heading(title, about),
                "Each point is a source: its accuracy on its own test images, and the accuracy after the transfer with "
                "its 95 % interval. Lines join architectures at the same epsilon.",
                functools.partial(draw_sources, panels[start : start + _PANELS]),
            )


# Panels of lines ------------------------------------------------------------------------------------------------


def _curves(
    groups: Sequence[Group],
    title: str,
    about: str,
    *,
    line: str,
    panel: Sequence[str] | None = None,
    measure: Measure = "accuracy",
) -> Iterator[StudyFigure]:
    """Yields figures with epsilon on the horizontal axis, a line for each value of an axis, and panels for the rest."""
    groups = [group for group in groups if any(measure in place.measures for place in group.places)]
    rest = [axis for axis in axes_of(groups) if axis != line] if panel is None else list(panel)
    panels = [
        _epsilon_panel(describe(inside[0], rest), inside, line, values_on(groups, line), measure)
        for _, inside in _split(groups, rest)
    ]
    legend = line.replace("_", " ") if len(values_on(groups, line)) > 1 else ""
    yield from _pages(title, about, panels, legend=legend, y_label=_TITLES[measure])


def _epsilon_panel(title: str, groups: Sequence[Group], line: str, values: Sequence[object], measure: Measure) -> Panel:
    epsilons = sorted({place.epsilon for group in groups for place in group.places if place.epsilon is not None})
    norm = groups[0].key.source_norm
    lines = []
    for value in values:
        places: list[Place] = []
        published = []
        for group in groups:
            if value_of(group, line) == value:
                places = [place for place in group.places if place.epsilon is not None and measure in place.measures]
                cell = published_of(group) if measure == "accuracy" else None
                if cell and cell.epsilon in epsilons:
                    published = [(float(epsilons.index(cell.epsilon)), cell.accuracy)]
        x = [float(epsilons.index(place.epsilon or 0.0)) for place in places]
        lines.append(Line(legend_text(value), x, [place.measures[measure].estimate for place in places], published))
    ticks = [epsilon_text(epsilon, norm) for epsilon in epsilons]
    return Panel(title, lines, ticks, f"epsilon of the source ({norm_text(norm) or 'norm unknown'})")


def _label_panel(title: str, groups: Sequence[Group]) -> Panel:
    labels = values_on(groups, LABELS)
    epsilons = sorted({place.epsilon for group in groups for place in group.places if place.epsilon is not None})
    lines = []
    for epsilon in epsilons:
        found = [(group, place) for group in groups for place in group.places if place.epsilon == epsilon]
        x = [float(labels.index(value_of(group, LABELS))) for group, _ in found]
        estimates = [place.measures["accuracy"].estimate for _, place in found]
        lines.append(Line(epsilon_text(epsilon, groups[0].key.source_norm), x, estimates, []))
    ticks = ["all" if count is None else str(count) for count in labels]
    return Panel(title, lines, ticks, "training labels per class")


def _pages(
    title: str, about: str, panels: Sequence[Panel], *, legend: str, y_label: str = "accuracy"
) -> Iterator[StudyFigure]:
    shown = [panel for panel in panels if any(line.x for line in panel.lines)]
    for number, start in enumerate(range(0, len(shown), _PANELS)):
        page = shown[start : start + _PANELS]
        yield StudyFigure(
            _file_name(title, about, number),
            _heading(title, about),
            f"{y_label[0].upper()}{y_label[1:]} with 95 % intervals as bands, in {len(page)} "
            f"panel{'s' if len(page) > 1 else ''} with {len(page[0].lines)} line{'s' if len(page[0].lines) > 1 else ''}"
            f" each over the {page[0].x_label}. The tables hold the numbers.",
            functools.partial(draw_panels, page, legend, y_label),
        )


# Parts ----------------------------------------------------------------------------------------------------------


def _split(groups: Sequence[Group], axes: Sequence[str]) -> list[tuple[str, list[Group]]]:
    """Returns the groups with the same values on some axes, each with a text about the values that vary at all."""
    varying = [axis for axis in axes_of(groups) if axis in axes]
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(describe(group, varying), []).append(group)
    return list(parts.items())


def _num_epsilons(group: Group) -> int:
    return sum(place.epsilon is not None for place in group.places)


def _heading(title: str, about: str) -> str:
    heading = title[0].upper() + title[1:]
    return f"{heading}: {about}" if about else heading


def _file_name(title: str, about: str, number: int = 0) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", f"{title} {about}".lower()).strip("_")
    return f"{name}_{number + 1}" if number else name
