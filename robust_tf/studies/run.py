"""Runs the jobs of a study: the sources that are missing, then the cells that are missing, and writes the report."""

import os
import pathlib
import queue
import shutil
import threading
from collections.abc import Sequence

from rich import box
from rich.table import Table

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.console import console, meter
from robust_tf.errors import UserError
from robust_tf.files import check_output_folder, replaced_atomically
from robust_tf.flags import flat_fields, to_flag_file
from robust_tf.job.workdir import FLAGS
from robust_tf.results import FILE_NAME
from robust_tf.studies.collect import collect
from robust_tf.studies.grid import Grid, PlannedCell, Source
from robust_tf.studies.report import ERROR, REPORT, write_report
from robust_tf.studies.worker import Outcome, Worker
from robust_tf.training.interruption import Interrupted, signals_raise

_SHOWN = 10  # names that a message lists at most


def run_study(
    grid: Grid, workdir: pathlib.Path, *, workers: int, retry_failed: bool, rerun_changed: bool, is_part: bool = False
) -> int:
    """Runs what is missing of a study, and writes cells.csv, the report and the logs for TensorBoard.

    Args:
        grid: Jobs of the study.
        workdir: Folder of the study.
        workers: Number of processes that run jobs.
        retry_failed: Whether jobs that have failed before are run again.
        rerun_changed: Whether jobs that were run with other flags are deleted and run again.
        is_part: Whether these are only some jobs of a study, so that no report is written.

    Returns:
        Exit code: 0 if no job has failed, 1 if some have, 130 or 143 after a signal.

    Raises:
        UserError: The folder cannot be written to, or it holds jobs with other flags.
    """
    check_output_folder(workdir, "--workdir")
    _refuse_or_delete_changed(grid, delete=rerun_changed)
    runner = _Runner(workdir, workers=workers, retry_failed=retry_failed)
    with runner:
        runner.run("sources", [[source] for source in grid.sources])
        runner.run("cells", _by_source(grid))
    if not is_part:
        write_outputs(grid, workdir)
    failed = failures_of(grid)
    if failed:
        console.print(_table_of(failed))
        console.print(f"{len(failed)} jobs failed. --retry_failed runs them again.")
    if runner.signal_number:
        console.print("Interrupted. The same command continues the study.")
        return 128 + runner.signal_number
    if runner.is_disk_full:
        raise UserError(f"No space left for {workdir}. Free some space, and run the same command again.")
    return int(bool(failed))


def write_outputs(grid: Grid, workdir: pathlib.Path) -> None:
    """Writes cells.csv, summary.csv, the figures, report.html and the logs for TensorBoard from the finished cells.

    Args:
        grid: Jobs of the study.
        workdir: Folder of the study.
    """
    cells = collect(grid, workdir)
    if not cells:
        console.print("No cell is finished yet, so there is no report.")
        return
    from robust_tf.studies.hparams import write_hparams

    write_report(workdir)
    write_hparams(workdir, cells)
    console.print(f"{len(cells)} of {len(grid.cells)} cells are finished. The report is in {workdir / REPORT}.")


def failures_of(grid: Grid) -> dict[str, str]:
    """Returns why jobs of a study failed, by their names. A cell whose source failed has that as its reason."""
    failed: dict[str, str] = {}
    for source in grid.sources:
        if error := error_of(source.job):
            failed[f"source {source.name}"] = error
    for cell in grid.cells:
        if error := error_of(cell.job):
            failed[cell.name] = error
        elif cell.source and f"source {cell.source.name}" in failed:
            failed[cell.name] = f"its source {cell.source.name} failed"
    return failed


def error_of(job: JobConfig) -> str:
    """Returns why a job failed, or "" if it has not failed or was finished later."""
    folder = pathlib.Path(job.run.workdir)
    if is_finished(job) or not (folder / ERROR).exists():
        return ""
    return (folder / ERROR).read_text(encoding="utf-8", errors="replace").strip() or "unknown error"


def is_finished(job: JobConfig) -> bool:
    """Returns whether a job has written its results."""
    return (pathlib.Path(job.run.workdir) / FILE_NAME).exists()


