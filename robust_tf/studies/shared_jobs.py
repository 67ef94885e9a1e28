"""Runs the jobs of a study in one long-lived process, which loads and traces everything only once."""

import collections
from collections.abc import Hashable
from typing import Any

from robust_tf.config.job import JobConfig
from robust_tf.job.run import run_job
from robust_tf.sharing import sharing

# Sources, functions, features and trainers that the jobs of this process share.
_objects: collections.OrderedDict[tuple[Hashable, ...], Any] = collections.OrderedDict()


def run_sharing(job: JobConfig) -> None:
    """Runs a cell or a source as `robust_tf.train` does, but shares what earlier jobs of this process have made.

    With `--features=cached --outputs=results` and without an attack, a cell takes a fraction of a second. A source does
    not trace its training step again if the one before it differs from it only in its seed.

    Args:
        job: Job without a baseline, further draws or an export.

    Raises:
        UserError: Something is wrong with the flags, the data or the files.
    """
    try:
        with sharing(objects=_objects):
            run_job(job)
    except BaseException:
        _objects.clear()  # the job may have left a shared trainer in any state
        raise
