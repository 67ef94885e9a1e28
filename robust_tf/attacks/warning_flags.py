"""Signs that an evaluation overestimates the robustness, as AutoAttack's authors list them.

Source: Croce and Hein 2020, arXiv 2003.01690, and the flags of their program; gradient masking: Athalye et al. 2018,
arXiv 1802.00420.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import LOSSES, Model, logits_of, slope_of

# Square may find what a white-box attack has missed for this share of the images before it is suspicious.
_SQUARE_TOLERANCE = 0.002
# Largest distance of normalised outputs on the same images before the model counts as random.
_RANDOMNESS_TOLERANCE = 1e-4


def find_warnings(
    model: Model, images: np.ndarray, labels: np.ndarray, *, attacks: Sequence[str], randomised: bool = False
) -> dict[str, str]:
    """Looks at a model before it is attacked.

    Args:
        images: (batch, height, width, channels) float32, one batch of those that will be attacked.
        labels: (batch,) int32.
        attacks: the names of the attacks that will run.
        randomised: the model is known to be random and is attacked accordingly.

    Returns:
        Flag -> sentence, of those of few_classes, probabilities, randomness and zero_gradients that are up.
    """
    points = tf.constant(images)
    call = tf.function(lambda x: logits_of(model, x))
    logits = call(points).numpy()
    num_classes = logits.shape[1]
    warnings = {}
    if num_classes < 4 and any(name == "apgd-t" or "dlr" in name for name in attacks):
        warnings["few_classes"] = (
            f"With {num_classes} classes the targeted DLR loss is not defined; the margin takes its place."
        )
    if looks_like_probabilities(logits):
        warnings["probabilities"] = (
            "The outputs look like probabilities. Attack the logits: behind a softmax gradients vanish."
        )
    if not randomised and any(_distance(logits, call(points).numpy()) > _RANDOMNESS_TOLERANCE for _ in range(3)):
        warnings["randomness"] = (
            "The model gives different outputs for the same images. Use the version 'rand', which averages gradients."
        )
    share = zero_gradient_share(model, points, tf.constant(labels))
    if share > 0:
        warnings["zero_gradients"] = (
            f"The gradient is zero at {share:.1%} of the images looked at. Attacks that follow gradients are "
            "unreliable there."
        )
    return warnings


def zero_gradient_share(model: Model, images: tf.Tensor, labels: tf.Tensor) -> float:
    """Share of the images at which the margin has no gradient at all, in [0, 1].

    The margin, not the cross-entropy: the gradient of a confident model's cross-entropy is zero by rounding alone.

    Args:
        images: (batch, height, width, channels) float32.
        labels: (batch,) int32.
    """

    @tf.function
    def share(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        gradient = slope_of(model, images, lambda logits: LOSSES["margin"](logits, labels, labels), labels).gradient
        zero = tf.reduce_all(tf.equal(gradient, 0.0), axis=(1, 2, 3))
        return tf.reduce_mean(tf.cast(zero, tf.float32))

    return float(share(images, labels))


def looks_like_probabilities(outputs: np.ndarray) -> bool:
    """Whether all rows (batch, classes) are in [0, 1] and sum to 1."""
    inside = outputs.min() > -1e-5 and outputs.max() < 1 + 1e-5
    return bool(inside and np.all(np.abs(outputs.sum(axis=1) - 1) < 1e-5))


def square_beats_the_others(felled_by: Sequence[str]) -> dict[str, str]:
    """The flag square_beats_gradients, when Square fells what attacks with gradients before it have left.

    Args:
        felled_by: for each image the attack that felled it, "clean", or "" while it resists.
    """
    fallen = sum(name == "square" for name in felled_by)
    if fallen / len(felled_by) <= _SQUARE_TOLERANCE:
        return {}
    return {
        "square_beats_gradients": (
            f"Square, which uses no gradients, felled {fallen} of {len(felled_by)} images that the attacks before it "
            "had not. Gradients may be masked: the robust accuracy is an overestimate."
        )
    }


def _distance(outputs: np.ndarray, again: np.ndarray) -> float:
    """Largest Euclidean distance of two outputs for an image, each scaled to length 1."""

    def scaled(values: np.ndarray) -> np.ndarray:
        return values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-10)

    return float(np.linalg.norm(scaled(outputs) - scaled(again), axis=1).max())
