"""Free adversarial training: one gradient updates both the weights and the perturbation of the images.

Source: Shafahi et al. 2019, arXiv 1904.12843.
"""

import keras
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig
from robust_tf.attacks.threat_models import l2_norm
from robust_tf.errors import UserError
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer
from robust_tf.training.runtime_checks import checked


class FreeReplays(Objective):
    """Takes several optimizer steps on each batch. One gradient updates both the weights and the perturbation.

    The next step starts from this perturbation, on the same batch or on the next one. Every step updates BatchNorm's
    statistics, as in the authors' code.

    Args:
        trainer: Trainer that owns the perturbation as one of its variables.
        replays: Number of optimizer steps on each batch.
        batch_size: Size of the largest batch.

    Raises:
        UserError: The classifier does not know the size of its images, or there are several replicas.
    """

    knows_clean_figures = False

    def __init__(self, trainer: Trainer, *, replays: int, batch_size: int) -> None:
        self.replays = replays
        self._batch_size = batch_size
        shape = tuple(trainer.classifier.input_shape[1:])
        if None in shape:
            raise UserError(
                "Free adversarial training keeps a perturbation of the size of the images, so the input shape of the "
                f"classifier must be fixed. Received: a classifier with input_shape={trainer.classifier.input_shape}."
            )
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            raise UserError(
                "Free adversarial training keeps one perturbation for the batch, so it runs on one device only. "
                f"Received: a strategy of {replicas} replicas."
            )
        self._perturbation = trainer.add_weight(
            shape=(batch_size, *shape), initializer="zeros", trainable=False, dtype="float32", name="perturbation"
        )

    @property
    def variables(self) -> list[keras.Variable]:
        """The perturbation, which is kept from one step to the next."""
        return [self._perturbation]

    def inputs(self, trainer: Trainer, batch: Batch) -> tf.Tensor:
        """Returns the perturbation of the images of this batch, (batch, height, width, channels)."""
        count = tf.shape(batch.images)[0]
        message = (
            "A batch of free adversarial training must not hold more than free_batch_size images, because the "
            f"perturbation has this size. Received: more than free_batch_size={self._batch_size} images in a batch."
        )
        if (batch.images.shape[0] or 0) > self._batch_size:
            raise UserError(message)
        return self._perturbation[: checked(count, count <= self._batch_size, message)]

    def watched(self, inputs: tf.Tensor) -> list[tf.Tensor]:
        """Returns the perturbation."""
        return [inputs]

    def forward(self, trainer: Trainer, batch: Batch, inputs: tf.Tensor) -> Outputs:
        """Returns the outputs for the perturbed images, clipped to [0, 1]."""
        return Outputs(batch.network(tf.clip_by_value(batch.images + inputs, 0.0, 1.0), True))

    def learn(self, trainer: Trainer, batch: Batch, inputs: tf.Tensor, gradients: list[tf.Tensor]) -> None:
        """Updates the perturbation with its gradient."""
        count = tf.shape(inputs)[0]
        # The gradient of the sum, not of the mean, since the step of an image must not depend on the size of its batch.
        moved = moved_perturbation(inputs, gradients[0] * tf.cast(count, tf.float32), trainer.attack)
        self._perturbation.assign(tf.concat([moved, self._perturbation[count:]], axis=0))


def moved_perturbation(perturbation: tf.Tensor, gradient: tf.Tensor, attack: AttackConfig) -> tf.Tensor:
    """Returns the perturbation after one step along the gradient and the projection onto the ball.

    As in the authors' code the perturbation is projected onto the ball only, not onto the range of the images, because
    the next batch will have other images.

    Args:
        perturbation: Perturbation (batch, height, width, channels), float32, inside the ball.
        gradient: Gradient of the loss with respect to the perturbation, in any scale. If it is not finite for an
            image, the perturbation of this image does not change.
        attack: Attack whose norm, epsilon and step size are used.

    Source: Shafahi et al. 2019, arXiv 1904.12843, algorithm 1 (linf; the step is epsilon there).
    """
    finite = tf.reduce_all(tf.math.is_finite(gradient), axis=(1, 2, 3), keepdims=True)
    gradient = tf.where(finite, gradient, tf.zeros_like(gradient))
    moved = perturbation + NORMS[attack.norm].step(gradient, attack.step_size)
    if attack.norm == "linf":
        return tf.clip_by_value(moved, -attack.epsilon, attack.epsilon)
    length = l2_norm(moved)
    return moved * tf.where(length > attack.epsilon, attack.epsilon / (length + 1e-7), tf.ones_like(length))
