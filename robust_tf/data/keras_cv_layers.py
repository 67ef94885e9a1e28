"""RandAugment, MixUp and CutMix of keras-cv, made to depend on a seed alone. The only module that knows keras-cv.

Its layers draw from TensorFlow's global generators, which in parallel calls give another result each time. Here the
random numbers are drawn without a state and handed to the layers' own operations. keras-cv is imported on first use,
since that takes seconds; it is at its last release (0.9), so that a move to another library is a change of this file.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from robust_tf.config.data import Mixing

# How many operations in a row, how often each really is done, and how their strength is spread.
_OPERATIONS = 2
_RATE = 10 / 11  # the paper's identity operation among eleven
_MAGNITUDE_STD = 0.15
_LAYER_OPTIONS = {"dtype": "float32"}  # whatever precision the network computes in
_MIXUP_ALPHA, _CUTMIX_ALPHA = 0.2, 1.0


def rand_augment(image: tf.Tensor, seed: tf.Tensor, *, magnitude: float) -> tf.Tensor:
    """Two operations in a row out of ten (contrast, colour, brightness, shear, translation, ...), chosen by the seed.

    Args:
        image: (height, width, 3) float32 in [0, 1].
        seed: (2,) integers, which alone decide the result.
        magnitude: mean strength of the operations, in (0, 1].

    Returns:
        The same kind of image.

    Source: Cubuk et al. 2020, arXiv 1909.13719; operations and their ranges as keras_cv.layers.RandAugment has them.
    """
    operations = _operations()
    images = image[None] * 255.0  # the unit of keras-cv's policy
    for position in range(_OPERATIONS):
        choice_seed, strength_seed = tf.unstack(
            tf.random.split(tf.random.experimental.stateless_fold_in(seed, position), 2)
        )
        draws = tf.random.stateless_uniform([2], choice_seed)
        strength = _Strength(strength_seed, magnitude)
        branches = [functools.partial(_same_shape, operation, images, strength) for operation in operations]
        # `switch_case` takes the last branch for every number that is out of range: nothing is done.
        branches.append(functools.partial(tf.identity, images))
        chosen = tf.cast(draws[0] * len(operations), tf.int32)
        images = tf.switch_case(tf.where(draws[1] < _RATE, chosen, len(operations)), branches)
    return tf.clip_by_value(images[0] / 255.0, 0.0, 1.0)


def mix(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor, *, kind: Mixing, num_classes: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each image of a batch, and its label, with another one of the batch.

    Args:
        images: (batch, height, width, 3) float32 in [0, 1].
        labels: (batch,) int32.
        seed: (2,) integers, which alone decide the result.
        kind: "mixup" (Zhang et al. 2018, arXiv 1710.09412; alpha 0.2) or "cutmix" (Yun et al. 2019, arXiv 1905.04899;
            alpha 1).
        num_classes: number of labels.

    Returns:
        Images of the same shape, and labels (batch, num_classes) float32 that sum to 1.
    """
    layer = _mixing_layers()[kind]
    layer.seed_of_call = seed
    mixed = layer({"images": images, "labels": tf.one_hot(labels, num_classes)})
    return tf.ensure_shape(mixed["images"], images.shape), mixed["labels"]


class _Strength:
    """How strong an operation is, drawn in the ways that the policy of keras-cv knows; shapes (1, 1)."""

    def __init__(self, seed: tf.Tensor, magnitude: float) -> None:
        normal_seed, uniform_seed = tf.unstack(tf.random.split(seed, 2))
        normal = magnitude + _MAGNITUDE_STD * tf.random.stateless_normal([2, 1, 1], normal_seed)
        uniform = tf.random.stateless_uniform([2, 1, 1], uniform_seed, -1.0, 1.0)
        self.share, self.other_share = tf.unstack(tf.clip_by_value(normal, 0.0, 1.0))  # around the magnitude
        self.signed_share = self.share * tf.sign(uniform[0])
        self.uniform = magnitude * uniform[1]  # up to the magnitude, either way


Operation = Callable[[tf.Tensor, _Strength], tf.Tensor]


def _same_shape(operation: Operation, images: tf.Tensor, strength: _Strength) -> tf.Tensor:
    return tf.ensure_shape(operation(images, strength), images.shape)


