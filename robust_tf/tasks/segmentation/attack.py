"""Attacks that make a segmenter wrong on as many pixels of an image as possible.

The cross-entropy of a whole image is a poor guide for that: its gradient is largest at pixels that are wrong already,
and the attack spends its radius on making them even worse. The other two losses here avoid this.

Source: Croce, Singh and Hein 2024, "Towards reliable evaluation and fast training of robust semantic segmentation
models", arXiv 2306.12941. Like their ensemble, `attack_segmenter` runs several losses and takes the worst result for
each image, but it climbs with PGD and a fixed radius instead of APGD with a radius that shrinks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import tensorflow as tf

from robust_tf.attacks import AttackConfig, climb
from robust_tf.attacks.checks import assert_pixels, floating
from robust_tf.attacks.losses import LOSSES, Model, logits_of
from robust_tf.attacks.seeds import Seed, as_seeds, fold_in
from robust_tf.errors import UserError, unknown_name
from robust_tf.tasks.segmentation.losses import labeled_pixels

SegmentationLoss = Literal["ce", "masked_ce", "js"]
SEGMENTATION_LOSSES: tuple[SegmentationLoss, ...] = get_args(SegmentationLoss)


def attack_segmenter(
    model: Model,
    images: tf.Tensor,
    masks: tf.Tensor,
    *,
    attack: AttackConfig,
    losses: Sequence[SegmentationLoss] = SEGMENTATION_LOSSES,
    seed: Seed = 0,
) -> tf.Tensor:
    """Returns adversarial images on which a segmenter is wrong at as many pixels as the attacks can reach.

    Each loss is climbed by itself, and each image keeps the result with the lowest pixel accuracy; of equal results,
    the one of the earlier loss. The image itself is a candidate too, so no result is better for the model than no
    attack. Within the run of a loss, with `attack.use_best`, each image keeps the iterate of lowest pixel accuracy, and
    among equals the one of highest loss. That costs nothing, because the predictions of all iterates are known. Without
    it, the last iterate counts.

    Inside a `tf.function` the attack becomes part of its graph. An eager call is traced each time, so wrap the call in
    a `tf.function` if there are many batches.

    Args:
        model: Callable from images to logits (batch, height, width, num_classes). A Keras model runs in inference mode.
        images: Float images (batch, height, width, channels) in [0, 1].
        masks: Classes of the pixels, (batch, height, width) integers, with -1 for ignored pixels. An image whose pixels
            are all ignored is returned unchanged.
        attack: Norm, radius, step size and number of steps, for each loss. If it is not active, the images are returned
            unchanged.
        losses: Losses to climb, one after the other. "ce" is the mean cross-entropy of the labeled pixels. "masked_ce"
            leaves out the pixels that the current iterate has made wrong already. "js" is the Jensen-Shannon divergence
            between the prediction and the truth, whose gradient vanishes at pixels that are wrong with confidence.
        seed: Seed for the random starts: an integer, or (batch, 2) integers with a pair for each image. Each loss
            starts at other points, so with random starts a loss that is named twice is restarted.

    Returns:
        images_adv (batch, height, width, channels) float32, in the ball and in [0, 1].

    Raises:
        UserError: A loss is unknown or there is none, or the shapes or types do not fit. In an eager call also: the
            images are not in [0, 1], or a mask holds a number that is not a class of the model.
        InvalidArgumentError: In a `tf.function`, the images are not in [0, 1].

    Source: Croce et al. 2024, arXiv 2306.12941 ("masked_ce", "js", and the worst case over losses).

    Example:
        A model that takes bright pixels for class 1, on an image that is gray everywhere:

        >>> import tensorflow as tf
        >>> def dark_or_bright(images):
        ...     return tf.concat([0.5 - images, images - 0.5], axis=-1)
        >>> images, masks = tf.fill([1, 4, 4, 1], 0.45), tf.zeros([1, 4, 4], tf.int32)
        >>> attack = AttackConfig(norm="linf", epsilon=0.1, step_size=0.05, steps=2)
        >>> images_adv = attack_segmenter(dark_or_bright, images, masks, attack=attack)
        >>> bool(tf.reduce_all(images_adv > 0.5))
        True
    """
    _check_losses(losses)
    images, masks = _checked(model, images, masks)
    if not attack.active:
        return images
    seeds = as_seeds(seed, tf.shape(images)[0])

    def run(images: tf.Tensor, masks: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        return _worst_of(model, images, masks, seeds, attack=attack, losses=losses)

    if tf.executing_eagerly():
        run = tf.function(run, autograph=False)
    return run(images, masks, seeds)


def pixel_accuracy_of_each_image(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    """Returns the share of labeled pixels that are classified correctly, (batch,) float32; 1 if none is labeled.

    Args:
        logits: Logits (batch, height, width, num_classes).
        masks: Classes (batch, height, width) integers, with -1 for ignored pixels.

    Example:
        >>> import tensorflow as tf
        >>> logits = tf.one_hot([[[0, 1], [0, 0]]], 2)
        >>> pixel_accuracy_of_each_image(logits, tf.constant([[[0, 1], [1, -1]]])).numpy().round(3).tolist()
        [0.6669999957084656]
    """
    pixels = _sum(labeled_pixels(masks)[0])
    return 1.0 - tf.math.divide_no_nan(_wrong_pixels(logits, masks), pixels)


def _worst_of(
    model: Model,
    images: tf.Tensor,
    masks: tf.Tensor,
    seeds: tf.Tensor,
    *,
    attack: AttackConfig,
    losses: Sequence[SegmentationLoss],
) -> tf.Tensor:
    images_adv = images
    most = _wrong_pixels(logits_of(model, images), masks)
    for number, name in enumerate(losses):
        result = climb(
            model,
            images,
            loss=functools.partial(_ranked_loss, masks=masks, loss=_LOSSES[name]),
            correct=lambda logits: _wrong_pixels(logits, masks) < _sum(labeled_pixels(masks)[0]),
            attack=attack,
            seed=fold_in(seeds, number),
        ).images_adv
        wrong = _wrong_pixels(logits_of(model, result), masks)
        images_adv = tf.where((wrong > most)[:, None, None, None], result, images_adv)
        most = tf.maximum(most, wrong)
    return tf.stop_gradient(images_adv)


def _ranked_loss(logits: tf.Tensor, masks: tf.Tensor, loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Returns a number for each image, (batch,), that is the larger, the more pixels are wrong.

    `climb` keeps the iterate of the highest loss. Here its value is the number of wrong pixels, plus a part below 1/2
    that rises with the loss and decides between equal numbers. The gradient is the gradient of the loss alone.
    """
    value = loss(logits, masks)
    rank = _wrong_pixels(logits, masks) + 0.5 * value / (1.0 + tf.abs(value))
    return value + tf.stop_gradient(rank - value)


