"""Tasks for tests, from the fields of a `DataConfig` and the arguments of `load_task` in one call."""

import pathlib
from typing import Any

from robust_tf.config.data import DataConfig
from robust_tf.data import TaskData, load_task

_ARGUMENTS = ("batch_size", "seed", "worker", "num_workers", "drop_remainder")


def make_task(dataset: str, **options: Any) -> TaskData:
    """Loads a task.

    Args:
        dataset: Name of the data set.
        **options: Arguments of `load_task`, and fields of `DataConfig`, where folders may be paths.
    """
    arguments = {name: options.pop(name) for name in _ARGUMENTS if name in options}
    fields = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in options.items()}
    return load_task(DataConfig(dataset=dataset, **fields), **arguments)
