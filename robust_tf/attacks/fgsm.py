"""The fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572)."""

from typing import Literal

import tensorflow as tf

from robust_tf.attacks.checks import check_threat_model, checked_batch
from robust_tf.attacks.losses import LOSSES, Model, slope_of
from robust_tf.attacks.seeds import Seed
from robust_tf.attacks.threat_models import NORMS


def fgsm(
    model: Model,
    images: tf.Tensor,
    labels: tf.Tensor,
    *,
    norm: Literal["linf", "l2"],
    epsilon: float | tf.Tensor,
    seed: Seed | None = None,
) -> tf.Tensor:
    """One step of length epsilon up the cross-entropy: images + epsilon * sign(gradient) for linf.

    With l2 the step goes along the normalised gradient. A weak attack, good to compare stronger ones with.

    Args:
        model: any callable from images to logits.
        images: (batch, height, width, channels), float, in [0, 1].
        labels: (batch,) or (batch, 1) integers.
        norm: "linf" or "l2".
        epsilon: radius of the ball, in [0, 1] pixel units; a number or a scalar tensor.
        seed: nothing here is random; taken so that all attacks are called alike.

    Returns:
        images_adv: (batch, height, width, channels) float32, in the ball and in [0, 1].

    Raises:
        UserError, InvalidArgumentError: as `pgd`.

    Warns:
        AttackWarning: as `pgd`.

    Source: Goodfellow et al. 2015, arXiv 1412.6572, section 4.
    """
    del seed
    check_threat_model(norm, epsilon, ("linf", "l2"))
    model, images, labels = checked_batch(model, images, labels, loss=LOSSES["ce"])
    slope = slope_of(model, images, lambda logits: LOSSES["ce"](logits, labels, labels), labels)
    geometry = NORMS[norm]
    return tf.stop_gradient(geometry.project(images + geometry.step(slope.gradient, epsilon), images, epsilon))
