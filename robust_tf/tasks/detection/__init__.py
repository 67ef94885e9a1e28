"""Object detection: the network, its anchors, labels and losses, the decoding, and the average precision.

A detector is built by `build_detector`. Its labels come from `BoxEncoder`, and it is compiled with
`loss={"boxes": BoxLoss(), "classes": FocalLoss()}`.
"""

from robust_tf.tasks.detection.anchors import anchors_for, anchors_of, levels_of
from robust_tf.tasks.detection.average_precision import (
    Matches,
    average_precision,
    bootstrap_difference,
    bootstrap_interval,
    match_detections,
)
from robust_tf.tasks.detection.decoding import decode_detections
from robust_tf.tasks.detection.head import build_detector
from robust_tf.tasks.detection.losses import BoxLoss, FocalLoss
from robust_tf.tasks.detection.targets import BoxEncoder, assign

__all__ = [
    "BoxEncoder",
    "BoxLoss",
    "FocalLoss",
    "Matches",
    "anchors_for",
    "anchors_of",
    "assign",
    "average_precision",
    "bootstrap_difference",
    "bootstrap_interval",
    "build_detector",
    "decode_detections",
    "levels_of",
    "match_detections",
]