@contextlib.contextmanager
def _making_layers() -> Iterator[None]:
    """Outside of any graph; and where layers can ask for a global generator, of which nothing is drawn here."""
    with tf.init_scope():
        # One that was seeded: the layers ask even if they have a seed, and op determinism forbids any other.
        tf.random.set_global_generator(tf.random.Generator.from_seed(1))
        yield


@functools.cache
def _operations() -> list[Operation]:
    """The ten operations of the policy: images (1, height, width, 3) in [0, 255] to the same."""
    import keras_cv

    layers, values, options = keras_cv.layers, (0, 255), _LAYER_OPTIONS
    with _making_layers():
        auto_contrast = layers.AutoContrast(values, **options)
        # A function of its own: the layer has an `if` on a tensor, which tf.data alone would not convert.
        equalize = tf.function(layers.Equalization(values, **options).augment_images)
        solarize = layers.Solarization(values, **options)
        color = layers.RandomColorDegeneration(1.0, **options)
        contrast = layers.RandomContrast(values, 1.0, **options)
        brightness = layers.RandomBrightness(1.0, values, **options)
        shear = layers.RandomShear(1.0, 1.0, **options)
        translate = layers.RandomTranslation(1.0, 1.0, **options)
    zero = np.zeros((1, 1), np.float32)

    def solarized(images: tf.Tensor, strength: _Strength) -> tf.Tensor:
        # Nothing above 110 is added: little but noise would be left.
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
    """(1, 1) -> (1, 1, 1, 1)."""
    return values[..., None, None]


@functools.cache
def _mixing_layers() -> dict[str, Any]:
    import keras_cv

    class MixUp(keras_cv.layers.MixUp):
        """With the partners and shares drawn from `seed_of_call`."""

        def _mixup(self, images: tf.Tensor) -> tuple[tf.Tensor, ...]:
            order_seed, share_seed = tf.unstack(tf.random.split(self.seed_of_call, 2))
            share = _beta(tf.shape(images)[0], self.alpha, share_seed)
            partners = _partners(images, order_seed)
            weight = tf.reshape(share, (-1, 1, 1, 1))
            return weight * images + (1.0 - weight) * tf.gather(images, partners), share, partners

    class CutMix(keras_cv.layers.CutMix):
        """With the partners and rectangles drawn from `seed_of_call`.

        An image keeps the share of its label that it keeps of its pixels. (keras-cv counts the part of a rectangle
        that sticks out of the image as if it were covered.)
        """

        def _cutmix(self, images: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
            order_seed, share_seed, place_seed = tf.unstack(tf.random.split(self.seed_of_call, 3))
            batch, height, width = tf.unstack(tf.shape(images)[:3])
            size = tf.cast(tf.stack([height, width]), tf.float32)
            side = tf.sqrt(1.0 - _beta(batch, self.alpha, share_seed))[:, None] * size
            centre = tf.floor(tf.random.stateless_uniform([batch, 2], place_seed) * size)
            low = tf.maximum(centre - tf.floor(side / 2.0), 0.0)[:, :, None]
            high = tf.minimum(centre + tf.floor((side + 1.0) / 2.0), size)[:, :, None]
            rows, columns = (tf.range(length, dtype=tf.float32)[None] for length in (size[0], size[1]))
            inside = ((rows >= low[:, 0]) & (rows < high[:, 0]))[:, :, None] & (
                (columns >= low[:, 1]) & (columns < high[:, 1])
            )[:, None, :]
            partners = _partners(images, order_seed)
            mixed = tf.where(inside[..., None], tf.gather(images, partners), images)
            kept = 1.0 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=(1, 2))
            return mixed, kept, partners, None, None, None, None  # the rest is for segmentation masks

    with _making_layers():
        return {
            "mixup": MixUp(_MIXUP_ALPHA, **_LAYER_OPTIONS),
            "cutmix": CutMix(_CUTMIX_ALPHA, **_LAYER_OPTIONS),
        }


def _partners(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_shuffle(tf.range(tf.shape(images)[0]), seed)


def _beta(count: tf.Tensor, alpha: float, seed: tf.Tensor) -> tf.Tensor:
    """(count,) draws from Beta(alpha, alpha)."""
    gamma = tf.random.stateless_gamma([count, 2], seed, alpha)
    # Of two draws that are both 0 within float32 neither is larger.
    return (gamma[:, 0] + 1e-30) / (tf.reduce_sum(gamma, axis=1) + 2e-30)
