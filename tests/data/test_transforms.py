"""The transforms, compared with Pillow and with the rules of torchvision."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_images

from robust_tf.data.augmentations import AUGMENTATIONS, random_crop_window
from robust_tf.data.transforms import DecodedPicture, Picture, decode, downscale, evaluation_transform, resize

PHOTOGRAPHS = load_sample_images().images  # two of (427, 640, 3)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow_evaluation(image: np.ndarray, *, image_size: int, resize_size: int) -> np.ndarray:
    """Does the same as torchvision's Resize and CenterCrop, with Pillow."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = (int(width * resize_size / short), int(height * resize_size / short))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - image_size) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + image_size, top + image_size)))


@pytest.mark.parametrize("photograph", [0, 1])
@pytest.mark.parametrize(("image_size", "resize_size"), [(224, 256), (32, 32), (96, 110)])
def test_evaluation_equals_pillow(photograph, image_size, resize_size):
    image = PHOTOGRAPHS[photograph]
    ours = evaluation_transform(tf.constant(image), image_size=image_size, resize_size=resize_size).numpy() * 255
    theirs = pillow_evaluation(image, image_size=image_size, resize_size=resize_size).astype(float)
    assert np.abs(ours - theirs).max() <= 2.0
    assert np.abs(ours - theirs).mean() < 0.5


def test_evaluation_leaves_images_of_the_right_size_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3)).astype(np.uint8)
    ours = evaluation_transform(tf.constant(image), image_size=28, resize_size=28)
    np.testing.assert_allclose(ours, image / 255.0, atol=1e-6)


def gray_16_bit() -> Image.Image:
    return Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.new("L", (20, 30), 77), "PNG"),
        (Image.new("RGBA", (20, 30), (10, 20, 30, 128)), "PNG"),
        (Image.new("CMYK", (20, 30), (0, 50, 100, 0)), "JPEG"),
        (gray_16_bit(), "PNG"),
        (Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"),
        (Image.new("RGB", (20, 30), (1, 2, 3)), "BMP"),
        (Image.new("P", (20, 30)), "GIF"),
    ],
    ids=["gray", "alpha", "cmyk", "16-bit", "one pixel", "bmp", "gif"],
)
def test_every_kind_of_image_becomes_rgb(image, kind):
    pixels = decode(tf.constant(encoded(image, kind)))
    assert pixels.dtype == tf.uint8
    assert pixels.shape == (image.height, image.width, 3)
    result = evaluation_transform(pixels, image_size=16, resize_size=18)
    assert result.shape == (16, 16, 3)
    assert 0 <= float(tf.reduce_min(result)) <= float(tf.reduce_max(result)) <= 1


def test_gray_is_repeated_and_alpha_dropped():
    gray = decode(tf.constant(encoded(Image.new("L", (4, 4), 77), "PNG"))).numpy()
    assert (gray == 77).all()
    alpha = decode(tf.constant(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 128)), "PNG"))).numpy()
    assert (alpha == (10, 20, 30)).all()


TRANSLUCENT = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 4)).astype(np.uint8))
SECOND_FRAME = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), (9, 9, 9))]}


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (TRANSLUCENT, "PNG", {}),
        (TRANSLUCENT.convert("LA"), "PNG", {}),
        (TRANSLUCENT.convert("RGB").quantize(16), "PNG", {"transparency": 3}),
        (TRANSLUCENT, "WEBP", {"lossless": True}),
        (TRANSLUCENT.convert("RGB"), "WEBP", {}),
        (TRANSLUCENT, "WEBP", {}),
        (TRANSLUCENT.convert("RGB").quantize(16), "GIF", SECOND_FRAME),
        (TRANSLUCENT, "BMP", {}),
        (TRANSLUCENT.convert("L"), "BMP", {}),
        (TRANSLUCENT.convert("RGB").quantize(16), "BMP", {}),
    ],
    ids=[
        "RGBA PNG",
        "LA PNG",
        "palette PNG",
        "RGBA WebP",
        "lossy WebP",
        "lossy RGBA WebP",
        "animated GIF",
        "RGBA BMP",
        "gray BMP",
        "palette BMP",
    ],
)
def test_other_formats_are_decoded_as_in_pillow(image, kind, options):
    data = encoded(image, kind, **options)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert len(np.unique(theirs)) > 10
    np.testing.assert_array_equal(decode(tf.constant(data)), theirs)
    np.testing.assert_array_equal(Picture(tf.constant(data)).whole(), theirs)


