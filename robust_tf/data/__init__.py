"""Data sets, their splits and the `tf.data` pipeline, which gives float32 images in [0, 1] and int32 labels.

Start with `load_task`, which turns the name of a data set into the training, validation and test batches of a task.
To add a data set, see `robust_tf.data.datasets`.

The public names are imported on first use, so that `python -m robust_tf.data --help` needs no TensorFlow.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from robust_tf.config.data import DataConfig

if TYPE_CHECKING or "pdoc" in sys.modules:  # pdoc documents the names that a module holds
    from robust_tf.data.augmentations import AUGMENTATIONS
    from robust_tf.data.datasets import DATASETS, DatasetInfo, dataset_info
    from robust_tf.data.pipeline import TaskData, load_task
    from robust_tf.data.transforms import decode, evaluation_transform

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "DataConfig",
    "DatasetInfo",
    "TaskData",
    "dataset_info",
    "decode",
    "evaluation_transform",
    "load_task",
]

# Each public name and the module that defines it, as in the imports above.
_MODULES = {
    "AUGMENTATIONS": "augmentations",
    "DATASETS": "datasets",
    "DatasetInfo": "datasets",
    "TaskData": "pipeline",
    "dataset_info": "datasets",
    "decode": "transforms",
    "evaluation_transform": "transforms",
    "load_task": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
