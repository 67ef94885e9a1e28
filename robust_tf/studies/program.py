"""What `python -m robust_tf.study` does: it runs a study, or plans it, writes an array job, or ranks sources."""

import pathlib
from collections.abc import Sequence

from robust_tf.config.study import StudyConfig
from robust_tf.errors import UserError
from robust_tf.studies.grid import Grid, build_grid
from robust_tf.studies.launch import write_array_job
from robust_tf.studies.plan import print_plan


def run(study: StudyConfig, arguments: Sequence[str], workdir: pathlib.Path) -> int:
    """Does what the flags ask for, and returns the exit code.

    Args:
        study: Flags of the program.
        arguments: The same flags as text, without the name of the program.
        workdir: Folder of the study.

    Raises:
        UserError: Something is wrong with the flags, the data or the files.
    """
    if study.advise:
        return _advise(study, workdir)
    if not study.vary and not study.also:
        raise UserError("A study needs an axis, such as --vary='source.epsilon=0 1'. Received: no --vary.")
    grid = build_grid(arguments, workdir)
    if study.job.plan.dry_run:
        print_plan(grid, workdir, workers=study.workers)
        return 0
    if study.launcher != "none":
        write_array_job(study.launcher, grid, arguments, workdir)
        return 0
    from robust_tf.studies.run import run_study, write_outputs

    if study.only == "report":
        write_outputs(grid, workdir)
        return 0
    if study.only:
        grid = _part(grid, study.only)
    return run_study(
        grid,
        workdir,
        workers=study.workers,
        retry_failed=study.retry_failed,
        rerun_changed=study.rerun_changed,
        is_part=bool(study.only),
    )


def _part(grid: Grid, only: str) -> Grid:
    """Returns the one job that an element of an array job runs."""
    kind, _, number = only.partition(":")
    jobs = {"source": grid.sources, "cell": grid.cells}.get(kind)
    if jobs is None or not number.isdigit() or int(number) >= len(jobs):
        raise UserError(
            f"--only takes source:NUMBER below {len(grid.sources)}, cell:NUMBER below {len(grid.cells)}, or report. "
            f"Received: {only!r}."
        )
    chosen = int(number)
    if kind == "source":
        return Grid((grid.sources[chosen],), ())
    cell = grid.cells[chosen]
    return Grid((cell.source,) if cell.source else (), (cell,))


def _advise(study: StudyConfig, workdir: pathlib.Path) -> int:
    from robust_tf.environment import start_tensorflow

    start_tensorflow()
    from robust_tf.studies.advice import advise

    advise(study.job, workdir)
    return 0
