"""What an adversarial step minimises besides Madry's loss: TRADES, AWP, free replays, and an epsilon that rises."""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_tf.attacks import NORMS, AttackConfig
from robust_tf.attacks.losses import Model, logits_of
from robust_tf.attacks.pgd import ascend
from robust_tf.attacks.threat_models import Scale, l2_norm
from robust_tf.config import JobConfig
from robust_tf.errors import UserError
from robust_tf.training.schedules import optimizer_steps_per_epoch

# Standard deviation of the Gaussian that TRADES starts at: at the clean image itself its divergence has no slope.
_TRADES_START = 0.001


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `AdversarialTrainer` trains with its attack; the default is Madry's adversarial training.

    Attributes:
        trades_beta: weight of the divergence in TRADES, at least 0; None is Madry's loss.
        awp_gamma: size of the adversarial weight perturbation relative to the weights, at least 0; None is none.
        awp_warmup_steps: optimizer steps before the first weight perturbation.
        epsilon_warmup_steps: optimizer steps over which epsilon and the step size rise linearly from 0; 0 is at once.
        free_replays: free adversarial training with so many steps on each batch; 0 is another kind.
        free_batch_size: the largest batch of free adversarial training, which must be known beforehand; else 0.
    """

    trades_beta: float | None = None
    awp_gamma: float | None = None
    awp_warmup_steps: float = 0.0
    epsilon_warmup_steps: float = 0.0
    free_replays: int = 0
    free_batch_size: int = 0

    def __post_init__(self) -> None:
        for name in ("trades_beta", "awp_gamma", "awp_warmup_steps", "epsilon_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a number of 0 or more. Received: {name}={value}.")
        if min(self.free_replays, self.free_batch_size) < 0 or bool(self.free_replays) != bool(self.free_batch_size):
            raise UserError(
                "Free adversarial training needs free_replays and free_batch_size, both 1 or more. Received: "
                f"free_replays={self.free_replays}, free_batch_size={self.free_batch_size}."
            )
        others = (self.trades_beta, self.awp_gamma, self.epsilon_warmup_steps or None)
        if self.free_replays and any(value is not None for value in others):
            raise UserError(
                "Free adversarial training takes one gradient for the weights and the images, so it goes with neither "
                f"TRADES nor AWP nor a rising epsilon. Received: {self}."
            )


def recipe_of(config: JobConfig, steps_per_epoch: int) -> Recipe:
    """The recipe that a job's flags describe; `steps_per_epoch` are batches in one pass over the training part."""
    steps = optimizer_steps_per_epoch(config, steps_per_epoch)
    free = config.fast == "free"
    return Recipe(
        trades_beta=config.trades_beta if config.uses_trades else None,
        awp_gamma=config.awp_gamma if config.uses_awp else None,
        awp_warmup_steps=config.awp_warmup_epochs * steps,
        epsilon_warmup_steps=(config.epsilon_warmup_epochs or 0.0) * steps,
        free_replays=config.free_replays if free else 0,
        free_batch_size=config.batch_size if free else 0,
    )


class CleanAndAdversarial(NamedTuple):
    """Two tensors of one batch: its images, or its logits, clean and adversarial."""

    clean: Any
    adversarial: Any


class AtPerturbedWeights(NamedTuple):
    """Images (or `CleanAndAdversarial` ones), and what is added to the weights that they are to be put through.

    Attributes:
        images: what the classifier takes.
        perturbations: one for each of `perturbed_weights`, in its order.
    """

    images: Any
    perturbations: list[tf.Tensor]


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
    labels: tf.Tensor,
    *,
    attack: AttackConfig,
    seed: tf.Tensor,
    strength: Scale = 1.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The attack of TRADES: projected gradient ascent on KL(clean || adversarial), the network in inference mode.

    It starts at the images plus Gaussian noise of standard deviation 0.001 (`attack.random_start` doesn't count). The
    start is put into the ball and into [0, 1], where the authors' linf code leaves it outside until after the first
    step: a classifier that clips its input has no gradient there.

    Args:
        model: [0, 1] images to logits.
        images: (batch, height, width, channels) float32 in [0, 1].
        labels: (batch,) int32; no part of what is maximised.
        attack: an active one.
        seed: (2,) integers, of the noise.
        strength: factor on epsilon and on the step size.

    Returns:
        images_adv (batch, height, width, channels) float32, and the logits of the clean images, (batch, num_classes).

    Source: Zhang et al. 2019, arXiv 1901.08573, algorithm 1; yaodongyu/TRADES, trades.py.
    """
    images = tf.cast(images, tf.float32)
    norm, epsilon = NORMS[attack.norm], attack.epsilon * strength
    clean_logits = logits_of(model, images)
    noise = tf.random.stateless_normal(tf.shape(images), seed, stddev=_TRADES_START)
    state = ascend(
        model,
        images,
        tf.cast(labels, tf.int32),
        norm.project(images + noise, images, epsilon),
        norm=norm,
        epsilon=epsilon,
        step_size=attack.step_size * strength,
        steps=attack.steps,
        loss=lambda logits, labels, targets: divergence(clean_logits, logits),
        use_best=attack.use_best,
    )
    return tf.stop_gradient(state["images_adv"]), clean_logits


def perturbed_weights(classifier: keras.Model) -> list[keras.Variable]:
    """The weights that AWP perturbs: trainable kernels of convolutions and dense layers, no biases, no BatchNorm.

    The authors' code takes every weight with more than one axis.
    """
    return [weight for weight in classifier.trainable_weights if len(weight.shape) > 1]


def weight_perturbation(weight: tf.Tensor, gradient: tf.Tensor, gamma: Scale) -> tf.Tensor:
    """The perturbation of one layer's kernel: along the gradient, `gamma` times as long as the kernel (L2).

    One step of gradient ascent, whatever its length, projected as equation (10) of the paper. A gradient that is zero
    or not finite (which loss scaling meets and undoes) gives none.

    Args:
        weight: the kernel, float32.
        gradient: of the loss with respect to it, in any scale.
        gamma: relative size, at least 0.

    Returns:
        float32 of the shape of the kernel.

    Source: Wu et al. 2020, arXiv 2004.05884, section 4; csdongxian/AWP, utils_awp.py.
    """
    length = tf.norm(gradient)
    perturbation = gamma * tf.norm(weight) * tf.math.divide_no_nan(gradient, length)
    return tf.where(tf.math.is_finite(length), perturbation, 0.0)


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
