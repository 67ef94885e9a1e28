"""The final figures: clean and robust accuracy with their intervals, on a part that training never saw."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.training.metrics import mean_per_class, wilson_interval
from robust_tf.training.progress import track


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Counts on one data set; the figures follow from them.

    Attributes:
        confusion: (num_classes, num_classes) int64, clean images: rows are true classes, columns predictions.
        robust_hits: images that are right both clean and attacked; None when no attack was run.
    """

    confusion: np.ndarray
    robust_hits: int | None

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def clean_accuracy(self) -> float:
        return int(self.confusion.trace()) / self.num_images

    @property
    def clean_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the clean accuracy."""
        return wilson_interval(int(self.confusion.trace()), self.num_images)

    @property
    def mean_per_class_accuracy(self) -> float:
        return mean_per_class(self.confusion)

    @property
    def robust_accuracy(self) -> float | None:
        return None if self.robust_hits is None else self.robust_hits / self.num_images

    @property
    def robust_interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the robust accuracy."""
        return None if self.robust_hits is None else wilson_interval(self.robust_hits, self.num_images)


def evaluate_classifier(
    classifier: keras.Model,
    dataset: Any,
    *,
    attack: AttackConfig,
    num_images: int,
    strategy: tf.distribute.Strategy | None = None,
) -> Evaluation:
    """Clean accuracy, and accuracy under PGD, where an image counts that is right before and after the attack.

    Args:
        classifier: [0, 1] images to logits.
        dataset: batches of images (batch, height, width, channels) float32 and labels (batch,) int.
        attack: epsilon 0 leaves the robust figures out.
        num_images: of the data set, for the progress bar.
        strategy: with several replicas, `dataset` is a distributed one, whose batches also have weights (batch,); what
            has weight 0 is there to fill a batch. Every process gets the whole result.
    """
    num_classes = classifier.output_shape[-1]

    def outcomes(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None = None) -> tf.Tensor:
        """For each image the label, the prediction, that under attack, and whether it counts, (batch, 4) int32."""
        attacked = clean = tf.argmax(classifier(images, training=False), axis=-1, output_type=tf.int32)
        if attack.active:
            images_adv = run_pgd(classifier, images, labels, attack=attack).images_adv
            attacked = tf.argmax(classifier(images_adv, training=False), axis=-1, output_type=tf.int32)
        counts = tf.ones_like(labels) if weights is None else tf.cast(weights > 0, labels.dtype)
        return tf.cast(tf.stack([labels, tf.cast(clean, labels.dtype), attacked, counts], axis=1), tf.int32)

    if strategy is None or strategy.num_replicas_in_sync == 1:
        # The signature has a free batch size: the last, smaller batch is no reason to trace again.
        outcomes_of = tf.function(outcomes, input_signature=dataset.element_spec)
    else:

        @tf.function(reduce_retracing=True, autograph=False)
        def outcomes_of(*batch: Any) -> tf.Tensor:
            return strategy.gather(strategy.run(outcomes, args=batch), axis=0)

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in dataset:
            outcome = outcomes_of(*batch).numpy()
            outcome = outcome[outcome[:, 3] > 0]
            yield outcome[:, 1:3], outcome[:, 0]

    confusion = np.zeros((num_classes, num_classes), np.int64)
    robust_hits = 0
    for predictions, labels in track(rows(), "test", num_images=num_images):
        clean, attacked = predictions.T
        np.add.at(confusion, (labels, clean), 1)
        robust_hits += int(((clean == labels) & (attacked == labels)).sum())
    return Evaluation(confusion, robust_hits if attack.active else None)
