"""Random views of an image for detection and segmentation: an exact map from its pixels to a square of fixed size.

A view scales and shifts an image. Annotations follow by the same numbers, without rounding, so that they stay on the
pixels that they belong to.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from robust_tf.data.augmentations import color_jitter
from robust_tf.errors import UserError, unknown_name

# Names of the augmentations, from the weakest to the strongest.
AUGMENTATION_NAMES = ("none", "flip", "crop_flip", "crop_flip_color")
# Value of the pixels of the square that the image does not cover.
GRAY = 0.5
# Range of the factor by which the size of an image is changed at random, as in the training of RetinaNet in torchvision
# and EfficientDet, whose ranges begin at 0.1. Small images need smaller changes.
_SCALE_RANGE = (0.5, 2.0)
_JITTER_STRENGTH = 0.3


class View(NamedTuple):
    """A map from the pixels of an image to those of a square: first mirrored, then scaled, then shifted.

    Attributes:
        scale: Pixels of the square per pixel of the image, (2,) float32: vertical, horizontal.
        shift: Position of the upper left corner of the image in the square, (2,) float32: top, left. It is negative if
            the corner is cut off.
        flip: Whether the image is mirrored horizontally, a bool scalar.
    """

    scale: tf.Tensor
    shift: tf.Tensor
    flip: tf.Tensor

    def boxes(self, boxes: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        """Returns boxes in the pixels of the square. They may reach beyond it.

        Args:
            boxes: Boxes in the pixels of the image, (boxes, 4) float32 [top, left, bottom, right].
            width: Width of the image in pixels, a float32 scalar.
        """
        top, left, bottom, right = tf.unstack(boxes, axis=1)
        left, right = tf.where(self.flip, width - right, left), tf.where(self.flip, width - left, right)
        edges = tf.stack([top, left, bottom, right], axis=1)
        return edges * tf.tile(self.scale, [2]) + tf.tile(self.shift, [2])

    def image(self, image: tf.Tensor, image_size: int, jitter_seed: tf.Tensor | None = None) -> tf.Tensor:
        """Returns the square, antialiased as in `robust_tf.data.transforms.resize`. The rest of it is gray.

        Args:
            image: (height, width, 3) uint8.
            image_size: Side of the square, in pixels.
            jitter_seed: Seed for changes of brightness, contrast and saturation, (2,) integers. None changes nothing.

        Returns:
            (image_size, image_size, 3) float32 in [0, 1].
        """
        image = tf.reverse(image, tf.range(1, 1 + tf.cast(self.flip, tf.int32)))
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        rows = _scaled_axis(tf.reshape(image, (height, width * 3)), self.scale[0], self.shift[0], image_size)
        columns = tf.reshape(tf.transpose(tf.reshape(rows, (image_size, width, 3)), (1, 0, 2)), (width, image_size * 3))
        square = _scaled_axis(columns, self.scale[1], self.shift[1], image_size)
        square = tf.transpose(tf.reshape(square, (image_size, image_size, 3)), (1, 0, 2))
        square = tf.clip_by_value(square * (1.0 / 255.0), 0.0, 1.0)  # rounding may give slightly more
        if jitter_seed is not None:
            square = color_jitter(square, jitter_seed, strength=_JITTER_STRENGTH)
        # The same operation on ones tells which rows and columns it has filled.
        covered = [
            _scaled_axis(tf.ones((length, 1)), scale, shift, image_size)[:, 0] > 0.5
            for length, scale, shift in zip(
                (height, width), tf.unstack(self.scale), tf.unstack(self.shift), strict=True
            )
        ]
        inside = covered[0][:, None, None] & covered[1][None, :, None]
        return tf.ensure_shape(tf.where(inside, square, GRAY), (image_size, image_size, 3))

    def mask(self, mask: tf.Tensor, image_size: int, outside: int) -> tf.Tensor:
        """Returns the square of a mask. Each pixel has the value of the pixel of the mask in which its center lies.

        Args:
            mask: (height, width) int32.
            image_size: Side of the square, in pixels.
            outside: Value of the pixels that the mask does not cover.

        Returns:
            (image_size, image_size) int32.
        """
        mask = tf.reverse(mask, tf.range(1, 1 + tf.cast(self.flip, tf.int32)))
        for axis in (0, 1):
            length = tf.shape(mask)[axis]
            centers = (tf.range(image_size, dtype=tf.float32) + 0.5 - self.shift[axis]) / self.scale[axis]
            positions = tf.cast(tf.floor(centers), tf.int32)
            inside = (positions >= 0) & (positions < length)
            mask = tf.gather(mask, tf.clip_by_value(positions, 0, length - 1), axis=axis)
            mask = tf.where(tf.expand_dims(inside, 1 - axis), mask, outside)
        return tf.ensure_shape(mask, (image_size, image_size))


def _scaled_axis(values: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor, size: int) -> tf.Tensor:
    """Scales and shifts the first axis of (length, others) and returns (size, others) float32, 0 where it is empty."""
    shape = tf.shape(values)
    # The arguments follow `robust_tf.data.transforms`: one axis at a time, as the first axis of an image of width 1.
    scaled = tf.raw_ops.ScaleAndTranslate(
        images=tf.reshape(values, (1, shape[0], 1, shape[1])),
        size=[size, 1],
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([shift, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )
    return tf.reshape(scaled, (size, shape[1]))


def random_view(
    height: tf.Tensor, width: tf.Tensor, seed: tf.Tensor, *, image_size: int, augmentation: str, keep_aspect: bool
) -> tuple[View, tf.Tensor | None]:
    """Returns a random view of an image for training.

    * "none" is the view of evaluation.
    * "flip" mirrors half of the images.
    * "crop_flip" also multiplies the scale by a random factor from 0.5 to 2, where halving is as likely as doubling. Of
      an image that is then larger than the square, it shows a random part; a smaller one lies in the upper left corner.
    * "crop_flip_color" also changes brightness, contrast and saturation by up to 30 %.

    Args:
        height: Height of the image in pixels, an int32 scalar.
        width: Width of the image in pixels, an int32 scalar.
        seed: Seed for the view, (2,) integers.
        image_size: Side of the square, in pixels.
        augmentation: One of `AUGMENTATION_NAMES`.
        keep_aspect: Whether the aspect ratio is kept. If not, the image without augmentation fills the square.

    Returns:
        The view, and the seed of the color changes for `View.image`, or None if there are none.
    """
    view = evaluation_view(height, width, image_size=image_size, keep_aspect=keep_aspect)
    if augmentation == "none":
        return view, None
    # Two seeds, so that the color changes do not depend on the geometry.
    geometry_seed, jitter_seed = tf.unstack(tf.random.split(seed, 2))
    draws = tf.random.stateless_uniform([4], geometry_seed)
    flip = draws[0] < 0.5
    if augmentation == "flip":
        return view._replace(flip=flip), None
    low, high = map(math.log, _SCALE_RANGE)
    scale = view.scale * tf.exp(low + (high - low) * draws[1])
    excess = tf.cast(tf.stack([height, width]), tf.float32) * scale - float(image_size)
    shift = -tf.maximum(excess, 0.0) * draws[2:]
    return View(scale, shift, flip), jitter_seed if augmentation == "crop_flip_color" else None


def evaluation_view(height: tf.Tensor, width: tf.Tensor, *, image_size: int, keep_aspect: bool) -> View:
    """Returns the view of an image in evaluation, which shows all of it.

    Args:
        height: Height of the image in pixels, an int32 scalar.
        width: Width of the image in pixels, an int32 scalar.
        image_size: Side of the square, in pixels.
        keep_aspect: Whether to scale both axes by image_size / longer side. If not, the image fills the square.
    """
    sides = tf.cast(tf.stack([height, width]), tf.float32)
    scale = float(image_size) / (tf.fill([2], tf.reduce_max(sides)) if keep_aspect else sides)
    return View(scale, tf.zeros(2), tf.constant(False))


def check_transform(image_size: Any, augmentation: str, names: Iterable[str] = AUGMENTATION_NAMES) -> None:
    """Refuses an image size that is no positive integer, and an unknown augmentation.

    Args:
        image_size: Side of the square, in pixels.
        augmentation: Name of the augmentation.
        names: Valid names.
    """
    if not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"image_size must be a positive integer, in pixels. Received: image_size={image_size!r}.")
    if augmentation not in names:
        raise unknown_name("augmentation", augmentation, names)
