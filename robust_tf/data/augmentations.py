"""Random transforms of training, as TensorFlow graph functions.

Every one takes a seed of shape (2,) and nothing else decides its result, so that a run that is resumed sees the images
of the run that was interrupted, in whatever order parallel calls end.
"""

import math
from collections.abc import Callable

import tensorflow as tf

from robust_tf.data.transforms import Picture, evaluation_transform, resize

# Krizhevsky et al. 2012, section 4.1: principal components of ImageNet's RGB values.
_PCA_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_PCA_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_LIGHTING_STD = 0.05
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow
_CROP_DRAWS = 10
_WINDOW_DRAWS = 2 * _CROP_DRAWS + 2  # areas, ratios, place


def random_crop_window(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Top, left, height and width (int32 scalars) of a random crop: 8-100 % of the area, ratio 3/4 to 4/3.

    The first of ten draws that fits is taken; when none does, the central crop of the nearest allowed ratio.
    Source: Szegedy et al. 2015, as in torchvision's RandomResizedCrop.
    """
    return _crop_window(height, width, tf.random.stateless_uniform([_WINDOW_DRAWS], seed))


def _crop_window(height: tf.Tensor, width: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The window that uniform random numbers (_WINDOW_DRAWS,) in [0, 1) stand for."""
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    low, high = 3.0 / 4.0, 4.0 / 3.0
    area_draws, ratio_draws, place_draws = tf.split(draws, [_CROP_DRAWS, _CROP_DRAWS, 2])
    area = height * width * (0.08 + (1.0 - 0.08) * area_draws)
    ratio = tf.exp(math.log(low) + (math.log(high) - math.log(low)) * ratio_draws)
    # The central crop is appended as the eleventh draw, which always fits.
    image_ratio = width / height
    widths = tf.concat([tf.round(tf.sqrt(area * ratio)), [tf.minimum(width, tf.round(height * high))]], 0)
    heights = tf.concat(
        [tf.round(tf.sqrt(area / ratio)), [tf.where(image_ratio < low, tf.round(width / low), height)]], 0
    )
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    fits = tf.concat([fits[:_CROP_DRAWS], [True]], 0)
    draw = tf.argmax(tf.cast(fits, tf.int32))
    crop = tf.maximum(tf.stack([heights[draw], widths[draw]]), 1.0)
    room = tf.stack([height, width]) - crop
    offset = tf.floor(place_draws * (room + 1.0))
    offset = tf.where(draw == _CROP_DRAWS, tf.floor(room / 2.0), tf.minimum(offset, room))
    return tuple(tf.unstack(tf.cast(tf.concat([offset, crop], 0), tf.int32)))


def _flipped_if(image: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    # Along axis 1, or along none. A `cond` would take longer than the work.
    return tf.reverse(image, tf.range(1, 1 + tf.cast(flip, tf.int32)))


def _random_resized_crop(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    # All numbers in one call: every operation costs some microseconds for each image.
    draws = tf.random.stateless_uniform([_WINDOW_DRAWS + 1], seed)
    window = _crop_window(picture.height, picture.width, draws[:-1])
    size = tf.constant(image_size)
    return _flipped_if(resize(picture.crop(*window), size, size), draws[-1] < 0.5)


def _blend(image: tf.Tensor, other: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(factor * image + (1.0 - factor) * other, 0.0, 1.0)


def _gray(image: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(image * tf.constant(_LUMA), axis=-1, keepdims=True)


def _color_jitter(image: tf.Tensor, seed: tf.Tensor, *, strength: float) -> tf.Tensor:
    """Brightness, contrast and saturation by a factor in 1 +- strength each, in random order."""
    factor_seed, order_seed = tf.unstack(tf.random.split(seed, 2))
    factors = tf.random.stateless_uniform([3], factor_seed, 1.0 - strength, 1.0 + strength)
    order = tf.random.experimental.stateless_shuffle(tf.range(3), order_seed)
    for position in range(3):
        # The loop variable is bound as a default: switch_case calls the branches within this iteration only.
        image = tf.switch_case(
            order[position],
            [
                lambda image=image: _blend(image, tf.zeros_like(image), factors[0]),
                lambda image=image: _blend(image, tf.reduce_mean(_gray(image)), factors[1]),
                lambda image=image: _blend(image, _gray(image), factors[2]),
            ],
        )
    return image


def _lighting(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Adds a random multiple of the principal color components; the result may leave [0, 1], so it is clipped."""
    weights = tf.random.stateless_normal([3], seed, stddev=_LIGHTING_STD) * tf.constant(_PCA_EIGENVALUES)
    return tf.clip_by_value(image + tf.linalg.matvec(tf.constant(_PCA_EIGENVECTORS), weights), 0.0, 1.0)


def _imagenet(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    crop_seed, jitter_seed, lighting_seed = tf.unstack(tf.random.split(seed, 3))
    image = _random_resized_crop(picture, image_size, crop_seed)
    return _lighting(_color_jitter(image, jitter_seed, strength=0.1), lighting_seed)


def _shift(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    """Up to an eighth of the side in any direction, the gap filled with black (4 pixels of 32, as usual for CIFAR)."""
    margin = image_size // 8
    image = evaluation_transform(picture.whole(), image_size=image_size, resize_size=image_size)
    padded = tf.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    return tf.image.stateless_random_crop(padded, (image_size, image_size, 3), seed)


def _shift_flip(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    shift_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    flip = tf.random.stateless_uniform([], flip_seed) < 0.5
    return _flipped_if(_shift(picture, image_size, shift_seed), flip)


def _none(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    del seed
    return evaluation_transform(picture.whole(), image_size=image_size, resize_size=image_size)


# (picture, image_size, seed (2,)) -> (image_size, image_size, 3) float32 in [0, 1]
AUGMENTATIONS: dict[str, Callable[[Picture, int, tf.Tensor], tf.Tensor]] = {
    "none": _none,
    "shift": _shift,
    "shift_flip": _shift_flip,
    "random_resized_crop": _random_resized_crop,  # the reference's transfer
    "imagenet": _imagenet,  # the reference's pretraining: color jitter and lighting on top
}
