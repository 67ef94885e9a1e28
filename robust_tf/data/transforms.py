"""The deterministic transforms that evaluation uses, from an encoded image to float32 pixels in [0, 1].

They follow the code of Salman et al. 2020 (arXiv 2007.08489). All functions can run within a TensorFlow graph, and
exported models also use `decode` and `evaluation_transform`.
"""

import dataclasses

import tensorflow as tf

from robust_tf.config.checks import check_choices
from robust_tf.config.data import AlphaBackground, Exif
from robust_tf.data.orientation import jpeg_orientation, turned
from robust_tf.data.transparency import on_background, opaque_gif

# The exact inverse DCT of libjpeg, which Pillow uses. TensorFlow's default differs by one gray level on average.
_DCT = "INTEGER_ACCURATE"

# Value of each background in all channels.
_BACKGROUNDS: dict[str, int] = {"white": 255, "black": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """Treatment of EXIF rotation and transparency. The defaults are those of the paper's code.

    Attributes:
        exif: "apply" to turn a JPEG as its EXIF orientation says, or "ignore" to leave it as it is stored.
        alpha_background: "white" or "black" to put transparent images on a background, or "none" to ignore the opacity
            and use the colors that are stored under transparent pixels.
    """

    exif: Exif = "ignore"
    alpha_background: AlphaBackground = "none"

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def background(self) -> int | None:
        """Value of the background in all channels, or None if there is no background."""
        return _BACKGROUNDS.get(self.alpha_background)


AS_STORED = Decoding()


def decode(encoded: tf.Tensor, decoding: Decoding = AS_STORED) -> tf.Tensor:
    """Decodes a JPEG, PNG, GIF (first frame), BMP or WebP (not animated) image to RGB.

    Repeats gray images in three channels, converts CMYK to RGB, and reduces 16 bits to 8. A BMP has no transparency,
    because most programs ignore its fourth channel.

    Args:
        encoded: Encoded image, a scalar string.
        decoding: Treatment of EXIF rotation and transparency.

    Returns:
        (height, width, 3) uint8.

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.data import decode
        >>> gray = tf.io.encode_png(tf.fill((20, 30, 1), tf.constant(77, tf.uint8)))
        >>> image = decode(gray)
        >>> image.shape.as_list(), image.dtype.name, image[0, 0].numpy().tolist()
        ([20, 30, 3], 'uint8', [77, 77, 77])
    """
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: _decode_jpeg(encoded, decoding),
        lambda: _decode_other(encoded, decoding.background),
    )
    return tf.ensure_shape(image, (None, None, 3))


def decode_floats(encoded: tf.Tensor, highest: float) -> tf.Tensor:
    """Decodes a gray image that TFDS has stored as float32.

    TFDS stores the four bytes of each number as the four channels of a PNG.

    Args:
        encoded: PNG of this form, a scalar string.
        highest: Upper end of the range [0, highest] of the stored pixels.

    Returns:
        (height, width, 3) float32 in [0, 255], the range of the pixels of `decode`.
    """
    pixels = tf.bitcast(tf.io.decode_png(encoded, channels=4), tf.float32)
    in_range = tf.reduce_all((pixels >= 0.0) & (pixels <= highest))  # false for NaN
    message = f"{FLOATS_OUT_OF_RANGE} [0, {highest:g}] like those of the first images."
    with tf.control_dependencies([tf.debugging.Assert(in_range, [message])]):
        return tf.repeat(pixels[..., None] * (255.0 / highest), 3, axis=-1)


# Beginning of the error message of `decode_floats`. Other modules recognize the error by it.
FLOATS_OUT_OF_RANGE = "The float32 pixels of all images must lie in"


def _decode_jpeg(encoded: tf.Tensor, decoding: Decoding) -> tf.Tensor:
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT)
    return turned(image, jpeg_orientation(encoded)) if decoding.exif == "apply" else image


def _decode_other(encoded: tf.Tensor, background: int | None) -> tf.Tensor:
    """Decodes all formats other than JPEG. TensorFlow's decoder alone is not enough for WebP, BMP and GIF."""
    signature = tf.strings.substr(encoded, 0, 2)
    cases = [
        (signature == b"RI", lambda: _decode_webp(encoded, background)),
        (signature == b"BM", lambda: _decode_bmp(encoded)),
    ]
    if background is None:
        return tf.case(cases, default=lambda: _decode_to_rgb(encoded))
    cases.append((signature == b"GI", lambda: _decode_to_rgb(opaque_gif(encoded, background))))
    return tf.case(
        cases,
        default=lambda: on_background(tf.io.decode_image(encoded, channels=4, expand_animations=False), background),
    )


