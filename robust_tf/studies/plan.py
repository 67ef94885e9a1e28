"""The plan of a study: how many jobs it has, how long they take, and how much disk they need."""

import pathlib
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table

from robust_tf.console import console
from robust_tf.results import FILE_NAME, JobResults
from robust_tf.studies.grid import Grid, PlannedCell, Source

# Bytes of a job: the classifier and three checkpoints of a small network, and the results alone.
_SOURCE_BYTES, _CELL_BYTES = 10e6, 50e3


def print_plan(grid: Grid, workdir: pathlib.Path, *, workers: int) -> None:
    """Prints the numbers of jobs, the time that they are expected to take, and the disk space that they need.

    The time is measured on the finished jobs of the same study.

    Args:
        grid: Jobs of the study.
        workdir: Folder of the study.
        workers: Number of processes that run jobs.
    """
    table = Table("", "sources", "cells", title=f"Plan of {workdir}", title_justify="left", box=box.SIMPLE)
    kinds: list[Sequence[Source | PlannedCell]] = [grid.sources, grid.cells]
    times = [_finished_seconds(kind) for kind in kinds]
    missing = [len(kind) - len(done) for kind, done in zip(kinds, times, strict=True)]
    medians = [statistics.median(done) if done else None for done in times]
    table.add_row("in all", *(str(len(kind)) for kind in kinds))
    table.add_row("finished", *(str(len(done)) for done in times))
    table.add_row("seconds each (median of the finished)", *("" if each is None else f"{each:.1f}" for each in medians))
    sizes = [len(kind) * size for kind, size in zip(kinds, (_SOURCE_BYTES, _CELL_BYTES), strict=True)]
    table.add_row("disk for small networks, GB", *(f"{size / 1e9:.2g}" for size in sizes))
    console.print(table)
    modes = sorted({(cell.job.data.dataset, cell.job.transfer.transfer_mode) for cell in grid.cells})
    console.print(f"Data sets and modes: {', '.join(f'{dataset} ({mode})' for dataset, mode in modes)}.")
    if any(number and each is None for number, each in zip(missing, medians, strict=True)):
        console.print(
            "The time is known once a source and a cell are finished: start the study, stop it after some jobs, and "
            "plan again. For large jobs, python -m robust_tf.train --dry_run --plan_devices=8xH100 with the flags of a "
            "cell estimates device-hours."
        )
        return
    seconds = sum(number * (each or 0.0) for number, each in zip(missing, medians, strict=True)) / workers
    console.print(f"What is missing takes about {seconds / 60:,.0f} minutes with --workers={workers}.")


def _finished_seconds(jobs: Sequence[Source | PlannedCell]) -> list[float]:
    found = [JobResults.read(pathlib.Path(each.job.run.workdir) / FILE_NAME) for each in jobs]
    return [results.seconds or 0.0 for results in found if results is not None]
