"""The EXIF orientation, compared with Pillow."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from robust_tf.data.orientation import jpeg_orientation
from robust_tf.data.preprocessing import Preprocessing
from robust_tf.data.transforms import Decoding, decode
from tests.data.images import encoded

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))


def rotated(orientation: int, *, endian: str = "<", **options) -> bytes:
    """Makes a JPEG with this orientation tag and some others."""
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F], exif[0x0112], exif[0x8769] = "maker", orientation, {0x9003: "2020:01:01 00:00:00"}
    return encoded(PIXELS, "JPEG", exif=exif, subsampling=0, **options)


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_in_pillow(orientation):
    data = rotated(orientation, endian="<>"[orientation % 2])
    assert int(jpeg_orientation(tf.constant(data))) == (orientation if 1 <= orientation <= 8 else 1)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    in_graph = tf.function(lambda bytes_: decode(bytes_, Decoding(exif="apply")))
    np.testing.assert_array_equal(in_graph(tf.constant(data)), theirs)
    np.testing.assert_array_equal(decode(tf.constant(data)), np.asarray(Image.open(io.BytesIO(data))))


def test_the_tag_is_found_after_other_segments():
    assert int(jpeg_orientation(tf.constant(rotated(6, icc_profile=b"x" * 70_000, comment=b"y" * 3_000)))) == 6


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_other_formats_have_no_orientation(kind):
    assert int(jpeg_orientation(tf.constant(encoded(PIXELS, kind)))) == 1
    assert int(jpeg_orientation(tf.constant(b""))) == 1


def test_damaged_headers_raise_no_error():
    data, rng = rotated(6), np.random.default_rng(0)
    find = tf.function(jpeg_orientation)
    head = np.frombuffer(data, np.uint8)
    for length in (3, 11, 20, 31, 45, 60):
        assert 1 <= int(find(tf.constant(data[:length]))) <= 8
    for _ in range(100):
        changed = head.copy()
        places = rng.integers(3, 120, 4)
        changed[places] = rng.choice(np.array([0, 1, 255, 254, 0xE1], np.uint8), 4)
        assert 1 <= int(find(tf.constant(changed.tobytes()))) <= 8


def test_the_orientation_is_applied_in_training_and_evaluation():
    data = tf.constant(rotated(8))
    turned = tf.constant(encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(rotated(8)))), "PNG"))
    apply, ignore = (
        Preprocessing(image_size=16, resize_size=18, augmentation="random_resized_crop", decoding=Decoding(exif=exif))
        for exif in ("apply", "ignore")
    )
    np.testing.assert_allclose(apply.for_evaluation(data), ignore.for_evaluation(turned), atol=1e-6)
    seed = tf.constant([1, 2])
    np.testing.assert_allclose(apply.for_training(data, seed), ignore.for_training(turned, seed), atol=1e-6)
    assert np.abs(ignore.for_evaluation(data) - apply.for_evaluation(data)).max() > 0.1
