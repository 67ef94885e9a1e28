"""A process that runs the jobs of a study one after the other, so that TensorFlow starts once for many jobs."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from typing import IO

from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.files import cache_folder
from robust_tf.flags import to_flag_file

# TensorFlow and Keras keep a little of every job. A new process from time to time keeps the memory bounded.
_MOST_JOBS = 200


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        error: What went wrong, in one paragraph; empty if the job is finished.
        is_interrupted: Whether the process was stopped by a signal. The job continues when it is run again.
        is_disk_full: Whether there was no space left, so that other jobs would fail, too.
    """

    error: str = ""
    is_interrupted: bool = False
    is_disk_full: bool = False


class Worker:
    """A process that runs jobs. It is started with the first job, and again if it has ended or run many jobs.

    Args:
        log: File to which the output of the jobs is added.
        threads: Number of threads for TensorFlow.
    """

    def __init__(self, log: pathlib.Path, *, threads: int) -> None:
        self._log, self._threads = log, threads
        self._process: subprocess.Popen[str] | None = None
        self._settings: tuple[bool, bool] | None = None
        self._jobs = 0
        self._is_stopped = False

    def run(self, job: JobConfig) -> Outcome:
        """Runs a job, and returns how it ended."""
        settings = (job.run.deterministic, job.optimization.tf32)
        if self._jobs >= _MOST_JOBS or self._settings not in (None, settings):  # a process cannot change its settings
            self.close()
        if self._is_stopped:
            return Outcome("stopped", is_interrupted=True)
        if self._process is None:
            self._process, self._settings, self._jobs = self._start(job), settings, 0
        self._jobs += 1
        process = self._process
        if line := _answer(process, {"flags": to_flag_file(job)}):
            return Outcome(**json.loads(line))
        code = process.wait()
        self._process = None
        if self._is_stopped or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return Outcome("stopped", is_interrupted=True)
        reason = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " The machine may be out of memory; try fewer --workers." if code == -signal.SIGKILL else ""
        return Outcome(f"The process of the job {reason}.{hint} Its output is in {self._log}.")

    def stop(self) -> None:
        """Tells the process to save the state of its job and to end. Another thread may be waiting in `run`."""
        self._is_stopped = True
        if self._process is not None:
            self._process.terminate()

    def close(self) -> None:
        """Ends the process after its job, and waits for it."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(BrokenPipeError):
                if process.stdin is not None:
                    process.stdin.close()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _start(self, job: JobConfig) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(self._threads)
        environment = {
            "TF_NUM_INTRAOP_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            **os.environ,
        }
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "robust_tf.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the study, which stops its workers
            )


def _answer(process: "subprocess.Popen[str]", request: dict[str, str]) -> str:
    """Returns the line with which a process answers, "" if it ends without one."""
    if process.stdin is None or process.stdout is None:
        return ""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process.stdout.readline()


def serve(requests: Iterable[str], answers: IO[str]) -> None:
    """Runs the jobs that are asked for, until there are no more requests.

    Args:
        requests: Lines of JSON with the flags of a job each.
        answers: File to which the outcome of each job is written, as a line of JSON.
    """
    from robust_tf.sharing import sharing
    from robust_tf.training.interruption import signals_raise

    with signals_raise(), sharing():
        for line in requests:
            outcome = _run(json.loads(line)["flags"])
            answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            answers.flush()


def _run(flags: str) -> Outcome:
    import tensorflow as tf

    from robust_tf.errors import UserError
    from robust_tf.job.run import run_job
    from robust_tf.job.workdir import check_outputs

    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(flags)
        file.flush()
        job = read_flag_file(pathlib.Path(file.name))
    tf.config.experimental.enable_tensor_float_32_execution(job.optimization.tf32)
    if job.run.deterministic:
        tf.config.experimental.enable_op_determinism()
    try:
        check_outputs(job)
        run_job(job)
    except UserError as error:
        return Outcome(str(error), is_disk_full="No space left" in str(error))
    except Exception as error:  # noqa: BLE001  # one job that fails must not end the study
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return Outcome(text, is_disk_full="No space left" in text)
    return Outcome()


def main() -> None:
    """Serves on stdin and stdout. What the jobs print goes to stderr."""
    from robust_tf.environment import start_tensorflow, use_xla_cache

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    first = sys.stdin.readline()
    if not first:
        return
    flags = json.loads(first)["flags"]
    deterministic, tf32 = "--deterministic=true" in flags.splitlines(), "--tf32=true" in flags.splitlines()
    use_xla_cache(cache_folder(None), deterministic=deterministic, tf32=tf32)
    start_tensorflow()
    from robust_tf.training.interruption import Interrupted

    try:
        serve(itertools.chain([first], sys.stdin), answers)
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None


if __name__ == "__main__":
    main()
