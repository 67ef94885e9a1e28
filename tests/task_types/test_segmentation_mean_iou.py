"""The metrics agree with each other, with Keras's own and with a calculation by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.tasks.segmentation.mean_iou import (
    MeanIoU,
    PixelAccuracy,
    bootstrap_interval,
    confusion_of,
    iou_of_each_class,
    miou,
    pixel_accuracy,
)

CLASSES = 5  # the last one never occurs


def data(count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.integers(-1, CLASSES - 1, (count, 7, 8))
    masks[1] = -1
    logits = rng.normal(size=(count, 7, 8, CLASSES)).astype(np.float32)
    logits[..., -1] = -9
    np.put_along_axis(logits, np.maximum(masks, 0)[..., None], 1.5, axis=-1)
    return masks, logits


def sets_of_pixels(masks: np.ndarray, predictions: np.ndarray) -> float:
    """The definition: intersection over union of two sets of pixels, for each class that occurs in either."""
    ious = []
    for number in range(CLASSES):
        truth = {index for index, value in np.ndenumerate(masks) if value == number}
        found = {index for index, value in np.ndenumerate(predictions) if value == number and masks[index] >= 0}
        if truth | found:
            ious.append(len(truth & found) / len(truth | found))
    return float(np.mean(ious))


def test_all_mean_ious_agree():
    masks, logits = data()
    predictions = logits.argmax(-1)
    expected = sets_of_pixels(masks, predictions)
    confusion = confusion_of(masks, predictions, CLASSES)
    assert confusion.shape == (6, CLASSES, CLASSES) and confusion.dtype == np.int64
    assert confusion.sum() == (masks >= 0).sum() and not confusion[1].any()
    assert miou(confusion) == pytest.approx(expected)
    assert miou(confusion.sum(0)) == pytest.approx(expected)
    assert pixel_accuracy(confusion) == pytest.approx((predictions == masks)[masks >= 0].mean())
    metrics = [MeanIoU(CLASSES), PixelAccuracy()]
    for part in (slice(0, 4), slice(4, 6)):
        for metric in metrics:
            metric.update_state(masks[part].astype(np.float32), logits[part])
    assert float(metrics[0].result()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics[1].result()) == pytest.approx(pixel_accuracy(confusion), rel=1e-6)
    # Keras's own metric treats classes that do not occur in the same way.
    keras_metric = keras.metrics.MeanIoU(CLASSES, ignore_class=-1)
    keras_metric.update_state(masks, predictions)
    assert float(keras_metric.result()) == pytest.approx(expected, rel=1e-6)


def test_a_class_that_is_predicted_but_does_not_occur_counts_as_zero():
    masks, predictions = np.zeros((1, 2, 2), int), np.array([[[0, 0], [0, 1]]])
    assert miou(confusion_of(masks, predictions, 3)) == pytest.approx((0.75 + 0) / 2)
    np.testing.assert_array_equal(iou_of_each_class(confusion_of(masks, predictions, 3)), [0.75, 0, np.nan])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_images_of_weight_0_are_left_out_and_all_others_count_equally(jit_compile):
    masks, logits = data()
    weights = np.array([1.0, 3.0, 0.0, 0.5, 0.0, 2.0], np.float32)
    for make in (lambda: MeanIoU(CLASSES), PixelAccuracy):
        weighted, chosen = make(), make()
        tf.function(weighted.update_state, jit_compile=jit_compile)(
            tf.constant(masks), tf.constant(logits), tf.constant(weights)
        )
        chosen.update_state(masks[weights > 0], logits[weights > 0])
        assert float(weighted.result()) == float(chosen.result()) > 0
        weighted.reset_state()
        assert float(weighted.result()) == 0
        assert not any(np.any(variable) for variable in weighted.variables)


def test_counts_are_exact_beyond_the_range_of_float32():
    metric = PixelAccuracy()
    metric._total.assign(2**24)
    metric._hits.assign(2**24)
    metric.update_state(np.array([[[0]]]), np.array([[[[0.0, 1.0]]]], np.float32))
    assert int(metric._total) == 2**24 + 1


def test_the_metrics_survive_their_configuration():
    again = keras.metrics.deserialize(keras.metrics.serialize(MeanIoU(4, name="mine")))
    assert isinstance(again, MeanIoU) and (again.num_classes, again.name) == (4, "mine")
    assert keras.metrics.deserialize(keras.metrics.serialize(PixelAccuracy())).name == "pixel_accuracy"


def test_the_bootstrap_interval_covers_the_true_value():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        # Of 25 pixels of each class, a share that differs from image to image is right: the mIoU tends to 0.6 / 1.4.
        right = rng.binomial(25, rng.beta(6, 4, (40, 2)))
        wrong = 25 - right
        confusion = np.stack([np.stack([right[:, 0], wrong[:, 0]], -1), np.stack([wrong[:, 1], right[:, 1]], -1)], 1)
        low, high = bootstrap_interval(confusion, samples=300)
        assert low < miou(confusion) < high
        covered += low < 0.6 / 1.4 < high
    assert 50 <= covered <= 60


def test_a_paired_interval_is_narrower_than_the_images_vary():
    rng = np.random.default_rng(0)
    right = rng.integers(5, 20, 50)
    one = np.array([[[hit, 20 - hit], [20 - hit, hit]] for hit in right])
    other = np.array([[[hit - 2, 22 - hit], [22 - hit, hit - 2]] for hit in right])
    low, high = bootstrap_interval(one, other)
    assert 0 < low < miou(one) - miou(other) < high
    alone = bootstrap_interval(one)
    assert high - low < (alone.high - alone.low) / 3
    assert bootstrap_interval(one, one) == (0, 0)
    assert (
        bootstrap_interval(one, other)
        == bootstrap_interval(one, other, seed=0)
        != bootstrap_interval(one, other, seed=1)
    )


def test_draws_without_labeled_pixels_are_left_out():
    confusion = np.zeros((3, 2, 2), int)
    confusion[0] = [[3, 1], [1, 3]]
    assert bootstrap_interval(confusion) == pytest.approx((0.6, 0.6))


def test_wrong_arguments_are_refused():
    masks, logits = data()
    predictions = logits.argmax(-1)
    with pytest.raises(UserError, match=r"masks of shape \(6, 7, 8\), predictions of shape \(5, 7, 8\)"):
        confusion_of(masks, predictions[:5], CLASSES)
    with pytest.raises(
        UserError, match=r"Masks must be in 0..2 or -1 for ignored pixels. Received: values from -1 to 3"
    ):
        confusion_of(masks, predictions, 3)
    with pytest.raises(UserError, match=r"Predictions must be in 0..4. Received: values from -1 to"):
        confusion_of(masks, masks, CLASSES)
    with pytest.raises(UserError, match="Predictions must hold integers. Received: type float32"):
        confusion_of(masks, logits[..., 0], CLASSES)
    with pytest.raises(
        UserError, match=r"at least one labeled pixel. Received: a confusion matrix of shape \(4, 2, 2\)"
    ):
        miou(np.zeros((4, 2, 2), int))
    with pytest.raises(UserError, match=r"Received: shape \(2, 3\)"):
        miou(np.zeros((2, 3), int))
    with pytest.raises(UserError, match=r"Received: \(2, 2, 2\) and \(3, 2, 2\)"):
        bootstrap_interval(np.ones((2, 2, 2), int), np.ones((3, 2, 2), int))
    with pytest.raises(UserError, match="samples=0"):
        bootstrap_interval(np.ones((2, 2, 2), int), samples=0)
