"""Synthetic scenes for the tests: squares, discs and triangles on noise, with their masks."""

import numpy as np

CLASS_NAMES = ("background", "square", "disc", "triangle")
_COLORS = np.array([[0.9, 0.25, 0.2], [0.2, 0.75, 0.3], [0.25, 0.35, 0.95]])


def scenes(count: int, *, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (count, size, size, 3) float32 in [0, 1] and masks (count, size, size) int32, without overlaps.

    Args:
        count: Number of scenes.
        size: Height and width, in pixels.
        seed: Seed for the scenes.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = 0.5 + 0.1 * rng.standard_normal((count, size, size, 3))
    masks = np.zeros((count, size, size), np.int32)
    for image, mask in zip(images, masks, strict=True):
        for kind in rng.permutation(3):
            for _ in range(20):
                radius = rng.integers(size // 8, size // 5)
                top, left = rng.integers(radius + 1, size - radius - 1, 2)
                y, x = rows - top, columns - left
                inside = (
                    np.maximum(abs(y), abs(x)) <= radius,
                    y**2 + x**2 <= radius**2,
                    (abs(x) <= (y + radius) / 2) & (abs(y) <= radius),
                )[kind]
                if not mask[inside].any():
                    mask[inside] = kind + 1
                    image[inside] = _COLORS[kind] + 0.05 * rng.standard_normal((inside.sum(), 3))
                    break
    return images.clip(0, 1).astype(np.float32), masks
