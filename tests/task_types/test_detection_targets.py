"""Boxes and the labels of anchors, compared with plain programs."""

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.tasks.detection import BoxEncoder, anchors_of, assign
from robust_tf.tasks.detection.boxes import clip, covered_share, decode, encode, pairwise_iou

ANCHORS = anchors_of({3: 8, 4: 4, 5: 2})
NONE = (np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool))


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low = rng.uniform(0, 50, (count, 2))
    return np.concatenate([low, low + rng.uniform(2, 40, (count, 2))], axis=1).astype(np.float32)


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Returns the shared area of two boxes and both areas."""
    height, width = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return height * width, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])


def plain_labels(boxes, classes, crowd) -> tuple[list[int], list[int]]:
    """Returns the class of each anchor and the number of its box, or -1."""
    objects = [row for row in range(len(boxes)) if not crowd[row]]
    iou = np.zeros((len(ANCHORS), len(boxes)))
    share = np.zeros((len(ANCHORS), len(boxes)))
    for i, anchor in enumerate(ANCHORS):
        for row, box in enumerate(boxes):
            shared, area, other = overlap(anchor, box)
            if crowd[row]:
                share[i, row] = shared / area
            else:
                iou[i, row] = shared / (area + other - shared)
    claims: dict[int, int] = {}
    for row in objects:
        best = int(np.argmax(iou[:, row]))
        if iou[best, row] >= 0.1 and (best not in claims or iou[best, row] > iou[best, claims[best]]):
            claims[best] = row
    labels, rows = [], []
    for i in range(len(ANCHORS)):
        row = claims.get(i, int(np.argmax(iou[i])) if len(boxes) and iou[i].max() >= 0.5 else -1)
        rows.append(row)
        if row >= 0:
            labels.append(int(classes[row]))
        elif len(boxes) and (iou[i].max() >= 0.4 or share[i].max() >= 0.5):
            labels.append(-2)
        else:
            labels.append(-1)
    return labels, rows


@pytest.mark.parametrize("seed", range(8))
def test_labels_equal_a_plain_program(seed):
    rng = np.random.default_rng(seed)
    count = seed  # 0 boxes too
    boxes, classes, crowd = random_boxes(rng, count), rng.integers(5, size=count), rng.random(count) < 0.3
    labels = tf.function(assign)(ANCHORS, boxes, tf.cast(classes, tf.int32), crowd)
    expected, rows = plain_labels(boxes, classes, crowd)
    np.testing.assert_array_equal(labels["classes"], expected)
    positive = np.array(rows) >= 0
    np.testing.assert_array_equal(labels["boxes"][:, 4], positive)
    np.testing.assert_array_equal(labels["boxes"].numpy()[~positive], 0)
    found = decode(labels["boxes"][:, :4], ANCHORS).numpy()[positive]
    np.testing.assert_allclose(found, boxes[np.array(rows)[positive]], atol=1e-3)
    if seed == 7:  # the random cases contain all kinds
        assert {-2, -1} < set(expected) and crowd.any()


def test_no_boxes_is_background():
    labels = assign(ANCHORS, *NONE)
    assert (labels["classes"].numpy() == -1).all() and not labels["boxes"].numpy().any()


def test_a_small_box_has_its_best_anchor_but_a_tiny_one_has_none():
    small, tiny = np.array([[12, 12, 28, 28]], np.float32), np.array([[17, 17, 24, 24]], np.float32)
    assert pairwise_iou(ANCHORS, small).numpy().max() < 0.4
    for boxes, count in ((small, 1), (tiny, 0)):
        labels = assign(ANCHORS, boxes, tf.constant([3]), tf.constant([False]))
        assert (labels["classes"].numpy() == 3).sum() == count


def test_a_box_keeps_its_best_anchor_although_another_box_overlaps_it_more():
    anchors = np.array([[0, 0, 32, 32], [0, 0, 30, 32]], np.float32)
    boxes = np.array([[0, 0, 30, 32], [20, 10, 32, 30]], np.float32)  # IoU 0.94 and 0.23 with the first anchor
    labels = assign(anchors, boxes, tf.constant([3, 4]), tf.constant([False, False]))
    assert labels["classes"].numpy().tolist() == [4, 3]
    np.testing.assert_allclose(decode(labels["boxes"][:, :4], anchors), boxes[::-1], atol=1e-3)


def test_anchors_in_a_crowd_are_ignored():
    labels = assign(ANCHORS, tf.constant([[0.0, 0.0, 64.0, 64.0]]), tf.constant([2]), tf.constant([True]))
    inside = covered_share(ANCHORS, np.array([[0, 0, 64, 64]], np.float32)).numpy()[:, 0] >= 0.5
    np.testing.assert_array_equal(labels["classes"], np.where(inside, -2, -1))
    assert inside.any() and not inside.all()


def test_the_encoder_works_in_a_pipeline_with_static_shapes():
    boxes = np.array([[8, 8, 40, 40]], np.float32)
    images = tf.data.Dataset.from_tensors((boxes, np.array([1], np.int32), np.array([False])))
    dataset = images.map(BoxEncoder(ANCHORS)).batch(1)
    assert {name: spec.shape[1:] for name, spec in dataset.element_spec.items()} == {
        "boxes": (len(ANCHORS), 5),
        "classes": (len(ANCHORS),),
    }
    labels = next(iter(dataset))
    assert labels["classes"].dtype == tf.int32 and 1 in labels["classes"].numpy()


@pytest.mark.parametrize("anchors", [np.zeros((4,)), np.zeros((0, 4)), np.zeros((3, 5))])
def test_bad_anchors_are_refused(anchors):
    with pytest.raises(UserError, match=f"Received: shape .{anchors.shape[0]}"):
        BoxEncoder(anchors)


def test_encoding_has_the_usual_form_and_an_inverse():
    rng = np.random.default_rng(0)
    boxes, anchors = random_boxes(rng, 50), random_boxes(rng, 50)
    offsets = encode(boxes, anchors).numpy()
    edges = anchors[:, 2:] - anchors[:, :2]
    moved = ((boxes[:, 2:] + boxes[:, :2]) - (anchors[:, 2:] + anchors[:, :2])) / 2
    np.testing.assert_allclose(offsets[:, :2], moved / edges / 0.1, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        offsets[:, 2:], np.log((boxes[:, 2:] - boxes[:, :2]) / edges) / 0.2, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(decode(offsets, anchors), boxes, atol=1e-3)


def test_extreme_boxes_stay_finite():
    anchors = np.array([[0, 0, 8, 8]], np.float32)
    assert np.isfinite(encode(np.array([[3, 3, 3, 3]], np.float32), anchors)).all()
    decoded = decode(tf.constant([[1e4, -1e4, 1e4, -1e4]]), anchors)
    assert np.isfinite(decoded).all() and (decoded[:, 2:] > decoded[:, :2]).numpy().all()
    np.testing.assert_array_equal(clip(tf.constant([[-5.0, 3.0, 70.0, 64.0]]), 64), [[0, 3, 64, 64]])


def test_iou():
    boxes = np.array([[0, 0, 10, 10], [0, 5, 10, 15], [20, 20, 30, 30], [5, 5, 5, 5]], np.float32)
    expected = [[1, 1 / 3, 0, 0], [1 / 3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(pairwise_iou(boxes, boxes), expected, atol=1e-6)
