"""The plan of a study for `--dry_run`: how many cells and sources, how long they take, and how much disk they need."""

import datetime
import pathlib
import statistics
from collections.abc import Sequence

from rich.table import Table

from robust_tf.config.study import Study
from robust_tf.console import console
from robust_tf.results import FILE_NAME
from robust_tf.studies.device_hours import device_hours
from robust_tf.studies.grid import CellRun, SourceRun, StudyPlan
from robust_tf.studies.states import cells_to_run, sources_to_run, state_of

_MEGABYTE = 1e6


def print_study_plan(study: Study, plan: StudyPlan) -> None:
    """Prints the plan of a study. Nothing is run, prepared or downloaded.

    Args:
        study: The study.
        plan: Its cells and sources.
    """
    table = Table(title=f"Plan of the study in {plan.workdir}", title_justify="left", show_header=False)
    cells, sources = cells_to_run(plan), sources_to_run(plan)
    failed = sum(state_of(cell.workdir) == "failed" for cell in cells)
    merged = f" ({plan.merged} places of the grids share a cell with another)" if plan.merged else ""
    table.add_row("cells", f"{len(plan.cells)}{merged}; {len(cells)} still to run, of which {failed} failed before")
    table.add_row("sources to train", f"{len(sources)} of {len(plan.sources)}")
    for number, grid in enumerate(study.grids, start=1):
        for axis in grid.axes:
            table.add_row(f"grid {number}: {axis.name}", " ".join(axis.texts) + (" (chosen)" if axis.chosen else ""))
    table.add_row("time", _time(plan, cells, sources, study.config.workers))
    table.add_row("disk", _disk(plan, cells, sources))
    for hours in device_hours(study.plan, sources, cells) if study.plan.plan_devices else []:
        table.add_row(f"on {hours.name}", hours.in_words)
        if study.plan.plan_price is not None:
            cost = (hours.sources + hours.cells) * study.plan.plan_price
            table.add_row(f"cost on {hours.name}", f"x {study.plan.plan_price:g} = {cost:,.2f}")
    console.print(table)


def measured_seconds(runs: Sequence[CellRun | SourceRun]) -> float | None:
    """Returns the median time of the finished ones among some jobs, or None if none is finished.

    Args:
        runs: Cells or sources.
    """
    times = []
    for run in runs:
        results, flags = run.workdir / FILE_NAME, run.workdir / "flags.cfg"
        if results.exists() and flags.exists():
            times.append(max(results.stat().st_mtime - flags.stat().st_mtime, 0.0))
    return statistics.median(times) if times else None


def _time(plan: StudyPlan, cells: Sequence[CellRun], sources: Sequence[SourceRun], workers: int) -> str:
    """Returns the time that is left, from the finished jobs of the same kind."""
    seconds, unknown = 0.0, 0
    modes = sorted({cell.job.transfer.transfer_mode for cell in plan.cells})
    groups: list[tuple[Sequence[CellRun | SourceRun], int]] = [(plan.sources, len(sources))]
    for mode in modes:
        of_mode = [cell for cell in plan.cells if cell.job.transfer.transfer_mode == mode]
        groups.append((of_mode, sum(cell.job.transfer.transfer_mode == mode for cell in cells)))
    for runs, left in groups:
        median = measured_seconds(runs)
        if left and median is None:
            unknown += left
        seconds += left * (median or 0.0)
    if unknown and not seconds:
        return f"unknown until the first of {unknown} jobs is finished"
    text = f"{datetime.timedelta(seconds=round(seconds / workers))} with {workers} workers, measured on finished jobs"
    if unknown:
        text += f"; unknown for {unknown} jobs of a kind of which none is finished"
    return text


def _disk(plan: StudyPlan, cells: Sequence[CellRun], sources: Sequence[SourceRun]) -> str:
    parts = []
    for name, runs, left in (("sources", plan.sources, len(sources)), ("cells", plan.cells, len(cells))):
        finished = [run.workdir for run in runs if state_of(run.workdir) == "finished"]
        if finished:
            size = statistics.mean(map(_size, finished))
            parts.append(f"{left} {name} x {size / _MEGABYTE:.2f} MB = {left * size / _MEGABYTE:,.0f} MB")
        elif left:
            parts.append(f"{left} {name}, unknown until the first is finished")
    return "; ".join(parts) or "nothing more"


def _size(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
