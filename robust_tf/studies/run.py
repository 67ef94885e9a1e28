"""Runs a study: first the missing sources, then the missing cells, in one or more worker processes.

There is no central state. A job is finished when its folder holds results.json, so the same command continues after any
interruption.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, cast

from rich import box
from rich.table import Table

from robust_tf.config.job import JobConfig
from robust_tf.config.study import StudyConfig
from robust_tf.console import console, meter
from robust_tf.errors import UserError
from robust_tf.files import check_output_folder, replaced_atomically
from robust_tf.studies.grid import ERROR, CellRun, SourceRun, StudyPlan
from robust_tf.studies.states import cells_to_run, error_of, sources_to_run, state_of
from robust_tf.studies.worker import Outcome, work

LOGS = "logs"
_LOCK = ".lock"
# TensorFlow and Keras keep a little of every job. A new process from time to time keeps the memory bounded.
_MOST_JOBS = 300
# A worker has this many periods of this many seconds to save its job. It gets SIGTERM again at the start of each one,
# because Python drops an exception that a signal handler raises while an object is being deleted.
_PERIODS_TO_SAVE, _PERIOD_SECONDS = 4, 30.0


class Failed(NamedTuple):
    """A cell or a source that failed.

    Attributes:
        name: Its name.
        error: Why it failed, in one line.
    """

    name: str
    error: str


@dataclasses.dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    run: SourceRun | CellRun | None = None
    last: SourceRun | CellRun | None = None
    jobs: int = 0


@dataclasses.dataclass
class _Queue:
    """The jobs that are still to run. Cells of one source follow each other, so that its features stay in memory."""

    sources: collections.deque[SourceRun]
    waiting: dict[str, list[CellRun]]
    ready: dict[str, collections.deque[CellRun]]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    done_sources: int = 0
    done_cells: int = 0

    def next_for(self, worker: _Worker, others: list[SourceRun | CellRun]) -> SourceRun | CellRun | None:
        """Returns the next job for a worker, if possible one that shares much with its last one.

        Sources come first. Those that differ only in their seed share a trainer, and cells of one source its features.

        Args:
            worker: The worker.
            others: Jobs that the other workers run now.
        """
        if self.sources:
            last_family, busy_families = _family(worker.last), [_family(run) for run in others]
            near = [source for source in self.sources if _family(source) == last_family]
            untouched = [source for source in self.sources if _family(source) not in busy_families]
            chosen = (near or untouched or self.sources)[0]
            self.sources.remove(chosen)
            return chosen
        if not self.ready:
            return None
        last, busy = _source_of(worker.last) if worker.last else "", {_source_of(run) for run in others}
        free = [name for name in self.ready if name not in busy]
        longest = max(self.ready, key=lambda name: len(self.ready[name]))
        name = last if last in self.ready else (free[0] if free else longest)
        cells = self.ready[name]
        cell = cells.popleft()
        if not cells:
            del self.ready[name]
        return cell

    def finish(self, run: SourceRun | CellRun, outcome: Outcome) -> None:
        """Notes the outcome of a job. Cells become ready with their source, or fail with it."""
        if outcome.error:
            self.failed[run.name] = outcome.error
        if isinstance(run, CellRun):
            self.done_cells += 1
            return
        self.done_sources += 1
        cells = self.waiting.pop(run.name, [])
        if outcome.error:
            self.done_cells += len(cells)
            self.failed |= {cell.name: f"its source {run.name} failed: {outcome.error}" for cell in cells}
        elif cells:
            self.ready[run.name] = collections.deque(cells)


def run_study(plan: StudyPlan, config: StudyConfig) -> list[Failed]:
    """Runs the missing sources and cells of a study.

    Args:
        plan: The study.
        config: How it is run.

    Returns:
        The sources and cells that failed, now or in an earlier run.

    Raises:
        UserError: The folder cannot be written to, another program runs the same study, or the disk is full.
    """
    check_output_folder(plan.workdir, "--workdir")
    with _locked(plan):
        queue = _queue(plan, retry_failed=config.retry_failed)
        total = len(queue.sources) + len(cells_to_run(plan)) - queue.done_cells
        if total:
            _run_all(plan, queue, config.workers)
    return [Failed(name, error) for name, error in queue.failed.items()]


def failed_before(plan: StudyPlan) -> list[Failed]:
    """Returns the sources and cells that failed in an earlier run.

    Args:
        plan: The study.
    """
    return [Failed(name, error) for name, error in _queue(plan, retry_failed=False).failed.items()]


def failure_table(failed: list[Failed]) -> Table:
    """Returns the table of the sources and cells that failed."""
    table = Table(title=f"{len(failed)} sources or cells failed", title_justify="left", box=box.SIMPLE)
    table.add_column("name", overflow="fold")
    table.add_column("error", overflow="fold")
    for name, error in failed:
        table.add_row(name, error)
    return table


def _queue(plan: StudyPlan, *, retry_failed: bool) -> _Queue:
    queue = _Queue(sources=collections.deque(), waiting={}, ready={})
    cells = cells_to_run(plan)
    pending = {source.name for source in sources_to_run(plan)}
    broken: dict[str, str] = {}
    for source in plan.sources:
        if source.name not in pending:
            continue
        if state_of(source.workdir) == "failed" and not retry_failed:
            broken[source.name] = queue.failed[source.name] = error_of(source.workdir)
        else:
            queue.sources.append(source)
    groups: dict[str, list[CellRun]] = {}
    for cell in cells:
        name = _source_of(cell)
        if name in broken:
            queue.failed[cell.name] = f"its source {name} failed: {broken[name]}"
            queue.done_cells += 1
        elif state_of(cell.workdir) == "failed" and not retry_failed:
            queue.failed[cell.name] = error_of(cell.workdir)
            queue.done_cells += 1
        else:
            groups.setdefault(name, []).append(cell)
    needed = {source.name for source in queue.sources} & groups.keys()
    queue.sources = collections.deque(source for source in queue.sources if source.name in needed)
    for name, group in groups.items():
        group.sort(key=lambda cell: (cell.job.data.dataset, cell.job.transfer.transfer_mode))
        if name in needed:
            queue.waiting[name] = group
        else:
            queue.ready[name] = collections.deque(group)
    return queue


def _run_all(plan: StudyPlan, queue: _Queue, num_workers: int) -> None:
    sources, skipped = len(queue.sources), queue.done_cells
    cells = len(cells_to_run(plan)) - skipped
    num_workers = min(num_workers, sources + cells)
    # A single process uses what TensorFlow chooses, exactly as `robust_tf.train` does.
    threads = max((os.cpu_count() or 1) // num_workers, 1) if num_workers > 1 else 0
    console.print(f"{sources} sources and {cells} cells to run in {plan.workdir}; their output is in {LOGS}/.")
    workers = [_start(plan, number, threads) for number in range(num_workers)]
    try:
        # A source takes much longer than most cells, so there are two bars, each with its own rate and ETA.
        if sources:
            with meter("sources", total=sources, unit="sources") as bar:
                while queue.done_sources < sources and _run_on(plan, queue, workers, threads):
                    bar.update(queue.done_sources, _failures(queue))
        with meter("cells", total=cells, unit="cells") as bar:
            bar.update(queue.done_cells - skipped, _failures(queue))
            while _run_on(plan, queue, workers, threads):
                bar.update(queue.done_cells - skipped, _failures(queue))
    finally:
        _stop(workers)


def _run_on(plan: StudyPlan, queue: _Queue, workers: list[_Worker], threads: int) -> bool:
    """Gives jobs to the free workers and waits for news of one. Returns False when nothing is left to do."""
    for number, worker in enumerate(workers):
        if worker.run is None and worker.jobs >= _MOST_JOBS:
            _stop([worker])
            workers[number] = _start(plan, number, threads)
    for worker in workers:
        if worker.run is None:
            _give(worker, queue, workers)
    active = [worker for worker in workers if worker.run]
    events = wait([item for each in active for item in (each.connection, each.process.sentinel)], timeout=5)
    for number, worker in enumerate(workers):
        reports = worker.connection in events or worker.process.sentinel in events
        if worker.run and reports and not _receive(worker, queue):
            workers[number] = _start(plan, number, threads)
    return bool(active)


def _start(plan: StudyPlan, number: int, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    ours, theirs = context.Pipe()
    log = str(plan.workdir / LOGS / f"worker_{number}.log")
    process = context.Process(target=work, args=(theirs, log, threads), name=f"worker {number}")
    process.start()
    theirs.close()  # so that the end of the worker closes the connection
    return _Worker(process, ours)


def _give(worker: _Worker, queue: _Queue, workers: list[_Worker]) -> None:
    worker.run = queue.next_for(worker, [each.run for each in workers if each.run])
    if worker.run is not None:
        # A worker that has just died is noticed by its sentinel.
        with contextlib.suppress(BrokenPipeError):
            worker.connection.send(worker.run.job)


def _receive(worker: _Worker, queue: _Queue) -> bool:
    """Notes the outcome of a worker's job. Returns whether the worker is still there."""
    run = worker.run
    if run is None:
        return True
    alive = True
    try:
        outcome = cast(Outcome, worker.connection.recv())
    except (EOFError, ConnectionResetError):
        alive = False
        worker.process.join()
        outcome = Outcome(
            f"The process that ran it ended with code {worker.process.exitcode}. A code of -9 often means that the "
            "memory was not enough: use fewer --workers."
        )
        with contextlib.suppress(UserError), replaced_atomically(run.workdir / ERROR) as temporary:
            temporary.write_text(outcome.error + "\n", encoding="utf-8")
    if outcome.disk_full:
        raise UserError(
            f"There is no space left for the study. {run.name} was not saved; everything before it is. Free some disk "
            f"space, and start the same command again with --retry_failed. Received: {outcome.error}"
        )
    worker.run, worker.last, worker.jobs = None, run, worker.jobs + 1
    queue.finish(run, outcome)
    if outcome.error:
        console.print(f"FAILED {run.name}: {outcome.error}")
    return alive


