"""TRADES: the loss on the clean images plus the divergence between clean and adversarial predictions.

Source: Zhang et al. 2019, arXiv 1901.08573.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig
from robust_tf.attacks.ascent import ascend
from robust_tf.attacks.losses import Model, logits_of
from robust_tf.attacks.threat_models import Scale
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer

# Standard deviation of the initial noise of the attack. At the clean image itself the gradient of the divergence is 0.
_TRADES_START = 0.001


class CleanAndAdversarial(NamedTuple):
    """The clean and the adversarial images of one batch."""

    clean: tf.Tensor
    adversarial: tf.Tensor


class Trades(Objective):
    """The compiled loss on the clean images + beta * KL(clean || adversarial).

    The clean and the adversarial images go through the network in two separate passes in training mode, which update
    BatchNorm's statistics one after the other, the clean pass first, as in the authors' code. The authors also run a
    second pass over the clean images. It is left out here, because it only updates the statistics once more.

    Args:
        beta: Weight of the divergence, at least 0.

    Source: Zhang et al. 2019, arXiv 1901.08573; yaodongyu/TRADES, trades.py.
    """

    passes = 2

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._divergence = Divergence()

    def inputs(self, trainer: Trainer, batch: Batch) -> CleanAndAdversarial:
        """Returns the clean images and the adversarial ones that maximize the divergence."""
        images_adv, outputs = ascend_divergence(
            lambda images: batch.network(images, False),
            batch.images,
            attack=trainer.attack,
            seed=batch.seed,
            strength=trainer.strength(),
            class_logits=trainer.compiled_loss.class_logits,
        )
        loss = trainer.compiled_loss
        trainer.update_clean(batch, loss(batch.labels, outputs), loss.hits(batch.labels, outputs))
        return CleanAndAdversarial(batch.images, images_adv)

    def forward(self, trainer: Trainer, batch: Batch, inputs: CleanAndAdversarial) -> Outputs:
        """Returns the outputs for the clean and for the adversarial images."""
        clean = batch.network(inputs.clean, True)
        return Outputs(adversarial=batch.network(inputs.adversarial, True), clean=clean)

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """Returns the loss on the clean images plus the weighted divergence."""
        loss = trainer.compute_loss(batch.images, batch.labels, outputs.clean, batch.sample_weight)
        logits_of = trainer.compiled_loss.class_logits
        clean, adversarial = logits_of(outputs.clean), logits_of(outputs.adversarial)
        return loss + self._beta * self._divergence(clean, adversarial, batch.sample_weight)


def divergence(clean_logits: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns the divergence KL(clean || adversarial), the sum of p log(p / q) over the classes.

    Args:
        clean_logits: Logits (batch, num_classes) of the class probabilities p.
        logits: Logits (batch, num_classes) of the class probabilities q.

    Returns:
        Divergence of each image, (batch,) float32. It has gradients with respect to both arguments.
    """
    log_clean = tf.nn.log_softmax(tf.cast(clean_logits, tf.float32))
    log_adversarial = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    return tf.reduce_sum(tf.exp(log_clean) * (log_clean - log_adversarial), axis=-1)


class Divergence(keras.losses.Loss):
    """`divergence` as a Keras loss: Keras applies the sample weights and averages over the batch and the replicas."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """Returns the divergence of each image, (batch,)."""
        return divergence(y_true, y_pred)


def ascend_divergence(
    model: Model,
    images: tf.Tensor,
    *,
    attack: AttackConfig,
    seed: tf.Tensor,
    strength: Scale = 1.0,
    class_logits: Callable[[Any], tf.Tensor] = lambda outputs: outputs,
) -> tuple[tf.Tensor, Any]:
    """Runs the attack of TRADES: projected gradient ascent on KL(clean || adversarial).

    The attack starts at the images plus Gaussian noise of standard deviation 0.001; `attack.random_start` is ignored.
    The starting points are projected onto the ball and onto [0, 1]. The authors' linf code projects only after the
    first step, but a classifier that clips its inputs has no gradient outside [0, 1].

    Args:
        model: Callable that maps images in [0, 1] to outputs. A Keras model runs in inference mode.
        images: Images (batch, height, width, channels), float32 in [0, 1].
        attack: Attack with an epsilon above 0.
        seed: Seed of the noise, (2,) integers.
        strength: Factor on epsilon and on the step size.
        class_logits: Function that maps the outputs to logits (batch, num_classes). By default, the outputs are the
            logits.

    Returns:
        A tuple of the adversarial images, (batch, height, width, channels) float32, and the outputs for the clean
        images.

    Source: Zhang et al. 2019, arXiv 1901.08573, algorithm 1; yaodongyu/TRADES, trades.py.
    """
    images = tf.cast(images, tf.float32)
    geometry, epsilon = NORMS[attack.norm], attack.epsilon * strength
    clean = logits_of(model, images)
    clean_logits = class_logits(clean)
    noise = tf.random.stateless_normal(tf.shape(images), seed, stddev=_TRADES_START)
    state = ascend(
        model,
        images,
        tf.zeros(tf.shape(images)[:1], tf.int32),
        geometry.project(images + noise, images, epsilon),
        geometry=geometry,
        epsilon=epsilon,
        step_size=attack.step_size * strength,
        steps=attack.steps,
        loss=lambda outputs, _labels, _targets: divergence(clean_logits, class_logits(outputs)),
        correct_of=lambda _outputs, labels: tf.zeros_like(labels, tf.bool),  # not used
        use_best=attack.use_best,
    )
    return tf.stop_gradient(state["images_adv"]), clean
