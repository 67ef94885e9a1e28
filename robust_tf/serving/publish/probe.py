"""The attack that runs inside the served graph: does this image keep its label within this epsilon?"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_tf.attacks.losses import margin_of
from robust_tf.attacks.pgd import ascend
from robust_tf.attacks.threat_models import NORMS
from robust_tf.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackProbe:
    """What the signature `attack_probe` runs: PGD without a random start, the radius given by each request.

    Attributes:
        norm: "linf" or "l2".
        steps: gradient steps; each is 2.5 * epsilon / steps long.
        epsilon: the radius that the classifier was evaluated at, in [0, 1] pixel units; only a hint for clients.
    """

    norm: str
    steps: int = 20
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):  # steps of the l1 norm need more than a gradient
            raise unknown_name("norm", self.norm, ("linf", "l2"))
        if self.steps < 1:
            raise UserError(f"The attack probe needs at least 1 step. Received: steps={self.steps}.")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise UserError(f"epsilon is a distance of at least 0. Received: epsilon={self.epsilon}.")


class ProbeResult(NamedTuple):
    """The worst point that the attack met for each image.

    Attributes:
        images_adv: (batch, height, width, 3) float32, in the ball and in [0, 1].
        logits: (batch, classes) float32, the classifier's logits there.
        margin: (batch,) float32, logit of the label minus the best other logit; positive: the label held everywhere.
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
    """PGD with a radius of its own for each image, keeping the point of smallest margin, the start included.

    Args:
        logits_of: (batch, height, width, 3) float32 in [0, 1] -> (batch, classes) float32, in inference mode.
        images: (batch, height, width, 3) float32 in [0, 1].
        labels: (batch,) int64.
        epsilon: (batch,) float32, in [0, 1] pixel units.
        probe: norm and number of steps.

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
    """The attack climbs the cross-entropy, as in the source, but an iterate is worse where the margin is smaller."""
    del targets

    @tf.custom_gradient
    def loss(logits: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        _, slope = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=labels)
        return -margin_of(logits, labels), lambda upstream: upstream[:, None] * slope

    return loss(logits)