def _stop(workers: list[_Worker]) -> None:
    """Ends the workers. One that is running a job saves it first."""
    for worker in workers:
        if worker.run is None:
            worker.connection.close()
        else:
            console.print(f"Waiting until {worker.run.name} has been saved ...")
    for _ in range(_PERIODS_TO_SAVE):
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + _PERIOD_SECONDS
        for worker in workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
    for worker in workers:
        worker.process.kill()
        worker.process.join()


def _failures(queue: _Queue) -> str:
    return f"failed {len(queue.failed)}" if queue.failed else ""


def _family(run: SourceRun | CellRun | None) -> JobConfig | None:
    """Returns what sources of different seeds have in common, None for a cell."""
    return _family_of(run.job) if isinstance(run, SourceRun) else None


@functools.cache
def _family_of(job: JobConfig) -> JobConfig:
    return job.with_flags(seed=0, workdir="")


def _source_of(run: SourceRun | CellRun) -> str:
    """Returns the source on whose features a cell depends. A source depends on none."""
    if isinstance(run, SourceRun):
        return run.name
    return run.source.name if run.source else run.job.transfer.source


@contextlib.contextmanager
def _locked(plan: StudyPlan) -> Iterator[None]:
    """Refuses a study that another program is running. The lock ends with the process, however it ends."""
    plan.workdir.mkdir(parents=True, exist_ok=True)
    with (plan.workdir / _LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another program is running this study. Received: --workdir={plan.workdir}. Wait for it, or choose "
                "another --workdir."
            ) from None
        yield
