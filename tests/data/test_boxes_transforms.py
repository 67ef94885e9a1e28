"""Boxes stay on the pixels that they belong to, whatever the augmentation."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.data.boxes import BoxPreprocessing
from robust_tf.data.boxes.geometry import random_view
from robust_tf.data.boxes.records import encode_label
from robust_tf.data.boxes.transforms import TOO_MANY_BOXES
from robust_tf.data.transforms import Decoding, resize
from robust_tf.errors import UserError
from tests.data.annotated import turned_photo

SIZE = 48
AUGMENTATIONS = ["none", "flip", "crop_flip", "crop_flip_color"]


def picture(height, width, box):
    """A blue PNG with a red box [top, left, bottom, right]."""
    pixels = np.full((height, width, 3), (20, 40, 200), np.uint8)
    top, left, bottom, right = box
    pixels[top:bottom, left:right] = (200, 40, 20)
    return tf.io.encode_png(pixels)


def label_of(*rows):
    return tf.constant(encode_label(np.float32(rows).reshape(-1, 6)))


def trained(preprocessing, encoded, label, seeds):
    """Training examples for many seeds, made within a graph as in a job."""
    examples = tf.data.Dataset.range(seeds).map(
        lambda seed: preprocessing.training_example(encoded, label, tf.stack([seed, 7]))
    )
    return list(examples.as_numpy_iterator())


def expected_pixels(low, high):
    """Whether the center of each pixel lies between two edges, and whether it is too near to an edge to say."""
    centers = np.arange(SIZE) + 0.5
    return (centers > low) & (centers < high), np.minimum(abs(centers - low), abs(centers - high)) < 0.02


def check_on_pixels(image, box):
    """Checks that the red pixels of an image are exactly those whose centers lie in the box."""
    red = image[..., 0] > image[..., 2]
    extent = box[2:] - box[:2]
    for axis in (0, 1):
        if extent[1 - axis] < 3:  # only at the rim of the box, whose pixels are a mixture
            continue
        expected, unclear = expected_pixels(box[axis], box[2 + axis])
        found = red.any(axis=1 - axis)
        np.testing.assert_array_equal(found[~unclear], expected[~unclear])
    top, left, bottom, right = np.array([*np.ceil(box[:2] + 1), *np.floor(box[2:] - 1)], int)
    assert red[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)].all()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width", "box"), [(60, 90, (11, 23, 37, 71)), (41, 30, (5, 3, 33, 20))])
def test_a_box_stays_on_its_pixels(augmentation, height, width, box):
    preprocessing = BoxPreprocessing(image_size=SIZE, augmentation=augmentation)
    examples = trained(preprocessing, picture(height, width, box), label_of([*box, 3, 0]), 60)
    kept = 0
    for image, labels in examples:
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.float32
        assert image.min() >= 0 and image.max() <= 1
        if len(labels["boxes"]):
            kept += 1
            assert labels["classes"].tolist() == [3] and labels["crowd"].tolist() == [False]
            assert labels["boxes"].min() >= 0 and labels["boxes"].max() <= SIZE
            check_on_pixels(image, labels["boxes"][0])
    if "crop" in augmentation:
        assert kept >= 40 and len({labels["boxes"].tobytes() for _, labels in examples}) > 50
    else:
        assert kept == 60
        flipped = len({labels["boxes"].tobytes() for _, labels in examples})
        assert flipped == (2 if augmentation == "flip" else 1)


def test_evaluation_keeps_the_aspect_ratio_and_pads_with_gray():
    # 30 * 48 / 41 is no whole number. Boxes follow the scale exactly, not the number of pixels.
    for height, width, box in ((60, 90, (11, 23, 37, 71)), (41, 30, (5, 3, 33, 20))):
        scale = SIZE / max(height, width)
        preprocessing = BoxPreprocessing(image_size=SIZE)
        image, labels = preprocessing.evaluation_example(picture(height, width, box), label_of([*box, 3, 1]))
        np.testing.assert_allclose(labels["boxes"], [np.array(box) * scale], rtol=1e-6)
        assert labels["crowd"].numpy().tolist() == [True]
        check_on_pixels(image.numpy(), labels["boxes"][0].numpy())
        gray = (image.numpy() == 0.5).all(axis=-1)
        rows, columns = np.arange(SIZE) + 0.5 > height * scale, np.arange(SIZE) + 0.5 > width * scale
        np.testing.assert_array_equal(gray, rows[:, None] | columns)


def test_a_square_image_is_resized_as_for_classification():
    pixels = np.random.default_rng(0).integers(0, 256, (77, 77, 3)).astype(np.uint8)
    image, _ = BoxPreprocessing(image_size=SIZE).evaluation_example(tf.io.encode_png(pixels), label_of())
    np.testing.assert_allclose(image, resize(tf.constant(pixels), SIZE, SIZE), atol=1e-6)


def test_an_image_without_boxes_has_none_left():
    preprocessing = BoxPreprocessing(image_size=SIZE, augmentation="crop_flip")
    for _, labels in trained(preprocessing, picture(40, 60, (1, 1, 2, 2)), label_of(), 5):
        assert labels["boxes"].shape == (0, 4) and labels["classes"].shape == labels["crowd"].shape == (0,)


def test_boxes_with_too_little_left_are_dropped_but_crowds_stay():
    box = (1, 2, 20, 30)
    preprocessing = BoxPreprocessing(image_size=SIZE, augmentation="crop_flip")
    label = label_of([*box, 0, 0], [*box, 1, 1])
    dropped = 0
    for seed, (image, labels) in enumerate(trained(preprocessing, picture(60, 90, box), label, 150)):
        view, _ = random_view(
            tf.constant(60),
            tf.constant(90),
            tf.constant([seed, 7], tf.int64),
            image_size=SIZE,
            augmentation="crop_flip",
            keep_aspect=True,
        )
        top, left, bottom, right = view.boxes(tf.constant([box], tf.float32), tf.constant(90.0)).numpy()[0]
        left_of_it = max(min(bottom, SIZE) - max(top, 0), 0) * max(min(right, SIZE) - max(left, 0), 0)
        share = left_of_it / ((bottom - top) * (right - left))
        expected = [0] * int(share >= 0.3) + [1] * int(share > 0)
        assert labels["classes"].tolist() == expected
        assert share > 0 or not (image[..., 0] > image[..., 2]).any()
        dropped += 0 < share < 0.3
    assert dropped > 3


def test_random_views_use_the_whole_range_of_scales_and_positions():
    def view(seed):
        found, _ = random_view(
            tf.constant(60),
            tf.constant(90),
            tf.stack([seed, 7]),
            image_size=SIZE,
            augmentation="crop_flip",
            keep_aspect=True,
        )
        return found

    views = list(tf.data.Dataset.range(1000).map(view).as_numpy_iterator())
    scales, shifts, flips = (np.array(values) for values in zip(*views, strict=True))
    factors = scales[:, 0] * 90 / SIZE
    np.testing.assert_allclose(scales[:, 0], scales[:, 1])
    assert 0.5 <= factors.min() < 0.51 and 1.97 < factors.max() <= 2.0
    assert abs(np.median(factors) - 1) < 0.05  # halving is as likely as doubling
    assert 0.45 < flips.mean() < 0.55
    excess = np.maximum(scales * (60, 90) - SIZE, 0)
    assert (shifts <= 0).all() and (shifts >= -excess - 1e-4).all()
    for axis in (0, 1):
        places = -shifts[:, axis][excess[:, axis] > 0] / excess[:, axis][excess[:, axis] > 0]
        assert places.min() < 0.02 and places.max() > 0.98 and abs(places.mean() - 0.5) < 0.05


def test_color_changes_leave_boxes_and_gray_alone():
    box = (11, 23, 37, 71)
    encoded, label = picture(60, 90, box), label_of([*box, 3, 0])
    plain = BoxPreprocessing(image_size=SIZE, augmentation="crop_flip")
    colored = dataclasses.replace(plain, augmentation="crop_flip_color")
    pairs = zip(trained(plain, encoded, label, 20), trained(colored, encoded, label, 20), strict=True)
    changed = 0
    for (plain_image, plain_labels), (image, labels) in pairs:
        np.testing.assert_array_equal(plain_labels["boxes"], labels["boxes"])
        gray = (plain_image == 0.5).all(axis=-1)
        np.testing.assert_array_equal((image == 0.5).all(axis=-1), gray)
        changed += np.abs(image - plain_image).max() > 0.02
    assert changed > 15


def test_everything_random_depends_on_the_seed():
    box = (11, 23, 37, 71)
    preprocessing = BoxPreprocessing(image_size=SIZE, augmentation="crop_flip_color")
    encoded, label = picture(60, 90, box), label_of([*box, 3, 0])
    first, again, other = (
        preprocessing.training_example(encoded, label, tf.constant(seed, tf.int64)) for seed in ([1, 2], [1, 2], [1, 3])
    )
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1]["boxes"], again[1]["boxes"])
    assert np.abs(first[0] - other[0]).max() > 0.1
    trained_in_graph = trained(preprocessing, encoded, label, 2)[1]
    np.testing.assert_allclose(
        trained_in_graph[0], preprocessing.training_example(encoded, label, tf.constant([1, 7], tf.int64))[0], atol=1e-6
    )


def test_labels_are_made_by_the_function_from_outside():
    received = []

    def encode(boxes, classes, crowd):
        received.append((boxes.dtype, classes.dtype, crowd.dtype, boxes.shape[-1]))
        return {"count": tf.shape(boxes)[0]}

    preprocessing = BoxPreprocessing(image_size=SIZE, encode_boxes=encode)
    label = label_of([1, 2, 3, 4, 0, 0], [2, 2, 9, 9, 1, 1])
    for labels in (
        preprocessing.training_example(picture(20, 30, (1, 2, 3, 4)), label, tf.constant([0, 0]))[1],
        preprocessing.evaluation_example(picture(20, 30, (1, 2, 3, 4)), label)[1],
    ):
        assert labels["count"] == 2
    assert received == [(tf.float32, tf.int32, tf.bool, 4)] * 2


def test_measured_boxes_are_in_original_pixels_and_filled_up():
    label = label_of([1, 2, 3, 4, 0, 0], [2, 2, 9, 9, 1, 1])
    preprocessing = BoxPreprocessing(image_size=SIZE, most_boxes=3)
    image, truth = preprocessing.measured_example(picture(20, 30, (1, 2, 3, 4)), label)
    assert truth["boxes"].numpy().tolist() == [[1, 2, 3, 4], [2, 2, 9, 9], [0, 0, 0, 0]]
    assert truth["classes"].numpy().tolist() == [0, 1, -1]
    assert truth["crowd"].numpy().tolist() == [False, True, False]
    assert float(truth["scale"]) == pytest.approx(SIZE / 30)
    evaluated, _ = preprocessing.evaluation_example(picture(20, 30, (1, 2, 3, 4)), label)
    np.testing.assert_array_equal(image, evaluated)
    too_few = dataclasses.replace(preprocessing, most_boxes=1)
    dataset = tf.data.Dataset.from_tensors(label).map(
        lambda value: too_few.measured_example(picture(20, 30, (1, 2, 3, 4)), value)
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{TOO_MANY_BOXES} 1"):
        list(dataset)


def test_exif_rotation_is_applied_before_boxes():
    preprocessing = BoxPreprocessing(image_size=16, decoding=Decoding(exif="apply"))
    image, labels = preprocessing.evaluation_example(tf.constant(turned_photo()), label_of([0, 8, 12, 16, 0, 0]))
    assert ((image.numpy() == 0.5).all(axis=-1)).sum(axis=0).tolist() == [4] * 16  # 16 wide and 12 high
    assert labels["boxes"].numpy().tolist() == [[0, 8, 12, 16]]


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1), (1, 1)])
def test_extreme_images(height, width):
    label = label_of([0, 0, height, width, 0, 0])
    for augmentation in AUGMENTATIONS:
        preprocessing = BoxPreprocessing(image_size=SIZE, augmentation=augmentation)
        for image, labels in trained(preprocessing, picture(height, width, (0, 0, 0, 0)), label, 5):
            assert np.isfinite(image).all() and np.isfinite(labels["boxes"]).all()


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="Received: 'crop_flips'. Did you mean 'crop_flip'"):
        BoxPreprocessing(image_size=32, augmentation="crop_flips")
    with pytest.raises(UserError, match="image_size=0"):
        BoxPreprocessing(image_size=0)
    with pytest.raises(UserError, match="most_boxes=0"):
        BoxPreprocessing(image_size=8, most_boxes=0)
    assert BoxPreprocessing(image_size=8).resize_size == 8
