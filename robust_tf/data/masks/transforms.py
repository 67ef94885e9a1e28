"""The complete transform from an encoded image and its mask to a training or evaluation example."""

import dataclasses

import tensorflow as tf

from robust_tf.data.boxes.geometry import check_transform, evaluation_view, random_view
from robust_tf.data.masks.mask_files import IGNORED, decode_mask
from robust_tf.data.transforms import AS_STORED, Decoding, decode

SIZES_DIFFER = "A mask must have the size of its image, height and width in pixels. Received:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPreprocessing:
    """The transforms that turn an encoded image and its mask into an example for segmentation.

    Image and mask are resized to a square without keeping the aspect ratio. A pixel of the mask takes the class of the
    pixel in which its center lies. Parts of the square that the image does not cover, which occur in training only,
    are gray (0.5) and ignored. The mask refers to the image as `decoding` gives it.

    Attributes:
        image_size: Height and width of the square, in pixels.
        augmentation: Random transform for training: "none", "flip" (mirrors half of the images), "crop_flip" (also
            multiplies the scale by 0.5 to 2 and shows a random part of what is then larger than the square), or
            "crop_flip_color" (also changes brightness, contrast and saturation by up to 30 %).
        decoding: Treatment of EXIF rotation and transparency.

    Raises:
        UserError: If `image_size` is not positive, or the augmentation is unknown.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.data.masks import MaskPreprocessing
        >>> encoded = tf.io.encode_png(tf.zeros((40, 80, 3), tf.uint8))
        >>> label = tf.io.encode_png(tf.ones((40, 80, 1), tf.uint8))
        >>> image, mask = MaskPreprocessing(image_size=2).evaluation_example(encoded, label)
        >>> image.shape.as_list(), mask.numpy().tolist()
        ([2, 2, 3], [[1, 1], [1, 1]])
    """

    image_size: int
    augmentation: str = "none"
    decoding: Decoding = AS_STORED

    def __post_init__(self) -> None:
        check_transform(self.image_size, self.augmentation)

    @property
    def resize_size(self) -> int:
        """Length to which evaluation resizes both sides, in pixels: the image size."""
        return self.image_size

    def training_example(self, encoded: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns a randomly augmented example. Everything random depends on the seed alone.

        Args:
            encoded: Encoded image, a scalar string.
            label: Label of the record, a scalar string, see `decode_mask`.
            seed: Seed for the augmentation, (2,) integers.

        Returns:
            The image, (image_size, image_size, 3) float32 in [0, 1], and the mask, (image_size, image_size) int32, -1
            for ignored pixels.
        """
        image, mask = self._decoded(encoded, label)
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        view, jitter_seed = random_view(
            height, width, seed, image_size=self.image_size, augmentation=self.augmentation, keep_aspect=False
        )
        return view.image(image, self.image_size, jitter_seed), view.mask(mask, self.image_size, IGNORED)

    def evaluation_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns an example with the whole image.

        Args:
            encoded: Encoded image, a scalar string.
            label: Label of the record, a scalar string, see `decode_mask`.

        Returns:
            The image, (image_size, image_size, 3) float32 in [0, 1], and the mask, (image_size, image_size) int32, -1
            for ignored pixels.
        """
        image, mask = self._decoded(encoded, label)
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        view = evaluation_view(height, width, image_size=self.image_size, keep_aspect=False)
        return view.image(image, self.image_size), view.mask(mask, self.image_size, IGNORED)

    def measured_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the same as `evaluation_example`: the mask is also the truth against which mIoU is measured."""
        return self.evaluation_example(encoded, label)

    def _decoded(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, mask = decode(encoded, self.decoding), decode_mask(label)
        sizes = tf.shape(image)[:2], tf.shape(mask)
        same = tf.debugging.Assert(tf.reduce_all(sizes[0] == sizes[1]), [SIZES_DIFFER, sizes[1], "and", sizes[0]])
        with tf.control_dependencies([same]):
            return image, tf.identity(mask)
