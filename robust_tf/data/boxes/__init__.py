"""Data sets for detection: images with boxes, read from COCO or Pascal VOC folders or from TFDS, and their transforms.

A record is (index, encoded image, label) as for classification. The label is the bytes of a little-endian float32 array
of shape (boxes, 6) with the rows [top, left, bottom, right, class, crowd]. The edges are in pixels of the original
image, and crowd is 1 for a box that counts neither as a hit nor as a miss. See `decode_boxes`.
"""

from robust_tf.data.boxes.open_boxes import open_boxes
from robust_tf.data.boxes.records import decode_boxes
from robust_tf.data.boxes.transforms import BoxPreprocessing

__all__ = ["BoxPreprocessing", "decode_boxes", "open_boxes"]
