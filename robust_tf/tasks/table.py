"""The table of task types whose labels are boxes or masks."""

import keras

from robust_tf.config.data import TaskType
from robust_tf.tasks.base import DenseTask
from robust_tf.tasks.detection.task import Detection
from robust_tf.tasks.segmentation.task import Segmentation

DENSE_TASKS: dict[str, DenseTask] = {"detection": Detection(), "segmentation": Segmentation()}


def dense_task(task_type: TaskType) -> DenseTask | None:
    """Returns the task type of this name, or None for classification."""
    return DENSE_TASKS.get(task_type)


def task_type_of(model: keras.Model) -> TaskType:
    """Returns what a model predicts, judging by its outputs.

    Args:
        model: Built model.
    """
    outputs = getattr(model, "output", None)  # a Sequential or subclassed model may have none
    if isinstance(outputs, dict) and set(outputs) == {"boxes", "classes"}:
        return "detection"
    shape = getattr(outputs, "shape", ())
    return "segmentation" if len(shape) == 4 and model.layers[-1].name == "head_mask" else "classification"
