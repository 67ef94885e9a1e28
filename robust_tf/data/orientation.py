"""Reads and applies the EXIF orientation of a JPEG within a TensorFlow graph.

Cameras store a photograph as the sensor saw it, and say in the orientation tag how to turn it. Browsers and image
viewers turn it accordingly; TensorFlow's decoder does not.
"""

import tensorflow as tf

# The tag is near the start of the file: EXIF data is one segment of at most 64 KiB, with few segments before it.
_HEAD_BYTES = 128 * 1024
_MAX_SEGMENTS = 64
_ORIENTATION_TAG = 0x0112


def jpeg_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the EXIF orientation of a JPEG.

    Damaged files are safe: the function reads no bytes outside of the file and ends after a fixed number of steps.

    Args:
        encoded: Encoded image, a scalar string.

    Returns:
        Int32 scalar from 1 to 8. 1 means "as stored", which is also the result for other formats and without a tag.

    Source: Exif 2.32 (CIPA DC-008), sections 4.5.4 and 4.6.4.
    """
    # The zero at the end is read in place of all bytes outside of the file.
    head = tf.concat([tf.io.decode_raw(tf.strings.substr(encoded, 0, _HEAD_BYTES), tf.uint8), [0]], 0)
    last = tf.size(head, tf.int64) - 1

    def byte(position: tf.Tensor) -> tf.Tensor:
        inside = (position >= 0) & (position < last)
        return tf.cast(tf.gather(head, tf.where(inside, position, last)), tf.int64)

    def is_exif(position: tf.Tensor) -> tf.Tensor:
        marker = tf.stack([byte(position + offset) for offset in (1, 4, 5, 6, 7, 8, 9)])
        return tf.reduce_all(marker == tf.constant([0xE1, *b"Exif\0\0"], tf.int64))

    def is_another_segment(position: tf.Tensor) -> tf.Tensor:
        marker = byte(position + 1)
        return (byte(position) == 0xFF) & (marker != 0xDA) & ~is_exif(position)  # 0xDA: the pixels begin

    def next_segment(position: tf.Tensor) -> tuple[tf.Tensor]:
        return (position + 2 + 256 * byte(position + 2) + byte(position + 3),)

    (segment,) = tf.while_loop(
        is_another_segment, next_segment, (tf.constant(2, tf.int64),), maximum_iterations=_MAX_SEGMENTS
    )
    tiff = segment + 10
    little_endian = byte(tiff) == ord("I")

    def number(position: tf.Tensor, size: int) -> tf.Tensor:
        weights = [256**power for power in range(size)]
        digits = [byte(position + offset) for offset in range(size)]
        little = sum(weight * digit for weight, digit in zip(weights, digits, strict=True))
        big = sum(weight * digit for weight, digit in zip(reversed(weights), digits, strict=True))
        return tf.where(little_endian, little, big)

    directory = tiff + number(tiff + 4, 4)
    entries = directory + 2 + 12 * tf.range(number(directory, 2))
    values = tf.boolean_mask(number(entries + 8, 2), number(entries, 2) == _ORIENTATION_TAG)
    value = tf.concat([values, [1]], 0)[0]
    valid = tf.io.is_jpeg(encoded) & is_exif(segment) & (value >= 1) & (value <= 8)
    return tf.cast(tf.where(valid, value, 1), tf.int32)


def turned(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns and mirrors an image as its EXIF orientation says.

    Args:
        image: Image as it is stored, (height, width, channels).
        orientation: EXIF orientation, an int32 scalar from 1 to 8.
    """
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    upside_down = tf.reduce_any(orientation == [3, 4, 7, 8])
    mirrored = tf.reduce_any(orientation == [2, 3, 6, 7])
    return tf.reverse(image, tf.boolean_mask([0, 1], tf.stack([upside_down, mirrored])))
