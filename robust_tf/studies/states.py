"""What the folder of a study already holds: finished, failed and stale cells and sources."""

import pathlib
import shutil
from typing import Literal

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.study import Stale
from robust_tf.errors import UserError
from robust_tf.flags import to_flag_file
from robust_tf.results import FILE_NAME
from robust_tf.studies.grid import ERROR, CellRun, SourceRun, StudyPlan

State = Literal["missing", "finished", "failed"]
_SHOWN = 5


def state_of(workdir: pathlib.Path) -> State:
    """Returns whether the job of a folder is finished, has failed, or has still to run.

    Args:
        workdir: Folder of the job.
    """
    if (workdir / FILE_NAME).exists():
        return "finished"
    return "failed" if (workdir / ERROR).exists() else "missing"


def error_of(workdir: pathlib.Path) -> str:
    """Returns the last line of the error.txt of a job that has failed.

    Args:
        workdir: Folder of the job.
    """
    lines = (workdir / ERROR).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "unknown error"


def settle_stale(plan: StudyPlan, stale: Stale) -> int:
    """Finds cells and sources that were run with other flags, and refuses, deletes or keeps them.

    If a source is stale, all of its cells are stale.

    Args:
        plan: The study.
        stale: What to do about them.

    Returns:
        The number of stale jobs.

    Raises:
        UserError: There are stale jobs, and `stale` is "refuse". The message names some and the flags that differ.
    """
    if stale == "keep":
        return 0
    differing: dict[pathlib.Path, str] = {}
    runs: list[SourceRun | CellRun] = [*plan.sources, *plan.cells]
    for run in runs:
        if differences := _differences(run.workdir, run.job):
            differing[run.workdir] = "; ".join(differences)
    for cell in plan.cells:
        if cell.source and cell.source.workdir in differing and cell.workdir.exists():
            differing.setdefault(cell.workdir, "its source is stale")
    if not differing:
        return 0
    if stale == "refuse":
        named = [f"{path.parent.name}/{path.name} ({reason})" for path, reason in list(differing.items())[:_SHOWN]]
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{len(differing)} cells or sources in {plan.workdir} were run with other flags (there -> now): "
            f"{', '.join(named)}{more}. Use --stale=rerun to delete them and run them again, --stale=keep to count "
            "them as they are, or another --workdir."
        )
    for path in differing:
        shutil.rmtree(path, ignore_errors=True)
    return len(differing)


def sources_to_run(plan: StudyPlan) -> list[SourceRun]:
    """Returns the sources without a classifier that an unfinished cell needs."""
    needed = {cell.source.name for cell in plan.cells if cell.source and state_of(cell.workdir) != "finished"}
    return [each for each in plan.sources if each.name in needed and state_of(each.workdir) != "finished"]


def cells_to_run(plan: StudyPlan) -> list[CellRun]:
    """Returns the cells that are not finished, failed ones included."""
    return [cell for cell in plan.cells if state_of(cell.workdir) != "finished"]


def _differences(workdir: pathlib.Path, job: JobConfig) -> list[str]:
    path = workdir / "flags.cfg"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    # Parsing hundreds of flag files takes seconds, and nearly all of them are equal to the text that is expected.
    return [] if text == to_flag_file(job.resolved()) else read_flag_file(path).differences(job)
