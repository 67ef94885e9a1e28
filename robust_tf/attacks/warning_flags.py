"""Signs that an evaluation overestimates the robustness, as AutoAttack's authors list them.

Source: Croce and Hein 2020, arXiv 2003.01690, and the flags of their program; gradient masking: Athalye et al. 2018,
arXiv 1802.00420.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import LOSSES, NO_GRADIENT_MEANS, Loss, likeliest_targets, slope_of
from robust_tf.attacks.outputs import Model, kind_of_probabilities, output_of
from robust_tf.errors import AttackWarning

# Square may find what a white-box attack has missed for this share of the images before it is suspicious.
_SQUARE_TOLERANCE = 0.002
# Largest distance of normalised outputs on the same images before the model counts as random.
_RANDOMNESS_TOLERANCE = 1e-4
# How far from [0, 1] the rounding of a resize or of a float16 file may go.
_PIXEL_ROUNDING = 1e-3

PROBABILITIES = "The outputs look like probabilities. Attack the logits: behind a softmax small differences vanish."


def issue(sentences: Iterable[str], *, stacklevel: int) -> None:
    """Issues each as an `AttackWarning`; `stacklevel` is that of warnings.warn in the caller."""
    for sentence in sentences:
        warnings.warn(sentence, AttackWarning, stacklevel=stacklevel + 1)


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
        Flag -> sentence, of those of few_classes, probabilities, randomness, zero_gradients, outside_pixels and
        dark_pixels that are up.
    """
    points = tf.constant(images)
    call = tf.function(lambda x: output_of(model, x), autograph=False)
    outputs = call(points)
    num_classes = outputs.shape[1]
    flags = pixel_flags(images)
    if num_classes < 4 and any(_loss_name(name) == "dlr" for name in attacks):
        flags["few_classes"] = (
            f"With {num_classes} classes the targeted DLR loss is not defined; the margin takes its place."
        )
    if kind_of_probabilities(model, outputs):
        flags["probabilities"] = PROBABILITIES
    if not randomised and any(
        _distance(outputs.numpy(), call(points).numpy()) > _RANDOMNESS_TOLERANCE for _ in range(3)
    ):
        flags["randomness"] = (
            "The model gives different outputs for the same images. Use the version 'rand', which averages gradients."
        )
    losses = {_loss_name(name) for name in attacks} - {""}
    shares = [zero_gradient_share(model, points, tf.constant(labels), loss=LOSSES[name]) for name in losses]
    if any(shares):
        flags["zero_gradients"] = zero_gradient_sentence(max(shares))
    return flags


def _loss_name(attack: str) -> str:
    """The loss that an attack of the table follows the gradient of; "" for Square."""
    if attack == "square":
        return ""
    if attack.startswith("fab"):
        return "margin"
    return "dlr" if attack == "apgd-t" or "dlr" in attack else "ce"


def zero_gradient_share(model: Model, images: tf.Tensor, labels: tf.Tensor, *, loss: Loss = LOSSES["margin"]) -> float:
    """Share of the images that are right, and at which a loss has no gradient at all, in [0, 1].

    A wrong image needs no attack, and DLR is constant where the label has the third highest logit.

    Args:
        images: (batch, height, width, channels) float32.
        labels: (batch,) int32.
        loss: the one that the attack follows; with targets, towards the likeliest other class.
    """
    share = tf.function(lambda x, y: mean_of_zero_gradients(model, x, y, loss), autograph=False)
    return float(share(images, labels))


def mean_of_zero_gradients(
    model: Model, images: tf.Tensor, labels: tf.Tensor, loss: Loss, *, targeted: bool = False
) -> tf.Tensor:
    """`zero_gradient_share` as a tensor, eagerly without tracing; `targeted`: of the images that are no target yet."""

    def loss_of(logits: tf.Tensor) -> tf.Tensor:
        return loss(logits, labels, likeliest_targets(logits, labels, 1)[:, 0])

    slope = slope_of(model, images, loss_of, labels)
    zero = tf.reduce_all(tf.equal(slope.gradient, 0.0), axis=(1, 2, 3))
    return tf.reduce_mean(tf.cast(zero & tf.not_equal(slope.correct, targeted), tf.float32))


def zero_gradient_sentence(share: float) -> str:
    """What the flag zero_gradients says."""
    return f"The gradient is zero at {share:.1%} of the images looked at. {NO_GRADIENT_MEANS}"


def pixel_flags(images: np.ndarray) -> dict[str, str]:
    """The flags outside_pixels and dark_pixels: images that may be in another unit than [0, 1]."""
    low, high = float(images.min()), float(images.max())
    flags = {}
    if low < -_PIXEL_ROUNDING or high > 1 + _PIXEL_ROUNDING:
        flags["outside_pixels"] = (
            f"The images have values from {low:g} to {high:g}. Attacks clip them to [0, 1], beyond epsilon."
        )
    if 0 < high <= 1.001 / 255:
        flags["dark_pixels"] = (
            f"No value is above 1/255 (the largest is {high:g}). Were the images divided by 255 twice?"
        )
    return flags


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
        values = values.astype(np.float32)
        return values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-10)

    return float(np.linalg.norm(scaled(outputs) - scaled(again), axis=1).max())
