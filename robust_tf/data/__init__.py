"""Data sets, their splits and the tf.data pipeline: [0, 1] float32 images and int32 labels out."""

from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.data.datasets import DATASETS, DatasetInfo, dataset_info
from robust_tf.data.pipeline import TaskData, load_task
from robust_tf.data.transforms import decode, evaluation_transform

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "DatasetInfo",
    "TaskData",
    "dataset_info",
    "decode",
    "evaluation_transform",
    "load_task",
]
