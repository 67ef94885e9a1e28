"""Writes the report of a study from the files in its folder: report.html, figures/, summary.csv and tensorboard/."""

import os
import pathlib
import platform
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from robust_tf.files import replaced_atomically
from robust_tf.reporting.page import bullets, page, table
from robust_tf.results import FILE_NAME
from robust_tf.studies.analysis import MEASURES, Group, Measure, Place, analyze, answers, comparisons
from robust_tf.studies.axes import axes_of, describe, epsilon_text, norm_text
from robust_tf.studies.drawing import published_of
from robust_tf.studies.figures import StudyFigure, study_figures, write_figures
from robust_tf.studies.grid import ERROR
from robust_tf.studies.hparams import write_hparams
from robust_tf.studies.published import SOURCE
from robust_tf.studies.records import CELLS, Cell, read_cells
from robust_tf.studies.summary import SUMMARY, write_summary
from robust_tf.studies.wording import (
    answer_sentence,
    counts_sentence,
    interval_points,
    needed,
    p_text,
    percent,
    signed_points,
)

REPORT = "report.html"
_OPEN_GROUPS = 6  # with more groups, their tables are collapsed
_METHOD = (
    "Each cell is one training job, whose test images were used once, after the training. Hyperparameters such as the "
    "learning rate were chosen on the validation part.",
    "A group is what has the same data set, mode, labels per class and kind of source. Its mean covers source seeds "
    "and draws of the training labels.",
    "Differences are paired: a robust source is compared with the standard source (epsilon 0) of the same seed, with "
    "the same draw of the labels.",
    "The answer at the top averages the groups over the source seeds and draws that all of them share.",
    "Intervals and p-values come from one t test, clustered by source seed and by draw (two-way random effects). A "
    "percentile bootstrap clustered by source seed is in summary.csv for comparison; it is too narrow for few seeds, "
    "because it never reaches beyond the smallest and the largest mean of a seed.",
    "Sources without a seed, such as published ones, are clustered by draw. Their intervals hold for other draws of "
    "the labels, but not for other sources.",
    "Better or worse means: p below 5 % after Holm's adjustment for the epsilons of the group. The number of runs that "
    "would decide is for 80 % power, if the true difference and variances equal the measured ones.",
    "The intervals hold for these test images. They do not say what other test images would give.",
)


class Failure(NamedTuple):
    """A cell or source that failed.

    Attributes:
        name: Its folder, relative to the folder of the study.
        error: The last line of its error.
        details: The whole error.
    """

    name: str
    error: str
    details: str


class Gap(NamedTuple):
    """Runs that are missing at a place, although other places of its group have them.

    Attributes:
        group: The group.
        place: The place.
        runs: Source seed and draw of each missing run.
    """

    group: Group
    place: Place
    runs: list[tuple[int | None, int]]


def write_report(workdir: pathlib.Path) -> None:
    """Writes summary.csv, figures/, tensorboard/ and report.html of a study, from cells.csv and the cells' folders.

    Args:
        workdir: Folder of the study. It may be unfinished: the report shows the gaps.

    Raises:
        UserError: cells.csv is missing or damaged, or a file cannot be written.
    """
    groups = analyze(cells := read_cells(workdir / CELLS))
    write_summary(workdir / SUMMARY, groups)
    write_hparams(workdir, cells)
    figures = study_figures(groups)
    content = _page(workdir, cells, groups, figures, write_figures(workdir, figures))
    with replaced_atomically(workdir / REPORT) as temporary:
        temporary.write_text(content, encoding="utf-8")


def failures(workdir: pathlib.Path) -> list[Failure]:
    """Returns the cells and sources of a study that failed, by the error.txt in their folders.

    Args:
        workdir: Folder of the study.
    """
    found = []
    for path in [*sorted(workdir.glob(f"sources/*/{ERROR}")), *sorted(workdir.glob(f"cells/*/{ERROR}"))]:
        if not (path.parent / FILE_NAME).exists():  # otherwise a later attempt has succeeded
            details = path.read_text(encoding="utf-8", errors="replace").strip()
            last = details.splitlines()[-1] if details else "unknown error"
            found.append(Failure(str(path.parent.relative_to(workdir)), last, details))
    return found


