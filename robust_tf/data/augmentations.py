"""The table of random transforms for training images, as TensorFlow graph functions.

The result of each function depends only on the image and on a seed of shape (2,). A resumed run therefore sees the same
images as one that was not interrupted, and the order of parallel calls does not matter.

To add an augmentation, write a function with the arguments of the others, give it a name in `AUGMENTATIONS`, and add
the name to the help of --augmentation in `robust_tf/config/data.py`.

Example:
    >>> import tensorflow as tf
    >>> from robust_tf.data import AUGMENTATIONS
    >>> from robust_tf.data.transforms import Picture
    >>> picture = Picture(tf.io.encode_png(tf.zeros((40, 50, 3), tf.uint8)))
    >>> image = AUGMENTATIONS["random_resized_crop"](picture, 32, tf.constant([0, 1]))
    >>> image.shape.as_list(), image.dtype.name
    ([32, 32, 3], 'float32')
"""

import math
from collections.abc import Callable

import tensorflow as tf

from robust_tf.data.transforms import Picture, evaluation_transform, resize

# Krizhevsky et al. 2012, section 4.1: principal components of ImageNet's RGB values.
_PCA_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_PCA_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_LIGHTING_STD = 0.05
_LUMA = (0.299, 0.587, 0.114)  # weights of ITU-R 601, as in Pillow
_CROP_DRAWS = 10
_WINDOW_DRAWS = 2 * _CROP_DRAWS + 2  # areas, aspect ratios and one position


def random_crop_window(height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns a random window with 8 % to 100 % of the image's area and an aspect ratio of 3/4 to 4/3.

    Draws ten windows and uses the first that fits into the image. If none fits, uses the central crop with the nearest
    allowed aspect ratio.

    Args:
        height: Height of the image in pixels, an integer scalar.
        width: Width of the image in pixels, an integer scalar.
        seed: Seed for the window, (2,) integers.

    Returns:
        Top, left, height and width of the window, int32 scalars.

    Source: Szegedy et al. 2015, arXiv 1409.4842, as in torchvision's RandomResizedCrop.
    """
    return _crop_window(height, width, tf.random.stateless_uniform([_WINDOW_DRAWS], seed))


def _crop_window(height: tf.Tensor, width: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Returns the window for uniform random numbers in [0, 1) of shape (_WINDOW_DRAWS,)."""
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    low, high = 3.0 / 4.0, 4.0 / 3.0
    area_draws, ratio_draws, place_draws = tf.split(draws, [_CROP_DRAWS, _CROP_DRAWS, 2])
    area = height * width * (0.08 + (1.0 - 0.08) * area_draws)
    ratio = tf.exp(math.log(low) + (math.log(high) - math.log(low)) * ratio_draws)
    # The central crop, which always fits, is appended as the eleventh window.
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
    # Reverses axis 1, or no axis. `tf.cond` would take longer than the reversal.
    return tf.reverse(image, tf.range(1, 1 + tf.cast(flip, tf.int32)))


def _random_resized_crop(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    # Draws all numbers in one call, because every operation costs some microseconds per image.
    draws = tf.random.stateless_uniform([_WINDOW_DRAWS + 1], seed)
    window = _crop_window(picture.height, picture.width, draws[:-1])
    size = tf.constant(image_size)
    return _flipped_if(resize(picture.crop(*window), size, size), draws[-1] < 0.5)


def _blend(image: tf.Tensor, other: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(factor * image + (1.0 - factor) * other, 0.0, 1.0)


def _gray(image: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(image * tf.constant(_LUMA), axis=-1, keepdims=True)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, *, strength: float) -> tf.Tensor:
    """Changes brightness, contrast and saturation in random order, each by a random factor in 1 +- strength."""
    factor_seed, order_seed = tf.unstack(tf.random.split(seed, 2))
    factors = tf.random.stateless_uniform([3], factor_seed, 1.0 - strength, 1.0 + strength)
    order = tf.random.experimental.stateless_shuffle(tf.range(3), order_seed)
    for position in range(3):
        # Binds `image` as a default value, because the loop reassigns the variable.
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
    """Adds a random multiple of the principal components of ImageNet's colors, and clips the result to [0, 1]."""
    weights = tf.random.stateless_normal([3], seed, stddev=_LIGHTING_STD) * tf.constant(_PCA_EIGENVALUES)
    return tf.clip_by_value(image + tf.linalg.matvec(tf.constant(_PCA_EIGENVECTORS), weights), 0.0, 1.0)


def _imagenet(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    crop_seed, jitter_seed, lighting_seed = tf.unstack(tf.random.split(seed, 3))
    image = _random_resized_crop(picture, image_size, crop_seed)
    return _lighting(color_jitter(image, jitter_seed, strength=0.1), lighting_seed)


def _shift(picture: Picture, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    """Shifts the image by up to an eighth of its side (4 of 32 pixels, as usual for CIFAR) and fills with black."""
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


# Each function takes the picture, the image size in pixels and a seed of shape (2,), and returns an image of shape
# (image_size, image_size, 3), float32 in [0, 1].
AUGMENTATIONS: dict[str, Callable[[Picture, int, tf.Tensor], tf.Tensor]] = {
    "none": _none,
    "shift": _shift,
    "shift_flip": _shift_flip,
    "random_resized_crop": _random_resized_crop,  # transfer, as in Salman et al. 2020
    "imagenet": _imagenet,  # pretraining, as in Salman et al. 2020: adds color jitter and lighting
}
