"""Anchors: the boxes at every position of the feature maps that the detections start from.

Source: Lin et al. 2017 (RetinaNet), arXiv 1708.02002, section 4.
"""

import re
from collections.abc import Mapping

import keras
import numpy as np

from robust_tf.errors import UserError

# The edge of the smallest square anchor is this many strides long.
BASE = 4
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)  # height / width, for anchors of the same area
PER_POSITION = len(SCALES) * len(RATIOS)
_OUTPUT_OF_LEVEL = re.compile(r"head_classes_p(\d+)")


def level_name(output: str, level: int) -> str:
    """Returns the name of the layer that holds an output of one level, such as "head_classes_p3".

    `levels_of` finds the levels of a loaded model by these names.

    Args:
        output: Name of the output, "classes" or "boxes".
        level: Base-2 logarithm of the stride.
    """
    return f"head_{output}_p{level}"


def anchors_of(levels: Mapping[int, int]) -> np.ndarray:
    """Returns the anchors of a detector, in the order of its outputs.

    Args:
        levels: Height and width of the square feature map of each level. The level is the base-2 logarithm of the
            stride.

    Returns:
        Anchors (A, 4) float32 [top, left, bottom, right] in pixels, which may exceed the image. The order is: levels
        from fine to coarse, rows, columns, and the 9 anchors of a position from small to large, each size with the
        height-to-width ratios 0.5, 1 and 2. The sizes at stride s are 4 s, 5.04 s and 6.35 s.

    Example:
        >>> anchors_of({3: 2, 4: 1}).shape
        (45, 4)
        >>> anchors_of({3: 2, 4: 1})[1]  # the square at the top left
        array([-12., -12.,  20.,  20.], dtype=float32)
    """
    found = []
    for level in sorted(levels):
        stride = 2**level
        centers = (np.arange(levels[level]) + 0.5) * stride
        edges = np.array(
            [
                (BASE * stride * scale * ratio**0.5, BASE * stride * scale / ratio**0.5)
                for scale in SCALES
                for ratio in RATIOS
            ]
        )
        center = np.stack(np.meshgrid(centers, centers, indexing="ij"), axis=-1)[:, :, None]
        boxes = np.concatenate([center - edges / 2, center + edges / 2], axis=-1)
        found.append(boxes.reshape(-1, 4))
    return np.concatenate(found).astype(np.float32)


def levels_of(detector: keras.Model) -> dict[int, int]:
    """Returns the levels of a detector, and the height and width of the feature map of each.

    They are read from the layers of the model, so a loaded `.keras` file needs no further files.

    Args:
        detector: Model of `build_detector`, or the same model after loading.

    Raises:
        UserError: The model is not a detector of this package.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.tasks.detection import build_detector
        >>> classifier = build_classifier("resnet8", 10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> levels_of(build_detector(classifier, 3, seed=0))
        {2: 8, 3: 4, 4: 2, 5: 1}
    """
    found = {}
    for layer in detector.layers:
        match = _OUTPUT_OF_LEVEL.fullmatch(layer.name)
        if match:
            found[int(match[1])] = int(layer.input.shape[1])
    if not found:
        raise UserError(
            "A detector of this package has a layer such as 'head_classes_p3' for each level. Received: "
            f"{detector.name!r}, whose last layers are {', '.join(layer.name for layer in detector.layers[-3:])}. "
            "Build it with robust_tf.tasks.detection.build_detector."
        )
    return dict(sorted(found.items()))


def anchors_for(detector: keras.Model) -> np.ndarray:
    """Returns the anchors of a detector, in the order of its outputs.

    Args:
        detector: Model of `build_detector`, or the same model after loading.

    Returns:
        Anchors (A, 4) float32, see `anchors_of`.

    Raises:
        UserError: The model is not a detector of this package.

    Example:
        >>> from robust_tf.models import build_classifier
        >>> from robust_tf.tasks.detection import build_detector
        >>> classifier = build_classifier("resnet8", 10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> anchors_for(build_detector(classifier, 3, seed=0)).shape
        (765, 4)
    """
    return anchors_of(levels_of(detector))
