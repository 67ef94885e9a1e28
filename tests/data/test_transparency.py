"""Transparent images on a background, compared with Pillow."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from robust_tf.data.preprocessing import Preprocessing
from robust_tf.data.transforms import Decoding, Picture, decode
from robust_tf.errors import UserError
from tests.data.images import encoded

RGBA = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 4)).astype(np.uint8))
RGB, GRAY, PALETTE = RGBA.convert("RGB"), RGBA.convert("L"), RGBA.convert("RGB").quantize(16)
OTHER_FRAME = {"save_all": True, "append_images": [RGB.rotate(180).quantize(32)], "loop": 0}
PICTURES = {
    "RGBA PNG": encoded(RGBA, "PNG"),
    "LA PNG": encoded(RGBA.convert("LA"), "PNG"),
    "palette PNG": encoded(PALETTE, "PNG", transparency=3),
    "PNG with a transparent color": encoded(RGB, "PNG", transparency=RGB.getpixel((5, 5))),
    "gray PNG with a transparent shade": encoded(GRAY, "PNG", transparency=GRAY.getpixel((5, 5))),
    "opaque PNG": encoded(RGB, "PNG"),
    "lossless WebP": encoded(RGBA, "WEBP", lossless=True),
    "opaque WebP": encoded(RGB, "WEBP"),
    "GIF": encoded(PALETTE, "GIF", transparency=3),
    "GIF with a comment": encoded(PALETTE, "GIF", transparency=15, comment=b"!\xf9\x04, " * 100),
    "animated GIF": encoded(PALETTE, "GIF", transparency=3, **OTHER_FRAME),
    "opaque GIF": encoded(PALETTE, "GIF"),
    "BMP": encoded(RGB, "BMP"),
    "JPEG": encoded(RGB, "JPEG"),
}


def with_own_palette(gif: bytes) -> bytes:
    """Moves the palette of a GIF from the start of the file into its frame."""
    size = 3 * 2 ** (gif[10] % 8 + 1)
    palette, rest = gif[13 : 13 + size], gif[13 + size :]
    frame = rest.index(b",")
    descriptor = rest[frame : frame + 9] + bytes([rest[frame + 9] | 128 | gif[10] % 8])
    return gif[:10] + bytes([gif[10] % 128]) + gif[11:13] + rest[:frame] + descriptor + palette + rest[frame + 10 :]


PICTURES["GIF with a palette in the frame"] = with_own_palette(PICTURES["GIF"])


@pytest.mark.parametrize("color", ["white", "black"])
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_put_on_the_background_as_in_pillow(kind, color):
    data = PICTURES[kind]
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    background = Image.new("RGBA", picture.size, color)
    background.alpha_composite(picture)
    theirs = np.asarray(background.convert("RGB")).astype(int)
    decoding = Decoding(alpha_background=color)
    tolerance = 2 if kind == "opaque WebP" else 1  # rounded differently
    assert np.abs(decode(tf.constant(data), decoding).numpy() - theirs).max() <= tolerance
    assert np.abs(Picture(tf.constant(data), decoding.background).whole().numpy() - theirs).max() <= tolerance
    if kind.startswith(("opaque", "BMP", "JPEG")):
        np.testing.assert_array_equal(decode(tf.constant(data), decoding), decode(tf.constant(data)))


@pytest.mark.parametrize("kind", ["GIF", "animated GIF", "RGBA PNG", "lossless WebP"])
def test_damaged_pictures_raise_the_error_of_the_decoder(kind):
    in_graph = tf.function(lambda data: decode(data, Decoding(alpha_background="white")))
    for length in (0, 2, 5, 12, 20, 30, 45):
        with pytest.raises(tf.errors.InvalidArgumentError):
            in_graph(tf.constant(PICTURES[kind][:length]))


def test_the_background_is_used_in_training_and_evaluation():
    clear = tf.constant(encoded(Image.new("RGBA", (16, 16), (200, 0, 0, 0)), "PNG"))
    for color, level in (("white", (1, 1, 1)), ("black", (0, 0, 0)), ("none", (200 / 255, 0, 0))):
        preprocessing = Preprocessing(
            image_size=8,
            resize_size=8,
            augmentation="random_resized_crop",
            decoding=Decoding(alpha_background=color),
        )
        expected = np.broadcast_to(np.float32(level), (8, 8, 3))
        np.testing.assert_allclose(preprocessing.for_evaluation(clear), expected, atol=1e-6)
        np.testing.assert_allclose(preprocessing.for_training(clear, tf.constant([0, 1])), expected, atol=1e-6)


def test_other_backgrounds_are_refused():
    with pytest.raises(UserError, match="--alpha_background.*'pink'.*Valid: black, none, white"):
        Decoding(alpha_background="pink")
