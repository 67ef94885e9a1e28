"""Detections from the outputs of a detector: boxes with a class and a score, without duplicates."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from robust_tf.tasks.detection.boxes import clip, decode

# Only the candidates of the highest scores are compared with each other, as in the paper on RetinaNet.
MOST_CANDIDATES = 1000
MOST_DETECTIONS = 100  # as many as COCO's average precision counts
SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5


def decode_detections(
    outputs: Mapping[str, tf.Tensor],
    anchors: np.ndarray,
    *,
    image_size: int,
    most: int = MOST_DETECTIONS,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
) -> dict[str, tf.Tensor]:
    """Returns the detections in each image. The function runs eagerly and in graphs, with static shapes.

    The 1000 highest scores of an image, over all anchors and classes, are candidates. In each class, non-maximum
    suppression removes a candidate whose IoU to one of a higher score is above the threshold.

    Args:
        outputs: Outputs of the detector: "boxes", offsets (batch, A, 4), and "classes", logits (batch, A, num_classes).
        anchors: Anchors of the detector, (A, 4) float32 in pixels.
        image_size: Height and width of the images that the detector takes, in pixels. Boxes are clipped to it.
        most: Largest number of detections in an image.
        score_threshold: Lowest score of a detection, in [0, 1].
        iou_threshold: Highest IoU of two detections of the same class, in [0, 1].

    Returns:
        Detections by descending score, padded to `most`. "boxes": (batch, most, 4) float32 [top, left, bottom, right]
        in pixels. "scores": (batch, most) float32, probabilities. "classes": (batch, most) int32, -1 in the padding.
        "count": (batch,) int32, the number of detections.

    Source: Lin et al. 2017, arXiv 1708.02002, section 4 (inference).

    Example:
        >>> import numpy
        >>> outputs = {"boxes": tf.zeros([1, 2, 4]), "classes": tf.constant([[[-9.0, 9.0], [-9.0, -9.0]]])}
        >>> anchors = numpy.array([[0, 0, 8, 8], [0, 8, 8, 16]], numpy.float32)
        >>> found = decode_detections(outputs, anchors, image_size=16, most=3)
        >>> found["count"].numpy().tolist(), found["classes"].numpy().tolist()
        ([1], [[1, -1, -1]])
    """
    logits = tf.cast(outputs["classes"], tf.float32)
    count, num_classes = logits.shape[1:]
    scores = tf.sigmoid(tf.reshape(logits, [-1, count * num_classes]))
    scores, places = tf.math.top_k(scores, k=min(MOST_CANDIDATES, count * num_classes))
    anchor, classes = places // num_classes, places % num_classes

    offsets = tf.gather(tf.cast(outputs["boxes"], tf.float32), anchor, axis=1, batch_dims=1)
    boxes = clip(decode(offsets, tf.gather(tf.constant(anchors, tf.float32), anchor)), image_size)
    # In the column of every other class a candidate has the score 0, which is below the threshold.
    by_class = scores[..., None] * tf.one_hot(classes, num_classes)
    boxes, scores, classes, found = tf.image.combined_non_max_suppression(
        boxes[:, :, None],
        by_class,
        max_output_size_per_class=most,
        max_total_size=most,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
        clip_boxes=False,
    )
    is_padding = tf.range(most)[None] >= found[:, None]
    classes = tf.where(is_padding, -1, tf.cast(classes, tf.int32))
    return {
        "boxes": tf.ensure_shape(boxes, [None, most, 4]),
        "scores": tf.ensure_shape(scores, [None, most]),
        "classes": tf.ensure_shape(classes, [None, most]),
        "count": found,
    }
