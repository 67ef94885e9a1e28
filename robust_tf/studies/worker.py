"""A process that runs the jobs of a study one after another, so that TensorFlow is loaded only once."""

import os
import pathlib
import signal
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from robust_tf.config.job import JobConfig
from robust_tf.environment import start_tensorflow
from robust_tf.errors import UserError
from robust_tf.files import replaced_atomically
from robust_tf.studies.grid import ERROR


class Outcome(NamedTuple):
    """What became of one job.

    Attributes:
        error: Why the job failed, in one line; empty if it succeeded.
        disk_full: Whether it failed because there is no space left.
    """

    error: str
    disk_full: bool = False


def work(connection: Connection, log: str, threads: int) -> None:
    """Runs the jobs that arrive on a connection, and answers each with its outcome, until the connection closes.

    Args:
        connection: Connection to the scheduler. It sends a `JobConfig` for each job.
        log: File for what the jobs print.
        threads: Number of threads for computing; 0 leaves the number to TensorFlow.
    """
    os.setpgrp()  # Ctrl-C reaches the scheduler only, which ends this process by SIGTERM
    _redirect_output(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_process(threads)
    from robust_tf.training.interruption import Interrupted, signals_raise

    try:
        with signals_raise():
            while True:
                job = connection.recv()
                connection.send(run_safely(job))
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None
    except (EOFError, BrokenPipeError):
        return


def prepare_process(threads: int) -> None:
    """Loads TensorFlow for the jobs of a study.

    Args:
        threads: Number of threads for computing; 0 leaves the number to TensorFlow.
    """
    if threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # several workers may share a GPU
    start_tensorflow()
    import tensorflow as tf

    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)


def run_safely(job: JobConfig) -> Outcome:
    """Runs a job. If it fails, writes error.txt into its workdir.

    Args:
        job: A cell or a source.
    """
    import tensorflow as tf

    from robust_tf.studies.shared_jobs import run_sharing

    tf.config.experimental.enable_tensor_float_32_execution(job.optimization.tf32)
    if job.run.deterministic:
        tf.config.experimental.enable_op_determinism()
    workdir = pathlib.Path(job.run.workdir)
    (workdir / ERROR).unlink(missing_ok=True)
    try:
        run_sharing(job)
    except Exception as error:  # noqa: BLE001  # one cell must not end the others, and its error is reported
        message = " ".join(str(error).split()) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        message = message.strip().splitlines()[0] if message.strip() else type(error).__name__
        details = message if isinstance(error, UserError) else f"{traceback.format_exc()}\n{message}"
        disk_full = "No space left" in details
        try:
            with replaced_atomically(workdir / ERROR) as temporary:
                temporary.write_text(details + "\n", encoding="utf-8")
        except UserError:  # on a full disk the scheduler's message has to do
            pass
        return Outcome(message, disk_full)
    return Outcome("")


def _redirect_output(log: str) -> None:
    pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)


def _end_with_parent() -> None:
    """Ends this process as SIGTERM does when the scheduler is gone, for example after kill -9."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
