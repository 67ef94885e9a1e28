"""RandAugment, MixUp and CutMix of keras-cv, changed so that their results depend only on a seed.

The layers of keras-cv draw random numbers from TensorFlow's global generators, whose results differ from run to run in
parallel calls. This module draws the numbers with stateless functions and passes them to the layers' operations.

No other module uses keras-cv, so replacing it with another library (0.9 is its last release) changes only this file.
keras-cv is imported on first use, because the import takes seconds.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from robust_tf.config.data import Mixing

_OPERATIONS = 2  # applied to each image, one after the other
# Probability that an operation is applied. One of the eleven operations in the RandAugment paper is the identity, so
# with probability 1/11 no operation is applied.
_RATE = 10 / 11
_MAGNITUDE_STD = 0.15
_LAYER_OPTIONS = {"dtype": "float32"}  # independent of the precision of the network
_MIXUP_ALPHA, _CUTMIX_ALPHA = 0.2, 1.0


def rand_augment(image: tf.Tensor, seed: tf.Tensor, *, magnitude: float) -> tf.Tensor:
    """Applies two random operations out of ten (contrast, color, brightness, shear, translation and others).

    Args:
        image: Image, (height, width, 3) float32 in [0, 1].
        seed: Seed for the operations and their strength, (2,) integers.
        magnitude: Mean strength of the operations, in (0, 1].

    Returns:
        Image of the same shape, float32 in [0, 1].

    Source: Cubuk et al. 2020, arXiv 1909.13719. The operations and their ranges are those of
    `keras_cv.layers.RandAugment`.
    """
    operations = _operations()
    images = image[None] * 255.0  # the range of pixels in keras-cv
    for position in range(_OPERATIONS):
        choice_seed, strength_seed = tf.unstack(
            tf.random.split(tf.random.experimental.stateless_fold_in(seed, position), 2)
        )
        draws = tf.random.stateless_uniform([2], choice_seed)
        strength = _Strength(strength_seed, magnitude)
        branches = [functools.partial(_same_shape, operation, images, strength) for operation in operations]
        # `switch_case` runs the last branch, which changes nothing, for every number that is out of range.
        branches.append(functools.partial(tf.identity, images))
        chosen = tf.cast(draws[0] * len(operations), tf.int32)
        images = tf.switch_case(tf.where(draws[1] < _RATE, chosen, len(operations)), branches)
    return tf.clip_by_value(images[0] / 255.0, 0.0, 1.0)


def mix(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, *, kind: Mixing, num_classes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each image of a batch and its label with another image of the batch and its label.

    Args:
        images: Images, (batch, height, width, 3) float32 in [0, 1].
        labels: Labels, (batch,) int32.
        seed: Seed for the pairs and their shares, (2,) integers.
        kind: "mixup" (Zhang et al. 2018, arXiv 1710.09412, with alpha 0.2) or "cutmix" (Yun et al. 2019,
            arXiv 1905.04899, with alpha 1).
        num_classes: Number of classes.

    Returns:
        Mixed images of the same shape, and their labels, (batch, num_classes) float32, which sum to 1 for each image.
    """
    layer = _mixing_layers()[kind]
    layer.seed_of_call = seed
    mixed = layer({"images": images, "labels": tf.one_hot(labels, num_classes)})
    return tf.ensure_shape(mixed["images"], images.shape), mixed["labels"]


class _Strength:
    """The random strength of an operation, (1, 1) float32, in all forms that keras-cv's operations take it in."""

    def __init__(self, seed: tf.Tensor, magnitude: float) -> None:
        normal_seed, uniform_seed = tf.unstack(tf.random.split(seed, 2))
        normal = magnitude + _MAGNITUDE_STD * tf.random.stateless_normal([2, 1, 1], normal_seed)
        uniform = tf.random.stateless_uniform([2, 1, 1], uniform_seed, -1.0, 1.0)
        self.share, self.other_share = tf.unstack(tf.clip_by_value(normal, 0.0, 1.0))  # around the magnitude
        self.signed_share = self.share * tf.sign(uniform[0])
        self.uniform = magnitude * uniform[1]  # between -magnitude and magnitude


Operation = Callable[[tf.Tensor, _Strength], tf.Tensor]


def _same_shape(operation: Operation, images: tf.Tensor, strength: _Strength) -> tf.Tensor:
    return tf.ensure_shape(operation(images, strength), images.shape)


@contextlib.contextmanager
def _making_layers() -> Iterator[None]:
    """Returns a context for creating layers, outside of any graph and with a seeded global generator."""
    with tf.init_scope():
        # The layers create a generator even if they never use it, and op determinism allows only a seeded one.
        tf.random.set_global_generator(tf.random.Generator.from_seed(1))
        yield


