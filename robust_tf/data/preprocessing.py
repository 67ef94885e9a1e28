"""What the flags of a job make of an encoded image, for training and for evaluation."""

import dataclasses

import tensorflow as tf

from robust_tf.data.augmentations import AUGMENTATIONS
from robust_tf.data.keras_cv_layers import rand_augment
from robust_tf.data.transforms import DecodedPicture, Picture, decode, downscale, evaluation_transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an encoded image becomes pixels.

    Attributes:
        image_size: side of the result in pixels.
        resize_size: what the shorter side is resized to in evaluation, before the centre crop.
        augmentation: key of AUGMENTATIONS, for training.
        rand_augment: magnitude in (0, 1] of RandAugment on top, 0 for none.
        downscale: what the shorter side is resized to before everything else; None leaves it.
    """

    image_size: int
    resize_size: int
    augmentation: str
    rand_augment: float = 0.0
    downscale: int | None = None

    def for_evaluation(self, encoded: tf.Tensor) -> tf.Tensor:
        """Bytes -> (image_size, image_size, 3) float32 in [0, 1]."""
        image = decode(encoded)
        if self.downscale is not None:
            image = downscale(image, self.downscale)
        return evaluation_transform(image, image_size=self.image_size, resize_size=self.resize_size)

    def for_training(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Bytes -> (image_size, image_size, 3) float32 in [0, 1], augmented as `seed` (2,) decides."""
        size = self.image_size
        if self.downscale is None:
            picture = Picture(encoded)
        else:
            picture = DecodedPicture(downscale(decode(encoded), self.downscale))
        crop_seed = tf.random.experimental.stateless_fold_in(seed, 0) if self.rand_augment else seed
        image = tf.ensure_shape(AUGMENTATIONS[self.augmentation](picture, size, crop_seed), (size, size, 3))
        if self.rand_augment:
            policy_seed = tf.random.experimental.stateless_fold_in(seed, 1)
            image = rand_augment(image, policy_seed, magnitude=self.rand_augment)
        return image
