"""Synthetic scenes for the tests of detection: colored rectangles on noise."""

import numpy as np

CLASSES = ("red", "green", "blue")


def scenes(count: int, *, size: int = 64, seed: int = 0) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Returns images (count, size, size, 3) float32, and the rectangles in each; the color is the class.

    Args:
        count: Number of images.
        size: Height and width of the images, in pixels.
        seed: Seed for everything that is random.
    """
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.3, 0.7, (count, size, size, 3)).astype(np.float32)
    truths = []
    for image in images:
        boxes: list[np.ndarray] = []
        wanted = int(rng.integers(1, 4))
        while len(boxes) < wanted:
            edges = rng.integers(size // 5, size // 2, 2)
            start = rng.integers(0, size - edges + 1)
            box = np.concatenate([start, start + edges])
            apart = (np.maximum(box[:2], other[:2]) >= np.minimum(box[2:], other[2:]) for other in boxes)
            if all(separate.any() for separate in apart):
                boxes.append(box)
        classes = rng.integers(len(CLASSES), size=wanted)
        for (top, left, bottom, right), color in zip(boxes, classes, strict=True):
            image[top:bottom, left:right] = 0.1
            image[top:bottom, left:right, color] = 0.9
        truths.append(
            {
                "boxes": np.array(boxes, np.float32),
                "classes": classes.astype(np.int32),
                "crowd": np.zeros(wanted, bool),
            }
        )
    return images, truths
