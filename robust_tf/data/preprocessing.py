"""What the flags of a job make of an encoded image, for training and for evaluation."""

import dataclasses

import tensorflow as tf

from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.data.keras_cv_layers import rand_augment
from robust_tf.data.transforms import (
    AS_STORED,
    DecodedPicture,
    Decoding,
    Picture,
    decode,
    decode_floats,
    downscale,
    evaluation_transform,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an encoded image becomes pixels.

    Attributes:
        image_size: side of the result in pixels.
        resize_size: what the shorter side is resized to in evaluation, before the center crop.
        augmentation: key of AUGMENTATIONS, for training.
        rand_augment: magnitude in (0, 1] of RandAugment on top, 0 for none.
        downscale: what the shorter side is resized to before everything else; None leaves it.
        decoding: what counts of an encoded image besides its colors.
        highest_float: the images are float32 in [0, highest_float], as TFDS stores them; None for all others.
    """

    image_size: int
    resize_size: int
    augmentation: str
    rand_augment: float = 0.0
    downscale: int | None = None
    decoding: Decoding = AS_STORED
    highest_float: float | None = None

    def for_evaluation(self, encoded: tf.Tensor) -> tf.Tensor:
        """Bytes -> (image_size, image_size, 3) float32 in [0, 1]."""
        return evaluation_transform(self._pixels(encoded), image_size=self.image_size, resize_size=self.resize_size)

    def for_training(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Bytes -> (image_size, image_size, 3) float32 in [0, 1], augmented as `seed` (2,) decides."""
        size = self.image_size
        if self.downscale is None and self.highest_float is None and self.decoding.exif == "ignore":
            picture = Picture(encoded, self.decoding.background)
        else:
            picture = DecodedPicture(self._pixels(encoded))
        crop_seed = tf.random.experimental.stateless_fold_in(seed, 0) if self.rand_augment else seed
        image = tf.ensure_shape(AUGMENTATIONS[self.augmentation](picture, size, crop_seed), (size, size, 3))
        if self.rand_augment:
            policy_seed = tf.random.experimental.stateless_fold_in(seed, 1)
            image = rand_augment(image, policy_seed, magnitude=self.rand_augment)
        return image

    def _pixels(self, encoded: tf.Tensor) -> tf.Tensor:
        """The whole image, (height, width, 3), uint8 or float32 in the same range."""
        if self.highest_float is None:
            image = decode(encoded, self.decoding)
        else:
            image = decode_floats(encoded, self.highest_float)
        return image if self.downscale is None else downscale(image, self.downscale)
