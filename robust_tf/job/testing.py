"""The final evaluation: clean and robust accuracy with their intervals, on images that training never saw."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_tf.attacks import AttackConfig, run_pgd
from robust_tf.console import console, track
from robust_tf.evaluation.example_choice import Example, ExampleChoice
from robust_tf.evaluation.outcomes import Outcomes
from robust_tf.sharing import MOST_TRAINERS, shared
from robust_tf.statistics import Interval, mean_per_class, wilson_interval
from robust_tf.training.xla import number_functions


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcomes for all images of one data set, and the accuracies that follow from them.

    Attributes:
        outcomes: Predictions for each image.
        num_classes: Number of classes of the classifier.
        examples: Some of the images that this process evaluated, with their adversarial images.
    """

    outcomes: Outcomes
    num_classes: int
    examples: tuple[Example, ...] = ()

    @property
    def confusion(self) -> np.ndarray:
        """Confusion matrix of the clean images, (num_classes, num_classes) int64, with the true classes in rows."""
        return self.outcomes.confusion(self.num_classes)

    @property
    def num_images(self) -> int:
        """Number of evaluated images."""
        return len(self.outcomes.labels)

    @property
    def clean_accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return int(self.outcomes.right.sum()) / self.num_images

    @property
    def clean_interval(self) -> Interval:
        """95 % Wilson interval of the clean accuracy."""
        return wilson_interval(int(self.outcomes.right.sum()), self.num_images)

    @property
    def mean_per_class_accuracy(self) -> float:
        """Mean over the classes of the clean accuracy in each class."""
        return mean_per_class(self.confusion)

    @property
    def robust_accuracy(self) -> float | None:
        """Share of the images that are classified correctly before and after the attack; None without an attack."""
        robust = self.outcomes.robust
        return None if robust is None else int(robust.sum()) / self.num_images

    @property
    def robust_interval(self) -> Interval | None:
        """95 % Wilson interval of the robust accuracy."""
        robust = self.outcomes.robust
        return None if robust is None else wilson_interval(int(robust.sum()), self.num_images)


def evaluate_classifier(
    classifier: keras.Model,
    dataset: Any,
    *,
    attack: AttackConfig,
    ids: np.ndarray,
    strategy: tf.distribute.Strategy | None = None,
    jit_compile: bool = False,
    share_trace: bool = False,
) -> Evaluation:
    """Measures the clean accuracy and the accuracy under PGD.

    An image counts as robust if it is classified correctly both before and after the attack.

    Args:
        classifier: Classifier that maps images in [0, 1] to logits.
        dataset: Batches of images (batch, height, width, channels) float32 and labels (batch,) int.
        attack: Attack of the evaluation. With epsilon 0 there is no robust accuracy.
        ids: Ids of the images in the order of `dataset`, (num_images,) int64.
        strategy: Strategy of the job. With several replicas, `dataset` is a distributed data set whose batches
            also have weights (batch,), and images of weight 0 only fill up a batch. Every process returns the outcomes
            of all images, but only examples from its own share.
        jit_compile: Whether XLA compiles the attack and the predictions, for each batch size in `dataset`. The data set
            may then have weights, too. Only for one replica.
        share_trace: Whether later calls with the same classifier object, which may have other weights by then, use the
            traced function again. This needs `robust_tf.sharing.sharing`, and only for one replica.
    """
    replicas: Any = strategy if strategy is not None and strategy.num_replicas_in_sync > 1 else None

    def outcomes(images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the outcomes, (batch, 4) int32, and the adversarial images, (batch, height, width, channels) float32.

        The four columns are the label, the prediction, the prediction under attack, and whether the image counts.
        """
        images_adv = images
        attacked = clean = tf.argmax(classifier(images, training=False), axis=-1, output_type=tf.int32)
        if attack.active:
            images_adv = run_pgd(classifier, images, labels, attack=attack).images_adv
            attacked = tf.argmax(classifier(images_adv, training=False), axis=-1, output_type=tf.int32)
        counts = tf.ones_like(labels) if weights is None else tf.cast(weights > 0, labels.dtype)
        rows = tf.cast(tf.stack([labels, tf.cast(clean, labels.dtype), attacked, counts], axis=1), tf.int32)
        return rows, images_adv

    if replicas is None:
        # The signature leaves the batch size open, so that a smaller last batch does not trace the function again.
        traced = tf.function(outcomes, input_signature=dataset.element_spec, jit_compile=jit_compile)
        key = ("outcomes", classifier, attack, dataset.element_spec, jit_compile)
        outcomes_of = shared(key, lambda: traced, most=MOST_TRAINERS) if share_trace else traced
    else:

        @tf.function(reduce_retracing=True, autograph=False)
        def outcomes_of(*batch: Any) -> tuple[tf.Tensor, Any, Any]:
            rows, images_adv = replicas.run(outcomes, args=batch)
            return replicas.gather(rows, axis=0), rows, images_adv

    if jit_compile:
        console.print("Compiling the test with XLA.")
        number_functions("test")
    choice = ExampleChoice()

    def outcomes_by_batch() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in dataset:
            if replicas is not None:
                gathered, *local = outcomes_of(*batch)
                local_rows, local_adv, local_images = (
                    replicas.experimental_local_results(each) for each in (*local, batch[0])
                )
                for rows, images, images_adv in zip(local_rows, local_images, local_adv, strict=True):
                    choice.look_at(rows.numpy(), images, images_adv)
            else:
                gathered, images_adv = outcomes_of(*batch)
                choice.look_at(gathered.numpy(), batch[0], images_adv)
            rows = gathered.numpy()
            rows = rows[rows[:, 3] > 0]
            yield rows[:, :3], rows[:, 0]

    rows = np.concatenate([rows for rows, _ in track(outcomes_by_batch(), "test", num_images=len(ids))])
    order = np.argsort(ids)
    labels, clean, attacked = rows[order].astype(np.int64).T
    outcome = Outcomes(ids[order], labels, clean, attacked if attack.active else None)
    return Evaluation(outcome, classifier.output_shape[-1], choice.examples)
