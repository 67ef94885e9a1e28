"""Runs the cells of a study in one long-lived process, which loads and traces everything only once."""

import collections
from collections.abc import Hashable
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.job.run import run_job
from robust_tf.sharing import sharing

# Sources, functions and features that the cells of this process share. Jobs that are no cells do not use them.
_objects: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()


def run_cell(job: JobConfig) -> None:
    """Runs a transfer job as `robust_tf.train` does, but shares what earlier cells of this process have loaded.

    With `--features=cached --outputs=results` and without an attack, a cell takes about half a second.

    Args:
        job: Job of the cell, without a baseline, further draws or an export.

    Raises:
        UserError: Something is wrong with the flags, the data or the files.
    """
    with sharing(objects=_objects):
        run_job(job)
