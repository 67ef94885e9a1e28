"""Measures a network for detection or segmentation on test or validation images, with and without an attack."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.data import TaskData
from robust_tf.data.examples import Examples
from robust_tf.results import Measures
from robust_tf.tasks.base import DenseTask, Prediction, Scores, TaskExample


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The result of measuring a network.

    Attributes:
        num_images: Number of images.
        clean: Scores of the original images.
        robust: Scores of the adversarial images; None without an attack.
        examples: Some of the images with their predictions.
    """

    num_images: int
    clean: Scores
    robust: Scores | None
    examples: tuple[TaskExample, ...]

    @property
    def clean_measures(self) -> Measures:
        """The metric on the original images."""
        return self.clean.measures()

    @property
    def robust_measures(self) -> Measures | None:
        """The metric on the adversarial images; None without an attack."""
        return None if self.robust is None else self.robust.measures()


class Measurer:
    """Measures one network, whose weights may change between two calls.

    Args:
        dense: Task type.
        network: Network to measure.
        task: Data of the task, with labels for this network.
        attack: Attack on each image. If it is not active, only the original images are measured.
        batch_size: Number of images in a batch.
        jit_compile: Whether XLA compiles the attack.
    """

    def __init__(
        self,
        dense: DenseTask,
        network: keras.Model,
        task: TaskData,
        *,
        attack: AttackConfig,
        batch_size: int,
        jit_compile: bool = False,
    ) -> None:
        self._dense, self._task, self._attack, self._batch_size = dense, task, attack, batch_size

        @tf.function(reduce_retracing=True, autograph=False)  # XLA cannot compile the suppression of boxes
        def predict(images: tf.Tensor) -> Mapping[str, tf.Tensor]:
            return dense.predict(network, images)

        @tf.function(reduce_retracing=True, autograph=False, jit_compile=jit_compile)
        def attacked(images: tf.Tensor, labels: Any) -> tf.Tensor:
            return dense.attacked(network, images, labels, attack=attack)

        self._predict, self._attacked = predict, attacked

    def measure(
        self,
        examples: Examples,
        *,
        limit: int | None = None,
        keep: int = 0,
        progress: Callable[[Iterator[Any]], Iterator[Any]] = lambda batches: batches,
    ) -> Measurement:
        """Measures the network on the images of a part.

        Args:
            examples: Images to measure it on, such as `task.test_examples`.
            limit: Largest number of images; the first ones are taken. None takes all.
            keep: Number of images to keep with their predictions.
            progress: Function that passes the batches on and shows how many have been done.
        """
        clean = self._dense.scores(self._task.class_names)
        robust = self._dense.scores(self._task.class_names) if self._attack.active else None
        kept: list[TaskExample] = []
        count = 0
        for images, truths, predictions, images_adv, predictions_adv in progress(self._outcomes(examples, limit)):
            for position, image in enumerate(images):
                truth, prediction, prediction_adv = (
                    _of_image(each, position) for each in (truths, predictions, predictions_adv)
                )
                clean.add(truth, prediction)
                if robust is not None:
                    robust.add(truth, prediction_adv)
                if len(kept) < keep:
                    kept.append(TaskExample(image, images_adv[position], truth, prediction, prediction_adv))
            count += len(images)
        return Measurement(count, clean, robust, tuple(kept))

    def _outcomes(self, examples: Examples, limit: int | None) -> Iterator[tuple[Any, ...]]:
        for images, labels, truths in self._batches(examples, limit):
            predictions = _arrays(self._predict(images))
            images_adv, predictions_adv = images, predictions
            if self._attack.active:
                images_adv = self._attacked(images, labels)
                predictions_adv = _arrays(self._predict(images_adv))
            yield images.numpy(), _arrays(truths), predictions, np.asarray(images_adv), predictions_adv

    def _batches(self, examples: Examples, limit: int | None) -> tf.data.Dataset:
        task = self._task

        def transform(_: tf.Tensor, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, Any, Any]:
            image, labels = task.preprocessing.evaluation_example(encoded, label)
            return image, labels, self._dense.truth(task, encoded, label)

        records = examples.in_order()
        records = records if limit is None else records.take(limit)
        return records.map(transform, num_parallel_calls=tf.data.AUTOTUNE).batch(self._batch_size).prefetch(2)


def _arrays(tensors: Mapping[str, tf.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _of_image(arrays: Mapping[str, np.ndarray], position: int) -> Prediction:
    return {name: array[position] for name, array in arrays.items()}
