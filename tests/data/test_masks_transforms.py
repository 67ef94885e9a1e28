"""Image and mask get the same transform, and masks keep their values."""

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.data.masks import MaskPreprocessing
from robust_tf.data.transforms import Decoding, resize
from robust_tf.errors import UserError
from tests.data.annotated import palette, turned_photo

SIZE = 48
AUGMENTATIONS = ["none", "flip", "crop_flip", "crop_flip_color"]


def pair(height, width):
    """A red rectangle on blue, and a palette mask with class 7 there, 3 around it, and 255 at the left."""
    pixels = np.full((height, width, 3), (20, 40, 200), np.uint8)
    mask = np.full((height, width), 3, np.uint8)
    top, bottom, left, right = height // 4, height // 2, width // 3, width - 6
    pixels[top:bottom, left:right] = (200, 40, 20)
    mask[top:bottom, left:right] = 7
    mask[:, :2] = 255
    return tf.io.encode_png(pixels), tf.constant(palette(mask))


def trained(preprocessing, example, seeds):
    encoded, label = example
    examples = tf.data.Dataset.range(seeds).map(
        lambda seed: preprocessing.training_example(encoded, label, tf.stack([seed, 7]))
    )
    return list(examples.as_numpy_iterator())


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width"), [(60, 90), (41, 30)])
def test_the_mask_stays_on_its_pixels(augmentation, height, width):
    examples = trained(MaskPreprocessing(image_size=SIZE, augmentation=augmentation), pair(height, width), 40)
    seen = 0
    for image, mask in examples:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.float32
        assert mask.shape == (SIZE, SIZE) and mask.dtype == np.int32
        assert set(np.unique(mask)) <= {-1, 3, 7}
        red = image[..., 0] > image[..., 2]
        # At the four corners of the rectangle, the mixture may have less red although the center lies within it.
        assert (red != (mask == 7))[mask != -1].sum() <= 4
        assert (mask[(image == 0.5).all(axis=-1)] == -1).all()
        seen += (mask == 7).any()
    different = len({mask.tobytes() for _, mask in examples})
    # Of a large view, several random parts may show a single class.
    assert different == {"none": 1, "flip": 2}[augmentation] if "crop" not in augmentation else different > 30
    assert seen > 25


def test_evaluation_fills_the_square():
    encoded, label = pair(60, 90)
    preprocessing = MaskPreprocessing(image_size=SIZE)
    image, mask = preprocessing.evaluation_example(encoded, label)
    np.testing.assert_allclose(image, resize(tf.io.decode_png(encoded), SIZE, SIZE), atol=1e-6)
    # The centers (row + 0.5) * 60 / 48 and (column + 0.5) * 90 / 48 of the pixels, in the original image.
    rows, columns = ((np.arange(SIZE) + 0.5) * length // SIZE for length in (60, 90))
    expected = np.full((SIZE, SIZE), 3)
    expected[((rows >= 15) & (rows < 30))[:, None] & ((columns >= 30) & (columns < 84))] = 7
    expected[:, columns < 2] = -1
    np.testing.assert_array_equal(mask, expected)
    for measured, evaluated in zip(preprocessing.measured_example(encoded, label), (image, mask), strict=True):
        np.testing.assert_array_equal(measured, evaluated)


def test_everything_random_depends_on_the_seed():
    preprocessing = MaskPreprocessing(image_size=SIZE, augmentation="crop_flip_color")
    encoded, label = pair(60, 90)
    first, again, other = (
        preprocessing.training_example(encoded, label, tf.constant(seed)) for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[1] != other[1]).numpy().any()


def test_a_mask_of_another_size_is_an_error():
    encoded, _ = pair(60, 90)
    dataset = tf.data.Dataset.from_tensors(pair(60, 89)[1]).map(
        lambda label: MaskPreprocessing(image_size=SIZE).evaluation_example(encoded, label)
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"size of its image.*\[60 89\].*\[60 90\]"):
        list(dataset)


def test_exif_rotation_is_applied_before_masks():
    label = tf.constant(palette(np.full((12, 16), 5, np.uint8)))  # the photo is stored with 16x12 rows and columns
    preprocessing = MaskPreprocessing(image_size=8, decoding=Decoding(exif="apply"))
    _, mask = preprocessing.evaluation_example(tf.constant(turned_photo()), label)
    assert (mask.numpy() == 5).all()


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="Received: 'imagenet'"):
        MaskPreprocessing(image_size=32, augmentation="imagenet")
    with pytest.raises(UserError, match="image_size=-1"):
        MaskPreprocessing(image_size=-1)
    assert MaskPreprocessing(image_size=8).resize_size == 8


def test_training_without_augmentation_is_as_evaluation():
    preprocessing = MaskPreprocessing(image_size=SIZE)
    encoded, label = pair(60, 90)
    example = preprocessing.training_example(encoded, label, tf.constant([1, 2]))
    for first, second in zip(example, preprocessing.evaluation_example(encoded, label), strict=True):
        np.testing.assert_array_equal(first, second)
