"""Detection as a task type: RetinaNet on the feature pyramid of a backbone, and COCO's average precision."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig, climb
from robust_tf.data import TaskData
from robust_tf.data.boxes import BoxPreprocessing
from robust_tf.tasks.base import Prediction, TaskExample
from robust_tf.tasks.detection.anchors import anchors_for
from robust_tf.tasks.detection.decoding import decode_detections
from robust_tf.tasks.detection.head import build_detector
from robust_tf.tasks.detection.losses import BoxLoss, FocalLoss
from robust_tf.tasks.detection.scores import AveragePrecision
from robust_tf.tasks.detection.targets import BoxEncoder
from robust_tf.tasks.drawing import draw_boxes

SHOWN_SCORE = 0.3  # detections with lower scores are not drawn


class Detection:
    """RetinaNet, see `DenseTask`. The attack raises the sum of the focal loss and the box loss of each image."""

    name = "detection"
    metric = "average_precision"
    metric_title = "average precision"
    attack_title = "PGD-{}"

    def build(self, backbone: keras.Model, num_classes: int, *, seed: int) -> keras.Model:
        """Puts the head of RetinaNet on a backbone."""
        return build_detector(backbone, num_classes, seed=seed)

    def with_labels_for(self, task: TaskData, network: keras.Model) -> TaskData:
        """Returns the same data, with a target for each anchor of the network as labels."""
        encoder = BoxEncoder(anchors_for(network))
        preprocessing = dataclasses.replace(cast(BoxPreprocessing, task.preprocessing), encode_boxes=encoder)
        return dataclasses.replace(task, preprocessing=preprocessing)

    def loss(self) -> dict[str, keras.losses.Loss]:
        """Returns the focal loss of the classes and the loss of the boxes."""
        return {"boxes": BoxLoss(), "classes": FocalLoss()}

    def metrics(self, num_classes: int) -> Any:
        """Returns no further metrics: average precision needs all detections of all images."""
        del num_classes
        return None

    def trial_labels(self, outputs: Any) -> Any:
        """Returns the labels of images without boxes."""
        boxes, classes = outputs["boxes"], outputs["classes"]
        return {
            "boxes": tf.zeros([*boxes.shape[:2], 5], tf.float32),
            "classes": tf.fill(classes.shape[:2], tf.constant(-1, tf.int32)),
        }

    def attacked(self, network: keras.Model, images: tf.Tensor, labels: Any, *, attack: AttackConfig) -> tf.Tensor:
        """Returns the images after PGD on the loss of the detector."""
        losses = self.loss()

        def loss(outputs: Any) -> tf.Tensor:
            return tf.add_n([losses[name].call(tf.cast(labels[name], tf.float32), outputs[name]) for name in losses])

        return climb(
            lambda points: network(points, training=False),
            images,
            loss=loss,
            correct=lambda outputs: tf.zeros(tf.shape(outputs["boxes"])[:1], tf.bool),
            attack=attack,
        ).images_adv

    def predict(self, network: keras.Model, images: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns detections, with boxes in pixels of the square."""
        return decode_detections(
            network(images, training=False), anchors_for(network), image_size=network.input_shape[1]
        )

    def truth(self, task: TaskData, encoded: tf.Tensor, label: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the boxes of an image in its own pixels, and the scale of the square."""
        return cast(BoxPreprocessing, task.preprocessing).measured_example(encoded, label)[1]

    def scores(self, class_names: Sequence[str]) -> AveragePrecision:
        """Returns an empty collection of detections."""
        return AveragePrecision(class_names)

    def rows(
        self, examples: Sequence[TaskExample], class_names: Sequence[str], *, attack: str
    ) -> dict[str, list[np.ndarray]]:
        """Draws images with their true boxes, and with what was detected without and with the attack."""

        def drawn(image: np.ndarray, boxes: Prediction) -> np.ndarray:
            shown = boxes["scores"] >= SHOWN_SCORE
            return draw_boxes(
                image, boxes["boxes"][shown], boxes["classes"][shown], boxes["scores"][shown], class_names
            )

        rows = {
            "truth": [
                draw_boxes(
                    each.image, each.truth["boxes"] * each.truth["scale"], each.truth["classes"], None, class_names
                )
                for each in examples
            ],
            "detected": [drawn(each.image, each.prediction) for each in examples],
        }
        if attack:
            rows[f"under {attack}"] = [drawn(each.image_adv, each.prediction_adv) for each in examples]
        return rows
