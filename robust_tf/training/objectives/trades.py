"""TRADES: the loss of the clean images, and how far the outputs of the adversarial ones are (arXiv 1901.08573)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig
from robust_tf.attacks.losses import Model, logits_of
from robust_tf.attacks.pgd import ascend
from robust_tf.attacks.threat_models import Scale
from robust_tf.training.objectives.base import Batch, Objective, Outputs, Trainer

# Standard deviation of the Gaussian that TRADES starts at: at the clean image itself its divergence has no slope.
_TRADES_START = 0.001


class CleanAndAdversarial(NamedTuple):
    """The images of one batch, clean and adversarial."""

    clean: tf.Tensor
    adversarial: tf.Tensor


class Trades(Objective):
    """The compiled loss on the clean images + beta * KL(clean || adversarial).

    Both batches go through the network on their own, in training mode, and move BatchNorm's statistics one after the
    other, the clean one first, as in the authors' code. Its second pass over the clean images, which changes nothing
    but the statistics, is left out.

    Args:
        beta: weight of the divergence, at least 0.

    Source: Zhang et al. 2019, arXiv 1901.08573; yaodongyu/TRADES, trades.py.
    """

    passes = 2

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._divergence = Divergence()

    def inputs(self, trainer: Trainer, batch: Batch) -> CleanAndAdversarial:
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
        clean = batch.network(inputs.clean, True)
        return Outputs(adversarial=batch.network(inputs.adversarial, True), clean=clean)

    def loss(self, trainer: Trainer, batch: Batch, outputs: Outputs) -> tf.Tensor:
        loss = trainer.compute_loss(batch.images, batch.labels, outputs.clean, batch.sample_weight)
        logits_of = trainer.compiled_loss.class_logits
        clean, adversarial = logits_of(outputs.clean), logits_of(outputs.adversarial)
        return loss + self._beta * self._divergence(clean, adversarial, batch.sample_weight)


def divergence(clean_logits: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """KL(clean || adversarial) between the class probabilities, sum of p log(p / q) over the classes.

    Args:
        clean_logits: (batch, num_classes), of p.
        logits: (batch, num_classes), of q.

    Returns:
        (batch,) float32; the gradient goes into both.
    """
    log_clean = tf.nn.log_softmax(tf.cast(clean_logits, tf.float32))
    log_adversarial = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    return tf.reduce_sum(tf.exp(log_clean) * (log_clean - log_adversarial), axis=-1)


class Divergence(keras.losses.Loss):
    """`divergence` as a Keras loss, so that Keras weights the images and shares out the mean between replicas."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
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

    It starts at the images plus Gaussian noise of standard deviation 0.001 (`attack.random_start` doesn't count). The
    start is put into the ball and into [0, 1], where the authors' linf code leaves it outside until after the first
    step: a classifier that clips its input has no gradient there.

    Args:
        model: a callable from [0, 1] images to outputs; a Keras model is run in inference mode.
        images: (batch, height, width, channels) float32 in [0, 1].
        attack: threat model and search, with an epsilon above 0.
        seed: (2,) integers, the seed of the noise.
        strength: factor on epsilon and on the step size.
        class_logits: outputs -> logits (batch, num_classes); by default the outputs are logits.

    Returns:
        images_adv (batch, height, width, channels) float32, and the outputs for the clean images.

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
        loss=lambda outputs, labels, targets: divergence(clean_logits, class_logits(outputs)),
        correct_of=lambda outputs, labels: tf.zeros_like(labels, tf.bool),  # nobody asks
        use_best=attack.use_best,
    )
    return tf.stop_gradient(state["images_adv"]), clean
