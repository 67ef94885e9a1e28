"""The losses of a detector, compared with plain programs; each image counts by itself, also in an attack."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_tf.tasks.detection import BoxLoss, FocalLoss
from robust_tf.tasks.detection.boxes import decode


def labels_and_outputs(seed: int = 0, *, images: int = 3, anchors: int = 40, num_classes: int = 4):
    rng = np.random.default_rng(seed)
    classes = rng.integers(-2, num_classes, (images, anchors))
    classes[-1] = rng.integers(-2, 0, anchors)  # the last image has no objects
    offsets = rng.normal(0, 2, (images, anchors, 4)).astype(np.float32)
    boxes = np.concatenate([offsets, (classes >= 0)[..., None]], axis=-1).astype(np.float32)
    outputs = {
        "boxes": rng.normal(0, 2, (images, anchors, 4)).astype(np.float32),
        "classes": rng.normal(0, 3, (images, anchors, num_classes)).astype(np.float32),
    }
    return {"boxes": boxes, "classes": classes.astype(np.float32)}, outputs


def plain_focal(labels: np.ndarray, logits: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    totals = []
    for row, scores in zip(labels, logits.astype(np.float64), strict=True):
        total, positive = 0.0, 0
        for label, values in zip(row, scores, strict=True):
            positive += label >= 0
            for index, value in enumerate(values):
                p = 1 / (1 + np.exp(-value))
                p, weight = (p, alpha) if index == label else (1 - p, 1 - alpha)
                total += 0 if label == -2 else -weight * (1 - p) ** gamma * np.log(p)
        totals.append(total / max(positive, 1))
    return np.array(totals)


def plain_giou(a: np.ndarray, b: np.ndarray) -> float:
    def area(box):
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - shared
    return shared / union - (hull - union) / hull


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.4, 1.5)])
def test_focal_loss_equals_a_plain_program(alpha, gamma):
    labels, outputs = labels_and_outputs()
    found = FocalLoss(alpha=alpha, gamma=gamma).call(labels["classes"], outputs["classes"])
    expected = plain_focal(labels["classes"], outputs["classes"], alpha, gamma)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with_axis = FocalLoss(alpha=alpha, gamma=gamma).call(labels["classes"][..., None], outputs["classes"])
    np.testing.assert_array_equal(found, with_axis)


def test_focal_loss_without_focus_is_the_binary_crossentropy():
    labels, outputs = labels_and_outputs(anchors=10)
    labels["classes"][:] = np.maximum(labels["classes"], 0)  # every anchor is positive
    one_hot = np.eye(4, dtype=np.float32)[labels["classes"].astype(int)]
    expected = keras.losses.binary_crossentropy(one_hot, outputs["classes"], from_logits=True)
    found = FocalLoss(alpha=0.5, gamma=0.0).call(labels["classes"], outputs["classes"])
    np.testing.assert_allclose(found, 0.5 * 4 * np.mean(expected, axis=1), rtol=1e-5)


def test_box_loss_is_the_generalized_iou_of_boxes_in_pixels():
    """It is computed without the anchors, but equals the loss of the decoded boxes for any anchors."""
    labels, outputs = labels_and_outputs()
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 50, (40, 2))
    anchors = np.concatenate([low, low + rng.uniform(5, 40, (40, 2))], axis=1).astype(np.float32)
    true, predicted = (decode(x[..., :4], anchors).numpy() for x in (labels["boxes"], outputs["boxes"]))
    found = BoxLoss().call(labels["boxes"], outputs["boxes"]).numpy()
    for image in range(3):
        rows = np.flatnonzero(labels["boxes"][image, :, 4])
        values = [1 - plain_giou(true[image, row], predicted[image, row]) for row in rows]
        assert found[image] == pytest.approx(np.mean(values) if values else 0.0, rel=1e-4)
    assert found[-1] == 0


def test_perfect_predictions():
    labels, outputs = labels_and_outputs()
    perfect = np.where(labels["classes"][..., None] == np.arange(4), 20.0, -20.0).astype(np.float32)
    assert np.max(FocalLoss().call(labels["classes"], perfect)) < 1e-6
    assert np.max(np.abs(BoxLoss().call(labels["boxes"], labels["boxes"][..., :4]))) < 1e-5


@pytest.mark.parametrize(("name", "loss"), [("boxes", BoxLoss()), ("classes", FocalLoss())])
def test_an_image_does_not_depend_on_its_batch(name, loss):
    labels, outputs = labels_and_outputs()
    together = loss.call(labels[name], outputs[name])
    alone = [loss.call(labels[name][i : i + 1], outputs[name][i : i + 1])[0] for i in range(3)]
    assert together.shape == (3,)
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e30])
@pytest.mark.parametrize(
    ("name", "loss"), [("boxes", BoxLoss()), ("classes", FocalLoss()), ("classes", FocalLoss(0.3, 0.5))]
)
def test_values_and_gradients_are_finite(name, loss, scale):
    labels, outputs = labels_and_outputs()
    values = tf.constant(outputs[name] * np.float32(scale))
    values = tf.concat([tf.zeros_like(values[:, :1]), values[:, 1:]], axis=1)
    with tf.GradientTape() as tape:
        tape.watch(values)
        losses = loss.call(labels[name], values)
    gradient = tape.gradient(losses, values).numpy()
    assert np.isfinite(losses).all() and np.isfinite(gradient).all()
    ignored = labels["classes"] == -2 if name == "classes" else labels["boxes"][..., 4] == 0
    assert not gradient[ignored].any()


@pytest.mark.parametrize("loss", [BoxLoss(), FocalLoss(alpha=0.4, gamma=1.0)])
def test_losses_can_be_saved(loss):
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(restored) is type(loss) and restored.get_config() == loss.get_config()