def _decode_to_rgb(encoded: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _decode_webp(encoded: tf.Tensor, background: int | None) -> tf.Tensor:
    # With 3 channels, the decoder refuses an image that has transparency. With all channels, it writes beyond its
    # buffer if the image is animated (TensorFlow 2.21). Bit 1 of the flags in the extended header marks an animated
    # image, which is therefore decoded with 3 channels and refused.
    header = tf.io.decode_raw(tf.strings.substr(encoded, 0, 24), tf.uint8, fixed_length=24)[12:21]
    extended = tf.reduce_all(header[:4] == tf.constant(list(b"VP8X"), tf.uint8))

    def still() -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels=0, expand_animations=False)
        return image[..., :3] if background is None else on_background(image, background)

    return tf.cond(
        extended & (tf.bitwise.bitwise_and(header[8], 2) != 0),
        lambda: _decode_to_rgb(encoded),
        still,
    )


def _decode_bmp(encoded: tf.Tensor) -> tf.Tensor:
    header = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, 0, 54), tf.uint8, fixed_length=56), tf.int32)

    def with_palette() -> tf.Tensor:
        # TensorFlow silently uses the positions in the palette as shades of gray.
        start = 14 + header[14] + 256 * header[15]  # after a header of 14 bytes and a second one, which states its size
        start = tf.minimum(start, tf.strings.length(encoded))
        palette = tf.reshape(tf.io.decode_raw(tf.strings.substr(encoded, start, 4 * 256), tf.uint8), (-1, 4))
        numbers = tf.io.decode_bmp(encoded)[..., 0]
        return tf.gather(palette, tf.cast(numbers, tf.int32))[..., 2::-1]  # blue, green, red, unused

    bits_per_pixel = header[28] + 256 * header[29]
    return tf.cond(bits_per_pixel == 8, with_palette, lambda: _decode_to_rgb(encoded))


