"""Boxes: overlap, and their encoding as offsets from anchors.

A box is [top, left, bottom, right] in pixels, with top <= bottom and left <= right.
"""

import math

import tensorflow as tf

# Factors by which offsets are divided, so that their typical size is about 1. They are common to SSD and RetinaNet.
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
# A box may be at most this many times as large as its anchor, or as small. Without a limit, exp could overflow.
LARGEST_RATIO = 1000.0
_SMALLEST_EDGE = 1e-2  # pixels; the logarithm of an edge of length 0 would be infinite


def intersections(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Returns the area that each box of the first list shares with each box of the second list.

    Args:
        first: Boxes (n, 4) float32.
        second: Boxes (m, 4) float32.

    Returns:
        Areas (n, m) float32, in pixels squared.
    """
    low = tf.maximum(first[:, None, :2], second[None, :, :2])
    high = tf.minimum(first[:, None, 2:], second[None, :, 2:])
    edges = tf.maximum(high - low, 0.0)
    return edges[..., 0] * edges[..., 1]


def areas(boxes: tf.Tensor) -> tf.Tensor:
    """Returns the areas of boxes, (..., 4) float32, in pixels squared, as (...,) float32.

    Args:
        boxes: Boxes (..., 4) float32.
    """
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Returns the intersection over union (IoU) of each pair of boxes.

    Args:
        first: Boxes (n, 4) float32.
        second: Boxes (m, 4) float32.

    Returns:
        IoU (n, m) float32, in [0, 1]. The IoU of two empty boxes is 0.

    Example:
        >>> pairwise_iou(tf.constant([[0.0, 0.0, 2.0, 2.0]]), tf.constant([[0.0, 1.0, 2.0, 3.0]])).numpy().round(3)
        array([[0.333]], dtype=float32)
    """
    shared = intersections(first, second)
    union = areas(first)[:, None] + areas(second)[None] - shared
    return tf.math.divide_no_nan(shared, union)


def covered_share(boxes: tf.Tensor, crowds: tf.Tensor) -> tf.Tensor:
    """Returns the share of each box that lies inside each crowd.

    A crowd is a region with many objects. A box for one of them is much smaller than the crowd, so that COCO divides by
    the area of the box and not by the area of the union.

    Args:
        boxes: Boxes (n, 4) float32.
        crowds: Boxes (m, 4) float32 around crowds.

    Returns:
        Shares (n, m) float32, in [0, 1].
    """
    return tf.math.divide_no_nan(intersections(boxes, crowds), areas(boxes)[:, None])


def encode(boxes: tf.Tensor, anchors: tf.Tensor) -> tf.Tensor:
    """Returns the offsets of boxes from anchors.

    Args:
        boxes: Boxes (..., 4) float32 in pixels.
        anchors: Anchors of the same shape.

    Returns:
        Offsets (..., 4) float32 [dy / height / 0.1, dx / width / 0.1, log(height ratio) / 0.2, log(width ratio) / 0.2],
        where dy and dx are the distances between the centers, and height and width are the anchor's.

    Source: Ren et al. 2015, arXiv 1506.01497, equation (2).

    Example:
        >>> encode(tf.constant([[0.0, 0.0, 10.0, 20.0]]), tf.constant([[0.0, 0.0, 10.0, 10.0]])).numpy().round(2)
        array([[0.  , 5.  , 0.  , 3.47]], dtype=float32)
    """
    edges = tf.maximum(boxes[..., 2:] - boxes[..., :2], _SMALLEST_EDGE)
    anchor_edges = anchors[..., 2:] - anchors[..., :2]
    moved = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / 2 / anchor_edges
    return tf.concat([moved / CENTER_VARIANCE, tf.math.log(edges / anchor_edges) / SIZE_VARIANCE], axis=-1)


def decode(offsets: tf.Tensor, anchors: tf.Tensor) -> tf.Tensor:
    """Returns the boxes that offsets describe. It is the inverse of `encode`.

    Args:
        offsets: Offsets (..., 4) float32, as `encode` returns them.
        anchors: Anchors (..., 4) float32 in pixels, of a shape that broadcasts.

    Returns:
        Boxes (..., 4) float32 in pixels, not clipped to the image. No edge is more than 1000 times as long as the
        anchor's.
    """
    anchor_edges = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + offsets[..., :2] * CENTER_VARIANCE * anchor_edges
    limit = math.log(LARGEST_RATIO)
    half = tf.exp(tf.clip_by_value(offsets[..., 2:] * SIZE_VARIANCE, -limit, limit)) * anchor_edges / 2
    return tf.concat([center - half, center + half], axis=-1)


def clip(boxes: tf.Tensor, image_size: int) -> tf.Tensor:
    """Returns boxes limited to the image.

    Args:
        boxes: Boxes (..., 4) float32 in pixels.
        image_size: Height and width of the image, in pixels.
    """
    return tf.clip_by_value(boxes, 0.0, float(image_size))