def gaps(groups: Sequence[Group]) -> list[Gap]:
    """Returns where runs are missing that other epsilons of the same group have.

    Args:
        groups: Result of `robust_tf.studies.analysis.analyze`.
    """
    found = []
    for group in groups:
        runs = [{(cell.source_seed, cell.seed) for cell in place.cells} for place in group.places]
        expected = sorted(set().union(*runs), key=str)
        for place, there in zip(group.places, runs, strict=True):
            if missing := [run for run in expected if run not in there]:
                found.append(Gap(group, place, missing))
    return found


def first_sentence(groups: Sequence[Group]) -> str:
    """Returns the answer of a study in plain words: one sentence for each transfer mode.

    Args:
        groups: Result of `robust_tf.studies.analysis.analyze`.
    """
    found = answers(groups)
    if not found:
        return (
            "This study has no pair of a robust and a standard source yet, so it does not say which transfers better."
        )
    return " ".join(answer_sentence(answer, groups) for answer in found)


def _page(
    workdir: pathlib.Path,
    cells: Sequence[Cell],
    groups: Sequence[Group],
    figures: Sequence[StudyFigure],
    elements: dict[str, str],
) -> str:
    failed, missing = failures(workdir), gaps(groups)
    sections = [
        ("In numbers", _counts(groups)),
        ("Warnings", bullets(_warnings(cells, failed, missing), "alarm")),
        ("Differences from the standard source", _tables(groups)),
        ("Figures", _figures(figures, elements)),
        ("Published accuracies", _published(groups)),
        ("Failures", _failures(failed)),
        ("Missing runs", _gaps(missing, groups)),
        ("How to read the numbers", bullets(_METHOD)),
        ("Versions and machine", table((), _versions(cells))),
    ]
    intro = f'<p id="answer"><strong>{escape(first_sentence(groups))}</strong></p>'
    return page(f"Study {workdir.absolute().name}", intro, sections)


def _counts(groups: Sequence[Group]) -> str:
    texts = [answer_sentence(answer, groups) for answer in answers(groups, "robust_accuracy")]
    for measure in MEASURES:
        if len(compared := comparisons(groups, measure)) > 1:
            texts.append(counts_sentence(compared, measure))
    return bullets(texts)


def _warnings(cells: Sequence[Cell], failed: Sequence[Failure], missing: Sequence[Gap]) -> list[str]:
    warnings = []
    if failed:
        warnings.append(f"Cells and sources that failed: {len(failed)}. They are listed below.")
    if missing:
        warnings.append(f"Runs that are missing beside finished ones: {sum(len(gap.runs) for gap in missing)}.")
    for name in ("robust_tf", "tensorflow", "keras"):
        versions = sorted({getattr(cell, name) for cell in cells} - {""})
        if len(versions) > 1:
            warnings.append(f"The cells were run with different versions of {name}: {', '.join(versions)}.")
    return warnings


def _tables(groups: Sequence[Group]) -> str:
    axes = axes_of(groups)
    parts = []
    for group in groups:
        opened = " open" if len(groups) <= _OPEN_GROUPS else ""
        name = describe(group, axes) or "all cells"
        tables = [
            _table(group, measure) for measure in MEASURES if any(measure in each.measures for each in group.places)
        ]
        parts.append(
            f"<details{opened}><summary>{escape(name)}: {escape(_verdicts(group))}</summary>{''.join(tables)}</details>"
        )
    return "".join(parts)


def _verdicts(group: Group) -> str:
    """Returns the verdicts of a group in a few words, for the line that opens its table."""
    compared = comparisons([group])
    if not compared:
        return "not compared"
    found = []
    for verdict in ("better", "worse"):
        places = [each.place for each in compared if each.difference.verdict == verdict]
        if places:
            epsilons = ", ".join(epsilon_text(place.epsilon, group.key.source_norm) for place in places)
            found.append(f"{verdict} at epsilon {epsilons}")
    return "; ".join(found) or "not decided"


