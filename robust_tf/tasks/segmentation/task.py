"""Semantic segmentation as a task type: a head of the DeepLabV3+ type, and mean IoU."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig
from robust_tf.data import TaskData
from robust_tf.data.masks import MaskPreprocessing
from robust_tf.tasks.base import TaskExample
from robust_tf.tasks.drawing import draw_mask
from robust_tf.tasks.segmentation.attack import attack_segmenter
from robust_tf.tasks.segmentation.head import build_segmenter
from robust_tf.tasks.segmentation.losses import PixelCrossEntropy
from robust_tf.tasks.segmentation.mean_iou import MeanIoU, PixelAccuracy
from robust_tf.tasks.segmentation.scores import SegmentationScores


class Segmentation:
    """Semantic segmentation, see `DenseTask`. An evaluation takes the worst of three attacks for each image."""

    name = "segmentation"
    metric = "mean_iou"
    metric_title = "mean IoU"
    attack_title = "worst of three PGD-{}"

    def build(self, backbone: keras.Model, num_classes: int, *, seed: int) -> keras.Model:
        """Puts a head of the DeepLabV3+ type on a backbone."""
        return build_segmenter(backbone, num_classes, seed=seed)

    def with_labels_for(self, task: TaskData, network: keras.Model) -> TaskData:
        """Returns the data unchanged: the labels are the classes of the pixels for every network."""
        del network
        return task

    def loss(self) -> keras.losses.Loss:
        """Returns the mean cross-entropy of the pixels of each image."""
        return PixelCrossEntropy()

    def metrics(self, num_classes: int) -> Any:
        """Returns mean IoU and pixel accuracy."""
        return [MeanIoU(num_classes), PixelAccuracy()]

    def trial_labels(self, outputs: Any) -> Any:
        """Returns masks of class 0."""
        return tf.zeros(outputs.shape[:-1], tf.int32)

    def attacked(self, network: keras.Model, images: tf.Tensor, labels: Any, *, attack: AttackConfig) -> tf.Tensor:
        """Returns for each image the adversarial image of three attacks in which most pixels are wrong."""
        return attack_segmenter(network, images, labels, attack=attack)

    def predict(self, network: keras.Model, images: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the class of each pixel."""
        return {"mask": tf.argmax(network(images, training=False), axis=-1, output_type=tf.int32)}

    def truth(self, task: TaskData, encoded: tf.Tensor, label: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the mask of an image at the size of the network's images."""
        return {"mask": cast(MaskPreprocessing, task.preprocessing).measured_example(encoded, label)[1]}

    def scores(self, class_names: Sequence[str]) -> SegmentationScores:
        """Returns an empty collection of masks."""
        return SegmentationScores(class_names)

    def rows(
        self, examples: Sequence[TaskExample], class_names: Sequence[str], *, attack: str
    ) -> dict[str, list[np.ndarray]]:
        """Draws images with their true masks, and with the masks predicted without and with the attack."""
        rows = {
            "truth": [draw_mask(each.image, each.truth["mask"], class_names) for each in examples],
            "predicted": [draw_mask(each.image, each.prediction["mask"], class_names) for each in examples],
        }
        if attack:
            rows[f"under {attack}"] = [
                draw_mask(each.image_adv, each.prediction_adv["mask"], class_names) for each in examples
            ]
        return rows
