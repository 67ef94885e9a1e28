"""Signs that an evaluation overestimates the robustness, as AutoAttack's authors list them.

Sources: Croce and Hein 2020, arXiv 2003.01690, and the flags of their program; for gradient masking Athalye et al.
2018, arXiv 1802.00420.
"""

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import cast

import numpy as np
import tensorflow as tf

from robust_tf.attacks.losses import LOSSES, NO_GRADIENT_MEANS, Loss, likeliest_targets, slope_of
from robust_tf.attacks.outputs import Model, kind_of_probabilities, output_of
from robust_tf.errors import AttackWarning

# It is suspicious if Square fells more than this share of all images after gradient attacks have failed on them.
_SQUARE_TOLERANCE = 0.002
# Distance between normalized outputs for the same images above which the model counts as random.
_RANDOMNESS_TOLERANCE = 1e-4
# How far outside [0, 1] rounding can take a pixel, in a resize or in a float16 file.
_PIXEL_ROUNDING = 1e-3

PROBABILITIES = (
    "The outputs look like probabilities. Attack the logits instead, because a softmax makes small differences vanish."
)


def issue(sentences: Iterable[str], *, stacklevel: int) -> None:
    """Issues each sentence as an `AttackWarning`.

    Args:
        sentences: Texts of the warnings.
        stacklevel: Stack level that the caller would pass to `warnings.warn`.
    """
    for sentence in sentences:
        warnings.warn(sentence, AttackWarning, stacklevel=stacklevel + 1)


def find_warnings(
    model: Model, images: np.ndarray, labels: np.ndarray, *, losses: Collection[str], randomized: bool = False
) -> dict[str, str]:
    """Looks for signs that attacks will overestimate the robustness of a model, before they run.

    Args:
        model: Callable from images to logits (batch, classes).
        images: One batch of the images that will be attacked, (batch, height, width, channels) float32.
        labels: Labels of these images, (batch,) int32.
        losses: Names of the losses whose gradients the attacks will follow.
        randomized: Whether the model is known to be random and the attacks average its gradients.

    Returns:
        The flags that apply, each with the sentence that explains it. The flags are "few_classes", "probabilities",
        "randomness", "zero_gradients", "outside_pixels" and "dark_pixels".
    """
    points = tf.constant(images)
    call = tf.function(lambda x: output_of(model, x), autograph=False)
    outputs = call(points)
    num_classes = outputs.shape[1]
    flags = pixel_flags(images)
    if num_classes < 4 and "dlr" in losses:
        flags["few_classes"] = (
            f"The targeted DLR loss is not defined for {num_classes} classes, so the margin takes its place."
        )
    if kind_of_probabilities(model, outputs):
        flags["probabilities"] = PROBABILITIES
    if not randomized and any(
        _distance(outputs.numpy(), call(points).numpy()) > _RANDOMNESS_TOLERANCE for _ in range(3)
    ):
        flags["randomness"] = (
            "The model returns different outputs for the same images. Use the version 'rand', which averages gradients."
        )
    shares = [zero_gradient_share(model, points, tf.constant(labels), loss=LOSSES[name]) for name in losses]
    if any(shares):
        flags["zero_gradients"] = zero_gradient_sentence(max(shares))
    return flags


