"""The complete transform from an encoded image and its boxes to a training or evaluation example."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from robust_tf.data.boxes.geometry import View, check_transform, evaluation_view, random_view
from robust_tf.data.boxes.records import decode_boxes
from robust_tf.data.transforms import AS_STORED, Decoding, decode
from robust_tf.errors import UserError

# A box is dropped if less than this share of its area is left within a random crop: what is left often shows too
# little of the object to recognize it.
SMALLEST_SHARE = 0.3

TOO_MANY_BOXES = "An image has more boxes than most_boxes, which is"

EncodeBoxes = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Any]


def plain_labels(boxes: tf.Tensor, classes: tf.Tensor, crowd: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns boxes as they are, as a dictionary. It is the default of `BoxPreprocessing.encode_boxes`.

    Args:
        boxes: (boxes, 4) float32 [top, left, bottom, right] in pixels of the square.
        classes: (boxes,) int32.
        crowd: (boxes,) bool.
    """
    return {"boxes": boxes, "classes": classes, "crowd": crowd}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxPreprocessing:
    """The transforms that turn an encoded image and its boxes into an example for detection.

    The image is scaled by image_size / longer side, which keeps its aspect ratio, and lies in the upper left corner of
    a square. The rest of the square is gray (0.5). The boxes follow exactly. They refer to the image as `decoding`
    gives it.

    Attributes:
        image_size: Height and width of the square, in pixels.
        augmentation: Random transform for training: "none", "flip" (mirrors half of the images), "crop_flip" (also
            multiplies the scale by 0.5 to 2 and shows a random part of what is then larger than the square), or
            "crop_flip_color" (also changes brightness, contrast and saturation by up to 30 %).
        encode_boxes: Function from boxes (n, 4) float32 [top, left, bottom, right] in pixels of the square, classes
            (n,) int32 and crowd (n,) bool to the labels of the example.
        most_boxes: Number of boxes to which `measured_example` fills up the boxes of every image.
        decoding: Treatment of EXIF rotation and transparency.

    Raises:
        UserError: If `image_size` or `most_boxes` is not positive, or the augmentation is unknown.

    Example:
        >>> import numpy as np
        >>> import tensorflow as tf
        >>> from robust_tf.data.boxes import BoxPreprocessing
        >>> encoded = tf.io.encode_png(tf.zeros((40, 80, 3), tf.uint8))
        >>> label = np.array([[10, 20, 30, 60, 2, 0]], "<f4").tobytes()
        >>> image, labels = BoxPreprocessing(image_size=32).evaluation_example(encoded, tf.constant(label))
        >>> image.shape.as_list(), labels["boxes"].numpy().tolist()
        ([32, 32, 3], [[4.0, 8.0, 12.0, 24.0]])
    """

    image_size: int
    augmentation: str = "none"
    encode_boxes: EncodeBoxes = plain_labels
    most_boxes: int = 100
    decoding: Decoding = AS_STORED

    def __post_init__(self) -> None:
        check_transform(self.image_size, self.augmentation)
        if self.most_boxes < 1:
            raise UserError(f"most_boxes must be 1 or more. Received: most_boxes={self.most_boxes}.")

    @property
    def resize_size(self) -> int:
        """Length to which evaluation resizes the longer side, in pixels: the image size."""
        return self.image_size

    def training_example(self, encoded: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns a randomly augmented example. Everything random depends on the seed alone.

        A box is cut off at the edge of the square, and dropped if less than 30 % of its area is left. A crowd box is
        dropped only if nothing is left.

        Args:
            encoded: Encoded image, a scalar string.
            label: Label of the record, a scalar string, see `decode_boxes`.
            seed: Seed for the augmentation, (2,) integers.

        Returns:
            The image, (image_size, image_size, 3) float32 in [0, 1], and the result of `encode_boxes`.
        """
        image = decode(encoded, self.decoding)
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        view, jitter_seed = random_view(
            height, width, seed, image_size=self.image_size, augmentation=self.augmentation, keep_aspect=True
        )
        boxes, classes, crowd = decode_boxes(label)
        boxes = view.boxes(boxes, tf.cast(width, tf.float32))
        clipped = tf.clip_by_value(boxes, 0.0, float(self.image_size))
        share = _area(clipped) / tf.maximum(_area(boxes), 1e-9)
        # Rounding may leave a box at the edge with a sliver of no width.
        kept = (share > 0.0) & (crowd | (share >= SMALLEST_SHARE))
        labels = self.encode_boxes(*(tf.boolean_mask(values, kept) for values in (clipped, classes, crowd)))
        return view.image(image, self.image_size, jitter_seed), labels

    def evaluation_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns an example with the whole image and the labels that a loss needs.

        Args:
            encoded: Encoded image, a scalar string.
            label: Label of the record, a scalar string, see `decode_boxes`.

        Returns:
            The image, (image_size, image_size, 3) float32 in [0, 1], and the result of `encode_boxes`.
        """
        image, view = self._whole(encoded)
        boxes, classes, crowd = decode_boxes(label)
        boxes = view.boxes(boxes, tf.cast(tf.shape(image)[1], tf.float32))
        return view.image(image, self.image_size), self.encode_boxes(boxes, classes, crowd)

    def measured_example(self, encoded: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Returns an example with the whole image and the boxes against which detections are measured.

        Fails with an `InvalidArgumentError` that begins with `TOO_MANY_BOXES` if an image has more than `most_boxes`.

        Args:
            encoded: Encoded image, a scalar string.
            label: Label of the record, a scalar string, see `decode_boxes`.

        Returns:
            The image, (image_size, image_size, 3) float32 in [0, 1], and a dictionary: `boxes`, (most_boxes, 4)
            float32 [top, left, bottom, right] in pixels of the original image, `classes`, (most_boxes,) int32, -1 for
            rows that fill up, `crowd`, (most_boxes,) bool, and `scale`, a float32 scalar: pixels of the square per
            pixel of the original image.
        """
        image, view = self._whole(encoded)
        boxes, classes, crowd = decode_boxes(label)
        missing = self.most_boxes - tf.shape(classes)[0]
        message = f"{TOO_MANY_BOXES} {self.most_boxes}."
        with tf.control_dependencies([tf.debugging.Assert(missing >= 0, [message])]):
            missing = tf.identity(missing)
        truth = {
            "boxes": tf.ensure_shape(tf.pad(boxes, ((0, missing), (0, 0))), (self.most_boxes, 4)),
            "classes": tf.ensure_shape(tf.pad(classes, ((0, missing),), constant_values=-1), (self.most_boxes,)),
            "crowd": tf.ensure_shape(tf.pad(crowd, ((0, missing),)), (self.most_boxes,)),
            "scale": view.scale[0],
        }
        return view.image(image, self.image_size), truth

    def _whole(self, encoded: tf.Tensor) -> tuple[tf.Tensor, View]:
        image = decode(encoded, self.decoding)
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        return image, evaluation_view(height, width, image_size=self.image_size, keep_aspect=True)


def _area(boxes: tf.Tensor) -> tf.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