def _cross_entropies(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    """Returns the cross-entropy of each pixel, (batch, height, width), corrected where its float32 value would be 0."""
    classes = tf.reshape(labeled_pixels(masks)[1], [-1])
    # The loss of the attacks on classifiers, with every pixel in the place of an image.
    flat = LOSSES["ce"](tf.reshape(logits, [-1, logits.shape[-1]]), classes, classes)
    return tf.reshape(flat, tf.shape(masks))


def _plain(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    counted = labeled_pixels(masks)[0]
    return _mean(_cross_entropies(logits, masks), counted, counted)


def _masked(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    counted, classes = labeled_pixels(masks)
    # A comparison has no gradient: the mask is a constant in each step.
    right = tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), classes)
    return _mean(_cross_entropies(logits, masks), counted & right, counted)


def _jensen_shannon(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    """Returns the mean divergence, at most log 2 for a pixel.

    With the probability p of the true class it is log 2 + (p log p - (1 + p) log(1 + p)) / 2: a one-hot truth shares
    only the true class with the prediction, and every other class contributes its probability times log(2) / 2.
    """
    counted, classes = labeled_pixels(masks)
    log_p = tf.gather(tf.nn.log_softmax(logits), classes, axis=-1, batch_dims=3)
    p = tf.exp(log_p)
    divergence = math.log(2.0) + 0.5 * (p * log_p - (1.0 + p) * tf.math.log1p(p))
    return _mean(divergence, counted, counted)


_LOSSES: dict[SegmentationLoss, Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = {
    "ce": _plain,
    "masked_ce": _masked,
    "js": _jensen_shannon,
}


def _wrong_pixels(logits: tf.Tensor, masks: tf.Tensor) -> tf.Tensor:
    """Returns the number of labeled pixels that are classified wrongly, (batch,) float32."""
    counted, classes = labeled_pixels(masks)
    return _sum(counted & tf.not_equal(tf.argmax(logits, axis=-1, output_type=tf.int32), classes))


def _sum(pixels: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(pixels, tf.float32), axis=(1, 2))


def _mean(values: tf.Tensor, used: tf.Tensor, counted: tf.Tensor) -> tf.Tensor:
    """Returns the sum over the used pixels, divided by the number of counted pixels, (batch,)."""
    # Not a product: the value of a pixel that is not used may be infinite, and 0 times infinity is NaN.
    total = tf.reduce_sum(tf.where(used, values, 0.0), axis=(1, 2))
    return total / tf.maximum(_sum(counted), 1.0)


def _check_losses(losses: Sequence[str]) -> None:
    if isinstance(losses, str) or not losses:
        raise UserError(
            f"`losses` must be a list with at least one of {', '.join(SEGMENTATION_LOSSES)}. Received: {losses!r}."
        )
    for name in losses:
        if name not in SEGMENTATION_LOSSES:
            raise unknown_name("loss of an attack on segmentation", name, SEGMENTATION_LOSSES)


def _checked(model: Model, images: tf.Tensor, masks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the images in float32 and the masks in int32, after checking both."""
    images, masks = floating(tf.convert_to_tensor(images)), tf.convert_to_tensor(masks)
    if images.shape.rank != 4 or not images.shape[:3].is_compatible_with(masks.shape):
        raise UserError(
            "Images must be (batch, height, width, channels), and masks (batch, height, width) of the same size. "
            f"Received: images of shape {images.shape}, masks of shape {masks.shape}."
        )
    if not masks.dtype.is_integer:
        raise UserError(f"Masks must hold integers. Received: masks of type {masks.dtype.name}.")
    images, masks = tf.cast(assert_pixels(images), tf.float32), tf.cast(masks, tf.int32)
    if tf.executing_eagerly() and masks.shape.num_elements():
        logits = logits_of(model, images[:1])
        expected = [1, *masks.shape[1:], None]
        if not logits.shape.is_compatible_with(expected):
            raise UserError(
                "A segmenter must return logits (batch, height, width, num_classes), with the size of the masks. "
                f"Received: logits of shape {logits.shape}, masks of shape {masks.shape}."
            )
        low, high = int(tf.reduce_min(masks)), int(tf.reduce_max(masks))
        if low < -1 or high >= logits.shape[-1]:
            raise UserError(
                f"Masks must be in 0..{logits.shape[-1] - 1}, or -1 for ignored pixels. Received: values from {low} to "
                f"{high}."
            )
    return images, masks