def zero_gradient_share(model: Model, images: tf.Tensor, labels: tf.Tensor, *, loss: Loss = LOSSES["margin"]) -> float:
    """Returns the share of the images at which an attack finds no gradient to follow.

    These are the images with a correct prediction at which the gradient of the loss is exactly zero. Images with a
    wrong prediction do not count, because they need no attack. A large share is a sign of gradient masking: attacks
    that follow gradients fail at these images, even if other attacks would succeed.

    Args:
        model: Callable from images to logits (batch, classes).
        images: Images (batch, height, width, channels) float32, in [0, 1].
        labels: Labels (batch,) int32.
        loss: Loss that the attack follows, one of `robust_tf.attacks.losses.LOSSES` or `TARGETED_LOSSES`. A targeted
            loss aims at the likeliest other class.

    Returns:
        The share, in [0, 1].

    Source: Athalye et al. 2018, arXiv 1802.00420.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.attacks import zero_gradient_share
        >>> def dark_or_bright(images):
        ...     brightness = tf.reduce_mean(images, axis=(1, 2, 3)) - 0.5
        ...     return tf.stack([-brightness, brightness], axis=1)
        >>> def saturated(images):  # the same predictions, but flat wherever the model is sure
        ...     return tf.clip_by_value(dark_or_bright(images), -0.1, 0.1)
        >>> images, labels = tf.fill([2, 4, 4, 1], 0.9), tf.constant([1, 1])
        >>> zero_gradient_share(dark_or_bright, images, labels)
        0.0
        >>> zero_gradient_share(saturated, images, labels)
        1.0
    """
    share = tf.function(lambda x, y: mean_of_zero_gradients(model, x, y, loss), autograph=False)
    return float(share(images, labels))


def mean_of_zero_gradients(
    model: Model, images: tf.Tensor, labels: tf.Tensor, loss: Loss, *, targeted: bool = False
) -> tf.Tensor:
    """Returns `zero_gradient_share` as a scalar tensor; when called eagerly, nothing is traced.

    Args:
        model: Callable from images to logits (batch, classes).
        images: Images (batch, height, width, channels) float32, in [0, 1].
        labels: Labels (batch,) int32.
        loss: Loss that the attack follows.
        targeted: Whether the labels are target classes. Images whose prediction is not yet the target then count.
    """

    def loss_of(logits: tf.Tensor) -> tf.Tensor:
        return loss(logits, labels, likeliest_targets(logits, labels, 1)[:, 0])

    slope = slope_of(model, images, loss_of, labels)
    zero = tf.reduce_all(tf.equal(slope.gradient, 0.0), axis=(1, 2, 3))
    return tf.reduce_mean(tf.cast(zero & tf.not_equal(slope.correct, targeted), tf.float32))


def zero_gradient_sentence(share: float) -> str:
    """Returns the sentence of the flag "zero_gradients" for a share in [0, 1]."""
    return f"The gradient is zero at {share:.1%} of the images that were checked. {NO_GRADIENT_MEANS}"


def pixel_flags(images: np.ndarray) -> dict[str, str]:
    """Returns the flags "outside_pixels" and "dark_pixels" if the images seem to be in a unit other than [0, 1]."""
    low, high = float(images.min()), float(images.max())
    flags = {}
    if low < -_PIXEL_ROUNDING or high > 1 + _PIXEL_ROUNDING:
        flags["outside_pixels"] = (
            f"The images have values from {low:g} to {high:g}. Attacks clip them to [0, 1], even if that changes a "
            "pixel by more than epsilon."
        )
    if 0 < high <= 1.001 / 255:
        flags["dark_pixels"] = (
            f"No value is above 1/255 (the largest is {high:g}). Were the images divided by 255 twice?"
        )
    return flags


def square_beats_the_others(felled_by: Sequence[str]) -> dict[str, str]:
    """Returns the flag "square_beats_gradients" if Square fells images on which the attacks before it have failed.

    Args:
        felled_by: For each image, the name of the attack that felled it, "clean", or "" while it resists. See
            `CascadeState`.
    """
    fallen = sum(name == "square" for name in felled_by)
    if fallen / len(felled_by) <= _SQUARE_TOLERANCE:
        return {}
    return {
        "square_beats_gradients": (
            f"Square, which uses no gradients, felled {fallen} of {len(felled_by)} images that the attacks before it "
            "had missed. The gradients may be masked, so the robust accuracy may be an overestimate."
        )
    }


def _distance(outputs: np.ndarray, again: np.ndarray) -> float:
    """Returns the largest Euclidean distance between two outputs for the same image, each scaled to length 1."""

    def scaled(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        return cast(np.ndarray, values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-10))

    return float(np.linalg.norm(scaled(outputs) - scaled(again), axis=1).max())