class _Runner:
    """Processes that run jobs, and what has stopped them. Use it in a `with` block."""

    def __init__(self, workdir: pathlib.Path, *, workers: int, retry_failed: bool) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        self._workers = [Worker(workdir / f"log{number}.txt", threads=threads) for number in range(workers)]
        self._retry_failed = retry_failed
        self.signal_number = 0
        self.is_disk_full = False

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def run(self, name: str, groups: Sequence[Sequence[Source | PlannedCell]]) -> None:
        """Runs the jobs of each group one after the other in one process, and the groups at the same time.

        Args:
            name: Name of the jobs.
            groups: The jobs. Those that are finished, or have failed before, are left out.
        """
        waiting: queue.Queue[list[JobConfig]] = queue.Queue()
        total = 0
        for group in groups:
            jobs = [each.job for each in group if self._is_missing(each.job)]
            total += len(jobs)
            if jobs:
                waiting.put(jobs)
        if not total or self._is_stopped:
            return
        done: queue.Queue[Outcome | None] = queue.Queue()
        threads = [threading.Thread(target=self._work, args=(worker, waiting, done)) for worker in self._workers]
        try:
            with signals_raise(), meter(name, total=total, unit=name) as bar:
                bar.update(0)
                for thread in threads:
                    thread.start()
                ended = failed = running = 0
                running = len(threads)
                while running:
                    outcome = done.get()
                    if outcome is None:
                        running -= 1
                        continue
                    ended += 1
                    failed += bool(outcome.error)
                    bar.update(ended, f"{failed} failed" if failed else "")
        except Interrupted as interruption:
            self.signal_number = interruption.signal_number
            console.print("Stopping: each running job saves its state.")
            for worker in self._workers:
                worker.stop()
        for thread in threads:
            thread.join()

    @property
    def _is_stopped(self) -> bool:
        return bool(self.signal_number) or self.is_disk_full

    def _is_missing(self, job: JobConfig) -> bool:
        return not is_finished(job) and (self._retry_failed or not error_of(job))

    def _work(
        self, worker: Worker, waiting: "queue.Queue[list[JobConfig]]", done: "queue.Queue[Outcome | None]"
    ) -> None:
        try:
            while not self._is_stopped:
                try:
                    jobs = waiting.get_nowait()
                except queue.Empty:
                    return
                for job in jobs:
                    if self._is_stopped:
                        return
                    outcome = worker.run(job)
                    if outcome.is_interrupted:
                        return
                    if outcome.is_disk_full:
                        self.is_disk_full = True
                    elif outcome.error:
                        _write_error(job, outcome.error)
                    done.put(outcome)
        finally:
            done.put(None)


def _write_error(job: JobConfig, error: str) -> None:
    with replaced_atomically(pathlib.Path(job.run.workdir) / ERROR) as temporary:
        temporary.write_text(error + "\n", encoding="utf-8")


def _by_source(grid: Grid) -> list[list[PlannedCell]]:
    """Returns the cells whose source is there, in one group for each source."""
    groups: dict[str, list[PlannedCell]] = {}
    for cell in grid.cells:
        if cell.source is None or is_finished(cell.source.job):
            groups.setdefault(cell.job.transfer.source, []).append(cell)
    return list(groups.values())


def _refuse_or_delete_changed(grid: Grid, *, delete: bool) -> None:
    changed: dict[str, tuple[pathlib.Path, list[str]]] = {}
    jobs: list[Source | PlannedCell] = [*grid.sources, *grid.cells]
    for each in jobs:
        path = pathlib.Path(each.job.run.workdir) / FLAGS
        if (
            path.exists()
            and _identity(path.read_text(encoding="utf-8")) != _identity(to_flag_file(each.job.resolved()))
            and (differences := read_flag_file(path).differences(each.job))
        ):
            changed[each.name] = path.parent, differences
    if delete:
        for folder, _ in changed.values():
            shutil.rmtree(folder)
        if changed:
            console.print(f"Deleted {len(changed)} jobs that were run with other flags.")
    elif changed:
        shown = [f"{name} ({'; '.join(differences)})" for name, (_, differences) in list(changed.items())[:_SHOWN]]
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(
            f"{len(changed)} jobs of the study were run with other flags (there -> now). Received: {', '.join(shown)}"
            f"{more}. Use --rerun_changed to delete and repeat them, or another --workdir to keep them."
        )


def _identity(flag_file: str) -> list[str]:
    """Returns the lines of a flag file that make a job what it is."""
    names = {field.name for field in flat_fields(JobConfig) if field.metadata.get("identity", True)}
    return sorted(line for line in flag_file.splitlines() if line.lstrip("-").partition("=")[0] in names)


def _table_of(failed: dict[str, str]) -> Table:
    table = Table("job", "error", title="Failed jobs", title_justify="left", box=box.SIMPLE)
    for name, error in list(failed.items())[:_SHOWN]:
        table.add_row(name, error.splitlines()[-1][:300])
    if len(failed) > _SHOWN:
        table.add_row(f"and {len(failed) - _SHOWN} more", "see error.txt in their folders")
    return table
