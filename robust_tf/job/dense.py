"""The parts of a job that differ for detection and segmentation: validation, test, and the files that it writes."""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from PIL import Image

from robust_tf.config.job import JobConfig
from robust_tf.console import track
from robust_tf.data import TaskData
from robust_tf.results import JobResults
from robust_tf.tasks.base import DenseTask
from robust_tf.tasks.measuring import Measurement, Measurer
from robust_tf.tasks.sheet import save_examples
from robust_tf.training.callbacks import averages_in_place
from robust_tf.training.tensorboard import write_test_figures
from robust_tf.training.xla import compiles_with_xla

SHEET = "examples.png"
_VALIDATION_IMAGES = 128  # measured after each epoch, since every image has to be attacked
_EXAMPLES = 6


class MeasureEachEpoch(keras.callbacks.Callback):
    """Measures the network after each epoch on up to 128 validation images, and adds the metrics to the logs.

    The logs get "val_clean_<metric>" and, with an attack, "val_robust_<metric>".

    Args:
        job: Job that is run.
        dense: Its task type.
        network: Network that is trained.
        task: Data of the job, with labels for the network.
    """

    def __init__(self, job: JobConfig, dense: DenseTask, network: keras.Model, task: TaskData) -> None:
        super().__init__()
        self._dense, self._task, self._attack = dense, task, job.adversarial.validation_attack
        self._measurer = _measurer(job, dense, network, task, attack=self._attack)
        self._last: Measurement | None = None

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures the network."""
        with averages_in_place(self.model):
            self._last = self._measurer.measure(
                self._task.validation_examples, limit=_VALIDATION_IMAGES, keep=_EXAMPLES
            )
        metric = self._dense.metric
        if logs is not None:  # Keras passes the same dictionary to the callbacks after this one
            logs[f"val_clean_{metric}"] = self._last.clean.value()
            if self._last.robust is not None:
                logs[f"val_robust_{metric}"] = self._last.robust.value()

    def picture(self) -> np.ndarray:
        """Returns a picture (height, width, 3) uint8 of some validation images with the predictions after the epoch."""
        examples = self._last.examples if self._last else ()
        attack = f"{self._attack.norm} {self._attack.epsilon:.4g}" if self._attack.active else ""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / SHEET
            save_examples(path, self._dense, examples, self._task.class_names, attack=attack, title="Validation")
            return np.asarray(Image.open(path).convert("RGB"))


def measure_test(job: JobConfig, dense: DenseTask, network: keras.Model, task: TaskData) -> Measurement:
    """Measures a trained network on the test part.

    Args:
        job: Job that is run.
        dense: Its task type.
        network: Trained network.
        task: Data of the job, with labels for the network.
    """
    measurer = _measurer(job, dense, network, task, attack=job.adversarial.evaluation_attack)

    def progress(outcomes: Iterator[Any]) -> Iterator[Any]:
        counted = ((outcome, outcome[0]) for outcome in outcomes)
        return (outcome for outcome, _ in track(counted, "test", num_images=task.num_test))

    return measurer.measure(task.test_examples, keep=_EXAMPLES, progress=progress)


def write_measurement(
    job: JobConfig, dense: DenseTask, task: TaskData, measurement: Measurement, results: JobResults
) -> None:
    """Writes the sheet of examples and the test figures for TensorBoard into the workdir of a job."""
    path = pathlib.Path(job.run.workdir) / SHEET
    attack = results.robust_accuracy_attack
    save_examples(
        path,
        dense,
        measurement.examples,
        task.class_names,
        attack=attack.in_words if attack else "",
        title=f"Test images of {job.data.dataset}",
    )
    figures = {
        f"{kind}_{dense.metric}": measures.value
        for kind, measures in (("clean", results.clean), ("robust", results.robust))
        if measures is not None and measures.value is not None
    }
    write_test_figures(path.parent / "tensorboard", figures=figures, sheet=np.asarray(Image.open(path).convert("RGB")))


def _measurer(job: JobConfig, dense: DenseTask, network: keras.Model, task: TaskData, *, attack: Any) -> Measurer:
    return Measurer(
        dense,
        network,
        task,
        attack=attack,
        batch_size=job.optimization.batch_size,
        jit_compile=compiles_with_xla(job.optimization.xla, network),
    )