@functools.cache
def _operations() -> list[Operation]:
    """Returns the ten operations, which take and return images (1, height, width, 3) in [0, 255]."""
    import keras_cv

    layers, values, options = keras_cv.layers, (0, 255), _LAYER_OPTIONS
    with _making_layers():
        auto_contrast = layers.AutoContrast(values, **options)
        # As a `tf.function`, because the layer has an `if` on a tensor, which tf.data does not convert.
        equalize = tf.function(layers.Equalization(values, **options).augment_images)
        solarize = layers.Solarization(values, **options)
        color = layers.RandomColorDegeneration(1.0, **options)
        contrast = layers.RandomContrast(values, 1.0, **options)
        brightness = layers.RandomBrightness(1.0, values, **options)
        shear = layers.RandomShear(1.0, 1.0, **options)
        translate = layers.RandomTranslation(1.0, 1.0, **options)
    zero = np.zeros((1, 1), np.float32)

    def solarized(images: tf.Tensor, strength: _Strength) -> tf.Tensor:
        # Adds at most 110, because a larger number would leave little more than noise.
        additions, thresholds = 110.0 * strength.share, 255.0 * (1.0 - strength.other_share)
        return solarize.augment_images(images, {"additions": _4d(additions), "thresholds": _4d(thresholds)})

    def shifted(images: tf.Tensor, *, down: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        return translate.augment_images(images, {"height_translations": down, "width_translations": right})

    return [
        lambda images, _: auto_contrast.augment_images(images),
        lambda images, _: equalize(images),
        solarized,
        lambda images, strength: color.augment_images(images, _4d(strength.share)),
        lambda images, strength: contrast.augment_images(images, _4d(1.0 + strength.uniform)),
        lambda images, strength: brightness.augment_images(images, _4d(255.0 * strength.uniform)),
        lambda images, strength: shear.augment_images(images, {"shear_x": strength.signed_share, "shear_y": None}),
        lambda images, strength: shear.augment_images(images, {"shear_x": None, "shear_y": strength.signed_share}),
        lambda images, strength: shifted(images, down=zero, right=strength.uniform),
        lambda images, strength: shifted(images, down=strength.uniform, right=zero),
    ]


def _4d(values: tf.Tensor) -> tf.Tensor:
    """Reshapes (1, 1) to (1, 1, 1, 1)."""
    return values[..., None, None]


@functools.cache
def _mixing_layers() -> dict[str, Any]:
    import keras_cv

    class MixUp(keras_cv.layers.MixUp):
        """MixUp that draws the pairs and their shares from `seed_of_call`."""

        def _mixup(self, images: tf.Tensor) -> tuple[tf.Tensor, ...]:
            order_seed, share_seed = tf.unstack(tf.random.split(self.seed_of_call, 2))
            share = _beta(tf.shape(images)[0], self.alpha, share_seed)
            partners = _partners(images, order_seed)
            weight = tf.reshape(share, (-1, 1, 1, 1))
            return weight * images + (1.0 - weight) * tf.gather(images, partners), share, partners

    class CutMix(keras_cv.layers.CutMix):
        """CutMix that draws the pairs and the rectangles from `seed_of_call`.

        The share of an image in its label is equal to its share of the pixels. In keras-cv it is smaller if a part of
        the rectangle lies outside of the image.
        """

        def _cutmix(self, images: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            order_seed, share_seed, place_seed = tf.unstack(tf.random.split(self.seed_of_call, 3))
            batch, height, width = tf.unstack(tf.shape(images)[:3])
            size = tf.cast(tf.stack([height, width]), tf.float32)
            side = tf.sqrt(1.0 - _beta(batch, self.alpha, share_seed))[:, None] * size
            center = tf.floor(tf.random.stateless_uniform([batch, 2], place_seed) * size)
            low = tf.maximum(center - tf.floor(side / 2.0), 0.0)[:, :, None]
            high = tf.minimum(center + tf.floor((side + 1.0) / 2.0), size)[:, :, None]
            rows, columns = (tf.range(length, dtype=tf.float32)[None] for length in (size[0], size[1]))
            inside = ((rows >= low[:, 0]) & (rows < high[:, 0]))[:, :, None] & (
                (columns >= low[:, 1]) & (columns < high[:, 1])
            )[:, None, :]
            partners = _partners(images, order_seed)
            mixed = tf.where(inside[..., None], tf.gather(images, partners), images)
            kept = 1.0 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=(1, 2))
            return mixed, kept, partners, None, None, None, None  # the others are for segmentation masks

    with _making_layers():
        return {
            "mixup": MixUp(_MIXUP_ALPHA, **_LAYER_OPTIONS),
            "cutmix": CutMix(_CUTMIX_ALPHA, **_LAYER_OPTIONS),
        }


def _partners(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_shuffle(tf.range(tf.shape(images)[0]), seed)


def _beta(count: tf.Tensor, alpha: float, seed: tf.Tensor) -> tf.Tensor:
    """Draws `count` numbers from Beta(alpha, alpha)."""
    gamma = tf.random.stateless_gamma([count, 2], seed, alpha)
    # With the small constants, the result is 1/2 if both draws are 0 in float32.
    return (gamma[:, 0] + 1e-30) / (tf.reduce_sum(gamma, axis=1) + 2e-30)
