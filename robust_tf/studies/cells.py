"""Runs the cells of a study in one long-lived process, which loads and traces everything only once."""

import contextlib

from robust_tf.config.job import JobConfig
from robust_tf.job.run import run_job
from robust_tf.sharing import sharing

# Sources, functions and features of test images that the cells of this process share.
_kept = contextlib.ExitStack()
_is_sharing = False


def run_cell(job: JobConfig) -> None:
    """Runs a transfer job as `robust_tf.train` does, but shares what earlier cells of this process have loaded.

    With `--features=cached --outputs=results` and without an attack, a cell takes about half a second.

    Args:
        job: Job of the cell.

    Raises:
        UserError: Something is wrong with the flags, the data or the files.
    """
    global _is_sharing
    if not _is_sharing:
        _kept.enter_context(sharing())
        _is_sharing = True
    run_job(job)