def _table(group: Group, measure: Measure) -> str:
    key = group.key
    title = "mean per class accuracy" if group.metric == "mean_per_class_accuracy" else "accuracy"
    if measure == "robust_accuracy":
        title = (
            f"accuracy under attack ({norm_text(key.robust_norm)} {epsilon_text(key.robust_epsilon, key.robust_norm)})"
        )
    head = [
        f"source, {norm_text(key.source_norm)} epsilon",
        title,
        "difference, points",
        "verdict",
        "p (Holm)",
        "runs (seeds x draws)",
    ]
    rows = []
    for place in group.places:
        measured = place.measures.get(measure)
        if measured is None:
            continue
        name = epsilon_text(place.epsilon, key.source_norm) if place.epsilon is not None else place.source
        row = [name, percent(measured.estimate)]
        if difference := measured.difference:
            verdict: str = difference.verdict
            if verdict.startswith("not"):
                verdict = f"{verdict}; {needed(difference)}"
            interval = interval_points(difference.estimate.interval).removeprefix("95 % interval ")
            row += [f"{signed_points(difference.estimate.mean)} ({interval})", verdict, p_text(difference.holm_p_value)]
        else:
            row += ["", "standard source" if place.epsilon == 0 else "not compared", ""]
        rows.append([*row, _runs(place, measure)])
    return table(head, rows, numbers=True)


def _runs(place: Place, measure: Measure) -> str:
    estimate = place.measures[measure].estimate
    sources = "1 source" if estimate.cluster == "draw" else str(estimate.num_seeds)
    return f"{estimate.num_runs} ({sources} x {estimate.num_draws})"


def _figures(figures: Sequence[StudyFigure], elements: dict[str, str]) -> str:
    parts = []
    for figure in figures:
        svg = elements[figure.name].replace("<svg", f'<svg role="img" aria-label="{escape(figure.text)}"', 1)
        caption = f"<strong>{escape(figure.title)}.</strong> {escape(figure.text)}"
        parts.append(f'<figure id="{figure.name}">{svg}<figcaption>{caption}</figcaption></figure>')
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _published(groups: Sequence[Group]) -> str:
    axes = axes_of(groups)
    rows = []
    for group in groups:
        cell = published_of(group)
        ours = next((place for place in group.places if cell and place.epsilon == cell.epsilon), None)
        if cell and ours:
            measured = percent(ours.measures["accuracy"].estimate)
            name = describe(group, axes) or f"{cell.dataset}, {cell.architecture}"
            rows.append([name, epsilon_text(cell.epsilon, "l2"), f"{100 * cell.accuracy:.1f} %", measured])
    if not rows:
        return ""
    head = ("group", "L2 epsilon", "published", "this study")
    note = f"{SOURCE[0].upper()}{SOURCE[1:]}. The best epsilon was chosen by the test images."
    return f'<p class="soft">{escape(note)}</p>{table(head, rows, numbers=True)}'


def _failures(failed: Sequence[Failure]) -> str:
    parts = []
    for each in failed:
        summary = escape(f"{each.name}: {each.error}")
        parts.append(f"<details><summary>{summary}</summary><pre>{escape(each.details)}</pre></details>")
    return "".join(parts)


def _gaps(missing: Sequence[Gap], groups: Sequence[Group]) -> str:
    if not missing:
        return ""
    axes = axes_of(groups)
    rows = []
    for gap in missing:
        runs = [f"draw {draw}" if seed is None else f"seed {seed}, draw {draw}" for seed, draw in gap.runs]
        more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
        name = describe(gap.group, axes) or "all cells"
        epsilon = epsilon_text(gap.place.epsilon, gap.group.key.source_norm)
        rows.append([name, epsilon, f"{'; '.join(runs[:8])}{more}"])
    return table(("group", "epsilon", "missing runs"), rows)


def _versions(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    facts = [("finished cells", f"{len(cells):,}, of which {sum(cell.chosen for cell in cells):,} count")]
    facts.append(("time of all cells", f"{sum(cell.seconds for cell in cells):,.0f} s"))
    for name in ("robust_tf", "tensorflow", "keras"):
        facts.append((name, ", ".join(sorted({getattr(cell, name) for cell in cells} - {""})) or "unknown"))
    facts.append(("Python of this report", platform.python_version()))
    facts.append(("machine of this report", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"))
    return facts
