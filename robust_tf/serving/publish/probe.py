"""The attack in the served graph. It tests whether an image keeps its label at a given epsilon."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_tf.attacks.ascent import ascend
from robust_tf.attacks.losses import margin_of
from robust_tf.attacks.threat_models import NORMS
from robust_tf.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackProbe:
    """Settings of the signature `attack_probe`: PGD without a random start. Each request sets its epsilon.

    Attributes:
        norm: Norm of the perturbation, "linf" or "l2".
        steps: Number of gradient steps. Each is 2.5 * epsilon / steps long.
        epsilon: Epsilon at which the classifier was evaluated, in [0, 1] pixel units. It is only a hint for clients.

    Example:
        >>> AttackProbe(norm="l2", epsilon=0.5).steps
        20
    """

    norm: str
    steps: int = 20
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):  # in the l1 norm, a step depends on more than the gradient
            raise unknown_name("norm", self.norm, ("linf", "l2"))
        if self.steps < 1:
            raise UserError(f"The attack probe needs at least 1 step. Received: steps={self.steps}.")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise UserError(f"epsilon must be at least 0. Received: epsilon={self.epsilon}.")


class ProbeResult(NamedTuple):
    """The worst point that the attack found for each image.

    Attributes:
        images_adv: Adversarial images, (batch, height, width, 3) float32, in the ball and in [0, 1].
        logits: The classifier's logits for these images, (batch, classes) float32.
        margin: Logit of the label minus the largest other logit, (batch,) float32. If it is positive, the attack did
            not change the prediction.
    """

    images_adv: tf.Tensor
    logits: tf.Tensor
    margin: tf.Tensor


def run_probe(
    logits_of: Callable[[tf.Tensor], tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    epsilon: tf.Tensor,
    *,
    probe: AttackProbe,
) -> ProbeResult:
    """Attacks each image with PGD and its own epsilon, and keeps the point of smallest margin, including the start.

    Args:
        logits_of: Function from images, (batch, height, width, 3) float32 in [0, 1], to logits, (batch, classes)
            float32, in inference mode.
        images: Images, (batch, height, width, 3) float32 in [0, 1].
        labels: Labels, (batch,) int64.
        epsilon: Epsilon of each image, (batch,) float32, in [0, 1] pixel units.
        probe: Norm and number of steps.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """
    labels = tf.cast(labels, tf.int32)
    radius = epsilon[:, None, None, None]
    images_adv = ascend(
        logits_of,
        images,
        labels,
        images,
        geometry=NORMS[probe.norm],
        epsilon=radius,
        step_size=2.5 * radius / probe.steps,
        steps=probe.steps,
        loss=_margin_with_the_slope_of_cross_entropy,
    )["images_adv"]
    logits = logits_of(images_adv)
    return ProbeResult(images_adv, logits, margin_of(logits, labels))


def _margin_with_the_slope_of_cross_entropy(logits: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Returns minus the margin, by which points are ranked, but with the gradient of the cross-entropy for PGD."""
    del targets

    @tf.custom_gradient
    def loss(logits: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        _, slope = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=labels)
        return -margin_of(logits, labels), lambda upstream: upstream[:, None] * slope

    return loss(logits)
