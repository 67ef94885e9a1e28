"""The common corruptions: their effect on an image, and the errors that are computed from them."""

import types

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.data.preprocessing import Preprocessing
from robust_tf.errors import UserError
from robust_tf.evaluation import corruption_error
from robust_tf.evaluation.corruption_error import (
    corrupted_images,
    error_of,
    mean_corruption_error,
    relative_corruption_error,
)
from robust_tf.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from robust_tf.evaluation.subject import Images


def picture(size: int) -> np.ndarray:
    """Makes a color image with smooth areas, an edge and texture."""
    y, x = np.mgrid[:size, :size] / size
    image = np.stack([0.2 + 0.6 * x, 0.3 + 0.4 * y, 0.5 + 0.3 * np.sin(20 * x * y)], axis=-1)
    image[size // 3 : 3 * size // 5, size // 5 : size // 2] = (0.9, 0.2, 0.1)
    return np.round(image * 255).astype(np.float32)[None] / np.float32(255)


def distance(image: np.ndarray, name: str, severity: int) -> float:
    """Returns the root mean square of the change, over a few random draws."""
    copies = np.repeat(image, 4, axis=0)
    return float(np.sqrt(np.mean((corrupt(copies, name, severity, ids=range(4)) - copies) ** 2)))


def test_there_are_fifteen_corruptions_with_five_severities():
    assert len(CORRUPTIONS) == 15
    assert all(len(corruption.large) == len(corruption.small) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("size", [16, 32, 96])
def test_a_corruption_changes_the_image_and_the_highest_severity_changes_it_most(size):
    image = picture(size)
    for name in CORRUPTIONS:
        results = [corrupt(image, name, severity, ids=[3]) for severity in SEVERITIES]
        for result in results:
            assert result.shape == image.shape and result.dtype == np.float32
            assert result.min() >= 0 and result.max() <= 1
            np.testing.assert_allclose(result * 255, np.round(result * 255), atol=1e-4)  # eight bits, as published
        assert all(np.abs(result - image).max() > 1.5 / 255 for result in results[1:]), name
        # The severities of the first two differ in kind, and the third depends on where its blocks meet edges.
        if name not in ("elastic_transform", "glass_blur", "pixelate"):
            assert distance(image, name, 5) > 1.05 * distance(image, name, 1), name


def test_the_random_numbers_depend_on_the_image_and_not_on_its_batch():
    images = np.repeat(picture(16), 3, axis=0)
    together = corrupt(images, "snow", 3, ids=[5, 6, 7], seed=1)
    alone = corrupt(images[1:2], "snow", 3, ids=[6], seed=1)
    np.testing.assert_array_equal(together[1:2], alone)
    assert np.any(together[0] != together[1])
    assert np.any(corrupt(images[1:2], "snow", 3, ids=[6], seed=2) != alone)


def test_a_gray_image_stays_gray():
    gray = np.repeat(picture(16)[..., :1], 3, axis=-1)
    for name in CORRUPTIONS:
        result = corrupt(gray, name, 4, ids=[0])
        assert np.ptp(result, axis=-1).max() == 0, name


def test_simple_corruptions_have_the_documented_values():
    image = picture(32)
    mean = image.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(image, "contrast", 5, ids=[0]), (image - mean) * 0.15 + mean, atol=3e-3)
    brighter = corrupt(np.zeros((1, 16, 16, 3), np.float32), "brightness", 3, ids=[0])
    np.testing.assert_allclose(brighter, 0.15, atol=3e-3)
    orange = np.full((1, 16, 16, 3), (0.8, 0.4, 0.2), np.float32)
    np.testing.assert_allclose(corrupt(orange, "brightness", 2, ids=[0])[0, 0, 0], (0.9, 0.45, 0.225), atol=3e-3)
    noise = corrupt(np.full((1, 64, 64, 3), 0.5, np.float32), "gaussian_noise", 5, ids=[0]) - 0.5
    assert noise.std() == pytest.approx(0.10, rel=0.05) and abs(noise.mean()) < 0.005
    salt = corrupt(np.full((1, 64, 64, 3), 0.5, np.float32), "impulse_noise", 5, ids=[0])
    assert np.mean((salt == 0) | (salt == 1)) == pytest.approx(0.07, abs=0.01)
    photons = corrupt(np.full((1, 64, 64, 3), 0.5, np.float32), "shot_noise", 5, ids=[0])
    assert photons.std() == pytest.approx(np.sqrt(0.5 / 50), rel=0.05)  # Poisson: variance = mean / photons


def test_blurs_leave_a_flat_image_unchanged():
    flat = np.full((1, 32, 32, 3), 0.4, np.float32)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"):
        np.testing.assert_allclose(corrupt(flat, name, 5, ids=[0]), 0.4, atol=3e-3)


@pytest.mark.parametrize(("name", "severity", "message"), [("fogg", 1, "Did you mean 'fog'"), ("fog", 6, "severity=6")])
def test_an_unknown_corruption_is_refused(name, severity, message):
    with pytest.raises(UserError, match=message):
        corrupt(picture(16), name, severity, ids=[0])


def test_mean_and_relative_corruption_errors_of_known_errors():
    ours = {"fog": [0.1, 0.3], "snow": [0.4, 0.4]}
    assert mean_corruption_error(ours) == pytest.approx(0.3)
    # (0.4 / 0.8 + 0.8 / 0.4) / 2, not the ratio of the means
    assert relative_corruption_error(ours, {"fog": [0.4, 0.4], "snow": [0.1, 0.3]}) == pytest.approx(1.25)
    assert relative_corruption_error(ours, ours) == pytest.approx(1.0)
    assert relative_corruption_error(ours, {"fog": [0.0, 0.0], "snow": [1.0, 1.0]}) is None


def test_the_error_is_the_share_of_wrong_predictions():
    images = Images(np.arange(4), np.zeros((4, 2, 2, 3), np.float32), np.array([0, 1, 1, 1]))
    assert error_of(lambda pixels: np.tile([0.0, 1.0], (len(pixels), 1)), images) == 0.25


def subject_of(dataset: str, classes: tuple[int, ...] = ()) -> types.SimpleNamespace:
    preprocessing = Preprocessing(image_size=8, resize_size=8, augmentation="none")
    task = types.SimpleNamespace(class_preprocessing=preprocessing, image_size=8, resize_size=8)
    return types.SimpleNamespace(dataset=dataset, classes=classes, task=task)


class PreparedSet:
    """Stands for a TFDS builder, with ten images whose pixels are equal to their severity."""

    def __init__(self, reference: str, data_dir: str | None) -> None:
        self.reference, self.data_dir = reference, data_dir

    def is_prepared(self) -> bool:
        return self.data_dir == "prepared"

    def as_dataset(self, *, split: str, decoders: object, shuffle_files: bool) -> tf.data.Dataset:
        assert split == "test" and not shuffle_files
        level = int(self.reference.partition(":")[0][-1])
        png = tf.io.encode_png(tf.fill([8, 8, 3], tf.constant(level, tf.uint8))).numpy()
        return tf.data.Dataset.from_tensor_slices({"image": [png] * 10, "label": np.arange(10)})


def test_the_corrupted_set_of_tfds_is_used_if_it_is_prepared(monkeypatch):
    monkeypatch.setattr(corruption_error.tfds, "builder", PreparedSet)
    clean = Images(np.array([1, 5, 8]), np.zeros((3, 8, 8, 3), np.float32), np.array([1, 5, 8]))
    source, read = corrupted_images(subject_of("cifar10"), clean, source="auto", data_dir="prepared", seed=0)
    assert source == "cifar10_corrupted:1.0.0 (TFDS)"
    images = read("glass_blur", 4)
    assert images.pixels.shape == (3, 8, 8, 3) and np.all(np.round(images.pixels * 255) == 4)
    np.testing.assert_array_equal(images.labels, images.ids)
    for dataset, classes, data_dir in (("cifar10", (), "not"), ("cifar10", (1, 2), "prepared"), ("digits", (), "")):
        subject = subject_of(dataset, classes)
        source, _ = corrupted_images(subject, clean, source="auto", data_dir=data_dir, seed=0)
        assert source == "computed"
        with pytest.raises(UserError, match=f"Received: {dataset}"):
            corrupted_images(subject, clean, source="tfds", data_dir=data_dir, seed=0)


def test_computed_corruptions_keep_ids_and_labels():
    clean = Images(np.array([1, 5]), np.repeat(picture(16), 2, axis=0), np.array([3, 4]))
    _, read = corrupted_images(subject_of("digits"), clean, source="computed", data_dir="", seed=2)
    images = read("fog", 2)
    expected = corrupt(clean.pixels, "fog", 2, ids=[1, 5], seed=2)
    assert images.ids.tolist() == [1, 5] and images.labels.tolist() == [3, 4]
    np.testing.assert_array_equal(images.pixels, expected)
