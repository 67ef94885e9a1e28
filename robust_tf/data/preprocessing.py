"""The complete transform from an encoded image to the pixels of a batch, for training and for evaluation."""

import dataclasses
from typing import Any, Protocol

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


class ExamplePreprocessing(Protocol):
    """What `TaskData` needs of the transforms of a task: of `Preprocessing` here, or of those for boxes and masks."""

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""

    @property
    def resize_size(self) -> int:
        """Length to which evaluation resizes the shorter side, in pixels."""

    @property
    def augmentation(self) -> str:
        """Name of the augmentation of the training images."""

    def training_example(self, encoded: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the pixels of a training image and its labels as the loss takes them."""

    def evaluation_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the pixels of an image for evaluation and its labels as the loss takes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The transforms that turn an encoded image into pixels.

    Attributes:
        image_size: Height and width of the result, in pixels.
        resize_size: Length to which evaluation resizes the shorter side before the center crop, in pixels.
        augmentation: Key of `AUGMENTATIONS` for training.
        rand_augment: Magnitude in (0, 1] of RandAugment, applied after the augmentation. 0 turns it off.
        downscale: Length to which the shorter side is reduced before anything else, in pixels. None turns it off.
        decoding: Treatment of EXIF rotation and transparency.
        highest_float: Upper end of the range [0, highest_float] if TFDS stores the images as float32. None for all
            other images.
    """

    image_size: int
    resize_size: int
    augmentation: str
    rand_augment: float = 0.0
    downscale: int | None = None
    decoding: Decoding = AS_STORED
    highest_float: float | None = None

    def for_evaluation(self, encoded: tf.Tensor) -> tf.Tensor:
        """Returns the pixels of an encoded image for evaluation.

        Args:
            encoded: Encoded image, a scalar string.

        Returns:
            (image_size, image_size, 3) float32 in [0, 1].
        """
        return evaluation_transform(self._pixels(encoded), image_size=self.image_size, resize_size=self.resize_size)

    def for_training(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns the randomly augmented pixels of an encoded image for training.

        Args:
            encoded: Encoded image, a scalar string.
            seed: Seed for the augmentation, (2,) integers.

        Returns:
            (image_size, image_size, 3) float32 in [0, 1].
        """
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

    def training_example(self, encoded: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the randomly augmented pixels of an image and its label."""
        return self.for_training(encoded, seed), label

    def evaluation_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the pixels of an image for evaluation and its label."""
        return self.for_evaluation(encoded), label

    def _pixels(self, encoded: tf.Tensor) -> tf.Tensor:
        """Returns the whole image, (height, width, 3) uint8, or float32 in [0, 255]."""
        if self.highest_float is None:
            image = decode(encoded, self.decoding)
        else:
            image = decode_floats(encoded, self.highest_float)
        return image if self.downscale is None else downscale(image, self.downscale)
