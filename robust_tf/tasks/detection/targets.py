"""Training labels of a detector: the class and the offsets that each anchor has to predict."""

import numpy as np
import tensorflow as tf

from robust_tf.errors import UserError
from robust_tf.tasks.detection.boxes import covered_share, encode, pairwise_iou

BACKGROUND, IGNORED = -1, -2
POSITIVE_IOU, BACKGROUND_IOU = 0.5, 0.4
# A box whose best anchor overlaps less than this gets no anchor. The offsets would be too large to learn.
LEAST_IOU = 0.1
CROWD_SHARE = 0.5


def assign(anchors: tf.Tensor, boxes: tf.Tensor, classes: tf.Tensor, crowd: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the labels of all anchors for one image. The function runs eagerly and in graphs such as tf.data's.

    An anchor with IoU >= 0.5 to a box is positive: it has to predict the box of the highest IoU. An anchor with IoU <
    0.4 to every box is background, and those between are ignored. In addition, the anchor with the highest IoU to a box
    is positive if this IoU is at least 0.1, because a small box may have no anchor with IoU >= 0.5. If several boxes
    claim the same anchor in this way, the one of the highest IoU gets it. Other anchors of which at least half lies in
    a crowd are ignored.

    Args:
        anchors: Anchors (A, 4) float32 [top, left, bottom, right] in pixels.
        boxes: Boxes of the objects and crowds, (n, 4) float32, in the same unit. n may be 0.
        classes: Classes of the boxes, (n,) int32.
        crowd: Whether a box contains a crowd instead of one object, (n,) bool.

    Returns:
        "boxes", (A, 5) float32: the offsets of `boxes.encode`, then 1.0 for positive anchors; all are 0.0 for others.
        "classes", (A,) int32: the class, -1 for background, or -2 for ignored anchors.

    Source: Lin et al. 2017, arXiv 1708.02002, section 4; the best anchor of each box is from Ren et al. 2015, arXiv
    1506.01497, section 3.1.2.

    Example:
        >>> anchors = tf.constant([[0.0, 0.0, 8.0, 8.0], [0.0, 8.0, 8.0, 16.0]])
        >>> labels = assign(anchors, anchors[:1], tf.constant([2]), tf.constant([False]))
        >>> labels["classes"].numpy().tolist(), labels["boxes"][:, 4].numpy().tolist()
        ([2, -1], [1.0, 0.0])
    """
    anchors = tf.convert_to_tensor(anchors, tf.float32)
    # An empty box without a class at the end, so that there is always one to take the maximum over. Its IoU is 0.
    boxes = tf.concat([tf.reshape(tf.cast(boxes, tf.float32), [-1, 4]), tf.zeros([1, 4])], axis=0)
    classes = tf.concat([tf.cast(classes, tf.int32), [BACKGROUND]], axis=0)
    crowd = tf.concat([tf.cast(crowd, tf.bool), [False]], axis=0)

    iou = tf.where(crowd[None], 0.0, pairwise_iou(anchors, boxes))
    highest = tf.reduce_max(iou, axis=1)
    best_anchor = tf.argmax(iou, axis=0, output_type=tf.int32)
    claimed = tf.one_hot(best_anchor, tf.shape(anchors)[0], axis=0, on_value=True, off_value=False, dtype=tf.bool)
    claimed &= iou >= LEAST_IOU
    is_claimed = tf.reduce_any(claimed, axis=1)
    box_of = tf.argmax(tf.where(is_claimed[:, None] & ~claimed, -1.0, iou), axis=1, output_type=tf.int32)

    positive = is_claimed | (highest >= POSITIVE_IOU)
    share = tf.reduce_max(tf.where(crowd[None], covered_share(anchors, boxes), 0.0), axis=1)
    ignored = ~positive & ((highest >= BACKGROUND_IOU) | (share >= CROWD_SHARE))
    of_anchor = tf.where(positive, tf.gather(classes, box_of), tf.where(ignored, IGNORED, BACKGROUND))
    offsets = tf.where(positive[:, None], encode(tf.gather(boxes, box_of), anchors), 0.0)
    return {
        "boxes": tf.concat([offsets, tf.cast(positive, tf.float32)[:, None]], axis=1),
        "classes": of_anchor,
    }


class BoxEncoder:
    """Turns the boxes of an image into the labels of a detector; the `encode_boxes` of `BoxPreprocessing`.

    Args:
        anchors: Anchors of the detector, (A, 4) float32 in pixels, see `anchors.anchors_for`.

    Raises:
        UserError: The anchors are not (A, 4).

    Example:
        >>> encode_boxes = BoxEncoder(np.array([[0, 0, 8, 8], [0, 8, 8, 16]]))
        >>> labels = encode_boxes(tf.constant([[0.0, 0.0, 8.0, 8.0]]), tf.constant([2]), tf.constant([False]))
        >>> labels["classes"].numpy().tolist()
        [2, -1]
    """

    def __init__(self, anchors: np.ndarray) -> None:
        self.anchors = np.asarray(anchors, np.float32)
        if self.anchors.ndim != 2 or self.anchors.shape[1] != 4 or not len(self.anchors):
            raise UserError(f"Anchors must be an array (A, 4). Received: shape {self.anchors.shape}.")

    def __call__(self, boxes: tf.Tensor, classes: tf.Tensor, crowd: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns the labels of one image, see `assign`.

        Args:
            boxes: Boxes (n, 4) float32 in pixels of the square image.
            classes: Classes (n,) int32.
            crowd: Whether a box contains a crowd, (n,) bool.
        """
        labels = assign(self.anchors, boxes, classes, crowd)
        count = len(self.anchors)
        return {
            "boxes": tf.ensure_shape(labels["boxes"], [count, 5]),
            "classes": tf.ensure_shape(labels["classes"], [count]),
        }
