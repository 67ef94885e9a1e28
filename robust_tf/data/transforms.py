"""From an encoded image to float32 pixels in [0, 1], without chance: what the reference does to images in evaluation.

All functions are TensorFlow graph functions. Serving uses `decode` and `evaluation_transform` too.
"""

import dataclasses

import tensorflow as tf

from robust_tf.config.checks import check_choices
from robust_tf.config.data import AlphaBackground, Exif
from robust_tf.data.orientation import jpeg_orientation, turned
from robust_tf.data.transparency import on_background, opaque_gif

# libjpeg's exact inverse DCT, as Pillow takes it. TensorFlow's default differs from that by one grey level on average.
_DCT = "INTEGER_ACCURATE"


# The color of a background, the same in all channels.
_BACKGROUNDS: dict[str, int] = {"white": 255, "black": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """What of an encoded picture counts besides its colors. The defaults are the reference's.

    Attributes:
        exif: "apply" turns a JPEG as its EXIF orientation says; "ignore" leaves it as it is stored.
        alpha_background: what transparent pictures are put on; "none" drops the opacity, so that the colors count that
            are stored under transparent pixels.
    """

    exif: Exif = "ignore"
    alpha_background: AlphaBackground = "none"

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def background(self) -> int | None:
        """Value of the background in all channels; None without one."""
        return _BACKGROUNDS.get(self.alpha_background)


AS_STORED = Decoding()


def decode(encoded: tf.Tensor, decoding: Decoding = AS_STORED) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame), BMP or WebP (not animated) bytes, a scalar string -> (height, width, 3) uint8.

    Grey is repeated to RGB, CMYK converted, 16 bits reduced to 8. `decoding` says how transparency and EXIF rotation
    are treated. A BMP has no transparency: most programs ignore its fourth channel.
    """
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: _decode_jpeg(encoded, decoding),
        lambda: _decode_other(encoded, decoding.background),
    )
    return tf.ensure_shape(image, (None, None, 3))


def decode_floats(encoded: tf.Tensor, highest: float) -> tf.Tensor:
    """A picture that TFDS has stored as float32 -> (height, width, 3) float32, 0 to 255 like the pixels of `decode`.

    TFDS stores the four bytes of each number as the four channels of a PNG.

    Args:
        encoded: such a PNG, a scalar string.
        highest: the pixels are meant to lie in [0, highest].
    """
    pixels = tf.bitcast(tf.io.decode_png(encoded, channels=4), tf.float32)
    in_range = tf.reduce_all((pixels >= 0.0) & (pixels <= highest))  # nor is NaN
    message = f"{FLOATS_OUT_OF_RANGE} [0, {highest:g}] like those of the first pictures."
    with tf.control_dependencies([tf.debugging.Assert(in_range, [message])]):
        return tf.repeat(pixels[..., None] * (255.0 / highest), 3, axis=-1)


# By which the error of `decode_floats` is known.
FLOATS_OUT_OF_RANGE = "The float32 pixels of all pictures must lie in"


def _decode_jpeg(encoded: tf.Tensor, decoding: Decoding) -> tf.Tensor:
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method=_DCT)
    return turned(image, jpeg_orientation(encoded)) if decoding.exif == "apply" else image


def _decode_other(encoded: tf.Tensor, background: int | None) -> tf.Tensor:
    """The formats besides JPEG. Two of them need more than TensorFlow's decoder."""
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
    # Asked for 3 channels, the decoder refuses an image with alpha. Asked for all, it writes beyond its buffer for an
    # animated one (TensorFlow 2.21), so that must stay refused: bit 1 of the extended header's flags.
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
        # TensorFlow takes the numbers of the colours for shades of grey, without a word.
        start = 14 + header[14] + 256 * header[15]  # behind both headers; the second one says how long it is
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
    """An image of which only the part that is asked for is decoded, where the format allows it (JPEG).

    Attributes:
        height, width: int32 scalars, in pixels.
    """

    def __init__(self, encoded: tf.Tensor, background: int | None = None) -> None:
        """Args: `encoded`: bytes as `decode` takes them; `background`: as in `Decoding`."""
        self._encoded = encoded
        self._is_jpeg = tf.io.is_jpeg(encoded)
        # The other formats are decoded here, once; for a JPEG there are no pixels yet.
        self._pixels, shape = tf.cond(
            self._is_jpeg,
            lambda: (tf.zeros([0, 0, 3], tf.uint8), tf.image.extract_jpeg_shape(encoded)),
            lambda: _with_shape(_decode_other(encoded, background)),
        )
        self.height, self.width = shape[0], shape[1]

    def crop(self, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        """The pixels of a window within the image, (height, width, 3) uint8."""
        pixels = tf.cond(
            self._is_jpeg,
            lambda: tf.image.decode_and_crop_jpeg(
                self._encoded, tf.stack([top, left, height, width]), channels=3, dct_method=_DCT
            ),
            lambda: self._pixels[top : top + height, left : left + width],
        )
        return tf.ensure_shape(pixels, (None, None, 3))

    def whole(self) -> tf.Tensor:
        """All pixels, (height, width, 3) uint8."""
        pixels = tf.cond(
            self._is_jpeg,
            lambda: tf.io.decode_jpeg(self._encoded, channels=3, dct_method=_DCT),
            lambda: self._pixels,
        )
        return tf.ensure_shape(pixels, (None, None, 3))


class DecodedPicture(Picture):
    """A picture whose pixels are there already."""

    def __init__(self, pixels: tf.Tensor) -> None:
        """Args: `pixels`: (height, width, 3) uint8, or float32 in the same range."""
        self._pixels = pixels
        self.height, self.width = tf.shape(pixels)[0], tf.shape(pixels)[1]

    def crop(self, top: tf.Tensor, left: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return self._pixels[top : top + height, left : left + width]

    def whole(self) -> tf.Tensor:
        return self._pixels


def resize(image: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Antialiased bilinear, as Pillow does it and tf.image.resize by default does not: a point of ImageNet accuracy.

    Args:
        image: (any, any, 3) uint8, or float32 in the same range.
        height, width: of the result, in pixels.

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
    """The part of `image` resized to `size` that lies at `offset` and is as large as `window`: (height, width) each."""
    shape = tf.shape(image)
    # One axis after the other, each as the first one of an image of width 1. TensorFlow's kernel goes through the
    # second axis pixel by pixel; this way, with the same result bit by bit, it takes a quarter of the time.
    rows = _resize_first_axis(image, shape[0], shape[1], size[0], offset[0], window[0])
    columns = _resize_first_axis(tf.transpose(rows, (1, 0, 2)), shape[1], window[0], size[1], offset[1], window[1])
    # Rounding may leave 255 by a hair.
    return tf.transpose(tf.minimum(columns * (1.0 / 255.0), 1.0), (1, 0, 2))


def _resize_first_axis(
    image: tf.Tensor,
    length: tf.Tensor,
    other: tf.Tensor | int,
    size: tf.Tensor,
    first: tf.Tensor | int,
    count: tf.Tensor | int,
) -> tf.Tensor:
    """(length, other, 3) -> rows `first` to `first + count` of (size, other, 3) float32, in the units of `image`."""
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
    """Shorter side to `resize_size` (antialiased bilinear), then the `image_size` square in the centre.

    Args:
        image: (height, width, 3) uint8.
        image_size: side of the result in pixels.
        resize_size: at least `image_size`; the reference takes 256 for 224.

    Returns:
        (image_size, image_size, 3) float32 in [0, 1].
    """
    size = shorter_side_to(tf.shape(image)[0], tf.shape(image)[1], resize_size)
    top, left = (tf.cast(tf.round(tf.cast(side - image_size, tf.float32) / 2.0), tf.int32) for side in size)
    # Only the square is made: the whole of an image of 1x30,000 pixels would take 24 GB.
    square = _resized_window(image, size, (top, left), (image_size, image_size))
    return tf.ensure_shape(square, (image_size, image_size, 3))


def downscale(image: tf.Tensor, size: int) -> tf.Tensor:
    """Shorter side to `size`, (height, width, 3) uint8 -> the same kind, rounded as Pillow's images are.

    Put before everything else, it makes the tasks comparable whose images have different resolutions.
    Source: Salman et al. 2020, arXiv 2007.08489, section 5 (unifying dataset scale).
    """
    height, width = shorter_side_to(tf.shape(image)[0], tf.shape(image)[1], size)
    return tf.cast(tf.round(resize(image, height, width) * 255.0), tf.uint8)


def shorter_side_to(height: tf.Tensor, width: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width (int32) of an image whose shorter side is brought to `size`.

    The longer one is rounded down, as torchvision does.
    """
    shorter = tf.minimum(height, width)
    # In 64 bits: the product of a large side and a large size needs more than 32.
    longer = tf.cast(tf.cast(tf.maximum(height, width), tf.int64) * size // tf.cast(shorter, tf.int64), tf.int32)
    upright = height > width
    return tf.where(upright, longer, size), tf.where(upright, size, longer)
