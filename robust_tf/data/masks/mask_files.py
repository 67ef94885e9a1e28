"""Reads masks, whose pixels are class numbers. TensorFlow's decoder would turn the numbers of a palette into colors."""

import io

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

from robust_tf.errors import UserError

# Value of an ignored pixel in a file, and in the labels of an example.
IGNORED_IN_FILE = 255
IGNORED = -1
MOST_CLASSES = 255

# Pillow's names of images with one number for each pixel: gray with 1, 8 and 16 bits, and a palette.
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def read_mask(content: bytes, where: str) -> np.ndarray:
    """Returns the pixels of a mask.

    Args:
        content: Encoded PNG.
        where: Name of the mask, for messages.

    Returns:
        (height, width) int32.

    Raises:
        UserError: If the mask is no PNG that can be read, or has colors instead of class numbers.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise UserError(
                    "The pixels of a mask must be class numbers: a gray PNG, or one with a palette. Received: "
                    f"{image.mode} for {where}. Replace each color by the number of its class, and save the mask as a "
                    "gray PNG."
                )
            return np.asarray(image).astype(np.int32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        reason = "not a PNG" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"A mask must be a PNG file that can be read. Received: {where} ({reason}). Convert or repair it."
        ) from error


def check_values(mask: np.ndarray, num_classes: int, where: str) -> None:
    """Refuses a mask with a value that is neither a class nor 255, which stands for ignored pixels.

    Args:
        mask: (height, width) int32.
        num_classes: Number of classes.
        where: Name of the mask, for the message.
    """
    wrong = mask[((mask >= num_classes) | (mask < 0)) & (mask != IGNORED_IN_FILE)]
    if wrong.size:
        raise UserError(
            f"The pixels of a mask must be 0 to {num_classes - 1}, the numbers of the classes, or 255 for ignored "
            f"pixels. Received: {int(wrong.max())} in {where}. Correct the mask, or list all classes in classes.txt."
        )


def check_size(mask: np.ndarray, height: int, width: int, where: str) -> None:
    """Refuses a mask that does not have the size of its image.

    Args:
        mask: (height, width) int32.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        where: Name of the mask, for the message.
    """
    if mask.shape != (height, width):
        raise UserError(
            "A mask must have the size of its image. Received: "
            f"{mask.shape[1]}x{mask.shape[0]} pixels (width x height) for {where}, whose image has {width}x{height}. "
            "Correct the mask."
        )


def to_bytes(content: bytes | np.ndarray) -> bytes:
    """Returns the argument of a function under `tf.numpy_function`, which is an array outside of graphs, as bytes."""
    return bytes(np.asarray(content, object).item())


def decode_mask(label: tf.Tensor) -> tf.Tensor:
    """Returns the mask of a label. It can run within a graph of `tf.data`.

    Args:
        label: Label of a record, a scalar string.

    Returns:
        (height, width) int32. The values are classes, and -1 for ignored pixels.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.data.masks import decode_mask
        >>> label = tf.io.encode_png(tf.constant([[[0], [2], [255]]], tf.uint8))
        >>> decode_mask(label).numpy().tolist()
        [[0, 2, -1]]
    """

    def decoded(content: bytes | np.ndarray) -> np.ndarray:
        mask = read_mask(to_bytes(content), "a mask")
        return np.where(mask == IGNORED_IN_FILE, np.int32(IGNORED), mask)

    return tf.ensure_shape(tf.numpy_function(decoded, [label], tf.int32, stateful=False), (None, None))