ANIMATED_WEBP = encoded(TRANSLUCENT.convert("RGB"), "WEBP", **SECOND_FRAME)


@pytest.mark.parametrize(
    "data",
    [b"", b"B", b"BM", b"BM" + bytes(100), b"RIFF", b"no image", ANIMATED_WEBP],
    ids=["empty", "B", "BM", "BMP", "RIFF", "text", "animated WebP"],
)
def test_undecodable_files_raise_the_error_of_the_decoder(data):
    """This includes an animated WebP, for which TensorFlow would write beyond its buffer."""
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(data))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 5_000)], ids=str)
def test_only_the_central_square_of_a_thin_image_is_resized(size):
    """The whole image, with a shorter side of 256 pixels, would take up to 24 GB."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    ours = evaluation_transform(tf.constant(image), image_size=224, resize_size=256).numpy() * 255
    # Resizes only the pixels around the center, enough of them that their edges lie outside of the square.
    height, width = (slice(max(0, n // 2 - 10), n // 2 + 10) if n > 2 else slice(None) for n in size)
    short = min(size)
    part = Image.fromarray(image[height, width])
    whole = part.resize((part.width * 256 // short, part.height * 256 // short), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in whole.size)
    theirs = np.asarray(whole.crop((left, top, left + 224, top + 224)), float)
    assert np.abs(ours - theirs).max() <= 2 and np.abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_decides_an_augmentation(name):
    picture = DecodedPicture(tf.constant(PHOTOGRAPHS[0]))
    augment = tf.function(lambda seed: AUGMENTATIONS[name](picture, 32, seed))
    first, again, other = (augment(tf.constant([0, seed])).numpy() for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - other).max() > 0.01) == (name != "none")


@pytest.mark.parametrize("name", ["random_resized_crop", "shift_flip", "imagenet"])
def test_some_images_are_flipped_and_some_are_not(name):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255  # the left half is white
    augment = tf.function(lambda seed: AUGMENTATIONS[name](DecodedPicture(tf.constant(image)), 32, seed))
    results = [augment(tf.constant([0, seed])).numpy() for seed in range(30)]
    left = [result[:, :8].mean() > result[:, -8:].mean() for result in results]
    assert 5 < sum(left) < 25


def test_crop_windows_have_the_documented_distribution():
    height, width = 375, 500
    windows = np.array(
        [[int(v) for v in random_crop_window(height, width, tf.constant([7, seed]))] for seed in range(300)]
    )
    top, left, heights, widths = windows.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + heights <= height).all() and (left + widths <= width).all()
    area = heights * widths / (height * width)
    ratio = widths / heights
    assert 0.075 < area.min() < 0.15 and area.max() > 0.85
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.35
    # The ratio is log-uniform, so among the small crops, where every ratio fits, half are upright.
    small = area < 0.4
    assert 0.4 < (ratio[small] < 1).mean() < 0.6


@pytest.mark.parametrize(("size", "crop"), [((10, 1000), (10, 13)), ((1000, 10), (13, 10)), ((1, 1), (1, 1))])
def test_a_thin_image_gets_the_central_crop_with_the_nearest_ratio(size, crop):
    image_height, image_width = size
    window = random_crop_window(image_height, image_width, tf.constant([0, 0]))
    top, left, height, width = (int(value) for value in window)
    assert (height, width) == crop
    assert (top, left) == ((image_height - crop[0]) // 2, (image_width - crop[1]) // 2)


def jpeg(mode: str, **options) -> bytes:
    return encoded(Image.fromarray(PHOTOGRAPHS[1]).convert(mode), "JPEG", quality=90, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpegs_are_decoded_as_in_pillow(mode, options):
    data = jpeg(mode, **options)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(tf.constant(data)), theirs)
    np.testing.assert_array_equal(Picture(tf.constant(data)).whole(), theirs)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("window", [(33, 57, 200, 301), (0, 0, 427, 640), (5, 9, 3, 3), (426, 639, 1, 1)])
def test_a_window_of_a_jpeg_has_the_pixels_of_the_whole_image(mode, window):
    """The outermost pixels may differ, because colors are stored at half the resolution and interpolated."""
    data = tf.constant(jpeg(mode))
    top, left, height, width = window
    ours = Picture(data).crop(*map(tf.constant, window)).numpy().astype(int)
    whole = decode(data).numpy().astype(int)[top : top + height, left : left + width]
    assert ours.shape == (height, width, 3)
    np.testing.assert_array_equal(ours[1:-1, 1:-1], whole[1:-1, 1:-1])
    assert np.abs(ours - whole).mean() < 0.01


def test_a_jpeg_is_decoded_only_inside_the_window():
    """The part of the file below the window may even be missing."""
    data = jpeg("RGB")
    upper_half = tf.constant(data[: len(data) // 2])
    window = Picture(upper_half).crop(*map(tf.constant, (10, 10, 50, 60)))
    np.testing.assert_array_equal(window[1:-1, 1:-1], decode(tf.constant(data))[11:59, 11:69])
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(upper_half)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_windows_of_other_formats_have_the_pixels_of_the_whole_image(kind):
    image = Image.fromarray(PHOTOGRAPHS[0][:60, :80]).convert("P" if kind == "GIF" else "RGB")
    data = tf.constant(encoded(image, kind))
    picture = Picture(data)
    assert (int(picture.height), int(picture.width)) == (60, 80)
    np.testing.assert_array_equal(picture.whole(), decode(data))
    np.testing.assert_array_equal(picture.crop(*map(tf.constant, (7, 9, 20, 30))), decode(data)[7:27, 9:39])


def test_exif_rotation_is_ignored_by_default():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = jpeg("RGB", exif=exif)
    assert decode(tf.constant(data)).shape == (427, 640, 3)
    np.testing.assert_array_equal(decode(tf.constant(data)), decode(tf.constant(jpeg("RGB"))))


def test_16_bits_are_reduced_to_the_upper_8():
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    pixels = decode(tf.constant(encoded(Image.fromarray(values), "PNG"))).numpy()
    np.testing.assert_array_equal(pixels, (values >> 8).astype(np.uint8)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (4000, 3000)], ids=str)
def test_tiny_thin_and_huge_images_can_be_augmented(name, size):
    data = tf.constant(encoded(Image.new("RGB", size[::-1], (200, 100, 50)), "JPEG"))
    image = tf.function(AUGMENTATIONS[name])(Picture(data), 16, tf.constant([1, 2]))
    assert image.shape == (16, 16, 3)
    if name in ("none", "random_resized_crop"):
        np.testing.assert_allclose(image * 255, np.broadcast_to((200, 100, 50), (16, 16, 3)), atol=2)


@pytest.mark.parametrize("size", [(224, 224), (500, 300), (17, 1), (427, 640)], ids=str)
def test_resizing_is_bit_equal_to_tensorflow(size):
    """`resize` makes one pass for each axis, which is faster."""
    theirs = tf.image.resize(PHOTOGRAPHS[0], size, antialias=True) * (1 / 255)
    np.testing.assert_array_equal(resize(tf.constant(PHOTOGRAPHS[0]), *map(tf.constant, size)), tf.minimum(theirs, 1))


@pytest.mark.parametrize("size", [32, 100])
def test_downscaling_equals_pillow(size):
    image = PHOTOGRAPHS[1]
    ours = downscale(tf.constant(image), size).numpy()
    theirs = np.asarray(Image.fromarray(image).resize((int(640 * size / 427), size), Image.Resampling.BILINEAR))
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.25
