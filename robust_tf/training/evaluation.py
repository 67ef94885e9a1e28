"""The final figures: clean and robust accuracy with their intervals, on a part that training never saw."""

import dataclasses

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
    classifier: keras.Model, dataset: tf.data.Dataset, *, attack: AttackConfig, num_images: int
) -> Evaluation:
    """Clean accuracy, and accuracy under PGD, where an image counts that is right before and after the attack.

    Args:
        classifier: [0, 1] images to logits.
        dataset: batches of images (batch, height, width, channels) float32 and labels (batch,) int.
        attack: epsilon 0 leaves the robust figures out.
        num_images: of the data set, for the progress bar.
    """
    num_classes = classifier.output_shape[-1]

    # The signature has a free batch size: the last, smaller batch is no reason to trace again.
    @tf.function(input_signature=dataset.element_spec)
    def predictions(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        clean = tf.argmax(classifier(images, training=False), axis=-1, output_type=tf.int32)
        if not attack.active:
            return clean, clean
        images_adv = run_pgd(classifier, images, labels, attack=attack).images_adv
        return clean, tf.argmax(classifier(images_adv, training=False), axis=-1, output_type=tf.int32)

    confusion = np.zeros((num_classes, num_classes), np.int64)
    robust_hits = 0
    for images, labels in track(dataset, "test", num_images=num_images):
        clean, attacked = (values.numpy() for values in predictions(images, labels))
        labels = labels.numpy()
        np.add.at(confusion, (labels, clean), 1)
        robust_hits += int(((clean == labels) & (attacked == labels)).sum())
    return Evaluation(confusion, robust_hits if attack.active else None)