def _with_shape(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    image = tf.ensure_shape(image, (None, None, 3))
    return image, tf.shape(image)


class Picture:
    """An encoded image. If it is a JPEG, only the requested window is decoded.

    Attributes:
        height: Height of the whole image in pixels, an int32 scalar.
        width: Width of the whole image in pixels, an int32 scalar.
    """

    def __init__(self, encoded: tf.Tensor, background: int | None = None) -> None:
        """Reads the size of the image.

        Args:
            encoded: Encoded image in a format that `decode` accepts, a scalar string.
            background: Value of the background of transparent images, 0 to 255. None ignores the opacity.
        """
        self._encoded = encoded
        self._is_jpeg = tf.io.is_jpeg(encoded)
        # A JPEG is not decoded yet, so it has no pixels here. All other formats are decoded here, once.
        self._pixels, shape = tf.cond(
            self._is_jpeg,
            lambda: (tf.zeros([0, 0, 3], tf.uint8), tf.image.extract_jpeg_shape(encoded)),
            lambda: _with_shape(_decode_other(encoded, background)),
        )
        self.height, self.width = shape[0], shape[1]

    def crop(self, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        """Returns the pixels of a window.

        Args:
            top: First row of the window, an int32 scalar.
            left: First column of the window, an int32 scalar.
            height: Height of the window in pixels, an int32 scalar.
            width: Width of the window in pixels, an int32 scalar.

        Returns:
            (height, width, 3) uint8.
        """
        pixels = tf.cond(
            self._is_jpeg,
            lambda: tf.image.decode_and_crop_jpeg(
                self._encoded, tf.stack([top, left, height, width]), channels=3, dct_method=_DCT
            ),
            lambda: self._pixels[top : top + height, left : left + width],
        )
        return tf.ensure_shape(pixels, (None, None, 3))

    def whole(self) -> tf.Tensor:
        """Returns all pixels, (height, width, 3) uint8."""
        pixels = tf.cond(
            self._is_jpeg,
            lambda: tf.io.decode_jpeg(self._encoded, channels=3, dct_method=_DCT),
            lambda: self._pixels,
        )
        return tf.ensure_shape(pixels, (None, None, 3))


class DecodedPicture(Picture):
    """A picture that is already decoded."""

    def __init__(self, pixels: tf.Tensor) -> None:
        """Wraps the pixels of an image, (height, width, 3) uint8, or float32 in [0, 255]."""
        self._pixels = pixels
        self.height, self.width = tf.shape(pixels)[0], tf.shape(pixels)[1]

    def crop(self, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        """Returns the pixels of a window. See `Picture.crop`."""
        return self._pixels[top : top + height, left : left + width]

    def whole(self) -> tf.Tensor:
        """Returns all pixels."""
        return self._pixels


def resize(image: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Resizes an image with antialiased bilinear interpolation, as Pillow does.

    The default of `tf.image.resize` is not antialiased, which costs about one point of accuracy on ImageNet.

    Args:
        image: Image of any size, (height, width, 3) uint8, or float32 in [0, 255].
        height: Height of the result in pixels, an int32 scalar.
        width: Width of the result in pixels, an int32 scalar.

    Returns:
        (height, width, 3) float32 in [0, 1].
    """
    return _resized_window(image, (height, width), (0, 0), (height, width))


def _resized_window(
    image: tf.Tensor,
    size: tuple[tf.Tensor, tf.Tensor],
    offset: tuple[tf.Tensor | int, tf.Tensor | int],
    window: tuple[tf.Tensor | int, tf.Tensor | int],
) -> tf.Tensor:
    """Resizes `image` to `size` and returns the window at `offset` with the size `window`, all (height, width)."""
    shape = tf.shape(image)
    # Resizes one axis after the other, each as the first axis of an image of width 1. The result is the same bit by
    # bit, and takes a quarter of the time, because TensorFlow's kernel processes the second axis pixel by pixel.
    rows = _resize_first_axis(image, shape[0], shape[1], size[0], offset[0], window[0])
    columns = _resize_first_axis(tf.transpose(rows, (1, 0, 2)), shape[1], window[0], size[1], offset[1], window[1])
    # Rounding may give slightly more than 255.
    return tf.transpose(tf.minimum(columns * (1.0 / 255.0), 1.0), (1, 0, 2))


def _resize_first_axis(
    image: tf.Tensor,
    length: tf.Tensor,
    other: tf.Tensor | int,
    size: tf.Tensor,
    first: tf.Tensor | int,
    count: tf.Tensor | int,
) -> tf.Tensor:
    """Resizes (length, other, 3) to (size, other, 3) float32 and returns `count` rows, beginning with `first`."""
    strip = tf.reshape(image, (1, length, 1, other * 3))
    scale = tf.stack([tf.cast(size, tf.float32) / tf.cast(length, tf.float32), 1.0])
    resized = tf.raw_ops.ScaleAndTranslate(
        images=strip,
        size=tf.stack([count, 1]),
        scale=scale,
        translation=tf.stack([-tf.cast(first, tf.float32), 0.0]),
        kernel_type="triangle",
        antialias=True,
    )
    return tf.reshape(resized, (count, other, 3))


def evaluation_transform(image: tf.Tensor, *, image_size: int, resize_size: int) -> tf.Tensor:
    """Resizes the shorter side of an image (antialiased bilinear), then cuts out the square in the center.

    Args:
        image: Image, (height, width, 3) uint8, or float32 in [0, 255].
        image_size: Side of the square, in pixels.
        resize_size: Length of the shorter side before the crop, in pixels. At least `image_size`; the paper's code
            uses 256 for an image size of 224.

    Returns:
        (image_size, image_size, 3) float32 in [0, 1].

    Example:
        >>> import tensorflow as tf
        >>> from robust_tf.data import evaluation_transform
        >>> image = tf.fill((100, 200, 3), tf.constant(255, tf.uint8))
        >>> square = evaluation_transform(image, image_size=32, resize_size=36)
        >>> square.shape.as_list(), round(float(tf.reduce_max(square)), 3)
        ([32, 32, 3], 1.0)
    """
    size = shorter_side_to(tf.shape(image)[0], tf.shape(image)[1], resize_size)
    top, left = (tf.cast(tf.round(tf.cast(side - image_size, tf.float32) / 2.0), tf.int32) for side in size)
    # Computes only the square. Resizing the whole of an image of 1x30,000 pixels would take 24 GB.
    square = _resized_window(image, size, (top, left), (image_size, image_size))
    return tf.ensure_shape(square, (image_size, image_size, 3))


def downscale(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the shorter side of an image and rounds the pixels to integers, as Pillow does.

    Applied before all other transforms, it makes tasks with different image resolutions comparable.

    Args:
        image: Image, (height, width, 3) uint8, or float32 in [0, 255].
        size: Length of the shorter side, in pixels.

    Returns:
        (height, width, 3) uint8.

    Source: Salman et al. 2020, arXiv 2007.08489, section 5 (unifying dataset scale).
    """
    height, width = shorter_side_to(tf.shape(image)[0], tf.shape(image)[1], size)
    return tf.cast(tf.round(resize(image, height, width) * 255.0), tf.uint8)


def shorter_side_to(height: tf.Tensor, width: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the height and the width of an image after its shorter side is resized.

    The longer side is rounded down, as in torchvision.

    Args:
        height: Height of the image in pixels, an int32 scalar.
        width: Width of the image in pixels, an int32 scalar.
        size: Length of the shorter side after resizing, in pixels.

    Returns:
        Height and width, int32 scalars.
    """
    shorter = tf.minimum(height, width)
    # In 64 bits, because the product of a long side and a large size may not fit into 32.
    longer = tf.cast(tf.cast(tf.maximum(height, width), tf.int64) * size // tf.cast(shorter, tf.int64), tf.int32)
    upright = height > width
    return tf.where(upright, longer, size), tf.where(upright, size, longer)
