"""The attack that runs inside the served graph: does this image keep its label within this epsilon?"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

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


def margin_of(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Logit of the label minus the best other logit, (batch,) float32."""
    is_label = tf.one_hot(labels, tf.shape(logits)[-1], on_value=True, off_value=False)
    own = tf.reduce_max(tf.where(is_label, logits, -float("inf")), axis=-1)
    best_other = tf.reduce_max(tf.where(is_label, -float("inf"), logits), axis=-1)
    return own - best_other


def run_probe(
    logits_of: Callable[[tf.Tensor], tf.Tensor],
    images: tf.Tensor,
    labels: tf.Tensor,
    epsilon: tf.Tensor,
    *,
    probe: AttackProbe,
) -> ProbeResult:
    """PGD with a radius of its own for each image, keeping the point of smallest margin, the start included.

    `robust_tf.attacks.pgd` takes one epsilon that is known when the graph is built; a request brings its own.

    Args:
        logits_of: (batch, height, width, 3) float32 in [0, 1] -> (batch, classes) float32, in inference mode.
        images: (batch, height, width, 3) float32 in [0, 1].
        labels: (batch,) int64.
        epsilon: (batch,) float32, in [0, 1] pixel units.
        probe: norm and number of steps.

    Source: Madry et al. 2018, arXiv 1706.06083, section 2.1.
    """
    norm = NORMS[probe.norm]
    radius = epsilon[:, None, None, None]
    step_size = 2.5 * radius / probe.steps

    def step(i: tf.Tensor, points: tf.Tensor, worst: ProbeResult) -> tuple[tf.Tensor, tf.Tensor, ProbeResult]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            logits = logits_of(points)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        worst = worse_of(ProbeResult(points, logits, margin_of(logits, labels)), worst)
        moved = points + norm.step(tape.gradient(loss, points), step_size)
        return i + 1, norm.project(moved, images, radius), worst

    def worse_of(new: ProbeResult, worst: ProbeResult) -> ProbeResult:
        lower = new.margin < worst.margin
        return ProbeResult(
            tf.where(lower[:, None, None, None], new.images_adv, worst.images_adv),
            tf.where(lower[:, None], new.logits, worst.logits),
            tf.where(lower, new.margin, worst.margin),
        )

    clean = logits_of(images)
    start = ProbeResult(images, clean, margin_of(clean, labels))
    _, points, worst = tf.while_loop(lambda i, *_: i < probe.steps, step, (0, images, start))
    last = logits_of(points)
    return worse_of(ProbeResult(points, last, margin_of(last, labels)), worst)
