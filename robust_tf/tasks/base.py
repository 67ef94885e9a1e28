"""What a task type brings along besides its data: head, loss, metric and attack.

A network for detection or segmentation is a plain Keras model that maps images in [0, 1] to its outputs, as a
classifier is. Everything that a training job or an evaluation has to know about boxes or masks is behind `DenseTask`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.data import TaskData
from robust_tf.results import Measures

# The outputs of a network as arrays of one image, by name, in the form in which the metric takes them.
Prediction = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """One test image with its annotation and what the network predicts for it.

    Attributes:
        image: Image (size, size, 3) float32 in [0, 1].
        image_adv: Adversarial image of the same shape; the image itself if there was no attack.
        truth: Annotation of the image, as the metric takes it.
        prediction: Prediction for the image.
        prediction_adv: Prediction for the adversarial image.
    """

    image: np.ndarray
    image_adv: np.ndarray
    truth: Prediction
    prediction: Prediction
    prediction_adv: Prediction


class Scores(Protocol):
    """Collects the predictions for some images, and computes the metric over all of them."""

    def add(self, truth: Prediction, prediction: Prediction) -> None:
        """Adds one image."""

    def state(self) -> dict[str, np.ndarray]:
        """Returns everything that was added, as arrays that `numpy.savez` can store."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state` returned, instead of what was added so far."""

    def value(self) -> float:
        """Returns the metric over all images, 0 if there was nothing to find."""

    def measures(self) -> Measures:
        """Returns the metric over all images with its interval and related figures."""

    def difference(self, other: Self) -> Measures:
        """Returns the metric minus the metric of another network on the same images, with its interval."""


class DenseTask(Protocol):
    """A task type whose labels are boxes or masks: "detection" or "segmentation".

    Attributes:
        name: Value of `--task_type`.
        metric: Name of the metric in results.json and in the logs, such as "mean_iou".
        metric_title: Its name in text.
        attack_title: Name of the attack of an evaluation, whose number of steps is filled in, such as "PGD-{}".
    """

    name: str
    metric: str
    metric_title: str
    attack_title: str

    def build(self, backbone: keras.Model, num_classes: int, *, seed: int) -> keras.Model:
        """Puts the head of the task on the backbone of a classifier, whose layers the new network shares.

        Args:
            backbone: Classifier whose stages become the feature pyramid.
            num_classes: Number of classes.
            seed: Seed for the initial weights of the head.

        Raises:
            UserError: The classifier has no stages that could be a feature pyramid.
        """

    def with_labels_for(self, task: TaskData, network: keras.Model) -> TaskData:
        """Returns the same data with labels in the form in which the loss of this network takes them."""

    def loss(self) -> Any:
        """Returns the loss as `compile` takes it."""

    def metrics(self, num_classes: int) -> Any:
        """Returns further metrics of training and validation as `compile` takes them."""

    def trial_labels(self, outputs: Any) -> Any:
        """Returns labels of the right shapes for some outputs, with which metrics can be built."""

    def attacked(self, network: keras.Model, images: tf.Tensor, labels: Any, *, attack: AttackConfig) -> tf.Tensor:
        """Returns adversarial images, which raise the loss of the task for each image separately."""

    def predict(self, network: keras.Model, images: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the predictions for a batch of images, whose first axis is the batch."""

    def truth(self, task: TaskData, encoded: tf.Tensor, label: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the annotation of one image as the metric takes it, with the same shapes for all images."""

    def scores(self, class_names: Sequence[str]) -> Scores:
        """Returns an empty collection of scores."""

    def rows(
        self, examples: Sequence[TaskExample], class_names: Sequence[str], *, attack: str
    ) -> dict[str, list[np.ndarray]]:
        """Draws images with their annotations and predictions.

        Args:
            examples: Images to draw.
            class_names: Names of the classes.
            attack: Name of the attack. Empty if there was none.

        Returns:
            Rows of pictures (height, width, 3) uint8 by their names, with one picture for each image.
        """
