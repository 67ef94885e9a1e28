"""Decoding, compared with a plain non-maximum suppression, in graphs and in exported models."""

import numpy as np
import pytest
import tensorflow as tf

from robust_tf.tasks.detection import anchors_of, decode_detections
from robust_tf.tasks.detection.boxes import clip, decode

ANCHORS = anchors_of({3: 8, 4: 4})


def random_outputs(seed: int, num_classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "boxes": rng.normal(0, 1.5, (2, len(ANCHORS), 4)).astype(np.float32),
        "classes": rng.normal(-2.5, 1.5, (2, len(ANCHORS), num_classes)).astype(np.float32),
    }


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    height, width = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - height * width
    return height * width / union if union > 0 else 0.0


def plain_detections(boxes, logits, *, most, score_threshold, iou_threshold):
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    places = np.argsort(-scores.ravel(), kind="stable")[:1000]
    kept: list[tuple[float, int, np.ndarray]] = []
    for place in places:
        row, label = divmod(int(place), logits.shape[1])
        score = scores[row, label]
        same = (plain_iou(boxes[row], box) <= iou_threshold for _, other, box in kept if other == label)
        if score > score_threshold and all(same):
            kept.append((score, label, boxes[row]))
    return kept[:most]


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {}),
        (1, {"most": 7}),
        (2, {"score_threshold": 0.6}),
        (3, {"iou_threshold": 0.3, "score_threshold": 0.2}),
        (4, {"score_threshold": 0.9999}),
    ],
)
def test_equals_a_plain_program(seed, options):
    outputs = random_outputs(seed)
    found = decode_detections(outputs, ANCHORS, image_size=64, **options)
    options = {"most": 100, "score_threshold": 0.05, "iou_threshold": 0.5} | options
    boxes = clip(decode(outputs["boxes"], ANCHORS), 64).numpy()
    for image in range(2):
        expected = plain_detections(boxes[image], outputs["classes"][image], **options)
        count = int(found["count"][image])
        assert count == len(expected)
        np.testing.assert_array_equal(found["classes"][image, :count], [label for _, label, _ in expected])
        np.testing.assert_allclose(found["scores"][image, :count], [score for score, _, _ in expected], rtol=1e-5)
        np.testing.assert_allclose(
            found["boxes"][image, :count], np.reshape([box for *_, box in expected], (-1, 4)), rtol=1e-5
        )
        assert (found["classes"].numpy()[image, count:] == -1).all()
        assert not found["scores"].numpy()[image, count:].any() and not found["boxes"].numpy()[image, count:].any()


def test_equal_boxes_of_different_classes_stay():
    logits = np.full((1, len(ANCHORS), 3), -9.0, np.float32)
    logits[0, 5] = [2.0, 1.0, -9.0]
    logits[0, 6, 0] = 1.5  # overlaps anchor 5 and has the same class
    outputs = {"boxes": np.zeros((1, len(ANCHORS), 4), np.float32), "classes": logits}
    found = decode_detections(outputs, ANCHORS, image_size=64, iou_threshold=0.3)
    assert found["classes"][0, :3].numpy().tolist() == [0, 1, -1]
    np.testing.assert_array_equal(found["boxes"][0, 0], found["boxes"][0, 1])


def test_fewer_scores_than_candidates():
    few = ANCHORS[:2]
    outputs = {"boxes": np.zeros((1, 2, 4), np.float32), "classes": np.array([[[3.0], [-9.0]]], np.float32)}
    found = decode_detections(outputs, few, image_size=64, most=5)
    assert found["count"].numpy().tolist() == [1] and found["boxes"].shape == (1, 5, 4)


def test_export_has_static_shapes_and_equal_results(tmp_path):
    class Decoder(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec([None, len(ANCHORS), 4], tf.float32),
                tf.TensorSpec([None, len(ANCHORS), 3], tf.float32),
            ]
        )
        def __call__(self, boxes, classes):
            return decode_detections({"boxes": boxes, "classes": classes}, ANCHORS, image_size=64, most=20)

    decoder = Decoder()
    shapes = decoder.__call__.get_concrete_function().structured_outputs
    assert {name: tuple(spec.shape) for name, spec in shapes.items()} == {
        "boxes": (None, 20, 4),
        "scores": (None, 20),
        "classes": (None, 20),
        "count": (None,),
    }
    assert shapes["classes"].dtype == shapes["count"].dtype == tf.int32
    tf.saved_model.save(decoder, tmp_path)
    outputs = random_outputs(5)
    restored = tf.saved_model.load(tmp_path)(outputs["boxes"], outputs["classes"])
    expected = decode_detections(outputs, ANCHORS, image_size=64, most=20)
    for name, value in expected.items():
        np.testing.assert_array_equal(restored[name], value)
