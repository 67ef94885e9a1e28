"""Free adversarial training: several steps on each batch, one gradient for both (Shafahi et al., arXiv 1904.12843)."""

import keras
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig
from robust_tf.attacks.threat_models import l2_norm
from robust_tf.errors import UserError
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer
from robust_tf.training.runtime_checks import checked


class FreeReplays(Objective):
    """Several optimizer steps on each batch; one gradient moves the weights and the perturbation of the images.

    The next step, on the same batch or on the next one, goes on from the perturbation. BatchNorm's statistics follow
    every step, as in the authors' code.

    Args:
        trainer: whose variable the perturbation becomes.
        replays: number of optimizer steps on each batch.
        batch_size: size of the largest batch.

    Raises:
        UserError: the classifier does not know the size of its images, or there are several replicas.
    """

    knows_clean_figures = False

    def __init__(self, trainer: Trainer, *, replays: int, batch_size: int) -> None:
        self.replays = replays
        self._batch_size = batch_size
        shape = tuple(trainer.classifier.input_shape[1:])
        if None in shape:
            raise UserError(
                "Free adversarial training keeps a perturbation of the size of the images, which the classifier must "
                f"know. Received: a classifier with input_shape={trainer.classifier.input_shape}."
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
        return [self._perturbation]

    def inputs(self, trainer: Trainer, batch: Batch) -> tf.Tensor:
        """The perturbation of these images, (batch, height, width, channels)."""
        count = tf.shape(batch.images)[0]
        message = (
            "A batch of free adversarial training must not be larger than free_batch_size, the size of the "
            f"perturbation that is kept. Received: more than free_batch_size={self._batch_size} images in a batch."
        )
        if (batch.images.shape[0] or 0) > self._batch_size:
            raise UserError(message)
        return self._perturbation[: checked(count, count <= self._batch_size, message)]

    def watched(self, inputs: tf.Tensor) -> list[tf.Tensor]:
        return [inputs]

    def forward(self, trainer: Trainer, batch: Batch, inputs: tf.Tensor) -> Outputs:
        return Outputs(batch.network(tf.clip_by_value(batch.images + inputs, 0.0, 1.0), True))

    def learn(self, trainer: Trainer, batch: Batch, inputs: tf.Tensor, gradients: list[tf.Tensor]) -> None:
        count = tf.shape(inputs)[0]
        # The gradient of the summed loss, since the step of an image must not depend on the size of its batch.
        moved = moved_perturbation(inputs, gradients[0] * tf.cast(count, tf.float32), trainer.attack)
        self._perturbation.assign(tf.concat([moved, self._perturbation[count:]], axis=0))


def moved_perturbation(perturbation: tf.Tensor, gradient: tf.Tensor, attack: AttackConfig) -> tf.Tensor:
    """The perturbation of free adversarial training after its step: up the gradient, then back into the ball.

    As in the authors' code it is the ball alone that it is put back into; where images + perturbation leaves [0, 1] is
    another matter for each batch.

    Args:
        perturbation: (batch, height, width, channels) float32, in the ball.
        gradient: of the loss with respect to it, in any scale; images where it is not finite keep theirs.
        attack: its norm, epsilon and step size count.

    Source: Shafahi et al. 2019, arXiv 1904.12843, algorithm 1 (linf; the step is epsilon there).
    """
    finite = tf.reduce_all(tf.math.is_finite(gradient), axis=(1, 2, 3), keepdims=True)
    gradient = tf.where(finite, gradient, 0.0)
    moved = perturbation + NORMS[attack.norm].step(gradient, attack.step_size)
    if attack.norm == "linf":
        return tf.clip_by_value(moved, -attack.epsilon, attack.epsilon)
    length = l2_norm(moved)
    return moved * tf.where(length > attack.epsilon, attack.epsilon / (length + 1e-7), 1.0)
