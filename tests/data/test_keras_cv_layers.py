"""RandAugment, MixUp and CutMix: their range, the effect of the seed, and labels that agree with the pixels."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from robust_tf.data import keras_cv_layers
from robust_tf.data.keras_cv_layers import mix, rand_augment

IMAGE = tf.constant(load_sample_images().images[0][100:148, 200:256] / 255.0, tf.float32)


def seed(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def test_the_seed_decides_rand_augment_in_parallel_calls():
    augment = tf.function(
        lambda number: rand_augment(IMAGE, tf.stack([tf.constant(5, tf.int64), number]), magnitude=0.5)
    )
    numbers = tf.data.Dataset.range(40)
    first, second = (np.stack(list(numbers.map(augment, num_parallel_calls=8).as_numpy_iterator())) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (40, *IMAGE.shape) and first.dtype == np.float32
    assert first.min() >= 0 and first.max() <= 1
    unchanged = np.isclose(first, IMAGE, atol=1e-5).all(axis=(1, 2, 3)).sum()
    assert unchanged <= 4  # (1/11)^2 of them, and operations with little effect
    assert len({image.tobytes() for image in first}) >= 30


def test_every_operation_has_a_different_effect():
    strength = keras_cv_layers._Strength(seed(3), 0.7)
    results = [operation(IMAGE[None] * 255.0, strength).numpy() for operation in keras_cv_layers._operations()]
    assert len(results) == 10
    for number, result in enumerate(results):
        assert result.shape == (1, *IMAGE.shape) and np.isfinite(result).all()
        assert np.abs(result[0] - IMAGE.numpy() * 255.0).mean() > 1, number
        assert all(np.abs(result - other).mean() > 0.5 for other in results[:number]), number


def test_a_larger_magnitude_changes_more():
    changes = [
        np.mean([np.abs(rand_augment(IMAGE, seed(n), magnitude=m) - IMAGE).mean() for n in range(25)])
        for m in (0.1, 0.9)
    ]
    assert changes[1] > 1.3 * changes[0]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_the_shares_of_the_pixels(kind):
    """Each class has a color, so the mean color is the label."""
    labels = tf.constant([0, 1, 2, 0, 1, 2, 2, 1])
    images = tf.tile(tf.one_hot(labels, 3)[:, None, None, :], (1, 12, 18, 1))
    mixed, shares = mix(images, labels, seed(1), kind=kind, num_classes=3)
    assert mixed.shape == images.shape and shares.dtype == tf.float32
    np.testing.assert_allclose(tf.reduce_mean(mixed, axis=(1, 2)), shares, atol=1e-5)
    np.testing.assert_allclose(tf.reduce_sum(shares, axis=1), 1.0, atol=1e-5)
    assert np.any((shares > 0.02) & (shares < 0.98))
    is_pure = np.isin(mixed, (0.0, 1.0)).all()
    assert is_pure == (kind == "cutmix")  # CutMix copies pixels, MixUp blends them


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_seed_decides_mixing_at_any_precision(kind):
    tf.keras.config.set_dtype_policy("mixed_bfloat16")
    images = tf.random.stateless_uniform([6, 8, 8, 3], [1, 2])
    labels = tf.range(6)
    call = tf.function(lambda s: mix(images, labels, s, kind=kind, num_classes=6))
    first, again, other = (call(seed(number)) for number in (1, 1, 2))
    assert first[0].dtype == first[1].dtype == tf.float32
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.abs(first[1] - other[1]).max() > 0.01


def test_mixing_leaves_a_single_image_unchanged():
    for kind in ("mixup", "cutmix"):
        images, labels = mix(IMAGE[None], tf.constant([1]), seed(0), kind=kind, num_classes=2)
        np.testing.assert_allclose(images[0], IMAGE, atol=1e-6)
        np.testing.assert_allclose(labels, [[0.0, 1.0]])
